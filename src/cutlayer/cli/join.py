"""``cutlayer join``: take part in a server's run with text that stays here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cutlayer import logs
from cutlayer.cli.console import Format, Level, console, guarded, hush


@guarded()
def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.")],
    data: Annotated[str, typer.Option(help="Your text: a file, a glob, or a Hub data set.")],
    out: Annotated[Path, typer.Option(help="Your output folder; a run that was joined from there goes on.")],
    keys: Annotated[Path | None, typer.Option(help="Your folder that 'cutlayer keys' made.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Your policy: what may leave this machine, and how much.")] = None,
    held_out: Annotated[str | None, typer.Option("--eval", help="Text of yours to evaluate on.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the model is here; 'served': your part of it from the server.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    name: Annotated[str | None, typer.Option(help="Which client of the run you are, where no keys say it.")] = None,
    run: Annotated[str | None, typer.Option(help="Which of the server's runs, where you are in several.")] = None,
    secret: Annotated[
        Path | None, typer.Option(help="A secret of the run's clients ('cutlayer secret'), where the run needs one.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN", help="What your files call a column, as text=body; may be repeated."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text and no keys; only to a server on this machine.")
    ] = False,
    log_format: Format = "text",
    log_level: Level = "info",
) -> None:
    """Take part in a run: your text, the first (and last) blocks and their adapters stay here."""
    if insecure == (keys is not None):
        raise typer.BadParameter("Give --keys with your folder, or --insecure for a server on this machine.")
    named = dict(one.partition("=")[::2] for one in columns or [])
    if not all(ours and theirs for ours, theirs in named.items()):
        raise typer.BadParameter("--columns takes our name and your column, such as: --columns text=body")

    from cutlayer.keys import client_keys

    who = name or (client_keys(keys).name if keys is not None else "")
    logs.set_up(log_format, log_level, client=who)  # before gRPC is imported, which reads its own level then

    from cutlayer.joining import join as join_run
    from cutlayer.report.progress import RichProgress

    hush()
    where = console()
    progress = logs.LogReporter() if log_format == "json" else RichProgress(where)
    try:
        joined = join_run(
            address, data=data, out=out, held_out=held_out, keys=keys, name=name, run=run, policy=policy,
            model=model, device=device, secret=secret, columns=named, progress=progress,
        )  # fmt: skip
    finally:
        progress.stop()
    if log_format == "json":
        progress.note(joined.left)
        return
    where.print(f"your part of the adapter: {joined.adapter}")
    where.print(joined.left)
