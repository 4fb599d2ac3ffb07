"""The row's check, but for the attack: the server gets averages, and each client its share of the gradient."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import joint
import unsplit
from cutlayer.config import load_config
from cutlayer.driver import Run
from cutlayer.errors import ConfigError, MethodError
from cutlayer.methods.mixing._averager import Averager
from cutlayer.wire import read_frames
from spine import (  # noqa: F401
    MOSTLY_TWO,
    PARTITIONS,
    TWO,
    U,
    adapter,
    caught,
    equal,
    lines,
    losses,
    model,
    often,
    resumed,
    train,
    twin_of,
)
from tiny import text_rows

MIXING = "three-tier-sl"
NAMES = ("ann", "bob", "cid", "dan", "eve")
SGD = {"name": "sgd", "lr": joint.LR}


def even(seed: int, count: int) -> list[dict[str, Any]]:
    """Texts of nine words each."""
    draw = random.Random(seed)
    return [{"text": " ".join(f"w{draw.randrange(40, 97)}" for _ in range(9))} for _ in range(count)]


ROWS = {name: even(i, 3) for i, name in enumerate(NAMES[:4])}
UNEVEN = {name: text_rows(3 + i, seed=i, longest=6 + 4 * i) for i, name in enumerate(NAMES)}
Frames = list[tuple[dict[str, Any], Any, dict[str, Tensor]]]


def frames(folder: Path) -> Frames:
    return [
        (line, header, dict(zip(header.names, tensors, strict=True))) for line, header, tensors in read_frames(folder)
    ]


def told(found: Frames, step_name: str, sender: str, receiver: str, step: int = 0) -> list[dict[str, Tensor]]:
    return [
        tensors
        for line, _, tensors in found
        if (line["step_name"], line["sender"], line["receiver"], line["step"]) == (step_name, sender, receiver, step)
    ]


@PARTITIONS
@pytest.mark.parametrize("weights", [None, [0.8, 0.2]], ids=["equal", "weighted"])
def test_the_server_gets_only_averages(
    weights: list[float] | None, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    """Every frame to the server, step 11 aside, is of the aggregator and holds an average; shares come down."""
    mixing, wire = {"name": MIXING, "weights": weights}, tmp_path / "wire"
    train(
        model(), tmp_path / "out", ROWS, partition=partition, framework="sfl-v1", mixing=mixing, rounds=1,
        record_wire=str(wire), optimizer=SGD,
    )  # fmt: skip
    found, share = frames(wire), weights or [0.5, 0.5]
    up = [(line, tensors) for line, _, tensors in found if line["receiver"] == "server" and tensors]
    assert {line["sender"] for line, _ in up if line["step_name"] != "aggregate"} == {"aggregator"}
    for step_name in ("send_activations", "send_gradients"):
        sums = told(found, step_name, "aggregator", "server")
        own = [told(found, step_name, name, "aggregator") for name in ROWS]
        if step_name == "send_gradients" and partition == TWO:
            assert sums == []
            continue
        assert len(sums) == 2
        for group, tensors in enumerate(sums):
            pair = [own[2 * group][0]["hidden"], own[2 * group + 1][0]["hidden"]]
            wanted = share[0] * pair[0] + share[1] * pair[1]
            assert torch.allclose(tensors["hidden"], wanted, rtol=0, atol=1e-7)
    back = told(found, "return_gradients", "server", "aggregator")
    for number, name in enumerate(ROWS):
        gradient = told(found, "return_gradients", "aggregator", name)[0]["hidden"]
        assert torch.allclose(gradient, share[number % 2] * back[number // 2]["hidden"], rtol=0, atol=1e-9)
    if partition == U:
        outputs = told(found, "return_activations", "server", "aggregator")
        for number, name in enumerate(ROWS):
            got = told(found, "return_activations", "aggregator", name)[0]["hidden"]
            assert torch.equal(got, outputs[number // 2]["hidden"])
    run = caught[0]
    pairs = {("aggregator", "server"), ("ann", "aggregator"), ("aggregator", "ann"), ("server", "aggregator")}
    assert all(run.meter.by_pair[pair] > 1000 for pair in pairs)
    assert run.meter.by_pair["ann", "aggregator"] > run.meter.by_pair["aggregator", "server"] / 4
    assert {name: slot.version for name, slot in run.parts.server.slots.items()} == {"shared": 1}


@PARTITIONS
def test_a_client_gets_its_share_of_the_gradient_at_the_average(partition: dict[str, Any], tmp_path: Path) -> None:
    """Against one graph in plain Transformers and PEFT: heads apart, the average in place of block 0's output."""
    rows = {name: ROWS[name] for name in ("ann", "bob")}
    wire, out = tmp_path / "wire", tmp_path / "out"
    train(
        model(), out, rows, partition=partition, framework="sfl-v1", mixing=MIXING, rounds=1, record_wire=str(wire)
    )  # fmt: skip
    whole = joint.load(model(), out / "adapter_initial")
    batches = [unsplit.text_batches(model(), r, size=3)[0] for r in rows.values()]
    first = whole.base_model.model.model.layers[0]
    hidden: list[Tensor] = []
    keep = first.register_forward_hook(lambda module, given, output: hidden.append(output))
    for batch in batches:
        whole(**batch)
    keep.remove()
    for tensor in hidden:
        tensor.retain_grad()
    first.register_forward_hook(lambda module, given, output: (hidden[0] + hidden[1]) / 2)
    # Texts of one length: the mean over the soft labels is the mean of the clients' own losses.
    loss = sum(whole(**{**batches[0], "labels": batch["labels"]}).loss for batch in batches) / 2
    loss.backward()
    for name, tensor in zip(rows, hidden, strict=True):
        gradient = told(frames(wire), "return_gradients", "aggregator", name)[0]["hidden"]
        assert tensor.grad is not None
        assert torch.allclose(gradient, tensor.grad, rtol=0, atol=1e-7)
    if partition == TWO:
        assert all(abs(line["loss"] - float(loss)) < 1e-5 for line in lines(out))


