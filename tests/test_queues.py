"""Turnstile (a given order) and Fifo (order of arrival) on the virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from cutlayer.clock import Fifo, Turnstile, VirtualClock
from cutlayer.errors import Deadlock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


async def visit(queue: Turnstile | Fifo, clock: VirtualClock, name: str, arrive: float, seen: list[object]) -> None:
    """Arrive, be let in, stay for a second."""
    await clock.sleep(arrive, key=name)
    async with queue(name):
        await clock.sleep(1, key=name)
        seen.append((name, clock.now()))


def test_turnstile_keeps_its_order_round_and_round(clock: VirtualClock) -> None:
    seen: list[object] = []
    turnstile = Turnstile(["c", "a", "b"], clock)

    async def client(name: str, arrive: float) -> None:
        await visit(turnstile, clock, name, arrive, seen)
        await visit(turnstile, clock, name, 0, seen)

    async def main() -> None:
        await asyncio.gather(client("a", 0), client("b", 0), client("c", 2))

    clock.run(main())
    assert seen == [("c", 3), ("a", 4), ("b", 5), ("c", 6), ("a", 7), ("b", 8)]


def test_nobody_waits_for_one_that_left(clock: VirtualClock) -> None:
    seen: list[object] = []
    turnstile = Turnstile(["a", "b", "c"], clock)

    async def goes() -> None:
        await clock.sleep(5, key="a")
        turnstile.leave("a")
        turnstile.leave("a")

    async def main() -> None:
        await asyncio.gather(visit(turnstile, clock, "b", 0, seen), visit(turnstile, clock, "c", 0, seen), goes())

    clock.run(main())
    assert seen == [("b", 6), ("c", 7)]
    assert turnstile.turn == "b"
    turnstile.leave("b")
    turnstile.leave("c")
    assert turnstile.turn is None


def test_leaving_inside_passes_the_turn_on_once(clock: VirtualClock) -> None:
    seen: list[object] = []
    turnstile = Turnstile(["a", "b", "c"], clock)

    async def last_visit() -> None:
        async with turnstile("a"):
            turnstile.leave("a")
            await clock.sleep(1, key="a")
            assert seen == []  # b is not let in beside a

    async def main() -> None:
        await asyncio.gather(visit(turnstile, clock, "c", 0, seen), visit(turnstile, clock, "b", 0, seen), last_visit())

    clock.run(main())
    assert seen == [("b", 2), ("c", 3)]


def test_an_error_inside_passes_the_turn_on(clock: VirtualClock) -> None:
    seen: list[object] = []
    turnstile = Turnstile(["a", "b"], clock)

    async def fails() -> None:
        async with turnstile("a"):
            raise KeyError("inside")

    async def main() -> None:
        results = await asyncio.gather(fails(), visit(turnstile, clock, "b", 0, seen), return_exceptions=True)
        assert [type(result) for result in results] == [KeyError, type(None)]

    clock.run(main())
    assert seen == [("b", 1)]


def test_turnstile_deadlock_says_whose_turn_it_is(clock: VirtualClock) -> None:
    turnstile = Turnstile(["a", "b"], clock, name="trunk")
    with pytest.raises(Deadlock, match=r"b waits for its turn at 'trunk' \(it is the turn of a\)"):
        clock.run(visit(turnstile, clock, "b", 0, []))


def test_turnstile_misuse(clock: VirtualClock) -> None:
    with pytest.raises(ValueError, match="twice"):
        Turnstile(["a", "a"], clock)
    turnstile = Turnstile(["a", "b"], clock)
    with pytest.raises(ValueError, match="never had a turn"):
        turnstile.leave("x")

    async def main() -> None:
        with pytest.raises(ValueError, match="in its order: a, b"):
            async with turnstile("x"):
                pass
        waits = asyncio.create_task(visit(turnstile, clock, "b", 0, []))
        await clock.sleep(1, key="driver")
        with pytest.raises(RuntimeError, match="cancel its task first"):
            turnstile.leave("b")
        waits.cancel()
        turnstile.leave("b")
        async with turnstile("a"), asyncio.timeout(1):
            pass

    clock.run(main())


def test_fifo_serves_by_arrival_and_breaks_ties_by_name(clock: VirtualClock) -> None:
    seen: list[object] = []
    queue = Fifo(clock, "server")

    async def main() -> None:
        arrivals = [("d", 0.5), ("c", 0.5), ("z", 0.25), ("b", 1.25), ("a", 1.25)]
        await asyncio.gather(*(visit(queue, clock, name, when, seen) for name, when in arrivals))

    clock.run(main())
    # z is in from 0.25 on; c and d tie at 0.5; a and b arrive at the very instant at which z leaves, behind them
    assert seen == [("z", 1.25), ("c", 2.25), ("d", 3.25), ("a", 4.25), ("b", 5.25)]


def test_fifo_sees_a_tie_whole(clock: VirtualClock) -> None:
    seen: list[object] = []
    queue = Fifo(clock)

    async def in_two_legs(name: str) -> None:  # arrives at 1.0 as well, one turn later than b
        await clock.sleep(1, key=name)
        await visit(queue, clock, name, 0, seen)

    async def main() -> None:
        await asyncio.gather(visit(queue, clock, "b", 1, seen), in_two_legs("a"))

    clock.run(main())
    assert seen == [("a", 2), ("b", 3)]


def test_fifo_forgets_who_was_cancelled(clock: VirtualClock) -> None:
    seen: list[object] = []
    queue = Fifo(clock)

    async def main() -> None:
        tasks = {n: asyncio.create_task(visit(queue, clock, n, 0, seen)) for n in "abcd"}
        await clock.sleep(0.5, key="driver")
        tasks["b"].cancel()  # waits
        tasks["a"].cancel()  # is inside
        results = await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2 + [type(None)] * 2
        async with queue("late"):
            seen.append(("late", clock.now()))

    clock.run(main())
    assert seen == [("c", 1.5), ("d", 2.5), ("late", 2.5)]


def test_fifo_cancelled_in_the_moment_it_is_served(clock: VirtualClock) -> None:
    victims: list[asyncio.Task[None]] = []

    class Spiteful(Fifo):
        def _serve(self) -> None:
            super()._serve()
            victims[0].cancel()  # after it was given its place, before it wakes

    queue = Spiteful(clock)

    async def main() -> None:
        victims.append(asyncio.create_task(visit(queue, clock, "a", 0, [])))
        async with queue("b"):
            assert victims[0].cancelled()

    clock.run(main())


def test_fifo_deadlock_names_the_holder(clock: VirtualClock) -> None:
    queue = Fifo(clock, "uplink")

    async def main() -> None:
        async with queue("a"), queue("b"):
            pass

    with pytest.raises(Deadlock, match=r"b waits for 'uplink' \(held by a\)"):
        clock.run(main())
