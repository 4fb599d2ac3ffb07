"""``cutlayer compare``: several run files in, a table and a page of what they gave out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.console import complain, console, guarded, hush


@guarded()
def compare(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN.yaml... key=value", help="The run files, and fields to set in all.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Make each run with so many seeds, from that of the files.")] = 1,
    out: Annotated[Path | None, typer.Option(help="The folder; by default one in outputs, named by the runs.")] = None,
    target: Annotated[
        float | None, typer.Option(help="The loss to measure the time to; by default one that every run reached.")
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare runs that differ in model, data, clients or length.")
    ] = False,
) -> None:
    """Make runs on the same model, data and seeds, and put side by side what they gave.

    Each RUN.yaml is made with each seed; key=value sets one field in all of them:

        cutlayer compare a.yaml b.yaml rounds=20 eval_every=1 profile=laptop+4g --seeds 3

    The same command goes on where it was stopped, and makes nothing twice.
    """
    files = [text for text in arguments if "=" not in text or Path(text).is_file()]
    if not files:
        raise typer.BadParameter("Give the run files to compare: cutlayer compare a.yaml b.yaml")
    if target is not None and not math.isfinite(target):
        raise typer.BadParameter("--target is a loss, so a finite number.")

    from cutlayer import comparison
    from cutlayer.report.comparison_page import table
    from cutlayer.report.progress import RichProgress

    hush()
    where = console()
    progress = RichProgress(where)
    try:
        made = comparison.compare(
            files,
            out=out,
            seeds=seeds,
            target=target,
            allow_different=allow_different,
            overrides=[text for text in arguments if text not in files],
            progress=progress,
        )
    finally:
        progress.stop()
    where.print(table(made.summary), crop=False)
    where.print(f"Page: {made.page}", soft_wrap=True)
    if made.summary["failed"]:
        complain(f"{len(made.summary['failed'])} of the runs failed; see above.", head="Failed")
        raise typer.Exit(1)
