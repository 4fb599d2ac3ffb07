"""The virtual clock: numbers are computed for real, durations are simulated and cost no waiting.

An asyncio loop whose time jumps. It moves on only when no callback is ready and no executor work is outstanding, and
then by ONE event. Events have one order: (nanosecond, grants last, turn, party, sequence number).

- A *turn* is a round of zero-length sleeps within one instant. A sleep of 0 does go through the heap, and wakes in the
  next turn of the same instant. Returning at once would let the order in which tasks were created decide instead of
  the parties' names; ordering zero sleeps by name alone would let the first party run to its end before the second
  one starts wherever all durations are 0 (``profile: null``).
- *Grants* (a ``Fifo`` choosing whom to serve) come last, when everybody who arrives at that instant has arrived.
- Executor work is handed back in the order of submission, one at a time, so that real durations never decide an order.

Asyncio's own timers (``asyncio.sleep``, ``asyncio.timeout``) go through the same heap under the empty name.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import heapq
import itertools
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol, TypeVar

from cutlayer._loop import NANO, JumpingLoop
from cutlayer.errors import Deadlock

T = TypeVar("T")

LAST = "~"  # sorts behind the names of all parties and queues


class Clock(Protocol):
    """What parties and wrappers need of a clock, virtual or real."""

    def now(self) -> float:
        """Seconds since the run began."""
        ...

    async def sleep(self, seconds: float, *, key: str) -> None:
        """Let ``seconds`` pass for the party ``key``."""
        ...

    def waiting(self, name: str, what: str | Callable[[], str] = ...) -> contextlib.AbstractContextManager[None]:
        """Say, for the error message of a deadlock, that ``name`` waits for ``what``."""
        ...


class Queue(Protocol):
    """A lock that serves in order of arrival: ``async with queue(name):``."""

    def __call__(self, key: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Wait until ``key`` is served; the end of the block frees the queue."""
        ...


