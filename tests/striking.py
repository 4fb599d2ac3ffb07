"""A process that is killed, or kills another, at a named step of a run: for the tests of what survives that."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

At = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Fate:
    """When a command strikes, and whom.

    Args:
        step: one of the eleven names; it strikes as its process comes to it.
        after: a file or folder that must be there before (``partition`` comes first of all: none).
        victim: the file with the number of the process to kill; None: its own.
    """

    step: str
    after: Path | None = None
    victim: Path | None = None


def await_fate(fate: Fate) -> None:
    """From now on this process strikes, once, when it comes to the step."""
    import cutlayer.links.local
    import cutlayer.links.net.answering
    import cutlayer.links.network
    import cutlayer.parties.client
    import cutlayer.parties.trunk
    from cutlayer.step import at

    struck = False

    def comes_to(step: str) -> None:
        nonlocal struck
        if struck or step != fate.step or (fate.after is not None and not fate.after.exists()):
            return
        struck = True
        os.kill(int(fate.victim.read_text()) if fate.victim else os.getpid(), signal.SIGKILL)

    @contextmanager
    def watched(step: str) -> Iterator[None]:
        comes_to(step)
        with at(step):
            yield

    for module in (cutlayer.links.local, cutlayer.links.network, cutlayer.parties.client, cutlayer.parties.trunk):
        assert module.at is at
        module.at = watched  # type: ignore[attr-defined]

    whole = cutlayer.links.net.answering.pack_whole

    def packed(frame: Any) -> Any:
        comes_to(frame.header.step_name)  # a client's reply, computed and not yet sent
        return whole(frame)

    cutlayer.links.net.answering.pack_whole = packed
