"""The row's check: equal step times, within two percent of an exhaustive search, and bytes that no cut changes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from cutlayer.contracts import Layout
from cutlayer.costs import Memory, Profile, Stages, Training, memory
from cutlayer.errors import MethodError
from cutlayer.methods.planner.capability_cut import CapabilityCut
from cutlayer.planning import Costs, Situation, at_cut
from cutlayer.shapes import shape_of
from cutlayer.wire import STEP_NAMES
from spine import MOSTLY_U, model, train
from tiny import text_rows

BLOCKS = 6
LAN = {"up": 1e9, "down": 1e9, "rtt": 0.0}


def situation(
    flops: dict[str, float], *, workers: int = 8, server: float = 1e13, memories: dict[str, int] | None = None,
    tail: bool = False, holds: Any = memory, at_server: int | None = None,
) -> Situation:  # fmt: skip
    """Clients with these speeds on a tiny model of six blocks."""
    shape = shape_of(AutoConfig.from_pretrained(model(num_hidden_layers=BLOCKS)), task="causal")
    profiles = {c: Profile(f, **LAN, memory=(memories or {}).get(c)) for c, f in flops.items()}
    costs = Costs(
        shape, Training(rank=2), rows=4, micro=1, lengths=dict.fromkeys(flops, 32), profiles=profiles,
        server=Profile(server, **LAN, memory=at_server, workers=workers), number=4, holds=holds,
    )  # fmt: skip
    whole = Layout(range(1), range(1, BLOCKS), range(BLOCKS, BLOCKS), tail_at_client=True)
    two = Layout(range(1), range(1, 1), range(1, BLOCKS), tail_at_client=False)
    return Situation(BLOCKS, dict.fromkeys(flops, whole if tail else two), dict.fromkeys(flops, 1.0), profiles, costs)


UNEQUAL = {"slow": 1e9, "middle": 2e9, "fast": 4e9}


def times(planner: CapabilityCut, now: Situation, cuts: dict[str, int]) -> list[float]:
    return [planner._alone(now, client, cut) for client, cut in cuts.items()]


def spread(found: list[float]) -> float:
    return (max(found) - min(found)) / max(found)


@pytest.mark.parametrize("tail", [False, True], ids=["two-part", "u-shape"])
def test_the_spread_of_step_times_falls_by_half(tail: bool) -> None:
    """Speeds 1:2:4, time dominated by the clients' compute, against one common cut."""
    now, planner = situation(UNEQUAL, tail=tail), CapabilityCut()
    cuts = dict(planner.start(now))
    common = dict.fromkeys(UNEQUAL, cuts["slow"])
    if tail:  # a tail's work, which no cut moves, is in every client's time
        assert spread(times(planner, now, cuts)) < spread(times(planner, now, common))
    else:
        assert spread(times(planner, now, cuts)) <= spread(times(planner, now, common)) / 2
    assert cuts["slow"] < cuts["middle"] <= cuts["fast"]


@pytest.mark.parametrize("workers", [8, 1], ids=["parallel", "queue"])
@pytest.mark.parametrize("server", [1e13, 4e9, 1e9], ids=["fast", "middling", "slow"])
def test_no_worse_than_exhaustive_search(workers: int, server: float) -> None:
    """Over all cuts from 1 to 5 of three clients."""
    now, planner = situation(UNEQUAL, workers=workers, server=server), CapabilityCut()
    found = planner._step(now, planner.start(now))
    every = (dict(zip(UNEQUAL, cuts, strict=True)) for cuts in itertools.product(range(1, BLOCKS), repeat=3))
    assert found <= min(planner._step(now, cuts) for cuts in every) * 1.02


def test_the_goals_differ_where_time_leaves_a_choice() -> None:
    """A slow link sets the step time of one client; the others may do much or little."""
    now = situation({"slow": 1e8, "fast": 1e10})
    unload, spare = CapabilityCut().start(now), CapabilityCut(goal="client").start(now)
    assert unload["fast"] > spare["fast"] == 1
    assert CapabilityCut()._step(now, unload) == CapabilityCut()._step(now, spare)


def test_memory_bounds_a_client() -> None:
    by_block = lambda shape, *, blocks, **_: Memory(0, 0, 100 * len(blocks), 0)  # noqa: E731
    now = situation({"ann": 1e9, "bob": 1e12}, memories={"bob": 250}, holds=by_block)
    assert CapabilityCut().start(now)["bob"] == 2
    with pytest.raises(MethodError, match="client 'bob' cannot hold 3 head blocks"):
        CapabilityCut(least=3).start(now)


