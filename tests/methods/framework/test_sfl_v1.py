"""The row's check: one round is one large-batch step, eight local steps are FedAvg, N adapters on one base."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import joint
import unsplit
from cutlayer.driver import Run
from spine import MOSTLY_U, PARTITIONS, adapter, caught, equal, model, train  # noqa: F401
from tiny import text_rows

SAME = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid"))}
SGD = {"name": "sgd", "lr": joint.LR}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).abs().max()) for n in left)


@PARTITIONS
def test_a_merging_every_step_is_large_batch_training(partition: dict[str, Any], tmp_path: Path) -> None:
    """E = 1, SGD, weights by tokens: three rounds are three unsplit steps on the concatenated batches."""
    out, by_tokens = tmp_path / "out", {"name": "fedavg", "weight_by": "tokens"}
    train(model(), out, SAME, partition=partition, framework="sfl-v1", optimizer=SGD, rounds=3, aggregator=by_tokens)
    parts = [unsplit.text_batches(model(), rows, size=3)[0] for rows in SAME.values()]
    reference = unsplit.train(model(), [parts] * 3, adapter=out / "adapter_initial", make_optimizer=joint.sgd)
    assert distance(adapter(out), reference.state) <= 1e-6
    assert distance(adapter(out), adapter(out, "adapter_initial")) > 1e-3


def test_b_local_steps_are_fedavg_of_the_whole_model(tmp_path: Path) -> None:
    """E = 8 on unequal data, two rounds, AdamW whose states stay local (FedAvg's) or are reset."""
    rows = {name: text_rows(size, seed=i) for i, (name, size) in enumerate({"ann": 6, "bob": 3, "cid": 9}.items())}
    out = tmp_path / "out"
    framework = {"name": "sfl-v1", "local_steps": 8, "moments": "keep"}
    train(model(), out, rows, framework=framework, rounds=2, optimizer={"name": "adamw", "lr": 2e-3})
    reference = joint.fedavg(
        model(), out / "adapter_initial", rounds=2, local_steps=8, sizes={n: len(r) for n, r in rows.items()},
        batches={n: unsplit.text_batches(model(), r, size=3) for n, r in rows.items()},
        make_optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3),
    )  # fmt: skip
    assert distance(adapter(out), reference) <= 1e-6


def test_c_the_server_holds_a_copy_a_client_on_one_base(tmp_path: Path, caught: list[Run]) -> None:
    train(model(), tmp_path / "out", SAME, framework="sfl-v1", rounds=1)
    parts = caught[0].parts
    assert set(parts.server.slots) == set(SAME)
    storages = [p.data_ptr() for slot in parts.server.slots.values() for p in slot.params.values()]
    assert len(set(storages)) == len(storages)
    assert len({id(party.head.base) for party in parts.clients.values()}) == 1


@pytest.mark.parametrize("moments", ["keep", "average", "reset"])
def test_the_trunks_moments_are_kept_averaged_or_reset(moments: str, tmp_path: Path, caught: list[Run]) -> None:
    framework = {"name": "sfl-v1", "moments": moments}
    train(model(), tmp_path / "out", SAME, framework=framework, rounds=1)
    slots = caught[0].parts.server.slots.values()
    found = [{k: v for k, v in slot.get(optimizer=True).items() if "exp_avg" in k} for slot in slots]
    if moments == "reset":
        assert found == [{}, {}, {}]
        return
    assert equal(found[0], found[1]) == (moments == "average")


def test_who_was_not_drawn_begins_with_the_last_merge(tmp_path: Path, caught: list[Run]) -> None:
    """Trunk copies too: a client that sat out takes both parts of the average before its next step."""
    framework = {"name": "sfl-v1", "participation": 0.4}
    optimizer = {"name": "sgd", "lr": 0.0}
    train(model(), tmp_path / "out", SAME, framework=framework, rounds=4, optimizer=optimizer)
    run = caught[0]
    assert sum(run.counters.steps.values()) == 8
    assert all(equal(run.state("ann"), run.state(c)) for c in SAME)  # at rate 0 nothing may move, merges included


@MOSTLY_U
def test_unequal_cuts_change_nothing(partition: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """Merged by block, E = 1 and SGD are the joint batch wherever each client's cut is; the server has what it must."""
    out, deep = tmp_path / "out", model(num_hidden_layers=5)
    train(
        deep, out, SAME, partition=partition, cuts={"ann": 0, "bob": 1, "cid": 3}, framework="sfl-v1", rounds=3,
        optimizer=SGD, aggregator={"name": "fedavg", "weight_by": "tokens"},
    )  # fmt: skip
    batches = [unsplit.text_batches(deep, rows, size=3)[0] for rows in SAME.values()]
    reference = unsplit.train(deep, [batches] * 3, adapter=out / "adapter_initial", make_optimizer=joint.sgd)
    for client in SAME:
        found = {f"base_model.model.{n.replace('.default', '')}": t for n, t in caught[0].state(client).items()}
        assert distance(found, reference.state) <= 1e-6
    heads = {name: len(layout.head) for name, layout in caught[0].parts.layouts.items()}
    assert heads == {"ann": 0, "bob": 1, "cid": 3}
