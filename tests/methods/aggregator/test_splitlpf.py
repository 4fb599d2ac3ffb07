"""The row's check: whoever trains on wrong targets loses weight, and honest clients of one source keep theirs."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.driver import Run
from cutlayer.errors import MethodError
from cutlayer.parties.client import ClientParty
from cutlayer.parties.federated import FederatedServer
from cutlayer.registry import create
from spine import PARTITIONS, U, adapter, block_of, caught, equal, losses, model, resumed, train, twin_of  # noqa: F401
from tiny import BLOCKS, make_model, make_tokenizer, text_rows, write_rows

NAMES = ("ann", "bob", "cid", "dan")
EQUAL = dict.fromkeys(NAMES, 0.25)
START = {"t": torch.zeros(2, 2), "head": torch.ones(3)}


def told(**options: Any) -> Any:
    """An aggregator that knows of a trunk ``t`` for each client."""
    made = create("aggregator", "splitlpf", options)
    made.begin({name: ["t"] for name in NAMES})
    return made


def states_of(changes: Mapping[str, list[float]]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {"t": START["t"] + torch.tensor(change).reshape(2, 2), "head": START["head"] * i}
        for i, (name, change) in enumerate(changes.items())
    }


def test_one_merge_by_hand() -> None:
    """Of three clients two pull one way and one the other."""
    states = states_of({"ann": [1, 0, 0, 0], "bob": [1, 1, 0, 0], "cid": [-2, 0, 0, 0]})
    weights = {"ann": 0.5, "bob": 0.25, "cid": 0.25}
    aggregator = told(rho=0.25)
    merged = aggregator.merge(START, states, weights)
    ann = torch.cosine_similarity(torch.tensor([1.0, 0]), torch.tensor([0.25 - 0.5, 0.25]), dim=0)
    bob = torch.cosine_similarity(torch.tensor([1.0, 1]), torch.tensor([0.5 - 0.5, 0.0]), dim=0)
    assert float(ann) < 0
    assert float(bob) == 0  # the others cancel each other
    assert aggregator.state() == {"ann": 0.25, "bob": 0.25, "cid": 0.25}
    third = {"ann": 1 / 3, "bob": 1 / 3, "cid": 1 / 3}
    assert aggregator.shares == pytest.approx(third)
    assert torch.allclose(merged["t"], sum((states[c]["t"] / 3 for c in third), torch.zeros(())))
    again = told(rho=0.25)
    again.merge(START, states_of({"ann": [1, 0, 0, 0], "bob": [1, 1, 0, 0], "cid": [0, 1, 0, 0]}), weights)
    wanted = {  # the others: .25 bob + .25 cid, .5 ann + .25 cid, .5 ann + .25 bob
        "ann": 0.25 / math.hypot(0.25, 0.5), "bob": 0.75 / math.hypot(0.5, 0.25) / math.sqrt(2),
        "cid": 0.25 / math.hypot(0.75, 0.25),
    }  # fmt: skip
    assert again.state() == pytest.approx({c: 0.25 + 0.75 * q for c, q in wanted.items()})


def test_a_client_is_not_measured_by_itself() -> None:
    """Orthogonal changes have nothing in common, though each has a cosine of 0.5 with the mean of all four."""
    aggregator = told()
    states = states_of({name: [float(i == j) for j in range(4)] for i, name in enumerate(NAMES)})
    aggregator.merge(START, states, EQUAL)
    assert aggregator.state() == dict.fromkeys(NAMES, 0.5)


def test_only_the_trunk_is_measured_but_all_is_averaged() -> None:
    """What the clients hold, and optimizer state, may be anything."""
    changes = {name: [1.0, float(i), 0.5, 0] for i, name in enumerate(NAMES)}
    plain, wild = told(), told()
    plain.merge(START, states_of(changes), EQUAL)
    states = states_of(changes)
    for number, name in enumerate(NAMES):
        states[name]["head"] = torch.randn(3, generator=torch.Generator().manual_seed(number)) * 100
        states[name]["optimizer/t/exp_avg"] = torch.full((2, 2), float(number))
    merged = wild.merge({**START, "optimizer/t/exp_avg": torch.zeros(2, 2)}, states, EQUAL)
    assert wild.state() == plain.state()
    assert len(set(wild.shares.values())) == 4
    for name in merged:
        assert torch.allclose(merged[name], sum((states[c][name] * a for c, a in wild.shares.items()), torch.zeros(())))


def test_contributions_are_smoothed_remembered_and_floored() -> None:
    """dan goes against the others in every merge; who is absent keeps what it had."""
    changes = {"ann": [1.0, 0, 0, 0], "bob": [1.0, 0, 0, 0], "cid": [1.0, 0, 0, 0], "dan": [-1.0, 0, 0, 0]}
    aggregator = told()
    for merge in range(1, 6):
        aggregator.merge(START, states_of(changes), EQUAL)
        assert aggregator.state() == pytest.approx({"ann": 1, "bob": 1, "cid": 1, "dan": 0.5**merge})
        assert sum(aggregator.shares.values()) == pytest.approx(1)
    assert aggregator.shares == pytest.approx({"dan": 0.025, **dict.fromkeys(("ann", "bob", "cid"), 0.975 / 3)})
    resumed = told()
    resumed.restore(aggregator.state())
    fewer = {name: changes[name] for name in ("ann", "bob", "dan")}
    for one in (aggregator, resumed):
        one.merge(START, states_of(fewer), EQUAL)
        assert one.state()["cid"] == pytest.approx(1)
        assert one.state()["dan"] == pytest.approx(0.5**6)
    assert resumed.shares == aggregator.shares


def test_the_softmax_is_sharper() -> None:
    shares = {}
    for kappa, a_min in ((None, 0.1), (5.0, 0.2), (5.0, 0.01)):
        aggregator = told(kappa=kappa, a_min=a_min)
        aggregator.restore({"dan": 0.4, "ann": 0.8, "bob": 0.8, "cid": 0.8})
        aggregator.merge(START, {name: {"head": torch.ones(1)} for name in NAMES}, EQUAL)
        shares[kappa, a_min] = aggregator.shares["dan"]
    raw = math.exp(5 * 0.5) / (3 * math.exp(5) + math.exp(5 * 0.5))
    assert 0.01 / 4 < raw < 0.2 / 4
    assert shares == pytest.approx({(None, 0.1): 0.4 / 2.8, (5.0, 0.2): 0.2 / 4, (5.0, 0.01): raw})


def test_without_changes_or_memory_all_weigh_the_same() -> None:
    aggregator = told(rho=0.0)
    states = states_of({name: [0.0] * 4 for name in NAMES})
    merged = aggregator.merge(START, states, {"ann": 0.7, "bob": 0.1, "cid": 0.1, "dan": 0.1})
    assert aggregator.shares == EQUAL
    assert merged["t"].eq(0).all()
    aggregator = told()
    aggregator.merge(START, {"ann": states["ann"]}, {"ann": 1.0})  # nobody to be held against
    assert aggregator.state() == {}
    aggregator.merge(START, {c: {"head": s["head"]} for c, s in states.items()}, EQUAL)  # and no trunk
    assert aggregator.state() == {}


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("rho", 1.0, "below 1"), ("a_min", 0.0, "above 0"), ("a_min", 1.0, "below 1"), ("kappa", -1.0, "or null")],
)
def test_unsound_options_are_refused(option: str, value: float, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        create("aggregator", "splitlpf", {option: value})


def test_a_shared_trunk_is_refused(tmp_path: Path) -> None:
    rows = {name: text_rows(3, seed=i) for i, name in enumerate(NAMES)}
    with pytest.raises(MethodError, match=r"none of their own: ann, bob, cid, dan\. Take framework: sfl-v1"):
        train(model(), tmp_path / "out", rows, framework="sfl-v2", aggregator="splitlpf")
    train(model(), tmp_path / "alone", {"ann": rows["ann"]}, framework="sfl-v2", aggregator="splitlpf", rounds=1)


@PARTITIONS
def test_in_a_run_the_first_merge_knows_the_start(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contributions after a round, against plain cosines of the flattened changes of the trunk."""
    seen: list[Any] = []
    original = FederatedServer.merge

    def merge(self: FederatedServer, states: Any, weights: Any = None, cluster: str = "") -> Any:
        seen.append({c: {n: t.clone() for n, t in s.items()} for c, s in states.items()})
        return original(self, states, weights, cluster)

    monkeypatch.setattr(FederatedServer, "merge", merge)
    rows = {name: text_rows(3 + i, seed=i) for i, name in enumerate(NAMES)}
    aggregator = {"name": "splitlpf", "weight_by": "examples"}
    train(
        model(), tmp_path / "out", rows, partition=partition, framework={"name": "sfl-v1", "local_steps": 2},
        aggregator=aggregator, rounds=1,
    )  # fmt: skip
    start = adapter(tmp_path / "out", "adapter_initial")
    measured = [n for n in start if 1 <= block_of(n) < (BLOCKS - 1 if partition == U else BLOCKS)]
    assert 0 < len(measured) < len(start)
    (states,) = seen

    def change(client: str) -> Tensor:
        parts = [(states[client][_inner(n, states[client])].double() - start[n].double()) for n in measured]
        return torch.cat([part.flatten() for part in parts])

    sizes = {name: len(rows[name]) for name in NAMES}
    for name in NAMES:
        others = sum((change(c) * sizes[c] for c in NAMES if c != name), torch.zeros(()))
        q = float(torch.cosine_similarity(change(name), others, dim=0))
        assert caught[0].federated.aggregator.state()[name] == pytest.approx(0.5 + 0.5 * max(0.0, q), abs=1e-9)


