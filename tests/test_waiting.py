"""Waiting: in every round, what a client works and what it waits are together the round, whoever's blocks it runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cutlayer.clock import VirtualClock
from cutlayer.engine import Engine
from cutlayer.links.local import Queues
from spine import TWO, lines, model, often, train
from tiny import text_rows

NAMES = ("ann", "bob", "cid", "dan")
ROWS = {name: text_rows(3, seed=i, shortest=12, longest=12) for i, name in enumerate(NAMES)}
QUICK = {"up_mbps": 1e6, "down_mbps": 1e6, "rtt_ms": 0}  # next to no time
SLOW = {"up_mbps": 1, "down_mbps": 2, "rtt_ms": 100}
SPEEDS = {"ann": 1e7, "bob": 2e7, "cid": 3e7, "dan": 4e7}
HOSTED = {
    "framework": {"name": "gsfl", "groups": "selection", "intra": "psl"},
    "selection": {"name": "parallelsfl", "sketch": "tokens", "size": 1},
}


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The virtual seconds of every round."""
    spans: list[float] = []
    original = Engine._round

    async def watched(self: Engine) -> None:
        began = self.run.clock.now()
        await original(self)
        spans.append(self.run.clock.now() - began)

    monkeypatch.setattr(Engine, "_round", watched)
    return spans


def run(out: Path, link: dict[str, Any], **changes: Any) -> tuple[dict[str, float], dict[str, float]]:
    """What each client waited, and the seconds by step name."""
    rows = changes.pop("rows", ROWS)
    summary = train(
        model(num_hidden_layers=8), out, rows, profiles={name: {"flops": SPEEDS[name], **link} for name in rows},
        rounds=1, **changes,
    ).summary  # fmt: skip
    return summary["waiting"], summary["virtual_by_step"]


PEERS = {
    "ring": {"framework": {"name": "ringsfl", "lengths": [2, 2, 2, 2]}},
    "clipped ring": {"framework": {"name": "ringsfl", "lengths": [1, 2, 2, 3]}, "max_grad_norm": 1.0},
    "pairs": {"framework": {"name": "pairingfl", "roles": "fixed"}},
    "chain of two owners": {"framework": {"name": "clicooper", "owners": 2}},
    "two-part chain": {"framework": "clicooper", "partition": TWO},
    "groups": HOSTED,
}


@pytest.mark.parametrize("which", often(PEERS, "pairs", "two-part chain"))
def test_where_devices_run_all_blocks_work_and_waiting_are_the_rounds(
    which: str, tmp_path: Path, took: list[float]
) -> None:
    """Links take no time, so the seconds by step name are those of the devices' work, and nobody else works."""
    waiting, by_step = run(tmp_path / "out", QUICK, **PEERS[which])
    work = sum(by_step.values())
    assert 0.2 * sum(took) < work < len(ROWS) * sum(took)
    assert work + sum(waiting.values()) == pytest.approx(len(ROWS) * sum(took), rel=1e-4)
    assert min(waiting.values()) >= 0
    if which == "groups":  # of one, each at its own device: the slowest never waits
        assert waiting["ann"] <= 1e-4 * sum(took) < waiting["bob"] < waiting["cid"] < waiting["dan"]
    if which == "pairs":  # a helper works in the trunk's part of its partner's steps, the data client in the rest
        for data, helper in (("ann", "bob"), ("cid", "dan")):
            steps = [line["virtual_seconds"] for line in lines(tmp_path / "out") if line["client"] == data]
            trunk = sum(step["trunk_forward"] + step["trunk_backward"] for step in steps)
            own = sum(sum(step.values()) for step in steps) - trunk
            assert waiting[helper] == pytest.approx(sum(took) - trunk, rel=1e-4)
            assert waiting[data] == pytest.approx(sum(took) - own, rel=1e-4)


def test_a_transfer_between_two_clients_keeps_both_at_work(tmp_path: Path, took: list[float]) -> None:
    """A chain of one trainer: either waits only while the other computes, whatever the link takes."""
    rows = {name: ROWS[name] for name in ("ann", "bob")}
    waiting, by_step = run(tmp_path / "out", SLOW, rows=rows, framework="clicooper")
    trunk = by_step["trunk_forward"] + by_step["trunk_backward"]
    ends = by_step["head_forward"] + by_step["tail_step"] + by_step["head_backward"]
    assert sum(took) > 2 * (trunk + ends) / 3
    assert waiting == {"ann": pytest.approx(trunk, rel=1e-6), "bob": pytest.approx(ends, rel=1e-6)}


SERVED = {
    "sequential-sl": {"framework": "sequential-sl"},
    "psl": {"framework": "psl"},
    "sfl-v1": {"framework": "sfl-v1"},
    "sfl-v2": {"framework": {"name": "sfl-v2", "local_steps": 2}},
    "gsfl": {"framework": {"name": "gsfl", "groups": 2}},
    "gsfl-psl": {"framework": {"name": "gsfl", "groups": 2, "intra": "psl"}, "partition": TWO},
    "p-sl": {"framework": "p-sl"},
    "async-sfl": {"framework": {"name": "async-sfl", "uploads": 2}, "aggregator": "dt-asfl"},
    "minibatch-sfl": {"framework": "sfl-v1", "mixing": "minibatch-sfl"},
}


@pytest.mark.parametrize("which", often(SERVED, "sfl-v1"))
def test_with_a_server_own_work_and_waiting_are_the_rounds(which: str, tmp_path: Path, took: list[float]) -> None:
    """All but the trunk's seconds (and the set-up's, which are of no round) are a client's work or its link's."""
    waiting, by_step = run(tmp_path / "out", SLOW, **SERVED[which])
    no_clients = ("partition", "trunk_forward", "trunk_backward")
    work = sum(seconds for name, seconds in by_step.items() if name not in no_clients)
    assert work + sum(waiting.values()) == pytest.approx(len(ROWS) * sum(took), rel=1e-6)


def test_a_second_in_which_a_device_and_its_link_work_is_counted_once() -> None:
    clock = VirtualClock()
    queues = Queues(clock, {})

    async def spend(start: float, seconds: float, *busy: str) -> None:
        await clock.sleep(start, key="test")
        await queues.spend("head_forward", seconds, "test", busy=busy, own=True)

    async def main() -> None:
        await asyncio.gather(
            spend(0, 3, "ann"), spend(1, 1, "ann", "bob"), spend(2, 4, "ann"), spend(8, 1, "ann"), spend(9, 1, "ann")
        )

    clock.run(main())
    assert queues.busy == {"ann": pytest.approx(8), "bob": pytest.approx(1)}  # 0 to 6, 8 to 10; 1 to 2
    assert queues.outside["head_forward"] == 10
