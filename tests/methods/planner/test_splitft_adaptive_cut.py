"""The row's check: the rule alone, a real run, gamma = 0, and that a move changes no logits (tests/test_moving.py)."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cutlayer.contracts import Layout
from cutlayer.errors import CutlayerError, MethodError
from cutlayer.methods.planner.splitft_adaptive_cut import SplitFTAdaptiveCut
from cutlayer.planning import Situation, at_cut
from cutlayer.profiles import Profile
from spine import MOSTLY_U, TWO, U, adapter, equal, lines, losses, model, often, train
from tiny import text_rows

BLOCKS = 8


class Costs:
    """A client's blocks take ``seconds`` each and hold ``size`` bytes each."""

    def __init__(self, seconds: dict[str, float], size: int = 10) -> None:
        self.seconds, self.size = seconds, size

    def stages(self, layout: Layout, client: str) -> Any:
        from cutlayer.costs import Stages

        return Stages(len(layout.head) * self.seconds[client], 0.0, 1.0, 0.0, 0.0)

    def memory(self, layout: Layout, client: str) -> int:
        return len(layout.head) * self.size


def situation(
    accuracy: dict[str, float], cuts: dict[str, int], *, profiles: dict[str, Profile] | None = None,
    seconds: dict[str, float] | None = None,
) -> Situation:  # fmt: skip
    whole = Layout(range(0), range(BLOCKS), range(BLOCKS, BLOCKS), tail_at_client=True)
    layouts = {client: at_cut(whole, cut) for client, cut in cuts.items()}
    costs: Any = Costs(seconds or dict.fromkeys(cuts, 1.0))
    return Situation(BLOCKS, layouts, dict.fromkeys(cuts, 10.0), profiles or {}, costs, accuracy)


def profile(memory: int | None) -> Profile:
    return Profile(1.0, 1.0, 1.0, 0.0, memory)


NAMES = ("ann", "bob", "cid", "dan")
ACCURACY = dict(zip(NAMES, (0.45, 0.35, 0.35, 0.25), strict=True))


def decide(planner: SplitFTAdaptiveCut, times: int, **more: Any) -> list[dict[str, int]]:
    """The cuts after each of some decisions."""
    now = situation({}, dict.fromkeys(NAMES, 2), **more)
    found = [dict(planner.start(now))]
    for _ in range(times):
        found.append(dict(planner.plan(situation(ACCURACY, found[-1], **more))))
    return found


def test_the_better_client_grows_and_the_worse_shrinks() -> None:
    found = decide(SplitFTAdaptiveCut(), 10)
    assert found[0] == dict.fromkeys(NAMES, 2)
    assert found[-1]["ann"] > 2 > found[-1]["dan"] >= 1
    assert found[-1]["bob"] == found[-1]["cid"] == 2  # they are the mean
    for before, after in itertools.pairwise(found):
        assert all(abs(after[c] - before[c]) <= 1 for c in NAMES)
    assert all(1 <= cut <= BLOCKS - 1 for cuts in found for cut in cuts.values())


def test_a_client_never_passes_what_it_can_hold() -> None:
    """Memory of two blocks; and a budget of seconds, which is at first the median client's."""
    held = {c: profile(25 if c == "ann" else None) for c in NAMES}
    found = decide(SplitFTAdaptiveCut(budget=100.0), 10, profiles=held)
    assert {cuts["ann"] for cuts in found} == {2}
    slow = {"ann": 1.0, "bob": 1.0, "cid": 1.0, "dan": 4.0}
    free = {c: profile(None) for c in NAMES}
    planner = SplitFTAdaptiveCut(budget=4.0)
    bounds = planner.bounds(situation({}, dict.fromkeys(NAMES, 2), profiles=free, seconds=slow))
    assert {c: (b.start, b.stop - 1) for c, b in bounds.items()} == {**dict.fromkeys(NAMES[:3], (1, 4)), "dan": (1, 1)}
    medians = SplitFTAdaptiveCut().bounds(situation({}, dict.fromkeys(NAMES[:3], 2), profiles={
        c: free[c] for c in NAMES[:3]}, seconds=slow))  # fmt: skip
    assert {b.stop - 1 for b in medians.values()} == {2}


def test_a_client_that_can_hold_nothing_is_named() -> None:
    held = {c: profile(5 if c == "bob" else None) for c in NAMES}
    with pytest.raises(MethodError, match="client 'bob' cannot hold 1 head blocks"):
        SplitFTAdaptiveCut().bounds(situation({}, dict.fromkeys(NAMES, 2), profiles=held))


def test_equal_accuracies_move_nothing_and_small_differences_neither() -> None:
    cuts = dict(zip(NAMES, (1, 2, 3, 2), strict=True))
    planner = SplitFTAdaptiveCut()
    for accuracy in ((0.4, 0.4, 0.4, 0.4), (0.401, 0.4, 0.399, 0.4)):
        assert planner.plan(situation(dict(zip(NAMES, accuracy, strict=True)), cuts)) == cuts


def test_the_weights_are_the_rules() -> None:
    """w (1 + gamma d), by hand; and they are what a checkpoint keeps."""
    planner = SplitFTAdaptiveCut()
    planner.plan(situation(ACCURACY, dict.fromkeys(NAMES, 2)))
    apart = (0.45 - 0.35) / 0.35
    assert planner.state() == pytest.approx({"ann": 1 + 0.5 * apart, "dan": 1 - 0.5 * apart})
    other = SplitFTAdaptiveCut()
    other.restore(planner.state())
    now = situation(ACCURACY, dict.fromkeys(NAMES, 2))
    assert other.plan(now) == planner.plan(now)
    assert other.state() == planner.state()