def _inner(name: str, state: Mapping[str, Tensor]) -> str:
    """The slot's name of an adapter's tensor."""
    wanted = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
    assert wanted in state, (wanted, list(state)[:2])
    return wanted


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, caught: list[Run]) -> None:
    """Contributions and the state before the round come out of the checkpoint."""
    rows = {name: text_rows(4, seed=i) for i, name in enumerate(NAMES)}
    train(
        model(), tmp_path / "whole", rows, framework={"name": "sfl-v1", "participation": 0.75}, aggregator="splitlpf",
        rounds=4, checkpoint_every=1,
    )  # fmt: skip
    part = twin_of(tmp_path / "whole")
    resumed(part)
    first, last = caught[0].federated.aggregator, caught[-1].federated.aggregator
    assert first.state() == last.state()
    assert first.shares == last.shares
    assert len(set(first.state().values())) == 4
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))


# The toy: sentences of a chain in which each word has two successors, a model that has seen a little of it, and a
# client whose targets are permuted over the batch.

WORDS = [word for word in range(4, 97) if not 30 <= word < 40]  # w3 is the unknown word, which splits w30 to w39
DRAW = random.Random(5)
NEXT = {word: [DRAW.choice(WORDS) for _ in range(2)] for word in WORDS}


def chains(count: int, seed: int) -> list[dict[str, Any]]:
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = [draw.choice(WORDS)]
        while len(words) < 20:
            words += draw.choices(NEXT[words[-1]], [3, 1])
        rows.append({"text": " ".join(f"w{word}" for word in words)})
    return rows


