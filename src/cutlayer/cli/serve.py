"""``cutlayer serve``: train a run's trunk with clients who join over the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cutlayer import logs
from cutlayer.cli.console import Format, Level, console, guarded, hush
from cutlayer.cli.train import split_arguments


@guarded()
def serve(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN.yaml|SERVICE.yaml key=value",
            help="The run file, and fields to set otherwise; or a file of runs.",
        ),
    ],
    bind: Annotated[str, typer.Option(help="HOST:PORT to listen at; port 0 takes one that is free.")],
    out: Annotated[Path, typer.Option(help="The output folder; a run that is there already goes on.")],
    keys: Annotated[Path | None, typer.Option(help="The server's folder that 'cutlayer keys' made.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text and no keys; only for clients on this machine.")
    ] = False,
    patience: Annotated[float, typer.Option(help="Seconds that a client may stay away in a run.")] = 600,
    drain: Annotated[
        float, typer.Option(help="Seconds to finish the round in after a SIGTERM; 0: stop at once.")
    ] = 120,
    status: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Metrics, health and readiness: plain text, for this machine."),
    ] = None,
    log_format: Format = "text",
    log_level: Level = "info",
) -> None:
    """Serve a run to clients who join it with 'cutlayer join'; ends when the run is done.

    What the run file says of data files is not used: each client brings its own. A service file has several runs, which
    are served at a time: 'runs: [flu.yaml, fraud.yaml]'.
    """
    if insecure == (keys is not None):
        raise typer.BadParameter("Give --keys with the server's folder (see 'cutlayer keys'), or --insecure.")
    if not patience > 0:
        raise typer.BadParameter("--patience is a number of seconds above 0.")
    if not drain >= 0:
        raise typer.BadParameter("--drain is a number of seconds; 0 stops at once.")
    source, overrides = split_arguments(arguments)
    if source is None:
        raise typer.BadParameter("Give a run file: cutlayer serve run.yaml --bind HOST:PORT ...")

    logs.set_up(log_format, log_level, run=Path(source).stem)  # before gRPC is imported, which reads its own level then

    from cutlayer.report.progress import RichProgress
    from cutlayer.report.tables import summary_table
    from cutlayer.service_file import is_service
    from cutlayer.serving import serve as serve_run
    from cutlayer.serving import serve_all

    hush()
    where = console()
    progress = logs.LogReporter() if log_format == "json" else RichProgress(where)
    several = is_service(source)
    if several and overrides:
        raise typer.BadParameter("A service file has several runs: set their fields in it, by 'set:'.")
    try:
        if several:
            results = serve_all(
                source, bind=bind, out=out, keys=keys, patience=patience, drain=drain, status=status, progress=progress
            )
        else:
            result = serve_run(
                source, bind=bind, out=out, keys=keys, overrides=overrides, patience=patience, drain=drain,
                status=status, progress=progress,
            )  # fmt: skip
            results = {"": result}
    finally:
        progress.stop()
    for result in results.values():
        if log_format == "json":
            progress.note(f"the run is done; its summary is {result.out / 'summary.json'}")
        else:
            where.print(summary_table(result.summary, result.out), crop=False)