class RunClock(Clock, Protocol):
    """What a run needs of its clock besides: it can be set, and says when all of an instant has happened."""

    async def settle(self) -> None:
        """Wake when all else that happens at this instant has happened."""
        ...

    def queue(self, name: str, *, capacity: int = 1) -> Queue:
        """A lock that serves in order of arrival."""
        ...

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` to its end and give its result."""
        ...

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the time in nanoseconds."""
        ...

    def restore(self, state: Mapping[str, int]) -> None:
        """Set the time that ``state()`` gave."""
        ...


class VirtualClock:
    """Simulated time, kept as integer nanoseconds; it goes on from one ``run`` to the next."""

    def __init__(self) -> None:
        self._before = 0  # nanoseconds, at the end of the last run
        self._loop: JumpingLoop | None = None
        self._waiting: dict[int, tuple[str, str | Callable[[], str], asyncio.Task[Any] | None]] = {}
        self._numbers = itertools.count()

    def now(self) -> float:
        """The virtual time in seconds."""
        return self.state()["nanoseconds"] / NANO

    async def sleep(self, seconds: float, *, key: str) -> None:
        """Wake after ``seconds`` of virtual time; those who wake at one instant do so in the order of ``key``."""
        if not (seconds >= 0 and math.isfinite(seconds)):
            raise ValueError(f"'{key}' cannot sleep for {seconds} seconds; a duration is a finite number from 0 on.")
        loop = self._running()
        woken = loop.create_future()
        timer = loop.at(loop.now + round(seconds * NANO), _resolve, woken, key=key)
        try:
            await woken
        finally:
            timer.cancel()

    async def settle(self) -> None:
        """Wake when all else that happens at this instant has happened: whoever decides then sees it whole."""
        loop = self._running()
        woken = loop.create_future()
        timer = loop.at(loop.now, _resolve, woken, key=LAST, late=True)
        try:
            await woken
        finally:
            timer.cancel()

    def queue(self, name: str, *, capacity: int = 1) -> Queue:
        """A lock that serves in order of arrival."""
        return Fifo(self, name, capacity=capacity)

    @contextlib.contextmanager
    def waiting(self, name: str, what: str | Callable[[], str] = "a signal") -> Iterator[None]:
        """Say that ``name`` waits for ``what`` (a function is asked at the time) while the block runs.

        A deadlock then names both; it has no other effect.
        """
        number = next(self._numbers)
        self._waiting[number] = (name, what, asyncio.current_task())
        try:
            yield
        finally:
            del self._waiting[number]

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` to its end, cancel what is left over, and return its result.

        Called inside a running loop (a notebook), it works in a new thread and blocks until that ends.

        Raises:
            Deadlock: nothing is left to happen, yet somebody waits.
        """
        if self._loop is not None:
            main.close()
            raise RuntimeError("This clock is already running; await the coroutine instead of calling run().")
        try:
            asyncio.get_running_loop()
            inside = True
        except RuntimeError:
            inside = False
        return self._run_in_thread(main) if inside else self._run(main)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: the time in nanoseconds."""
        return {"nanoseconds": self._before if self._loop is None else self._loop.now}

    def restore(self, state: Mapping[str, int]) -> None:
        """Set the time that ``state()`` gave; not while somebody sleeps."""
        if self._loop is not None and self._loop.sleeping():
            raise RuntimeError("The clock cannot be set while somebody sleeps on it.")
        self._before = int(state["nanoseconds"])
        if self._loop is not None:
            self._loop.now = self._before

    def _running(self) -> JumpingLoop:
        if self._loop is None or asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("This clock does not run here; start the coroutine with clock.run().")
        return self._loop

    def _run(self, main: Coroutine[Any, Any, T]) -> T:
        loop = self._loop = JumpingLoop(self._before, self._deadlock)
        runner = asyncio.Runner(loop_factory=lambda: loop)  # it turns Ctrl-C into a cancellation
        try:
            result = runner.run(main)
        except BaseException as error:
            try:
                runner.close()
            except Exception as second:  # a task refuses to be cancelled, say: the first error is the one to show
                error.add_note(f"While the run was being closed: {second}")
            raise
        else:
            runner.close()
        finally:
            self._before, self._loop = loop.now, None
        if loop.failure is not None:
            raise loop.failure
        return result

    def _run_in_thread(self, main: Coroutine[Any, Any, T]) -> T:
        outcome: Future[T] = Future()
        cancels: list[Callable[[], object]] = []
        go = threading.Event()  # nothing begins before an interrupt would be seen

        async def watched() -> T:
            task = asyncio.current_task()
            assert task is not None
            cancels.append(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel))
            return await main

        def work() -> None:
            go.wait()
            try:
                outcome.set_result(self._run(watched()))
            except BaseException as error:
                outcome.set_exception(error)

        target = functools.partial(contextvars.copy_context().run, work)
        threading.Thread(target=target, name="cutlayer-virtual-clock", daemon=True).start()
        try:
            go.set()
            # Not a join: in Python 3.11 one that was interrupted takes the thread for ended. And not one long wait, at
            # whose end only a signal would be seen that comes in the moment before it begins.
            while not outcome.done():
                wait([outcome], timeout=0.2)
        except BaseException:  # Ctrl-C reaches the caller's thread only: take the run down before passing it on
            while not outcome.done():
                if cancels:
                    with contextlib.suppress(RuntimeError):  # its loop has just ended by itself
                        cancels.pop()()
                wait([outcome], timeout=0.05)  # it may not have begun, so look again
            raise
        return outcome.result()

    def _deadlock(self, loop: JumpingLoop) -> Deadlock:
        said = {task for _, _, task in self._waiting.values()}
        lines = [f"{name} waits for {w if isinstance(w, str) else w()}" for name, w, _ in self._waiting.values()]
        tasks = sorted((t for t in asyncio.all_tasks(loop) if t not in said), key=asyncio.Task.get_name)
        lines += [f"task '{t.get_name()}' ({getattr(t.get_coro(), '__qualname__', '?')})" for t in tasks]
        failed = loop.failed()
        lines += [f"task '{name}' has failed before: {type(cause).__name__}: {cause}" for name, cause in failed]
        error = Deadlock(
            f"Nothing is left to happen at virtual time {self.now():g} s, yet somebody waits:\n"
            + "\n".join(f"  - {line}" for line in lines)
            + "\nFind out who ended, failed or was left out without telling those who wait for it."
        )
        error.__cause__ = failed[0][1] if failed else None
        return error


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # its task may have been cancelled at this very instant
        future.set_result(None)


