"""The asyncio loop of the virtual clock (see ``clock``): it never waits for time, it jumps.

asyncio polls its selector with "wait for ever" exactly when no callback is ready and no timer is set. This loop sets no
timers of asyncio's own, so there it decides what happens next. Only documented parts of asyncio are overridden.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import heapq
import itertools
import selectors
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

NANO = 1_000_000_000  # nanoseconds in a second

# (nanosecond, grant, turn, party, number, handle, what to do); the number is unique, so no comparison goes further
Event = tuple[int, bool, int, str, int, asyncio.TimerHandle, Callable[[], object]]


class JumpingLoop(asyncio.SelectorEventLoop):
    """The loop of one ``run``, beginning at ``now`` nanoseconds; ``deadlock`` makes the error for that case."""

    def __init__(self, now: int, deadlock: Callable[[JumpingLoop], Exception]) -> None:
        self.now = now
        self.failure: BaseException | None = None  # of a callback, or of a task whose error nobody awaited
        self._told = False
        self._deadlock = deadlock
        self._events: list[Event] = []
        self._numbers = itertools.count()
        self._turn = 0
        self._work: deque[tuple[Future[Any], asyncio.Future[Any]]] = deque()
        self._pool: Executor | None = None
        self._closing_pool = False
        self._born: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Virtual seconds."""
        return self.now / NANO

    def at(
        self,
        when: int,
        callback: Callable[..., object],
        *args: Any,
        key: str = "",
        late: bool = False,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call ``callback`` at the nanosecond ``when``; ``late`` marks a grant. The module tells the order."""
        turn = 0 if late or when > self.now else self._turn + 1
        handle = asyncio.TimerHandle(when / NANO, callback, args, self, context)
        call = functools.partial(self.call_soon, callback, *args, context=context)
        event: Event = (max(when, self.now), late, turn, key, next(self._numbers), handle, call)
        heapq.heappush(self._events, event)
        return handle

    # The base types the arguments of callbacks with a TypeVarTuple; here they are only passed on.
    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """asyncio's timers, in virtual seconds, under the empty name."""
        return self.at(round(when * NANO), callback, *args, context=context)

    def sleeping(self) -> bool:
        """Whether any event is to come."""
        return any(not handle.cancelled() for *_, handle, _ in self._events)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """As the base; the task is remembered for the message of a deadlock."""
        task = super().create_task(coro, **options)  # its options differ between Python versions
        self._born.add(task)
        return task

    def failed(self) -> list[tuple[str, BaseException]]:
        """Names and errors of the failed tasks that somebody still holds."""
        ended = [task for task in self._born if task.done() and not task.cancelled()]
        errors = [(task.get_name(), task.exception()) for task in ended]
        return sorted(((name, error) for name, error in errors if error is not None), key=lambda pair: pair[0])

    def call_exception_handler(self, context: Any) -> None:
        """An error that reaches nobody is logged as ever, and ends the run."""
        self.failure = self.failure or context.get("exception")
        super().call_exception_handler(context)

    def set_default_executor(self, executor: Any) -> None:
        """As the base."""
        self._pool = executor
        super().set_default_executor(executor)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run ``func`` in real time; virtual time stands still until its result has been handed back."""
        if executor is None:
            if self._pool is None:
                self.set_default_executor(ThreadPoolExecutor(thread_name_prefix="cutlayer"))
            executor = self._pool
        assert executor is not None
        work = executor.submit(func, *args)
        result: asyncio.Future[T] = self.create_future()
        result.add_done_callback(lambda done: work.cancel() if done.cancelled() else None)
        work.add_done_callback(lambda _: None if self.is_closed() else self.call_soon_threadsafe(lambda: None))
        self._work.append((work, result))
        return result

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the pool's threads, in real time: a limit in virtual time would mean nothing."""
        self._closing_pool = True
        try:
            await super().shutdown_default_executor()
        finally:
            self._closing_pool = False

    def idle(self, wait: Callable[[], Any]) -> Any:
        """Nothing is ready: hand back finished work, wait for unfinished work, or jump to the next event."""
        if self.failure is not None and not self._told:
            self._told = True  # once: closing the run needs the loop again
            raise self.failure
        if self._work:
            work, result = self._work[0]
            if not work.done():
                return wait()
            self._work.popleft()
            _hand_back(work, result)
            return []
        if self._closing_pool:
            return wait()
        while self._events:
            when, _, turn, _, _, handle, call = heapq.heappop(self._events)
            if not handle.cancelled():
                self._turn = turn if when > self.now else max(turn, self._turn)
                self.now = when
                call()
                return []
        raise self._deadlock(self)


def _hand_back(work: Future[Any], result: asyncio.Future[Any]) -> None:
    if result.cancelled():
        return
    if work.cancelled():
        result.cancel()
    elif (error := work.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(work.result())


class _Selector(selectors.DefaultSelector):
    """Asks the loop what to do where a selector would wait for time; carries the loop's self-pipe and nothing else."""

    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def register(self, fileobj: Any, events: Any, data: Any = None) -> selectors.SelectorKey:
        """The first file is the self-pipe; any other is refused."""
        if self.get_map():
            raise RuntimeError("No sockets on the virtual clock: what arrives in real time has no virtual time.")
        return super().register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> Any:
        """What is ready; where there is nothing and the loop would wait, what the loop's ``idle`` does."""
        return super().select(0) or ([] if timeout is not None else self._loop.idle(super().select))
