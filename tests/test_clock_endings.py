"""How a run on the virtual clock ends: deadlocks, errors, interrupts, runs inside a running loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import threading
import time

import pytest

from cutlayer.clock import VirtualClock
from cutlayer.errors import Deadlock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


def test_deadlock_names_who_waits(clock: VirtualClock) -> None:
    async def client(name: str, never: asyncio.Event) -> None:
        with clock.waiting(name, "the pool at 'trunk'"):
            await never.wait()

    async def main() -> None:
        never = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name in ("ann", "bob"):
                group.create_task(client(name, never))
            group.create_task(never.wait(), name="watcher")
            await clock.sleep(2.5, key="driver")

    with pytest.raises(Deadlock) as caught:
        clock.run(main())
    text = str(caught.value)
    for part in ("2.5 s", "ann waits for the pool at 'trunk'", "bob waits", "'watcher' (Event.wait)"):
        assert part in text
    assert clock.run(asyncio.sleep(1, "usable again")) == "usable again"


def test_deadlock_tells_the_failure_behind_it(clock: VirtualClock) -> None:
    async def server() -> None:
        raise ZeroDivisionError("in the server")

    async def main() -> None:
        task = asyncio.create_task(server(), name="server")
        await asyncio.Event().wait()
        await task

    with pytest.raises(Deadlock, match="'server' has failed before: ZeroDivisionError") as caught:
        clock.run(main())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_propagates_and_leaves_no_task(clock: VirtualClock) -> None:
    ended: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def bystander() -> None:
        try:
            await clock.sleep(1e9, key="b")
        finally:
            ended.append("bystander")

    async def main() -> None:
        tasks.append(asyncio.create_task(bystander()))
        await clock.sleep(1, key="a")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        clock.run(main())
    assert ended == ["bystander"]
    assert all(task.done() for task in tasks)
    assert clock.now() == 1


def test_an_error_that_nobody_awaits_ends_the_run(clock: VirtualClock, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1, int, "not a number")
        await clock.sleep(5, key="a")

    with pytest.raises(ValueError, match="not a number"):
        clock.run(main())
    assert "Exception in callback" in caplog.text


def test_a_task_that_refuses_to_end_does_not_hide_the_first_error(clock: VirtualClock) -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        task = asyncio.create_task(stubborn(), name="stubborn")
        await asyncio.sleep(0)
        raise KeyError(f"mine, beside {task.get_name()}")

    with pytest.raises(KeyError, match="mine") as caught:
        clock.run(main())
    assert "stubborn" in caught.value.__notes__[0]
    del caught
    gc.collect()  # asyncio logs the destroyed task now, into this test


def test_interrupt_gets_through_while_work_runs(clock: VirtualClock) -> None:
    gate = threading.Event()

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        gate.wait(30)

    async def main() -> None:
        try:
            await asyncio.to_thread(work)
        finally:
            gate.set()

    with pytest.raises(KeyboardInterrupt):
        clock.run(main())


def test_run_inside_a_running_loop(clock: VirtualClock) -> None:
    colour = contextvars.ContextVar("colour", default="none")

    async def inner() -> str:
        await clock.sleep(3, key="a")
        return colour.get()

    async def notebook() -> str:
        colour.set("blue")
        return clock.run(inner())

    async def failing() -> None:
        raise KeyError("inside")

    assert asyncio.run(notebook()) == "blue"
    assert clock.now() == 3

    async def failing_notebook() -> None:
        clock.run(failing())

    with pytest.raises(KeyError, match="inside"):
        asyncio.run(failing_notebook())


def test_interrupt_takes_a_run_in_a_thread_down(clock: VirtualClock) -> None:
    ended: list[str] = []

    async def inner() -> None:
        try:
            again = 0.0
            while True:  # once; a second time only if Python lost the first (it may, in a weak reference's callback)
                if time.monotonic() > again:
                    await asyncio.to_thread(os.kill, os.getpid(), signal.SIGINT)
                    again = time.monotonic() + 10
                await clock.sleep(1, key="a")
        finally:
            ended.append("inner")

    async def notebook() -> None:
        clock.run(inner())

    loop = asyncio.new_event_loop()  # as a notebook's: without asyncio.run's own handler of Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(notebook())
    finally:
        loop.close()
    assert ended == ["inner"]


def test_misuse(clock: VirtualClock) -> None:
    async def nested() -> None:
        with pytest.raises(RuntimeError, match="already running"):
            clock.run(asyncio.sleep(0))

    clock.run(nested())
    with pytest.raises(RuntimeError, match=r"clock\.run"):
        asyncio.run(clock.sleep(1, key="a"))
