"""The real clock, for runs whose clients are elsewhere: time passes by itself; who is ready first goes first."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class RealClock:
    """Seconds of this machine since the run began; it goes on from where a checkpoint was, and needs no wall time."""

    def __init__(self) -> None:
        self._begin = time.monotonic_ns()
        self._waiting: dict[int, tuple[str, str | Callable[[], str]]] = {}
        self._numbers = itertools.count()

    def now(self) -> float:
        """Seconds since the run began."""
        return (time.monotonic_ns() - self._begin) / 1e9

    async def sleep(self, seconds: float, *, key: str) -> None:
        """Let ``seconds`` pass for the party ``key``."""
        await asyncio.sleep(seconds)

    async def settle(self) -> None:
        """Let the others that are ready go first."""
        await asyncio.sleep(0)

    @contextlib.contextmanager
    def waiting(self, name: str, what: str | Callable[[], str] = "a signal") -> Iterator[None]:
        """Say that ``name`` waits for ``what`` while the block runs, for ``who_waits``."""
        number = next(self._numbers)
        self._waiting[number] = (name, what)
        try:
            yield
        finally:
            del self._waiting[number]

    def who_waits(self) -> list[str]:
        """Who waits for what just now, a sentence each; an operator asks when nothing moves."""
        return [
            f"{name} waits for {what if isinstance(what, str) else what()}" for name, what in self._waiting.values()
        ]

    def queue(self, name: str, *, capacity: int = 1) -> Queue:
        """A lock that serves in order of arrival."""
        return Queue(self, name, capacity)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` on an event loop of its own, in this thread."""
        return asyncio.run(main)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the time in nanoseconds."""
        return {"nanoseconds": time.monotonic_ns() - self._begin}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from the time that ``state()`` gave: what was done since is not counted."""
        self._begin = time.monotonic_ns() - int(state["nanoseconds"])


class Queue:
    """A lock that serves ``capacity`` at a time, in order of arrival."""

    def __init__(self, clock: RealClock, name: str, capacity: int) -> None:
        self.name = name
        self._clock = clock
        self._room = asyncio.Semaphore(capacity)

    @contextlib.asynccontextmanager
    async def __call__(self, key: str) -> AsyncIterator[None]:
        """Wait until ``key`` is served; the end of the block frees the queue."""
        with self._clock.waiting(key, f"'{self.name}'"):
            await self._room.acquire()
        try:
            yield
        finally:
            self._room.release()