@cache
def briefly_trained(folder: Path, blocks: int) -> Path:
    make_model(folder, "llama", num_hidden_layers=blocks)
    trained, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    for step in range(15):
        ids = tokenizer([row["text"] for row in chains(16, 1000 + step)], return_tensors="pt")["input_ids"]
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.save_pretrained(folder)
    return folder


def permute(monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    """Let a client train with its next-token targets permuted over the batch: it learns how often words come."""
    original = ClientParty._draw

    def draw(self: ClientParty, step: int, micro: int) -> Any:
        batch, weight, last = original(self, step, micro)
        if self.name == client:
            labels = batch.labels.clone()
            order = torch.randperm(labels[:, 1:].numel(), generator=torch.Generator().manual_seed(step))
            labels[:, 1:] = labels[:, 1:].flatten()[order].reshape(labels[:, 1:].shape)
            batch = dataclasses.replace(batch, labels=labels)
        return batch, weight, last

    monkeypatch.setattr(ClientParty, "_draw", draw)


def toy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, aggregator: str, *, rounds: int, blocks: int = BLOCKS
) -> tuple[float, list[dict[str, float]]]:
    """The held-out loss at the end, and the clients' weights of each merge."""
    shares: list[dict[str, float]] = []
    original = FederatedServer.merge

    def merge(self: FederatedServer, states: Any, weights: Any = None, cluster: str = "") -> Any:
        merged = original(self, states, weights, cluster)
        shares.append(dict(getattr(self.aggregator, "shares", {})))
        return merged

    with monkeypatch.context() as patch:
        patch.setattr(FederatedServer, "merge", merge)
        folder.mkdir(exist_ok=True)
        result = train(
            briefly_trained(folder.parent / f"trained-{blocks}", blocks), folder / aggregator,
            {name: chains(64, i) for i, name in enumerate(NAMES)}, framework={"name": "sfl-v1", "local_steps": 8},
            aggregator=aggregator, rounds=rounds, batch_size=8, peft="full", optimizer={"name": "adamw", "lr": 3e-3},
            data={"eval": str(write_rows(folder / "eval.jsonl", chains(40, 99))), "append_eos": False},
        )  # fmt: skip
    return result.summary["eval"]["after"]["loss"], shares


def test_wrong_targets_lose_weight_and_the_model_is_better_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy in short: three rounds of three blocks."""
    permute(monkeypatch, "dan")
    loss, shares = toy(tmp_path / "bad", monkeypatch, "splitlpf", rounds=3)
    fedavg, _ = toy(tmp_path / "bad", monkeypatch, "fedavg", rounds=3)
    assert len(shares) == 3
    assert shares[-1]["dan"] < 0.5 / 4 < min(shares[-1][name] for name in NAMES[:3])
    assert loss < fedavg - 0.05


@pytest.mark.slow
def test_the_toy_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rounds of four blocks: one of four with wrong targets, and then four alike."""
    alike, fair = toy(tmp_path / "alike", monkeypatch, "splitlpf", rounds=6, blocks=4)
    plain, _ = toy(tmp_path / "alike", monkeypatch, "fedavg", rounds=6, blocks=4)
    assert all(0.8 / 4 < share < 1.2 / 4 for merge in fair for share in merge.values())
    assert abs(alike - plain) < 0.01
    permute(monkeypatch, "dan")
    loss, shares = toy(tmp_path / "bad", monkeypatch, "splitlpf", rounds=6, blocks=4)
    fedavg, _ = toy(tmp_path / "bad", monkeypatch, "fedavg", rounds=6, blocks=4)
    assert min(merge["dan"] for merge in shares) < 0.5 / 4
    assert shares[-1]["dan"] < 0.5 / 4
    assert loss < fedavg - 0.05
