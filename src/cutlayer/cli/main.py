"""The command ``cutlayer``: one file per command, each imported without PyTorch so that ``--help`` is quick."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from cutlayer.cli.audit import audit
from cutlayer.cli.compare import compare
from cutlayer.cli.generate import generate
from cutlayer.cli.join import join
from cutlayer.cli.keys import keys
from cutlayer.cli.methods import methods
from cutlayer.cli.plan import plan
from cutlayer.cli.profile import profile
from cutlayer.cli.secret import secret
from cutlayer.cli.serve import serve
from cutlayer.cli.train import train
from cutlayer.cli.verify import verify

app = typer.Typer(
    name="cutlayer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and plain usage errors: no boxes that break in a log
)
for command in (train, audit, plan, compare, profile, verify, methods, generate, keys, secret, serve, join):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cutlayer {version('cutlayer')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fine-tune a language model that no party holds whole: text and ends of the model here, the middle on a server."""


def main() -> None:
    """Run the command line; the console script's entry."""
    app()
