"""The output folder: new or ours, written by one process, and taken back where a run never began."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cutlayer.errors import OutputError


def is_empty(folder: Path) -> bool:
    """Whether nothing is there, or only what a process leaves that is killed while it writes a run's first file."""
    return all(child.name == ".run.yaml.draft" for child in folder.iterdir())


def undoing(*folders: Path) -> Callable[[], None]:
    """What takes back all that is yet to be written into these folders; they are empty, or they are left alone."""
    ours = [f for f in folders if not f.exists() or (f.is_dir() and is_empty(f))]
    made = [p for f in ours for p in (f, *f.parents) if not p.exists()]

    def undo() -> None:
        for child in [child for folder in ours if folder.is_dir() for child in folder.iterdir()]:
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)
            else:
                child.unlink(missing_ok=True)
        for path in sorted(made, key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):  # somebody else has put something there
                path.rmdir()

    return undo


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the output folder, so that no second process goes on with a run that is still going."""
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(f"Another process is at work in {folder}. Wait for its end, or stop it first.") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(handle)


def recorded(file: Path, unit: str) -> int:
    """Whole lines, or bytes; 0 for a file that is not there."""
    if not file.is_file():
        return 0
    if unit == "bytes":
        return file.stat().st_size
    with file.open("rb") as lines:
        return sum(line.endswith(b"\n") for line in lines)
