"""``cutlayer train``: a run file in, an adapter out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cutlayer.cli.console import console, guarded, hush


@guarded()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.yaml key=value", help="The run file, and fields to set otherwise."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The output folder; a new one is made if none is given.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Take up the run in this output folder, to the same end.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print who would hold what and what a step would send; load no weights.")
    ] = False,
) -> None:
    """Fine-tune a model by split learning.

    RUN.yaml says everything of the run; key=value sets one field otherwise, with dots for inner ones:

        cutlayer train run.yaml framework.local_steps=8 optimizer.lr=1e-4 --out outputs/first
    """
    source, overrides = split_arguments(arguments or [])
    if resume is not None:
        if source is not None or overrides:
            raise typer.BadParameter("--resume takes the run as it was: give no run file and no key=value with it.")
        if out is not None or dry_run:
            raise typer.BadParameter("--resume goes on in its own folder: give neither --out nor --dry-run with it.")
    elif source is None and not overrides:
        raise typer.BadParameter("Give a run file (cutlayer train run.yaml), or --resume with an output folder.")

    from cutlayer import run
    from cutlayer.report.progress import RichProgress
    from cutlayer.report.tables import dry_run_table, summary_table

    hush()
    where = console()
    given: str | Mapping[str, Any] = {} if source is None else source
    if dry_run:
        where.print(dry_run_table(run.dry_run(given, overrides).summary), crop=False)
        return
    progress = RichProgress(where)
    try:
        result = run.train(None if resume else given, out=out, resume=resume, overrides=overrides, progress=progress)
    finally:
        progress.stop()
    where.print(summary_table(result.summary, result.out), crop=False)


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The run file, if one is named, and the overrides: what has a ``=`` and is no file."""
    files = [text for text in arguments if "=" not in text or Path(text).is_file()]
    if len(files) > 1:
        raise typer.BadParameter(
            f"Only one run file can be given, but there are {', '.join(files)}. "
            "A field is set by key=value, without spaces."
        )
    return (files[0] if files else None), [text for text in arguments if text not in files]
