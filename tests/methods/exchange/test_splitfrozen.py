"""The row's check: nothing trains at the head, no gradient comes down, and cached samples travel once."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.config import load_config
from cutlayer.driver import Run
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.wire import read_frames
from spine import (  # noqa: F401
    PARTITIONS,
    TWO,
    U,
    adapter,
    block_of,
    by_turns,
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

NAMES = ("ann", "bob", "cid")
ROWS = {name: text_rows(4 + i, seed=i) for i, name in enumerate(NAMES)}
PROFILES = dict(zip(NAMES, ("laptop+dsl", "phone+4g", "workstation+lan"), strict=True))
FROZEN = "splitfrozen"


def even(seed: int, count: int) -> list[dict[str, Any]]:
    """Texts of ten words each."""
    draw = random.Random(seed)
    return [{"text": " ".join(f"w{draw.randrange(40, 97)}" for _ in range(10))} for _ in range(count)]


@pytest.mark.parametrize(
    ("framework", "partition"),
    often(
        [(f, p) for f in ("sequential-sl", "sfl-v2", "sfl-v1", "psl") for p in (TWO, U)], ("sfl-v1", TWO), ("psl", U)
    ),
)
def test_the_head_stays_and_no_gradient_comes_down(
    framework: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    """Bits of the head, tensors in the frames down, the client's backward on the clock, and a model that learns."""
    out, wire = tmp_path / "out", tmp_path / "wire"
    train(
        model(dropout=0.1), out, ROWS, partition=partition, framework=framework, exchange=FROZEN, profiles=PROFILES,
        record_wire=str(wire), gradient_accumulation=2, batch_size=2, rounds=3,
    )  # fmt: skip
    run = caught[0]
    before, after = adapter(out, "adapter_initial"), adapter(out)
    for name, tensor in after.items():
        if block_of(name) < 1:
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(after[n], before[n]) for n in after if block_of(n) >= 1)
    assert all(not slot.params or partition == U for slot in (c.slot for c in run.parts.clients.values()))
    down = [(line["step_name"], list(tensors)) for line, header, tensors in read_frames(wire)
            if line["sender"] == "server" and line["step_name"] != "aggregate"]  # fmt: skip
    with_tensors = {step for step, tensors in down if tensors}
    assert with_tensors == (set() if partition == TWO else {"return_activations"})
    if partition == TWO:
        assert run.meter.by_step["aggregate"] == 0
    assert run.counters.virtual["head_backward"] == 0
    assert run.counters.virtual["head_forward"] > 0


@PARTITIONS
def test_one_step_trains_the_trunk_as_with_a_trained_head(partition: dict[str, Any], tmp_path: Path) -> None:
    """From the same state, SplitLoRA's server makes the same update."""
    for exchange in ("plain", FROZEN):
        train(model(), tmp_path / exchange, {"ann": ROWS["ann"]}, partition=partition, exchange=exchange, steps=1)
    plain, frozen = adapter(tmp_path / "plain"), adapter(tmp_path / FROZEN)
    trunk = [n for n in plain if block_of(n) >= 1]
    assert trunk
    assert all(torch.equal(plain[n], frozen[n]) for n in trunk)
    assert not all(torch.equal(plain[n], frozen[n]) for n in plain)


@by_turns("kind", ["even", "shuffled"])
def test_a_cached_sample_travels_once(kind: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """From the second epoch on only numbers go up, and the losses stay: with rows of one length to the last bit."""
    rows = {n: even(i, 5) for i, n in enumerate(NAMES)} if kind == "even" else ROWS
    data = {"even": {}, "shuffled": {"shuffle": True}}[kind]
    changes: dict[str, Any] = {
        "partition": partition,
        "framework": "sfl-v2",
        "epochs": 3,
        "batch_size": 2,
        "data": data,
    }
    train(model(), tmp_path / "plain", rows, exchange=FROZEN, **changes)
    cached = {"name": FROZEN, "cache": True}
    train(model(), tmp_path / "out", rows, exchange=cached, record_wire=str(tmp_path / "wire"), **changes)
    epoch = {name: math.ceil(len(theirs) / 2) for name, theirs in rows.items()}  # steps
    later = [
        sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for line, header, tensors in read_frames(tmp_path / "wire")
        if line["step_name"] == "send_activations" and line["step"] >= epoch[line["sender"]]
        and tensors[0].dtype != torch.float32
    ]  # fmt: skip
    assert len(later) == sum(2 * steps for steps in epoch.values())
    assert max(later) <= 2 * 8
    if kind == "even":
        assert losses(tmp_path / "plain") == losses(tmp_path / "out")
        assert equal(adapter(tmp_path / "plain"), adapter(tmp_path / "out"))
        return
    for (client, one), (other, two) in zip(losses(tmp_path / "plain"), losses(tmp_path / "out"), strict=True):
        assert client == other
        assert abs(one - two) < 1e-4


def test_classifiers_are_cached(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"partition": TWO, "epochs": 2, "batch_size": 2, "data": {"format": "classification"}}
    for cache in (False, True):
        train(model("bert"), tmp_path / str(cache), ROWS, exchange={"name": FROZEN, "cache": cache}, **changes)
    for (_, one), (_, two) in zip(losses(tmp_path / "False"), losses(tmp_path / "True"), strict=True):
        assert abs(one - two) < 1e-5


def test_a_killed_run_remembers_what_it_was_sent(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "exchange": {"name": FROZEN, "cache": True}, "framework": "sfl-v2", "rounds": 6, "batch_size": 2,
        "data": {"shuffle": True}, "checkpoint_every": 1, "partition": TWO,
    }  # fmt: skip
    train(model(), tmp_path / "whole", ROWS, **changes)
    part = twin_of(tmp_path / "whole")
    resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))


def test_each_client_may_have_its_own_cut(tmp_path: Path, caught: list[Run]) -> None:
    """One trunk from the shallowest cut on; a deeper client runs its blocks bare, and has a model of its own."""
    deep = model(num_hidden_layers=6)
    train(deep, tmp_path / "out", ROWS, partition=TWO, framework="psl", exchange=FROZEN, cuts={"bob": 3, "cid": 4})
    run = caught[0]
    before = {n: p.detach() for n, p in run.parts.base.initial.items()}
    for client, cut in {"ann": 1, "bob": 3, "cid": 4}.items():
        for name, tensor in run.state(client).items():
            if block_of(name) < cut:
                assert torch.equal(tensor, before[name]), name
            else:
                assert torch.equal(tensor, run.parts.server.slots["shared"].params[name]), name
    assert (tmp_path / "out" / "adapters" / "cid").is_dir()
    assert len(lines(tmp_path / "out")) == 6


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run: dict[str, Any] = {
        "model": "m",
        "data": {"train": "x", "packing": True},
        "exchange": {"name": FROZEN, "cache": True},
    }
    with pytest.raises(ConfigError, match=r"without padding .*data\.packing hides"):
        load_config(run)
    run["data"] = {"train": "x", "padding_side": "left"}
    with pytest.raises(ConfigError, match=r"behind data\.padding_side: left a row's first token is predicted from it"):
        load_config(run)
    with pytest.raises(CutlayerError, match=r"framework 'ringsfl' client '.*' trains blocks for"):
        train(model(num_hidden_layers=8), tmp_path / "out", ROWS, framework="ringsfl", exchange=FROZEN)
