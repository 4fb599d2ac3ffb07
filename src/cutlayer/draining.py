"""A server that is asked to stop finishes the round it is in, so that nothing that was computed is lost.

The first SIGTERM asks; the second, or the end of the time that is given, stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from cutlayer.run import Interrupted

T = TypeVar("T")
DRAIN = 120.0  # seconds that the rounds get which are under way
PARTING = "The server is going down for a while. It goes on with the run when it is back."


class Drained(Exception):
    """A run ended between two rounds, as it was asked to, and is not done."""


class Paused(Interrupted):
    """The server stopped as it was asked to; its run is not done."""

    code = 75  # EX_TEMPFAIL of sysexits.h: try again later; 0 says that the run is done


class Drain:
    """Whether a server was asked to stop.

    Args:
        seconds: how long it may take to; 0: it stops at once.
    """

    def __init__(self, seconds: float = DRAIN) -> None:
        self.seconds = seconds
        self._asked = asyncio.Event()

    def asked(self) -> bool:
        """Whether it was; any thread may ask."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Stop when the rounds under way are over; for the thread of the event loop."""
        self._asked.set()

    async def wait(self) -> None:
        """Until somebody asks."""
        await self._asked.wait()

    async def unless(self, work: Awaitable[T]) -> T:
        """The result of ``work``, if nobody asks to stop before it is looked at.

        Raises:
            Drained: somebody did.
        """
        doing, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({doing, asked}, return_when=asyncio.FIRST_COMPLETED)
            if self.asked():
                raise Drained
            return await doing
        finally:
            for task in (doing, asked):
                task.cancel()
            await asyncio.gather(doing, asked, return_exceptions=True)

    @contextlib.contextmanager
    def on_sigterm(self, task: asyncio.Task[Any], note: Callable[[str], None]) -> Iterator[None]:
        """Let SIGTERM ask while the block runs; ``task`` is cancelled where it is to stop at once."""
        if threading.current_thread() is not threading.main_thread():  # signals are not for it
            yield
            return
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []

        def told() -> None:
            if self.asked() or not self.seconds:
                task.cancel()
                return
            timers.append(loop.call_later(self.seconds, task.cancel))
            note(
                f"asked to stop: the round is finished first, for which there are {self.seconds:g} seconds; asked once "
                "more, the server stops at once"
            )
            self.ask()

        loop.add_signal_handler(signal.SIGTERM, told)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            for timer in timers:
                timer.cancel()
