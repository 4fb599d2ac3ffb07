"""``cutlayer audit``: play attacks on a run, and say how much of the private text comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cutlayer.cli.console import console, guarded, hush


@guarded()
def audit(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN.yaml key=value...", help="The run, and fields to set in it.")
    ],
    out: Annotated[Path, typer.Option(help="The folder that gets audit.json and index.html.")],
    attacks: Annotated[
        str | None, typer.Option(help="Ids with commas between; by default all that the run can have.")
    ] = None,
    defenses: Annotated[
        str | None,
        typer.Option(help="Settings to measure too: 'dp-forward(noise=0.3),dp-forward(noise=1)+clip-noise'."),
    ] = None,
    aux: Annotated[Path | None, typer.Option(help="Text of the attacker's own, in the form of the run's data.")] = None,
    budget: Annotated[
        Literal["quick", "standard", "full"], typer.Option(help="How much is recorded and attacked.")
    ] = "standard",
    frames: Annotated[
        Path | None, typer.Option(help="Frames of this run that were recorded earlier (record_wire).")
    ] = None,
) -> None:
    """Measure what the server of a run can read: attacks, controls, true and recovered text, and a verdict.

        cutlayer audit run.yaml --out audit --budget quick

    A short run is made with its messages recorded; then each attack gets the messages that its adversary has.
    """
    runs = [text for text in arguments if "=" not in text or Path(text).is_file()]
    if len(runs) != 1:
        raise typer.BadParameter("Give one run file: cutlayer audit RUN.yaml --out DIR")

    from cutlayer.audit.auditing import audit as audit_run
    from cutlayer.audit.settings import listed
    from cutlayer.report.audit_page import table
    from cutlayer.report.progress import RichProgress

    hush()
    where = console()
    progress = RichProgress(where)
    try:
        found = audit_run(
            runs[0], out=out, attacks=None if attacks is None else [name for name in attacks.split(",") if name],
            defenses=listed(defenses or ""), aux=aux, budget=budget, frames=frames,
            overrides=[text for text in arguments if text not in runs], progress=progress,
        )  # fmt: skip
    finally:
        progress.stop()
    where.print(table(found.rows), crop=False)
    for name, why in found.refused.items():
        where.print(f"not played: {name}: {why}", soft_wrap=True)
    for line in found.verdict:
        where.print(line, soft_wrap=True)
    where.print(f"Page: {found.out / 'index.html'}", soft_wrap=True)
