"""The virtual clock: order, jumps, executor work, deadlocks, endings; the turnstile and the queue."""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cutlayer.clock import Fifo, Turnstile, VirtualClock
from cutlayer.errors import Deadlock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


# ---------------------------------------------------------------- order


def woken(clock: VirtualClock, sleeps: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Who wakes when, for tasks that are created in the given order."""
    seen: list[tuple[str, float]] = []

    async def one(key: str, seconds: float) -> None:
        await clock.sleep(seconds, key=key)
        seen.append((key, clock.now()))

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for key, seconds in sleeps:
                group.create_task(one(key, seconds))

    clock.run(main())
    return seen


def test_equal_times_wake_in_the_order_of_names(clock: VirtualClock) -> None:
    assert woken(clock, [("c", 1.0), ("a", 1.0), ("b", 0.5), ("b", 1.0)]) == [
        ("b", 0.5),
        ("a", 1.0),
        ("b", 1.0),
        ("c", 1.0),
    ]


def test_equal_names_wake_in_the_order_of_their_calls(clock: VirtualClock) -> None:
    order: list[int] = []

    async def one(number: int) -> None:
        await clock.sleep(1.0, key="same")
        order.append(number)

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(20)))

    clock.run(main())
    assert order == list(range(20))


def test_zero_sleeps_follow_the_names_and_starve_nobody(clock: VirtualClock) -> None:
    order: list[str] = []

    async def one(key: str) -> None:
        for _ in range(3):
            await clock.sleep(0, key=key)
            order.append(key)

    async def main() -> None:
        await asyncio.gather(one("b"), one("a"), one("c"))

    clock.run(main())
    assert order == ["a", "b", "c"] * 3
    assert clock.now() == 0


def test_asyncio_timers_are_virtual_and_stable(clock: VirtualClock) -> None:
    order: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in range(200):  # more than asyncio's heap would keep in order
            loop.call_later(5, order.append, number)
        loop.call_later(4, order.append, "cancelled").cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await asyncio.sleep(100)
        assert (loop.time(), clock.now()) == (2.0, 2.0)
        await asyncio.sleep(3)
        await clock.sleep(0, key="x")

    clock.run(main())
    assert order == list(range(200))
    assert clock.now() == 5.0


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_duration_is_finite_and_not_negative(clock: VirtualClock, seconds: float) -> None:
    with pytest.raises(ValueError, match="'a' cannot sleep for"):
        clock.run(clock.sleep(seconds, key="a"))


def test_hundred_clients_are_deterministic() -> None:
    def trace() -> list[tuple[str, float]]:
        clock, seen = VirtualClock(), []
        queue = Fifo(clock, "server")

        async def client(number: int) -> None:
            key, draw = f"client-{number:03}", random.Random(number)
            for step in range(100):
                await clock.sleep(draw.choice([0, 0.25, 0.5, 1.0]), key=key)
                if step % 20 == 0:
                    async with queue(key):
                        await asyncio.to_thread(time.sleep, 1e-6 * random.random())  # noise in real time only
                        await clock.sleep(0.125, key=key)
                seen.append((key, clock.now()))

        async def main() -> None:
            await asyncio.gather(*(client(number) for number in range(100)))

        clock.run(main())
        return seen

    first = trace()
    assert len(first) == 100 * 100
    assert trace() == first
    assert trace() == first


# ---------------------------------------------------------------- time


def test_time_jumps(clock: VirtualClock) -> None:
    began = time.monotonic()
    assert woken(clock, [("a", 1e6)]) == [("a", 1e6)]
    assert time.monotonic() - began < 60


def test_time_is_kept_in_nanoseconds_and_goes_on(clock: VirtualClock) -> None:
    for _ in range(2):
        woken(clock, [("a", 0.1)] * 3)
    assert clock.state() == {"nanoseconds": 200_000_000}
    later = VirtualClock()
    later.restore(clock.state())
    assert woken(later, [("a", 0.1)]) == [("a", 0.3)]


def test_restore_inside_a_run_but_not_under_a_sleeper(clock: VirtualClock) -> None:
    async def main() -> None:
        clock.restore({"nanoseconds": 7})
        task = asyncio.create_task(clock.sleep(1, key="a"))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="while somebody sleeps"):
            clock.restore({"nanoseconds": 8})
        await task

    clock.run(main())
    assert clock.state() == {"nanoseconds": 1_000_000_007}


def test_executor_work_holds_time_and_comes_back_in_order(clock: VirtualClock) -> None:
    seen: list[tuple[str, float]] = []
    gate = threading.Event()

    def slow() -> None:
        assert gate.wait(30)

    async def worker(key: str) -> None:
        if key == "slow":
            await asyncio.to_thread(slow)
        else:
            await asyncio.to_thread(gate.set)
        seen.append((key, clock.now()))

    async def sleeper() -> None:
        await clock.sleep(1e-9, key="a")
        seen.append(("sleeper", clock.now()))

    async def main() -> None:
        await asyncio.gather(sleeper(), worker("slow"), worker("quick"))

    clock.run(main())
    assert seen == [("slow", 0), ("quick", 0), ("sleeper", 1e-9)]


def test_executor_errors_and_cancellation(clock: VirtualClock) -> None:
    begun, gate = threading.Event(), threading.Event()
    ran: list[str] = []

    def fail() -> None:
        raise KeyError("inside")

    def hold() -> None:
        begun.set()
        gate.wait(30)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(KeyError, match="inside"):
            await asyncio.to_thread(fail)
        with ThreadPoolExecutor(1) as pool:
            running = loop.run_in_executor(pool, hold)
            queued = loop.run_in_executor(pool, ran.append, "queued")
            begun.wait(30)
            running.cancel()
            queued.cancel()
            gate.set()
            await clock.sleep(1, key="a")  # what runs on is waited for, its result is dropped

    clock.run(main())
    assert ran == []


def test_no_sockets(clock: VirtualClock) -> None:
    async def main() -> None:
        await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)

    with pytest.raises(RuntimeError, match="No sockets"):
        clock.run(main())


# ---------------------------------------------------------------- endings


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
            await asyncio.to_thread(os.kill, os.getpid(), signal.SIGINT)
            while True:
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
