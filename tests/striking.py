"""A process that is killed, or kills another, at a named step of a run: for the tests of what survives that."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlayer.seat import Seat
from cutlayer.wire import Header

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
    import cutlayer.parties.trunk
    import cutlayer.parties.verbs
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

    for module in (cutlayer.links.local, cutlayer.links.network, cutlayer.parties.trunk, cutlayer.parties.verbs):
        assert module.at is at
        module.at = watched  # type: ignore[attr-defined]

    whole = cutlayer.links.net.answering.pack_whole

    def packed(frame: Any) -> Any:
        comes_to(frame.header.step_name)  # a client's reply, computed and not yet sent
        return whole(frame)

    cutlayer.links.net.answering.pack_whole = packed


@dataclass(frozen=True)
class Trap:
    """What happens to a client as it is given a request: of a training step by its number, else by its round.

    Of step 11, which tells neither: the so many-th from 0. One that waits says so beside the file, as ``.reached``.
    """

    verb: str
    number: int
    do: str  # kill, stop (until it is told to go on), wait for the file; in the answer: lie, swell, or leave it open
    file: str = ""

    def springs(self, header: Header, count: int) -> bool:
        """Whether this is the request."""
        if header.verb != self.verb:
            return False
        if header.step_name == "aggregate":
            return count == self.number
        if "round" in header.values:
            return header.values["round"] == self.number
        return header.step == self.number and bool(header.values.get("graph", True))

    def spring(self) -> None:
        """Do it."""
        if self.do == "wait":
            Path(f"{self.file}.reached").touch()
        while self.do == "wait" and not os.path.exists(self.file):
            time.sleep(0.02)
        if self.do in ("kill", "stop"):
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.do])


def falsified(header: Header, tensors: Sequence[Tensor]) -> tuple[Header, list[Tensor]]:
    """An answer with numbers that cannot be."""
    values = {name: math.nan if isinstance(value, float) else value for name, value in header.values.items()}
    return header.but(values=values), [torch.full_like(tensor, math.nan) for tensor in tensors]


def lay(traps: Sequence[Trap]) -> None:
    """Lay traps for the client in this process; each springs once."""
    original, left, counts = Seat._handled, list(traps), Counter[str]()

    def handled(self: Seat, header: Header, tensors: list[Tensor]) -> Any:
        sprung = [trap for trap in left if trap.springs(header, counts[header.verb])]
        for trap in sprung:
            left.remove(trap)
            trap.spring()
        counts[header.verb] += 1
        told = original(self, header, tensors)
        if any(trap.do == "open" for trap in sprung):  # what should be sealed
            return told[0].but(names=("hidden",)), told[1]
        if any(trap.do == "swell" for trap in sprung):  # to what is finite, and overflows in the first sum
            return told[0], [tensor.clamp(min=3e38) if tensor.is_floating_point() else tensor for tensor in told[1]]
        return falsified(*told) if any(trap.do == "lie" for trap in sprung) else told

    Seat._handled = handled  # type: ignore[method-assign]
