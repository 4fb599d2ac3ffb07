"""How a client's part in a run ends: its part of the result is there, or the run went on without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cutlayer.files import write_text

FINISHED = "finished.json"  # in the client's folder, once its part of the result is there


@dataclass(frozen=True)
class Left:
    """That a client refused what the run needs, so that the run went on without it.

    ``number``: the round, from 0. ``why``: the refusal. ``part``: where its own part then is; None: it has none.
    ``rounds``: after how many rounds the server set it back to; None: it did not.
    """

    number: int
    why: str
    part: Path | None = None
    rounds: int | None = None

    def __str__(self) -> str:
        has = "It has no part of the result."
        if self.part is not None:
            then = "when it left" if self.rounds is None else f"after {self.rounds} rounds"
            has = (
                f"Its own part as it was {then} is in {self.part}; it is not the part of the run's "
                "result, with which the others went on."
            )
        return (
            f"This client left the run in round {self.number}, as it refused what it was asked for: {self.why} {has} "
            "With that mended, the same command takes part again, if the run still goes on."
        )


def note_finished(out: Path, result: Path, of: Mapping[str, str]) -> None:
    """Write down that a run, with this identity, is done, and where in the client's folder its part of the result is.

    Raises:
        OSError: it cannot be written.
    """
    write_text(out / FINISHED, json.dumps({"result": result.name, "of": dict(of)}))


def not_finished(out: Path) -> None:
    """A server goes on with the run, so that it is not done."""
    (out / FINISHED).unlink(missing_ok=True)


def finished(out: Path, of: Mapping[str, str]) -> Path | None:
    """Where the client's part of the result of the run with this identity is; None: that run is not done."""
    try:
        told = json.loads((out / FINISHED).read_text())
        return out / str(told["result"]) if told["of"] == dict(of) else None
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that was damaged
        return None
