"""The row's check: the rate by the clients of a step, what it is good for, and one gradient for all at the cut."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import joint
from cutlayer.config import load_config
from cutlayer.driver import Run
from cutlayer.errors import ConfigError, NonFinite
from cutlayer.models.slots import Slot
from cutlayer.registry import create
from cutlayer.wire import read_frames
from spine import MOSTLY_U, TWO, block_of, by_turns, caught, equal, lines, losses, model, train  # noqa: F401
from tiny import text_rows

NAMES = ("ann", "bob", "cid", "dan")
ROWS = {name: text_rows(3, seed=i) for i, name in enumerate(NAMES)}
SGD = {"name": "sgd", "lr": joint.LR}


def even(seed: int, count: int) -> list[dict[str, Any]]:
    """Texts of eight words each; the label says in which half of the vocabulary they begin."""
    draw = random.Random(seed)
    rows = [[draw.randrange(40, 97) for _ in range(8)] for _ in range(count)]
    return [{"text": " ".join(f"w{i}" for i in row), "label": int(row[0] >= 68)} for row in rows]


def test_a_the_rate_by_clients_and_updates() -> None:
    for a, wanted in ((0.0, 1.0), (0.5, 2.0), (1.0, 4.0)):
        assert create("optimizer", "sglr", {"a": a, "warmup": 0}).factor(4, 0) == wanted
    rising = create("optimizer", "sglr", {"a": 1.0})
    assert [rising.factor(5, updates) for updates in (0, 49, 99, 500)] == [1.04, 3.0, 5.0, 5.0]
    assert create("optimizer", "sglr", {"mode": "avg_only"}).factor(9, 500) == 1.0
    for options in ({"a": -1.0}, {"a": math.inf}, {"warmup": -1}):
        with pytest.raises(Exception, match=r"must be"):
            create("optimizer", "sglr", options)


@pytest.mark.parametrize("way", ["accumulate", "concatenate", "minibatch-sfl"])
def test_a_it_follows_the_clients_of_each_step(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four in a round, then fewer once some have made their epochs; the clients' own rate stays."""
    rates: list[tuple[str, float]] = []
    step = Slot.update

    def update(self: Slot, **options: Any) -> int:
        made = step(self, **options)
        if self.optimizer is not None:
            rates.append((self.name, self.optimizer.param_groups[0]["lr"]))
        return made

    monkeypatch.setattr(Slot, "update", update)
    rows = {name: text_rows(3 * (1 + (i > 1)), seed=i) for i, name in enumerate(NAMES)}
    changes: dict[str, Any] = {"framework": {"name": "psl", "joint": way}}
    if way == "minibatch-sfl":
        changes = {"framework": "sfl-v1", "mixing": way}
    changes["framework"] = {
        **({"name": "sfl-v1"} if way == "minibatch-sfl" else changes["framework"]), "participation": 0.75
    }  # fmt: skip
    rate = {"name": "sglr", "a": 1.0, "warmup": 0}
    train(model(), tmp_path / "out", rows, **changes, rate=rate, optimizer=SGD, epochs=1)
    by_round: dict[int, int] = {}
    for line in lines(tmp_path / "out"):
        by_round[line["round"]] = by_round.get(line["round"], 0) + 1
    trunk = [round(lr / joint.LR, 9) for name, lr in rates if name == "shared"]
    assert trunk == list(by_round.values())
    assert len(set(trunk)) > 1
    assert {lr for name, lr in rates if name != "shared"} == {joint.LR}


def learnt(tmp_path: Path, rate: float, a: float, clients: int = 8, steps: int = 10) -> float:
    """The last loss of a run with that rate at the clients; infinite where it diverged."""
    rows = {f"c{i}": [{"text": "w50 w60 w70 w80 w90 w45"}] * 2 + even(i, 1) for i in range(clients)}
    out = tmp_path / f"{rate}-{a}"
    try:
        train(
            model(), out, rows, partition=TWO, framework={"name": "psl", "local_steps": steps}, rounds=1,
            rate={"name": "sglr", "a": a, "warmup": 0}, optimizer={"name": "sgd", "lr": rate},
        )  # fmt: skip
    except NonFinite:
        return math.inf
    return sum(line["loss"] for line in lines(out)[-clients:]) / clients


def test_b_a_faster_trunk_learns_faster(tmp_path: Path) -> None:
    """Four clients, at a rate below the edge."""
    found = [learnt(tmp_path, 1 / 16, a, clients=4, steps=6) for a in (1.0, 0.0)]
    assert found[0] < found[1], found


@pytest.mark.slow
def test_b_a_faster_trunk_learns_faster_up_to_the_edge(tmp_path: Path) -> None:
    """Eight clients: eta_max by doubling, eta_c = eta_max / 8; more is better up to a = 1, and a = 2 too much."""
    edge, best = 0.0, math.inf
    for power in range(-2, 4):
        reached = learnt(tmp_path, 2.0**power / 8, 1.0)
        if reached > best:
            break
        edge, best = 2.0**power, reached
    found = {a: learnt(tmp_path, edge / 8, a) for a in (0.0, 0.5, 2.0)} | {1.0: best}
    assert found[1.0] < found[0.5] < found[0.0] < found[2.0], (edge, found)


