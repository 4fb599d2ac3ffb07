"""Where commands print, and how an error looks: one paragraph on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable
from logging import ERROR, WARNING, getLogger
from traceback import print_exception, walk_tb
from typing import Annotated, Literal, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from cutlayer import logs
from cutlayer.errors import CutlayerError

Format = Annotated[Literal["text", "json"], typer.Option(help="Of the log, which goes to stderr.")]
Level = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="The least that is logged.")]
P = ParamSpec("P")
R = TypeVar("R")

PIPED_WIDTH = 160  # of a table that goes to a file or a pipe, where nothing tells a width
FILE_MODULE = "cutlayer_file_"  # how registry.py begins the name of the module of a method file
ADVICE = {
    errno.ENOSPC: "The disk is full. Free some space there, or give a folder on another disk.",
    errno.EDQUOT: "Your quota on this disk is used up. Free some space there, or give a folder on another disk.",
    errno.EFBIG: "The file system or your limit (ulimit -f) allows no file of this size. Raise it, or write elsewhere.",
    errno.EACCES: "You have no right to do that there. Change the rights, or give another folder.",
    errno.EPERM: "You have no right to do that there. Change the rights, or give another folder.",
    errno.EROFS: "The file system is read-only. Give a folder on another one.",
    errno.ENOTDIR: "A part of this path is a file, not a folder. Check the path.",
    errno.EISDIR: "This is a folder, not a file. Check the path.",
    errno.ENAMETOOLONG: "The path is too long. Give a shorter one.",
    errno.EMFILE: "Too many files are open. Raise the limit (ulimit -n).",
    errno.ENFILE: "Too many files are open on this machine. Close some programs.",
    errno.EIO: "The disk or the network drive does not work. Check it, or give another folder.",
}
MEMORY = (
    "There is not enough memory. Take a smaller batch_size (and a larger gradient_accumulation), "
    "gradient_checkpointing: true, a smaller data.max_length, or precision: bfloat16."
)


def console() -> Console:
    """The console of standard output; a table is not squeezed where there is no terminal."""
    terminal = sys.stdout.isatty()
    return Console(width=None if terminal else PIPED_WIDTH, highlight=False, markup=False, emoji=False)


def hush() -> None:
    """Keep the libraries' own bars and notes off the screen; a command shows its own."""
    from transformers.utils import logging

    if logs.as_json():
        logging.disable_default_handler()
        logging.enable_propagation()
    # Of the tries to reach the Hub only the last is told, as the error.
    getLogger("huggingface_hub").setLevel(ERROR)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def complain(message: str, head: str = "Error") -> None:
    """Print one paragraph on stderr, its head in red where there are colours; the message is printed as it stands.

    Where the log is JSON, it is a line of it.
    """
    if logs.as_json():
        logs.LOG.log(ERROR if head == "Error" else WARNING, "%s", message, extra={"what": head.lower()})
        return
    paragraph = Text.assemble((head, "bold red"), ": ", message)
    Console(stderr=True, highlight=False, emoji=False).print(paragraph, soft_wrap=True)


def guarded() -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a command: errors of the user and of the machine as one paragraph (exit code 2), ours with a traceback.

    A command that the user stops ends with exit code 130 (a server that could finish its round: 75), and with what the
    run says of how to go on.
    """

    def wrap(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt as stop:
                complain(str(stop) or "before anything was written.", head="Stopped")
                raise typer.Exit(getattr(stop, "code", 130)) from None
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                message = str(error) if isinstance(error, CutlayerError) else _machine(error) or _method(error)
                if message is None:
                    if not _usage(error) and getattr(error, "errno", None) != errno.EPIPE:
                        own = "".join(f" or in the method file {path}" for path in _method_files())
                        error.add_note(f"\nThis is a mistake in cutlayer{own}. Please report it, with the lines above.")
                    raise
                if os.environ.get("CUTLAYER_DEBUG") == "1":
                    print_exception(error)
                complain(message)
                raise typer.Exit(2) from None

        return run

    return wrap


def _usage(error: Exception) -> bool:
    """Whether it is one of Typer's own errors, which Typer shows itself."""
    return any(base.__name__ == "ClickException" for base in type(error).__mro__)


def _method_files() -> list[str]:
    """The methods that are files of the user and were loaded."""
    return [str(module.__file__) for name, module in list(sys.modules.items()) if name.startswith(FILE_MODULE)]


def _method(error: Exception) -> str | None:
    """What to say of an error of a method file of the user (or of a library that it calls), or None for any other."""
    walked = [(str(frame.f_globals.get("__name__")), frame, line) for frame, line in walk_tb(error.__traceback__)]
    name, frame, line = [("", None, 0), *(one for one in walked if one[0].startswith("cutlayer"))][-1]
    if frame is None or not name.startswith(FILE_MODULE):
        return None
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"The method file {frame.f_code.co_filename} fails in line {line}, in {frame.f_code.co_name}: {said}. Mend it; "
        "CUTLAYER_DEBUG=1 shows the whole traceback."
    )


def _machine(error: Exception) -> str | None:
    """What to say of an error that the machine makes (disk, rights, memory), or None for any other."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"{MEMORY} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    number = error.errno if isinstance(error, OSError) else None
    if number is None:  # safetensors and others that are not written in Python say the number in their text
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    if number is None or number not in ADVICE:
        return None
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return f"{' -> '.join(names) or 'A file'}: {os.strerror(number).lower()}. {ADVICE[number]}"
