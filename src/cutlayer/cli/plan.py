"""``cutlayer plan``: what a run would be, before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from cutlayer.cli.console import console, guarded, hush
from cutlayer.cli.train import split_arguments


@guarded()
def plan(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.yaml key=value", help="The run file, and fields to set otherwise."),
    ] = None,
) -> None:
    """Print who would hold what, what a step would send, and the cuts that a planner would begin with.

    The same as train --dry-run for a run without a planner. With one the data are read too, for their number and their
    lengths; weights never are. Step times and memory are the cost model's, by the clients' profiles:

        cutlayer plan run.yaml planner=capability-cut profile=laptop+dsl
    """
    source, overrides = split_arguments(arguments or [])
    if source is None and not overrides:
        raise typer.BadParameter("Give a run file: cutlayer plan run.yaml")

    from cutlayer import run
    from cutlayer.report.tables import dry_run_table

    hush()
    given: str | Mapping[str, Any] = {} if source is None else source
    console().print(dry_run_table(run.plan(given, overrides).summary), crop=False)