@MOSTLY_U
def test_c_identical_clients_get_their_own_gradient_back(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    """Same data, so the same steps, to the bit; for three clients too, whose sum rounds."""
    rows = {name: even(0, 6) for name in NAMES[:3]}
    changes: dict[str, Any] = {"partition": partition, "framework": {"name": "psl", "local_steps": 2}, "batch_size": 2}
    train(model(), tmp_path / "plain", rows, **changes)
    train(model(), tmp_path / "out", rows, **changes, rate={"name": "sglr", "mode": "avg_only"})
    assert losses(tmp_path / "plain") == losses(tmp_path / "out")
    for client in rows:
        assert equal(caught[0].state(client), caught[1].state(client))


@by_turns("way", ["accumulate", "concatenate", "minibatch-sfl"])
def test_c_and_d_everybody_goes_back_through_the_mean(
    way: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    """Unequal lengths and micro-batches: the frames down hold the mean of those without averages, sliced."""
    rows = {name: text_rows(2 + 2 * i, seed=i, longest=6 + 5 * i) for i, name in enumerate(NAMES[:3])}
    framework: dict[str, Any] = {"framework": {"name": "psl", "joint": way, "local_steps": 2}}
    if way == "minibatch-sfl":
        framework = {"framework": {"name": "sfl-v1", "local_steps": 2}, "mixing": way}
    gradients: dict[str, dict[tuple[int, int, str], torch.Tensor]] = {}
    for name, rate in (("plain", "none"), ("out", {"name": "sglr", "mode": "avg_only"})):
        train(
            model(), tmp_path / name, rows, partition=partition, **framework, rate=rate, rounds=1, batch_size=2,
            gradient_accumulation=2, record_wire=str(tmp_path / f"{name}-wire"), optimizer={"name": "sgd", "lr": 0.0},
        )  # fmt: skip
        gradients[name] = {
            (header.step, header.micro, header.client): tensors[0]
            for line, header, tensors in read_frames(tmp_path / f"{name}-wire")
            if line["step_name"] == "return_gradients"
        }
    assert gradients["plain"].keys() == gradients["out"].keys()
    once = 0
    for step, micro in {key[:2] for key in gradients["out"]}:
        own = {key[2]: tensor for key, tensor in gradients["plain"].items() if key[:2] == (step, micro)}
        size = [max(tensor.shape[axis] for tensor in own.values()) for axis in (0, 1)]
        mean = torch.zeros(*size, 32)
        for tensor in own.values():
            mean[: tensor.shape[0], : tensor.shape[1]] += tensor / len(own)
        for client, tensor in own.items():
            wanted = mean[: tensor.shape[0], : tensor.shape[1]]
            assert torch.allclose(gradients["out"][step, micro, client], wanted, rtol=0, atol=1e-7)
        once += own[min(own)].numel() * 4
    sent = sum(tensor.numel() * 4 for tensor in gradients["out"].values())
    assert caught[1].meter.repeated == sent - once
    assert caught[0].meter.repeated == 0


def test_c_heads_learn_from_an_averaged_gradient(tmp_path: Path) -> None:
    """IID classification on rows of one length, by loss: seen 0.5491 against 0.5499 with heads that stay as they are.

    That is nearly nothing, and with AdamW at 0.01, which makes whole steps of what is left of a mean, it was 0.17
    against 0.11: averaging harmed (0.41 against 0.02 where the server had a block to train). Nobody looked at accuracy.
    """
    rows = {name: even(i, 32) for i, name in enumerate(NAMES[:2])}
    found = {}
    for name, changes in {
        "mean": {"rate": {"name": "sglr", "mode": "avg_only"}}, "frozen": {"exchange": "splitfrozen"}
    }.items():  # fmt: skip
        train(
            model("bert"), tmp_path / name, rows, partition={**TWO, "head_blocks": 3}, framework="psl", rounds=30,
            batch_size=16, data={"format": "classification"}, optimizer={"name": "sgd", "lr": 0.3}, **changes,
        )  # fmt: skip
        found[name] = sum(loss for _, loss in losses(tmp_path / name)[-4:]) / 4
    assert found["mean"] < found["frozen"], found


@pytest.mark.parametrize("framework", ["sfl-v2", "sfl-v1", "sequential-sl", "gsfl"])
def test_updates_by_one_client_each_are_refused(framework: str) -> None:
    run: dict[str, Any] = {"model": "m", "data": {"train": "x"}, "framework": framework, "rate": "sglr"}
    with pytest.raises(ConfigError, match=f"in framework '{framework}' each has its own"):
        load_config(run)
    load_config({**run, "framework": {"name": "gsfl", "intra": "psl"}})


def test_a_frozen_head_gets_no_average() -> None:
    run: dict[str, Any] = {"model": "m", "data": {"train": "x"}, "framework": "psl", "exchange": "splitfrozen"}
    load_config({**run, "rate": "sglr"})
    with pytest.raises(ConfigError, match="exchange 'splitfrozen' sends none"):
        load_config({**run, "rate": {"name": "sglr", "mode": "both"}})