@MOSTLY_TWO
@pytest.mark.parametrize("side", often(["right", "left"], "right"))
def test_unequal_batches_on_a_clock_and_a_resumed_run(side: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """Five clients of unequal rows and lengths in groups of two and three; resumed, the same weights."""
    profiles = dict(zip(UNEVEN, ("laptop+dsl", "phone+4g", "workstation+lan", "laptop+5g", "laptop+lan"), strict=True))
    changes: dict[str, Any] = {
        "partition": partition, "framework": {"name": "sfl-v1", "local_steps": 2}, "mixing": MIXING, "rounds": 3,
        "data": {"padding_side": side}, "checkpoint_every": 1, "max_grad_norm": 1.0,
    }  # fmt: skip
    train(model(), tmp_path / "whole", UNEVEN, **changes, profiles=profiles)
    part = twin_of(tmp_path / "whole")
    resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))
    assert len(losses(part)) == 30


def test_groups_weigh_by_their_clients_in_the_trunks_update(
    tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five clients the second group has three: its gradient counts three fifths."""
    seen: list[dict[str, float]] = []
    original = Run.update_slot

    def noted(self: Run, slot: Any, weights: Any, **more: Any) -> None:
        seen.append(dict(weights))
        original(self, slot, weights, **more)

    monkeypatch.setattr(Run, "update_slot", noted)
    rows = {name: even(i, 3) for i, name in enumerate(NAMES)}
    train(model(), tmp_path / "out", rows, partition=TWO, framework="sfl-v1", mixing=MIXING, rounds=1)
    assert seen == [{"group 0": 2.0, "group 1": 3.0}]


def test_masses_are_the_clients_shares() -> None:
    """By hand: where the labels differ each has its client's share; nothing stands before the first token."""
    sent = {
        name: {"hidden": torch.zeros(1, 2, 1), "labels": torch.tensor([[5, label]])}
        for name, label in (("ann", 9), ("bob", 7))
    }
    found = Averager({"ann": 0.8, "bob": 0.2}, left=False, causal=True).activations(sent)
    assert found["labels"][0, 1].tolist() == [7, 9]
    assert found["masses"][0].tolist() == [[0, 0], pytest.approx([0.2, 0.8])]


def test_labels_are_sorted_and_each_position_has_masses(tmp_path: Path) -> None:
    """What the server has of the labels: by position the ids that occur, with shares that sum to 1 over the batch."""
    wire = tmp_path / "wire"
    rows = {"ann": [{"text": "w50 w60"}], "bob": [{"text": "w45 w60"}]}
    train(
        model(), tmp_path / "out", rows, partition=TWO, framework="sfl-v1", mixing=MIXING, rounds=1,
        record_wire=str(wire),
    )  # fmt: skip
    sent = told(frames(wire), "send_activations", "aggregator", "server")[0]
    assert sent["labels"][0, 1:].tolist() == [[60, 60], [2, 2]]
    assert sent["masses"][0].tolist() == [[0, 0], [0, 0.5], [0, 0.5]]


@PARTITIONS
def test_an_evaluation_passes_through(partition: dict[str, Any], tmp_path: Path) -> None:
    """Single texts, over the aggregator; the loss is that of the merged model."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text('{"text": "w50 w60 w70"}\n')
    found = []
    for out, mixing in (("plain", "none"), ("out", MIXING)):
        result = train(
            model(), tmp_path / out, ROWS, partition=partition, framework="sfl-v1", mixing=mixing, rounds=1,
            data={"eval": str(held_out)}, record_wire=str(tmp_path / f"{out}-wire"),
            optimizer={"name": "sgd", "lr": 0.0},
        )  # fmt: skip
        found.append(result.summary["eval"]["after"]["loss"])
    assert abs(found[0] - found[1]) < 1e-6
    senders = {
        line["sender"] for line, _, _ in frames(tmp_path / "out-wire") if line["step_name"] == "send_activations"
    }
    assert senders == {*ROWS, "aggregator"}


def test_classifiers_have_soft_labels_too(tmp_path: Path) -> None:
    rows = {name: text_rows(3 + i, seed=i) for i, name in enumerate(NAMES[:3])}
    train(
        model("bert"), tmp_path / "out", rows, partition=TWO, framework="sfl-v1", mixing={"name": MIXING, "size": 3},
        data={"format": "classification"},
    )  # fmt: skip
    assert len({loss for _, loss in losses(tmp_path / "out")}) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clients": 1}, "averages 2 clients, but a round has 1"),
        ({"epochs": 1}, "with epochs one may be left alone"),
        ({"gradient_accumulation": 2}, "needs steps of one micro-batch"),
        ({"data": {"train": "x", "packing": True}}, "cannot average packed rows"),
        (
            {"clients": [{"name": "aggregator"}, {"name": "ann"}]},
            "clients.0.name is 'aggregator', which is the name of a party of mixing 'three-tier-sl'",
        ),
        ({"mixing": {"name": MIXING, "weights": [1.0, 2.0]}}, "a round has 3 clients, which is no multiple"),
        ({"mixing": {"name": MIXING, "weights": [1.0]}}, "it must be 2 numbers above 0"),
        ({"framework": "psl"}, "they take turns or share one already"),
        ({"exchange": {"name": "splitfrozen", "cache": True}}, "which a cache leaves out"),
    ],
)
def test_what_would_leave_a_client_alone_is_refused(changes: dict[str, Any], said: str) -> None:
    run: dict[str, Any] = {"model": "m", "data": {"train": "x"}, "framework": "sfl-v1", "mixing": MIXING, **changes}
    with pytest.raises(ConfigError, match=said):
        load_config(run)


def test_cuts_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="so their activations cannot be averaged"):
        train(model(), tmp_path / "out", ROWS, partition=TWO, framework="sfl-v1", mixing=MIXING, cuts={"bob": 2})