def test_the_mean_is_over_examples_and_a_weight_stays_in_its_bounds() -> None:
    """ann has 30 examples and bob 10, so the mean is (30 * 0.5 + 10 * 0.2) / 40 = 0.425."""
    now = replace(situation({"ann": 0.5, "bob": 0.2}, {"ann": 2, "bob": 2}), examples={"ann": 30.0, "bob": 10.0})
    planner = SplitFTAdaptiveCut(gamma=0.5)
    planner.plan(now)
    assert planner.state() == pytest.approx({"ann": 1 + 0.5 * 0.075 / 0.425, "bob": 1 - 0.5 * 0.225 / 0.425})
    eager = SplitFTAdaptiveCut(gamma=20.0)
    eager.plan(now)
    assert eager.state() == {"ann": 4.0, "bob": 0.25}  # by the rule 4.5 and -9.6


def test_a_cut_follows_the_weight_beside_the_others() -> None:
    """Weights 1.5 and 2, mean 1.75: both targets, 2 * 1.5 / 1.75 and 2 * 2 / 1.75, are nearest to the 2 there are."""
    planner = SplitFTAdaptiveCut(gamma=1e-9)  # the weights stay as they are
    planner.restore({"ann": 1.5, "bob": 2.0})
    assert planner.plan(situation({"ann": 0.5, "bob": 0.2}, {"ann": 2, "bob": 2})) == {"ann": 2, "bob": 2}
    planner.restore({"ann": 1.0, "bob": 2.5})
    assert planner.plan(situation({"ann": 0.5, "bob": 0.2}, {"ann": 2, "bob": 2})) == {"ann": 1, "bob": 3}


def test_a_first_cut_that_the_model_does_not_leave_is_refused() -> None:
    """Of 8 blocks a client can have 7; a client that holds less than ``cut`` starts with what it can hold."""
    now = situation({}, dict.fromkeys(NAMES, 2))
    assert SplitFTAdaptiveCut(cut=7).start(now) == dict.fromkeys(NAMES, 7)
    with pytest.raises(MethodError, match="cut is 8, but a client of this model can hold at most 7 blocks"):
        SplitFTAdaptiveCut(cut=8).bounds(now)


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"gamma": -1.0}, {"least": 3}, {"weights": (2.0, 4.0)}, {"shard": 0.0}]
)
def test_options_out_of_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SplitFTAdaptiveCut(**wrong)


WORDS = [f"w{number}" for number in range(4, 64)]


def templates(share: float, seed: int) -> list[dict[str, str]]:
    """24 rows of eight words; a ``share`` of the words is always the same, the others are drawn."""
    draw = random.Random(seed)
    fixed = int(share * 8)
    return [{"text": " ".join([*WORDS[:fixed], *draw.choices(WORDS, k=8 - fixed)])} for _ in range(24)]


@pytest.mark.parametrize("partition", [TWO, pytest.param(U, marks=pytest.mark.slow)], ids=["two-part", "u-shape"])
def test_in_a_run_the_client_with_easy_text_grows(partition: dict[str, Any], tmp_path: Path) -> None:
    """P = 1: one client has one sentence over and over, another words at random, two have half of each."""
    clients = {"ann": templates(1, 0), "bob": templates(0.5, 1), "cid": templates(0.5, 2), "dan": templates(0, 3)}
    result = train(
        model(num_hidden_layers=BLOCKS), tmp_path / "out", clients, partition=partition, rounds=8,
        framework={"name": "sfl-v2", "local_steps": 8}, peft="full",
        planner={"name": "splitft-adaptive-cut", "every": 1, "shard": 0.15}, optimizer={"name": "adamw", "lr": 3e-3},
    )  # fmt: skip
    cuts = result.summary["cuts"]
    assert cuts["ann"]["head_blocks"] > 2 > cuts["dan"]["head_blocks"], cuts
    for found in cuts.values():
        path = [2, *(cut for _, cut in found["moves"])]
        assert all(abs(b - a) == 1 for a, b in itertools.pairwise(path))
    assert all(line["loss"] > 0 for line in lines(tmp_path / "out"))


@MOSTLY_U
@pytest.mark.parametrize("framework", often(["sfl-v1", "sfl-v2"], "sfl-v2"))
def test_gamma_nought_is_a_run_with_fixed_cuts(framework: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, and no accuracy is asked for."""
    clients = {name: text_rows(6, seed=i) for i, name in enumerate(NAMES)}
    changes: dict[str, Any] = {"partition": {**partition, "head_blocks": 2}, "framework": framework, "rounds": 3}
    planner = {"name": "splitft-adaptive-cut", "gamma": 0.0, "every": 1}
    plain = train(model(num_hidden_layers=BLOCKS), tmp_path / "plain", clients, **changes)
    planned = train(model(num_hidden_layers=BLOCKS), tmp_path / "planned", clients, planner=planner, **changes)
    assert losses(tmp_path / "plain") == losses(tmp_path / "planned")
    assert equal(adapter(tmp_path / "plain"), adapter(tmp_path / "planned"))
    assert plain.summary["bytes"] == planned.summary["bytes"]


def test_a_client_with_one_example_cannot_keep_any_back(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match="needs one to train on and one to validate on"):
        train(model(num_hidden_layers=BLOCKS), tmp_path / "out", {"ann": text_rows(1), "bob": text_rows(4)},
              framework="sfl-v2", planner="splitft-adaptive-cut")  # fmt: skip