def test_the_servers_memory_takes_time() -> None:
    """It holds fewer blocks than the fastest plan leaves it, so the clients' step becomes longer."""
    by_block = lambda shape, *, blocks, **_: Memory(0, 0, 100 * len(blocks), 0)  # noqa: E731
    free = CapabilityCut().start(situation(UNEQUAL, holds=by_block))
    tight = CapabilityCut().start(situation(UNEQUAL, holds=by_block, at_server=700))
    assert sum(BLOCKS - cut for cut in free.values()) > 7 >= sum(BLOCKS - cut for cut in tight.values())
    with pytest.raises(MethodError, match="no balanced plan fits the server's memory"):
        CapabilityCut().start(situation(UNEQUAL, holds=by_block, at_server=100))


def test_without_profiles_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="the run has no profiles"):
        train(model(), tmp_path / "out", {"ann": text_rows(3), "bob": text_rows(3)}, framework="sfl-v1",
              planner="capability-cut")  # fmt: skip


def test_measured_times_move_cuts_one_block_and_only_for_a_gain() -> None:
    """A client that turns out four times slower gives blocks away, one a plan, once the mean has seen enough."""
    planner, now = CapabilityCut(), situation({"ann": 4e9, "bob": 4e9})
    cuts = {"ann": 4, "bob": 4}
    path = []
    for _ in range(12):
        there = Situation(
            BLOCKS, {c: at_cut(now.layouts[c], cut) for c, cut in cuts.items()}, now.examples, now.profiles, now.costs,
        )  # fmt: skip
        predicted = {c: planner_time(there, c) for c in cuts}
        measured = {"ann": predicted["ann"], "bob": 4 * predicted["bob"]}
        cuts = dict(planner.plan(Situation(**{**vars(there), "measured": measured})))
        path.append(dict(cuts))
    assert path[-1]["bob"] < 4
    assert all(abs(b["bob"] - a["bob"]) <= 1 for a, b in itertools.pairwise(path))
    again = CapabilityCut()
    again.restore(planner.state())
    assert again.state() == planner.state() != {}


class FlatCosts:
    """A head block takes a client one second, any other block the server ``seconds``; links take no time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.server = seconds, Profile(1.0, **LAN, workers=1)

    def stages(self, layout: Layout, client: str) -> Stages:
        return Stages(float(len(layout.head)), 0.0, self.seconds * len(layout.middle), 0.0, 0.0)


def test_a_move_must_gain_more_than_the_hysteresis() -> None:
    """From 1 head block of 6 to 2: 1 + 5 * 1.2 = 7 s becomes 2 + 4 * 1.2 = 6.8 s, a gain of 2.9 percent."""
    two = Layout(range(1), range(1, 1), range(1, BLOCKS), tail_at_client=False)

    def planned(seconds: float, **options: Any) -> dict[str, int]:
        costs: Any = FlatCosts(seconds)
        return dict(CapabilityCut(**options).plan(
            Situation(BLOCKS, {"ann": two}, {"ann": 1.0}, {"ann": Profile(1.0, **LAN)}, costs)
        ))  # fmt: skip

    assert planned(1.2) == planned(1.2, hysteresis=0.03) == {"ann": 1}
    assert planned(1.2, hysteresis=0.028) == {"ann": 2}
    assert planned(2.0) == {"ann": 2}  # 11 s becomes 10 s, and no more than one block moves


def planner_time(now: Situation, client: str) -> float:
    one = now.stages(client, now.cut(client))
    return one.forward + one.up + one.down + one.backward


@MOSTLY_U
def test_bytes_of_a_step_are_those_of_every_cut(partition: dict[str, Any], tmp_path: Path) -> None:
    """Steps 3 to 9 byte for byte; only what step 11 moves depends on the cut."""
    clients = {name: text_rows(6, seed=i) for i, name in enumerate(UNEQUAL)}
    profiles = {name: {"flops": f, "up_mbps": 1000, "down_mbps": 1000, "rtt_ms": 0} for name, f in UNEQUAL.items()}
    changes: dict[str, Any] = {"partition": partition, "framework": "sfl-v1", "rounds": 3, "profiles": profiles}
    folder = model(num_hidden_layers=BLOCKS)
    planned = train(folder, tmp_path / "planned", clients, planner={"name": "capability-cut", "every": 1}, **changes)
    plain = train(folder, tmp_path / "plain", clients, **changes)
    assert len({found["head_blocks"] for found in planned.summary["cuts"].values()}) > 1
    for step in STEP_NAMES[2:9]:
        assert planned.summary["bytes"][step] == plain.summary["bytes"][step]
    assert planned.summary["bytes"]["aggregate"] > plain.summary["bytes"]["aggregate"]
