"""``cutlayer secret``: what the clients of a run know, and the server does not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cutlayer.cli.console import console, guarded


@guarded()
def secret(file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")]) -> None:
    """Make a secret for the clients of a run to share; the server must not have it.

    One data owner makes it and gives it to the others over a safe way; each joins with --secret FILE. A run says if it
    needs one.
    """
    from cutlayer.agreed import make_secret

    make_secret(file)
    console().print(
        f"{file}: give it to the other clients of the run, and not to who runs the server. Join with --secret {file}",
        soft_wrap=True,
    )
