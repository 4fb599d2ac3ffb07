"""What an operator may know of a server while it runs. Nothing here is asked for in a step: it is read when looked at.

A ``Watch`` stands between a run and its reporter, so it hears of each step; all else it reads off what the run, its
clock and its clients' connections count anyway. It is read in another thread than they are written in.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from cutlayer.draining import Drain
from cutlayer.links.net.listener import Listener
from cutlayer.links.net.remote import Remote
from cutlayer.parties.memory import storage_bytes
from cutlayer.real_clock import RealClock
from cutlayer.report.progress import Reporter

if TYPE_CHECKING:
    from cutlayer.driver import Run

T = TypeVar("T")
State = Literal["waiting", "training", "done", "failed"]  # of a run: waiting for clients; and so on
STATES: tuple[State, ...] = get_args(State)
ANSWER = 10.0  # seconds in which a loop that is well has answered


def still(read: Callable[[], T]) -> T:
    """What ``read`` gives, also where another thread adds to a mapping in the middle of it."""
    while True:
        try:
            return read()
        except RuntimeError as error:
            if "during iteration" not in str(error):
                raise


class Watch:
    """One run as its operator sees it; also the run's reporter, that hands on what it is told.

    Args:
        name: the run's.
        shown: is told what the run tells.
        remotes: its clients.
    """

    def __init__(self, name: str, shown: Reporter, remotes: Mapping[str, Remote]) -> None:
        self.name, self.shown, self.remotes = name, shown, remotes
        self.state: State = "waiting"
        self.run: Run | None = None  # while it is driven
        self.steps: Counter[str] = Counter()  # by client, made since this process began
        self.tokens: Counter[str] = Counter()
        self.losses: dict[str, float] = {}  # of each client's last step
        self._stepped: float | None = None

    def start(self, total_steps: int) -> None:
        """The run begins."""
        self._stepped = time.monotonic()
        self.shown.start(total_steps)

    def update(self, record: Mapping[str, Any]) -> None:
        """A client finished an optimizer step."""
        client = record["client"]
        self.steps[client] += 1
        self.tokens[client] += record["tokens"]
        self.losses[client] = record["loss"]
        self._stepped = time.monotonic()
        self.shown.update(record)

    def note(self, text: str) -> None:
        """Something worth a line."""
        self.shown.note(text)

    def stop(self) -> None:
        """The run is over, or broken off."""
        self.shown.stop()

    @property
    def since_step(self) -> float | None:
        """Seconds since the last step, or since the run began where it has made none; None before that."""
        return None if self._stepped is None else time.monotonic() - self._stepped

    @property
    def missing(self) -> list[str]:
        """The clients that are not here now."""
        return [name for name, remote in self.remotes.items() if remote.session is None]

    @property
    def waits(self) -> list[str]:
        """Who in the run waits for what, a sentence each."""
        run = self.run
        clock = run.clock if run is not None else None
        return still(clock.who_waits) if isinstance(clock, RealClock) else []

    def memory(self) -> dict[str, int]:
        """Bytes of this run's own at the server: the trained tensors with their optimizers' state, and the activations
        that the largest step keeps, which are counted in the first one. The base is not in it."""
        run = self.run
        if run is None:
            return {}
        parties = list(run.parts.parties.values())
        slots = [slot for party in parties for slot in party.slots.values()]
        trained = storage_bytes(t for slot in slots for t in still(partial(slot.get, optimizer=True)).values())
        saved = sum(party.watch.saved for party in parties)
        return {"trained": trained, **({"activations": saved} if saved else {})}

    def told(self) -> dict[str, Any]:
        """What ``/readyz`` says of it."""
        run, missing = self.run, self.missing
        found: dict[str, Any] = {"state": self.state, "missing": missing}
        if run is not None:
            found |= {"round": run.counters.rounds, "waits": self.waits}
        return found


@dataclass
class House:
    """A server as its operator sees it.

    Args:
        drain: whether it was asked to stop.
        until: when its certificate ends; None: it has none.
    """

    drain: Drain = field(default_factory=Drain)
    until: datetime | None = None
    runs: list[Watch] = field(default_factory=list)
    listener: Listener | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def well(self) -> str:
        """Why the process is not healthy; empty where it is: its event loop answers. For another thread than that."""
        loop = self.loop
        if loop is None:
            return ""  # it is still loading
        answered = threading.Event()
        try:
            loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # as asyncio says it
            return "The event loop has ended."
        return "" if answered.wait(ANSWER) else f"The event loop has not answered for {ANSWER:g} seconds."

    def unready(self) -> str:
        """Why clients cannot come; empty where they can."""
        if self.drain.asked():
            return "The server is draining: it stops after the rounds that are under way."
        return "" if self.listener is not None else "The server does not listen yet."
