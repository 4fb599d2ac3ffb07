"""The row's check: one joint update of the trunk whatever N, equal to the concatenated batch; heads stay apart."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import joint
import unsplit
from cutlayer.driver import Run
from cutlayer.errors import MethodError
from cutlayer.parties.trunk import TrunkParty
from spine import MOSTLY_TWO, TWO, U, adapter, block_of, by_turns, caught, equal, lines, model, often, train  # noqa: F401
from tiny import BLOCKS, text_rows

CLIENTS = ("ann", "bob", "cid", "dan")
ROWS = {name: text_rows(3, seed=i, shortest=3 + 6 * i, longest=9 + 8 * i) for i, name in enumerate(CLIENTS)}
SGD = {"name": "sgd", "lr": joint.LR}


def at_client(name: str, partition: dict[str, Any]) -> bool:
    block = block_of(name)
    return block < 1 or (partition["name"] == "u-shaped-split" and block >= BLOCKS - 1)


def file_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the adapter file's names."""
    return {f"base_model.model.{n.replace('.default', '')}": t for n, t in state.items()}


@by_turns("scale", ["local", "joint"])
def test_a_one_step_is_the_concatenated_batch(
    scale: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    """Unequal token counts, c_i by tokens: the trunk's step, and the heads' by either scale."""
    out = tmp_path / "out"
    framework = {"name": "psl", "grad_scale": scale}
    train(model(), out, ROWS, partition=partition, framework=framework, optimizer=SGD, rounds=1)
    before = adapter(out, "adapter_initial")
    batches = {n: unsplit.text_batches(model(), rows, size=3)[0] for n, rows in ROWS.items()}
    counts = {n: int((b["labels"][:, 1:] != -100).sum()) for n, b in batches.items()}
    assert len(set(counts.values())) == 4
    own = {n: joint.gradients(model(), out / "adapter_initial", b) for n, b in batches.items()}
    reference = unsplit.train(
        model(), [list(batches.values())], adapter=out / "adapter_initial", make_optimizer=joint.sgd
    )
    total = sum(counts.values())
    for client in ROWS:
        found = file_names(caught[0].state(client))
        for name, tensor in found.items():
            step = (before[name] - tensor) / joint.LR
            if not at_client(name, partition):
                assert torch.allclose(tensor, reference.state[name], rtol=0, atol=1e-6)
                continue
            share = counts[client] / total if scale == "joint" else 1.0
            assert torch.allclose(step, own[client][name] * share, rtol=0, atol=1e-5), name
    if scale == "joint":  # then the heads' steps add up to the unsplit one
        states = [file_names(caught[0].state(client)) for client in ROWS]
        for name in (n for n in before if at_client(n, partition)):
            moved = sum(state[name] - before[name] for state in states)
            assert torch.allclose(moved, reference.state[name] - before[name], rtol=0, atol=1e-6)


@MOSTLY_TWO
def test_c_and_d_heads_stay_apart_and_the_trunk_makes_one_update(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    train(model(), tmp_path / "out", ROWS, partition=partition, framework={"name": "psl", "local_steps": 2}, rounds=3)
    run = caught[0]
    assert {name: slot.version for name, slot in run.parts.server.slots.items()} == {"shared": 6}
    states = [run.state(client) for client in ROWS]
    for name in states[0]:
        same = all(torch.equal(states[0][name], state[name]) for state in states[1:])
        assert same == (not at_client(name, partition)), name
    assert run.meter.by_step["aggregate"] == 0


@pytest.mark.parametrize("by", ["examples", "uniform"])
def test_other_weights(by: str, tmp_path: Path, caught: list[Run]) -> None:
    """The trunk's step is the weighted mean of the clients' gradients."""
    rows = {"ann": text_rows(2), "bob": text_rows(6, seed=1)}
    out = tmp_path / "out"
    train(model(), out, rows, framework={"name": "psl", "weight_by": by}, optimizer=SGD, rounds=1)
    share = {"examples": (0.25, 0.75), "uniform": (0.5, 0.5)}[by]
    batches = [unsplit.text_batches(model(), r, size=3)[0] for r in rows.values()]
    grads = [joint.gradients(model(), out / "adapter_initial", batch) for batch in batches]
    before = adapter(out, "adapter_initial")
    for name, tensor in file_names(caught[0].state("ann")).items():
        if not at_client(name, U):
            wanted = before[name] - joint.LR * (share[0] * grads[0][name] + share[1] * grads[1][name])
            assert torch.allclose(tensor, wanted, rtol=0, atol=1e-6)


DATA = {"right": {}, "left": {"padding_side": "left"}, "packed": {"packing": True}}
CASES = [(by, side, split) for by in ("tokens", "uniform") for side in DATA for split in ("two-part", "u-shape")]
QUICK = [("tokens", "right", "two-part"), ("uniform", "left", "two-part"), ("tokens", "left", "u-shape"),
         ("tokens", "packed", "u-shape")]  # fmt: skip


@pytest.mark.parametrize(("by", "side", "split"), often(CASES, *QUICK))
def test_b_the_real_concatenation_gives_the_same_steps(
    by: str, side: str, split: str, tmp_path: Path, caught: list[Run]
) -> None:
    """Three steps with SGD, clipped, over two epochs of clients of unequal lengths, rows and micro-batches."""
    rows = {name: text_rows(3 + i, seed=i, shortest=3 + 4 * i, longest=9 + 5 * i) for i, name in enumerate(CLIENTS[:3])}
    changes: dict[str, Any] = {
        "partition": {"two-part": TWO, "u-shape": U}[split], "data": DATA[side],
        "optimizer": {"name": "sgd", "lr": 1.0}, "rounds": 3, "batch_size": 2,
        "gradient_accumulation": 2, "max_grad_norm": 0.5,
    }  # fmt: skip
    for way in ("accumulate", "concatenate"):
        train(model(), tmp_path / way, rows, framework={"name": "psl", "weight_by": by, "joint": way}, **changes)
    one, real = caught
    told = [sorted(lines(tmp_path / w), key=lambda n: (n["step"], n["client"])) for w in ("accumulate", "concatenate")]
    for line, other in zip(*told, strict=True):
        same = ("step", "client", "tokens", "label_tokens")
        assert [line[k] for k in same] == [other[k] for k in same]
        assert abs(line["loss"] - other["loss"]) < 2e-6
    moved = adapter(tmp_path / "accumulate", "adapter_initial")
    for client in rows:
        found = file_names(real.state(client))
        for name, tensor in file_names(one.state(client)).items():
            assert torch.allclose(tensor, found[name], rtol=0, atol=1e-6), name
        assert max(float((t - moved[n]).abs().max()) for n, t in found.items()) > 1e-3
    assert one.parts.server.slots["shared"].version == real.parts.server.slots["shared"].version == 3


@pytest.mark.parametrize("scale", ["local", "joint"])
def test_what_is_concatenated_is_one_graph_and_one_update(
    scale: str, tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk's forward gets the joint batch, once; the heads' scales are as without; a clock changes no number."""
    seen = []
    forward = TrunkParty.forward
    monkeypatch.setattr(
        TrunkParty, "forward", lambda self, parcel, how, place: seen.append(parcel) or forward(self, parcel, how, place)
    )
    profiles = dict(zip(CLIENTS, ("laptop+dsl", "phone+4g", "workstation+lan", "laptop+5g"), strict=True))
    framework = {"name": "psl", "grad_scale": scale}
    train(model(), tmp_path / "plain", ROWS, framework=framework, rounds=2, optimizer=SGD)
    assert len(seen) == 8
    for out, changes in (("one", {}), ("timed", {"profiles": profiles})):
        seen.clear()
        train(model(), tmp_path / out, ROWS, framework={**framework, "joint": "concatenate"}, rounds=2, optimizer=SGD,
              **changes)  # fmt: skip
        assert [len(parcel.tensors["hidden"]) for parcel in seen] == [12, 12]
    plain, one, timed = caught
    for client in ROWS:
        assert equal(one.state(client), timed.state(client))
        for name, tensor in plain.state(client).items():
            assert torch.allclose(tensor, one.state(client)[name], rtol=0, atol=1e-6), name
    assert timed.clock.now() > 0


def test_classifiers_and_a_step_of_one_client(tmp_path: Path, caught: list[Run]) -> None:
    """Labels without positions; whoever is alone in a step is not concatenated, and steps as if unsplit."""
    rows = {"ann": text_rows(3), "bob": text_rows(6, seed=1, longest=20)}
    for way in ("accumulate", "concatenate"):
        train(
            model("bert"), tmp_path / way, rows, framework={"name": "psl", "joint": way}, partition=TWO, epochs=2,
            data={"format": "classification"}, optimizer=SGD,
        )  # fmt: skip
    assert caught[1].counters.steps == {"ann": 2, "bob": 4}
    for client in rows:
        for name, tensor in caught[0].state(client).items():
            assert torch.allclose(tensor, caught[1].state(client)[name], rtol=0, atol=1e-6), name


def test_a_client_without_a_label_weighs_nothing(tmp_path: Path, caught: list[Run]) -> None:
    """All prompt, cut off: its loss is 0, its part stays, and the others' step is as without it."""
    long = [{"prompt": "w50 " * 70, "completion": "w60"}] * 3 + [{"prompt": "w50", "completion": "w60"}]
    short = [{"prompt": "w50 w51", "completion": f"w6{i} w7{i}"} for i in range(3)]
    for way in ("accumulate", "concatenate"):
        train(
            model(), tmp_path / way, {"ann": long, "bob": short}, framework={"name": "psl", "joint": way},
            partition=TWO, data={"format": "prompt-completion"}, optimizer=SGD, rounds=1,
        )  # fmt: skip
    assert [(line["client"], line["loss"] == 0) for line in lines(tmp_path / "concatenate")] == [
        ("ann", True), ("bob", False)
    ]  # fmt: skip
    for client in ("ann", "bob"):
        for name, tensor in caught[0].state(client).items():
            assert torch.allclose(tensor, caught[1].state(client)[name], rtol=0, atol=1e-6), name


def test_cuts_that_differ_cannot_be_concatenated(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="different cuts, so their batches cannot be concaten"):
        train(model(), tmp_path / "out", ROWS, framework={"name": "psl", "joint": "concatenate"}, cuts={"bob": 2},
              partition=TWO)  # fmt: skip
