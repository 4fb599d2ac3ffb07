"""The output folder: new or ours, written by one process, and taken back where a run never began."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cutlayer.errors import ConfigError, OutputError

OURS = "# Written by cutlayer: a run with every default. `cutlayer train --resume` goes on with it.\n"


def holds_a_run(folder: Path) -> bool:
    """Whether a run was begun there; a run.yaml may also be a user's own."""
    try:
        return (folder / "run.yaml").read_bytes().startswith(OURS.encode()) or (folder / "checkpoints").is_dir()
    except OSError:
        return False


def is_empty(folder: Path) -> bool:
    """Whether nothing is there, or only what a process leaves that is killed while it writes a run's first file."""
    return all(child.name == ".run.yaml.draft" for child in folder.iterdir())


def check_places(out: Path, record: str | None) -> None:
    """Refuse folders of a new run that are in use, or in each other's way; nothing is written.

    Args:
        out: the output folder.
        record: the folder of recorded frames, if any.

    Raises:
        OutputError: something is there.
        ConfigError: the record cannot be where it is asked for.
    """
    if os.path.exists(out) and (not out.is_dir() or not is_empty(out)):
        kind = "not empty" if out.is_dir() else "a file"
        advice = f"Go on with its run by --resume {out}, or give" if holds_a_run(out) else "Give"
        raise OutputError(f"{out} exists and is {kind}. {advice} another --out.")
    if record is None:
        return
    frames, folder = Path(os.path.realpath(record)), Path(os.path.realpath(out))
    there = next((path for path in (frames, *frames.parents) if os.path.exists(path)), frames)
    name = f"record_wire names {record}, which"
    if frames == folder or folder in frames.parents:
        problem = f"{name} is in the output folder {out}, whose files are the run's own. Name a folder outside of it."
    elif frames in folder.parents:
        problem = f"{name} has the output folder {out} in it. Name a folder of its own."
    elif os.path.isfile(there):
        problem = f"{name} {'is' if there == frames else f'is below {there}, that is,'} a file. Name a new folder."
    elif os.path.exists(frames / "frames.bin"):
        problem = f"{name} holds the frames of another run. Name a new folder."
    else:
        return
    raise ConfigError([problem], "the run")


def undoing(*folders: Path) -> Callable[[], None]:
    """What takes back all that is yet to be written into these folders; they are empty, or they are left alone."""
    # os.path's functions, not Path's, which fail on a name that is too long or may not be looked at.
    ours = [f for f in folders if not os.path.exists(f) or (os.path.isdir(f) and is_empty(f))]
    made = [p for f in ours for p in (f, *f.parents) if not os.path.exists(p)]

    def undo() -> None:
        for child in [child for folder in ours if os.path.isdir(folder) for child in folder.iterdir()]:
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