class Turnstile:
    """Admits named waiters one at a time, in a given order, round and round (SFL-V2: the server's order of clients).

    ``async with turnstile(name):`` waits for the turn of ``name``; the end of the block, by an error too, passes it on.
    """

    def __init__(self, order: Sequence[str], clock: Clock, name: str = "turnstile") -> None:
        if len(set(order)) != len(order):
            raise ValueError(f"A name comes twice in the order of '{name}': {', '.join(order)}.")
        self.name = name
        self._order = deque(order)
        self._known = frozenset(order)
        self._clock = clock
        self._inside = False
        self._queues: dict[str, deque[asyncio.Future[None]]] = {one: deque() for one in order}

    @property
    def turn(self) -> str | None:
        """Whose turn it is; None when all have left."""
        return self._order[0] if self._order else None

    @contextlib.asynccontextmanager
    async def __call__(self, name: str) -> AsyncIterator[None]:
        """Wait for the turn of ``name``, and pass it on at the end."""
        if name not in self._order:
            raise ValueError(f"'{name}' has no turn at '{self.name}'; in its order: {', '.join(self._order)}.")
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues[name].append(admitted)
        self._admit()
        try:
            with self._clock.waiting(name, lambda: f"its turn at '{self.name}' (it is the turn of {self.turn})"):
                await admitted
            yield
        finally:
            if admitted.done() and not admitted.cancelled():
                self._inside = False
                if self.turn == name:  # it may have left meanwhile
                    self._order.rotate(-1)
                self._admit()

    def leave(self, name: str) -> None:
        """``name`` comes no more: nobody waits for it. Leaving twice is harmless."""
        if name not in self._known:
            raise ValueError(f"'{name}' never had a turn at '{self.name}'.")
        if any(not one.done() for one in self._queues[name]):
            raise RuntimeError(f"'{name}' cannot leave '{self.name}' while it waits there; cancel its task first.")
        if name in self._order:
            self._order.remove(name)
            self._admit()

    def _admit(self) -> None:
        queue = self._queues[self._order[0]] if self._order and not self._inside else None
        while queue:
            one = queue.popleft()
            if not one.done():
                self._inside = True
                one.set_result(None)
                return


class Fifo:
    """A lock that serves in order of arrival, ties by (key, sequence): one party's CPU, uplink, downlink or worker.

    Whom to serve is decided when everything else at that instant has happened, so a tie is seen whole. ``capacity`` is
    how many it serves at a time.
    """

    def __init__(self, clock: VirtualClock, name: str = "queue", *, capacity: int = 1) -> None:
        self.name = name
        self.capacity = capacity
        self._clock = clock
        self._holders: list[str] = []
        self._queue: list[tuple[int, str, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def __call__(self, key: str) -> AsyncIterator[None]:
        """Wait until ``key`` is served; the end of the block frees the queue."""
        loop = self._clock._running()
        served: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._queue, (loop.now, key, next(self._numbers), served))
        self._ask(loop)
        try:
            with self._clock.waiting(key, lambda: f"'{self.name}' (held by {', '.join(self._holders)})"):
                await served
            yield
        finally:
            if served.done() and not served.cancelled():
                self._holders.remove(key)
                self._ask(loop)

    def _ask(self, loop: JumpingLoop) -> None:
        if len(self._holders) < self.capacity and self._queue:
            loop.at(loop.now, self._serve, key=self.name, late=True)

    def _serve(self) -> None:
        while len(self._holders) < self.capacity and self._queue:
            _, key, _, served = heapq.heappop(self._queue)
            if not served.done():
                self._holders.append(key)
                served.set_result(None)
