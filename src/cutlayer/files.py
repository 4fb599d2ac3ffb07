"""Files and folders that are there whole or not at all, whenever the process or the machine dies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cutlayer.errors import OutputError

OTHER = "Give another --out."


def make_folder(folder: Path) -> None:
    """Make an output folder, if it is not there, and see that files can be written into it.

    Raises:
        OutputError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(f"{error.filename or folder} is a file, and no folder can be made of it. {OTHER}") from error
    except OSError as error:
        raise OutputError(
            f"The folder {folder} cannot be made: {(error.strerror or str(error)).lower()}. {OTHER}"
        ) from error
    if not writable:
        raise OutputError(f"You have no right to write into {folder}. Change its rights, or give another --out.")


@contextmanager
def folder_for(folder: Path) -> Iterator[None]:
    """Have an output folder; one that was made for it goes again where what follows fails and leaves it empty.

    Raises:
        OutputError: as of ``make_folder``.
    """
    new = not folder.exists()
    make_folder(folder)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # it has something in it that must stay
                folder.rmdir()
        raise


def write_text(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write a text file whole or not at all, with the rights ``mode`` (less the process's mask) from its first byte."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.unlink(missing_ok=True)  # one that was left has rights of its own
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync(path.parent)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def move(draft: Path, folder: Path) -> None:
    """Put a finished folder in its place, so that it is there whole when this returns, even if the power fails."""
    for path in sorted(draft.rglob("*"), reverse=True):
        sync(path)
    sync(draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Have the disk keep what a file or folder is now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
