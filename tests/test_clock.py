"""The virtual clock: order, jumps, executor work."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cutlayer.clock import Fifo, VirtualClock


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
            await asyncio.sleep(0)  # the cancellations reach the pool
            gate.set()
            await clock.sleep(1, key="a")  # what runs on is waited for, its result is dropped

    clock.run(main())
    assert ran == []


def test_no_sockets(clock: VirtualClock) -> None:
    async def main() -> None:
        ends = os.pipe()
        try:
            with pytest.raises(RuntimeError, match="No sockets"):
                asyncio.get_running_loop().add_reader(ends[0], print)
        finally:
            for end in ends:
                os.close(end)

    clock.run(main())
