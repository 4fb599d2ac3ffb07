"""The row's check: near the best coverage, fair over time, a mix near that of all, and pairs that end together."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arranged import kill_and_resume, told, two_domains
from cutlayer.arrangement import Arrangement, Speed, Told
from cutlayer.driver import Run
from cutlayer.methods.selection._mixes import divergence
from cutlayer.methods.selection.pairingfl_selection import Gain
from cutlayer.registry import create
from spine import MOSTLY_U, adapter, caught, equal, losses, model, train  # noqa: F401

NAME = "pairingfl-selection"


def choosing(**options: Any) -> Any:
    return create("selection", NAME, {"sketch": "labels", **options})


def clients(seed: int, count: int = 10, classes: int = 10) -> Told:
    """Clients with mixes from a Dirichlet distribution, and devices of unequal speed."""
    draw = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(count)]
    speeds = {n: Speed(own=float(draw.uniform(1, 5)), middle=float(draw.uniform(1, 5))) for n in names}
    return told(
        {n: draw.dirichlet([0.2] * classes).tolist() for n in names}, speeds=speeds,
        sizes={n: float(draw.integers(10, 100)) for n in names},
    )  # fmt: skip


def test_a_coverage_is_near_the_best() -> None:
    """Ten clients, four taken, twenty draws: never below 1 - 1/e, and mostly above 95%."""
    shares = []
    for seed in range(20):
        given = clients(seed)
        gain = Gain(given, 0.0)
        best = max(gain.cover(group) for group in combinations(given.everybody, 4))
        taken = choosing(count=4, nu=0.0).chosen(0, given, dict.fromkeys(given.everybody, 0))
        assert len(taken) == 4
        shares.append(gain.cover(taken) / best)
    assert min(shares) >= 1 - 1 / np.e
    assert np.mean(np.array(shares) > 0.95) > 0.9


def rounds(selection: Any, given: Told, count: int) -> list[Arrangement]:
    """What it arranges in round after round."""
    found: list[Arrangement] = []
    for number in range(count):
        found.append(selection.arrange(number, given, found[-1] if found else None))
    return found


@pytest.mark.parametrize(("taken", "slack"), [(4, 1.0), (3, 0.0), (5, 2.0), (1, 1.0)])
def test_b_nobody_is_left_out_for_long(taken: int, slack: float) -> None:
    for seed in range(3):
        last = rounds(choosing(count=taken, slack=slack), clients(seed), 50)[-1]
        counts = last.noted.values()
        assert sum(counts) == 50 * taken
        assert max(counts) - min(counts) <= 2 * slack + 1


def test_c_the_mix_decides_between_clients_that_cover_alike() -> None:
    """By hand: c covers most. With a or b the coverage is the same, but the mix of b and c is nearer to that of all."""
    given = told({"a": (1, 0), "b": (0, 1), "c": (0.5, 0.5)}, sizes={"a": 1.0, "b": 3.0, "c": 4.0})
    gain = Gain(given, 3.0)
    covered = 2 + np.sqrt(0.5)
    assert gain.cover(["c", "a"]) == pytest.approx(covered) == gain.cover(["c", "b"])
    # The mix of all is (3, 5) / 8, that of a and c (3, 2) / 5, that of b and c (2, 5) / 7.
    far = 0.6 * np.log(0.6 * 8 / 3) + 0.4 * np.log(0.4 * 8 / 5)
    near = 2 / 7 * np.log(2 / 7 * 8 / 3) + 5 / 7 * np.log(5 / 7 * 8 / 5)
    assert gain.of(["c", "a"]) == pytest.approx(covered - 3 * far)
    assert gain.of(["c", "b"]) == pytest.approx(covered - 3 * near)
    nobody = dict.fromkeys("abc", 0)
    assert choosing(count=2).chosen(0, given, nobody) == ["b", "c"]
    assert choosing(count=2, nu=0.0).chosen(0, given, nobody) == ["a", "c"]  # the first of equals


def test_c_the_mix_of_the_chosen_is_nearer_to_that_of_all_than_a_random_one() -> None:
    for seed in range(3):
        given, draw = clients(seed), np.random.default_rng(seed)
        gain = Gain(given, 1.0)

        def distance(names: Any, __given: Told = given, __gain: Gain = gain) -> float:
            rows = [__gain.names.index(name) for name in names]
            mix = __gain.sizes[rows] @ __gain.mixes[rows] / __gain.sizes[rows].sum()
            return divergence(mix, __gain.whole)

        chosen = np.mean([distance(a.chosen) for a in rounds(choosing(count=4), given, 30)])
        random = np.mean([distance(draw.choice(given.everybody, 4, replace=False)) for _ in range(200)])
        assert chosen < random


def test_c_the_mix_is_nearer_than_with_coverage_alone() -> None:
    """In the mean over 20 draws of clients, first rounds. Seen: 0.107 nats from the mix of all against 0.177."""
    distance = dict.fromkeys((None, 0.0), 0.0)
    for seed in range(20):
        given = clients(seed)
        gain = Gain(given, 1.0)
        for nu in distance:
            taken = choosing(count=4, nu=nu).chosen(0, given, dict.fromkeys(given.everybody, 0))
            distance[nu] += (gain.cover(taken) - gain.of(taken)) / 20
    assert distance[None] < 0.8 * distance[0.0]


def test_d_the_slowest_pair_is_as_quick_as_can_be() -> None:
    """Against every matching of four data clients with six helpers, and so against any random one."""
    gained = []
    for seed in range(5):
        given, names = clients(seed), [f"c{i}" for i in range(10)]
        data, helpers = names[:4], names[4:]
        selection = choosing()

        def makespan(pairs: Any, __selection: Any = selection, __given: Told = given) -> float:
            return max(__selection.pair_cost(__given, a, u) for a, u in pairs)

        found = makespan(selection.matched(given, data, helpers))
        every = [makespan(zip(data, order, strict=True)) for order in permutations(helpers, 4)]
        assert found == min(every)
        gained.append(np.mean(every) - found)
    assert np.mean(gained) > 0.1  # a slow data client can make all matchings of a round alike


def test_matchings_differ_in_what_they_minimise() -> None:
    given = clients(3)
    data, helpers = [f"c{i}" for i in range(4)], [f"c{i}" for i in range(4, 10)]
    cost = {}
    for matching in ("bottleneck", "hungarian", "greedy"):
        for kind in ("step", "gap"):
            selection = choosing(matching=matching, cost=kind)
            pairs = selection.matched(given, data, helpers)
            assert sorted(a for a, _ in pairs) == data
            assert len({u for _, u in pairs}) == 4
            costs = [selection.pair_cost(given, a, u) for a, u in pairs]
            cost[matching, kind] = (max(costs), sum(costs))
    for kind in ("step", "gap"):
        assert cost["bottleneck", kind][0] == min(cost[m, kind][0] for m in ("bottleneck", "hungarian", "greedy"))
        assert cost["hungarian", kind][1] == min(cost[m, kind][1] for m in ("bottleneck", "hungarian", "greedy"))


def test_quick_pairs_make_more_steps_and_weigh_more() -> None:
    speeds = {
        "a": Speed(own=1, middle=1),
        "b": Speed(own=4, middle=4),
        "c": Speed(own=1, middle=1),
        "d": Speed(own=4, middle=4),
    }
    given = told(
        {"a": (1, 0), "b": (0, 1), "c": (1, 0), "d": (0, 1)}, speeds=speeds, local_steps=8,
        sizes={"a": 10.0, "b": 20.0, "c": 10.0, "d": 20.0},
    )  # fmt: skip
    made = choosing(steps="by-time").arrange(0, given, None)
    assert made.chosen == ("a", "b")
    assert made.pairs == (("a", "c"), ("b", "d"))
    assert made.steps == {"a": 8, "b": 2}
    assert made.weights == {"a": 80.0, "b": 40.0}


@MOSTLY_U
def test_pairs_train_as_sfl_v1_with_whom_it_chose(partition: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    rows = two_domains(5)
    selection = {"name": NAME, "sketch": "tokens"}
    common = {"partition": partition, "rounds": 4, "optimizer": {"name": "sgd", "lr": 0.05}, "selection": selection}
    train(
        model(),
        tmp_path / "one",
        rows,
        framework={"name": "pairingfl", "pairs": "selection", "local_steps": 2},
        **common,
    )
    train(model(), tmp_path / "two", rows, framework={"name": "sfl-v1", "local_steps": 2}, **common)
    assert sorted(losses(tmp_path / "one")) == sorted(losses(tmp_path / "two"))
    assert equal(adapter(tmp_path / "one"), adapter(tmp_path / "two"))
    steps = caught[0].counters.steps
    assert steps == caught[1].counters.steps
    assert sum(steps.values()) == 4 * 2 * 2
    assert max(steps.values()) - min(steps.values()) <= 2 * 3
    between = {pair for pair in caught[0].meter.by_pair if "server" not in pair}
    assert between
    assert not {pair for pair in caught[1].meter.by_pair if "server" not in pair}


@pytest.mark.parametrize("framework", ["sfl-v2", "sequential-sl", "psl"])
def test_any_framework_takes_whom_it_chooses(framework: str, tmp_path: Path, caught: list[Run]) -> None:
    selection = {"name": NAME, "sketch": "tokens", "count": 3, "steps": "by-time"}
    train(model(), tmp_path / "out", two_domains(4), framework=framework, selection=selection, rounds=4)
    run = caught[0]
    assert sum(run.counters.steps.values()) == 12
    assert run.counters.steps == {c: int(n) for c, n in run.arrangement.noted.items()}
    assert dict(run.parts.foreseen) == dict.fromkeys(run.clients, 3)


def test_runs_counted_in_steps_come_to_their_end(tmp_path: Path, caught: list[Run]) -> None:
    selection = {"name": NAME, "sketch": "tokens"}
    framework = {"name": "pairingfl", "pairs": "selection"}
    train(model(), tmp_path / "out", two_domains(3), framework=framework, selection=selection, steps=2)
    assert caught[0].counters.steps == dict.fromkeys(("c0", "c1", "c2"), 2)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    selection = {"name": NAME, "sketch": "tokens", "steps": "by-time"}
    profiles = {f"c{i}": {"flops": 1e9 * (1 + i), "up_mbps": 10, "down_mbps": 10, "rtt_ms": 5} for i in range(5)}
    framework = {"name": "pairingfl", "pairs": "selection", "local_steps": 2}
    kill_and_resume(model(), tmp_path, two_domains(5), framework=framework, selection=selection, profiles=profiles)
