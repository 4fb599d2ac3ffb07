"""``cutlayer serve``: train a run's trunk with clients who join over the network."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.console import console, guarded, hush
from cutlayer.cli.train import split_arguments


class Absent(Enum):
    """What is done when a client stays away for too long."""

    go_on = "go-on"
    end = "end"


@guarded()
def serve(
    arguments: Annotated[
        list[str], typer.Argument(metavar="RUN.yaml key=value", help="The run file, and fields to set otherwise.")
    ],
    bind: Annotated[str, typer.Option(help="HOST:PORT to listen at; port 0 takes one that is free.")],
    out: Annotated[Path, typer.Option(help="The output folder; a run that is there already goes on.")],
    keys: Annotated[Path | None, typer.Option(help="The server's folder that 'cutlayer keys' made.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text and no keys; only for clients on this machine.")
    ] = False,
    patience: Annotated[float, typer.Option(help="Seconds that a client may stay away in a run.")] = 600,
    absent: Annotated[
        Absent, typer.Option(help="When a client stays away for longer: the others go on without it, or the run ends.")
    ] = Absent.go_on,
) -> None:
    """Serve a run to clients who join it with 'cutlayer join'; ends when the run is done.

    What the run file says of data files is not used: each client brings its own.
    """
    if insecure == (keys is not None):
        raise typer.BadParameter("Give --keys with the server's folder (see 'cutlayer keys'), or --insecure.")
    if not patience > 0:
        raise typer.BadParameter("--patience is a number of seconds above 0.")
    source, overrides = split_arguments(arguments)
    if source is None:
        raise typer.BadParameter("Give a run file: cutlayer serve run.yaml --bind HOST:PORT ...")

    from cutlayer.report.progress import RichProgress
    from cutlayer.report.tables import summary_table
    from cutlayer.serving import serve as serve_run

    hush()
    where = console()
    progress = RichProgress(where)
    try:
        result = serve_run(
            source, bind=bind, out=out, keys=keys, overrides=overrides, patience=patience, absent=absent.value,
            progress=progress,
        )  # fmt: skip
    finally:
        progress.stop()
    where.print(summary_table(result.summary, result.out), crop=False)
