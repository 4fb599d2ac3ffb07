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
from spine import PARTITIONS, TWO, U, adapter, block_of, caught, model, train  # noqa: F401
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


@PARTITIONS
@pytest.mark.parametrize("scale", ["local", "joint"])
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


@pytest.mark.parametrize("partition", [TWO, U], ids=["two-part", "u-shape"])
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
