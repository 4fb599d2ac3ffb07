"""Clients that run on: without delay the synchronous frameworks, in one order every time, and resumed exactly."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import cutlayer
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError, NonFinite
from cutlayer.parties.federated import FederatedServer
from spine import U, adapter, by_turns, caught, equal, lines, losses, model, often, train  # noqa: F401
from tiny import text_rows, write_rows
from unequal import run, uploads

THREE = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid"))}
SPEEDS = {"ann": 1, "bob": 2, "cid": 3}
ALL = {"name": "dt-asfl", "buffer": 3, "a0": 1.0}


@by_turns("more", [{}, {"gradient_accumulation": 2, "max_grad_norm": 0.1}], ids=["", "clipped"])
def test_a_shared_trunk_without_delay_is_sfl_v2(
    partition: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    """The server admits steps in order of arrival, at one instant by name; heads are averaged. Every bit is equal."""
    framework = {"name": "async-sfl", "trunk": "shared"}
    train(model(), tmp_path / "a", THREE, partition=partition, framework=framework, aggregator=ALL, rounds=3, **more)
    twin = {"name": "sfl-v2", "order": "listed"}
    train(model(), tmp_path / "b", THREE, partition=partition, framework=twin, rounds=3, **more)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


def test_uploads_of_one_instant_are_merged_in_the_order_of_the_clients(tmp_path: Path) -> None:
    """Without a profile no time passes: everybody makes as many uploads, and the order is still one."""
    framework = {"name": "async-sfl", "uploads": 2}
    rows = dict(reversed(THREE.items()))
    train(model(), tmp_path / "out", rows, framework=framework, aggregator="dt-asfl", rounds=1)
    found = uploads(tmp_path / "out")
    assert [(one["client"], one["delay"]) for one in found] == [("cid", 0), ("bob", 1), ("ann", 2)] * 2
    assert "virtual_time" not in found[0]


@pytest.mark.parametrize(
    ("trunk", "aggregator"), often([("own", "safsl-window"), ("shared", "dt-asfl")], ("shared", "dt-asfl"))
)
def test_the_same_run_twice_and_resumed(trunk: str, aggregator: str, tmp_path: Path, caught: list[Run]) -> None:
    """The same order of events, weights and uploads, also when it is killed between two periods."""
    options: dict[str, Any] = {
        "rows": {name: text_rows(4, seed=i) for i, name in enumerate(SPEEDS)}, "aggregator": aggregator,
        "framework": {"trunk": trunk}, "rounds": 2, "checkpoint_every": 1,
    }  # fmt: skip
    for out in ("one", "two"):
        run(tmp_path / out, SPEEDS, **options)
    two = tmp_path / "two"
    assert uploads(two) == uploads(tmp_path / "one")
    assert [(x["client"], x["loss"], x["virtual_time"]) for x in lines(two)] == [
        (x["client"], x["loss"], x["virtual_time"]) for x in lines(tmp_path / "one")
    ]
    assert all(party.open_graphs == 0 for party in caught[0].parts.parties.values())
    for gone in ("checkpoints/round-000002", "adapter"):
        shutil.rmtree(two / gone)
    (two / "summary.json").unlink()
    cutlayer.train(resume=two)
    assert uploads(two) == uploads(tmp_path / "one")
    assert losses(two) == losses(tmp_path / "one")
    assert equal(adapter(two), adapter(tmp_path / "one"))


def test_a_fast_client_makes_more_steps_and_nobody_waits_for_the_slow(tmp_path: Path, caught: list[Run]) -> None:
    summary = run(tmp_path / "out", SPEEDS, framework={"uploads": 3}).summary
    steps = summary["steps"]
    assert steps["ann"] == 3
    assert 5 <= steps["bob"] <= 7
    assert 8 <= steps["cid"] <= 10
    assert caught[0].counters.merges == sum(steps.values())


def test_a_length_in_steps_is_everybodys(tmp_path: Path) -> None:
    """The fast end first; the slow go on, and a schedule knows where the end is."""
    optimizer = {"name": "sgd", "lr": 0.05, "schedule": "linear"}
    summary = run(tmp_path / "out", SPEEDS, steps=4, optimizer=optimizer).summary
    assert summary["steps"] == dict.fromkeys(SPEEDS, 4)
    assert {one["client"] for one in uploads(tmp_path / "out")[-2:]} <= {"ann", "bob"}


def test_only_some_take_part_in_a_period(tmp_path: Path) -> None:
    framework = {"name": "async-sfl", "participation": 0.5}
    train(model(), tmp_path / "out", THREE, framework=framework, aggregator="dt-asfl", rounds=3)
    found = uploads(tmp_path / "out")
    assert [sum(one["round"] == number for one in found) for number in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_the_trunks_moments(moments: str, tmp_path: Path, caught: list[Run]) -> None:
    framework = {"name": "async-sfl", "moments": moments}
    train(model(), tmp_path / "out", THREE, framework=framework, aggregator="dt-asfl", rounds=1)
    slots = caught[0].parts.server.slots.values()
    kept = [any(name.startswith("optimizer/") for name in slot.get(optimizer=True)) for slot in slots]
    assert kept == [moments == "keep"] * 3


def test_an_aggregator_that_waits_is_refused(tmp_path: Path) -> None:
    said = r"framework 'async-sfl' merges each upload as it comes.*'fedavg' cannot. Take one of: dt-asfl, safsl-window"
    with pytest.raises(CutlayerError, match=said):
        train(model(), tmp_path / "out", THREE, framework="async-sfl")


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match="uploads is 0"):
        train(model(), tmp_path / "a", THREE, framework={"name": "async-sfl", "uploads": 0}, aggregator=ALL)
    shared = {"name": "async-sfl", "trunk": "shared"}
    with pytest.raises(CutlayerError, match="a shared trunk is never merged"):
        train(model(), tmp_path / "b", THREE, framework={**shared, "moments": "reset"}, aggregator=ALL)
    with pytest.raises(CutlayerError, match="Give all the same cut, or take trunk: own"):
        train(model(num_hidden_layers=4), tmp_path / "c", THREE, framework=shared, aggregator=ALL, cuts={"bob": 2})
    with pytest.raises(CutlayerError, match=r"schedule is 'linear'.*as many in a round as it has time for"):
        run(tmp_path / "d", SPEEDS, optimizer={"name": "adamw", "lr": 0.01, "schedule": "linear"})


def test_different_cuts_with_own_trunks(tmp_path: Path) -> None:
    """A block that is one client's head and another's trunk is merged all the same."""
    options = {"framework": {"name": "async-sfl"}, "aggregator": ALL, "cuts": {"bob": 2}}
    train(model(num_hidden_layers=4), tmp_path / "a", THREE, **options)
    twin = {"framework": {"name": "sfl-v1", "moments": "keep"}, "cuts": {"bob": 2}}
    train(model(num_hidden_layers=4), tmp_path / "b", THREE, **twin)
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


def test_an_error_in_a_merge_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the clients that wait for it."""

    def broken(*_: Any) -> None:
        raise NonFinite("Client 'cid' sent 't' with values that are not finite.")

    monkeypatch.setattr(FederatedServer, "absorb", broken)
    with pytest.raises(NonFinite, match="Client 'cid' sent"):
        run(tmp_path / "out", SPEEDS)


@pytest.mark.parametrize("trunk", often(["own", "shared"], "own"))
def test_a_lost_client_goes_on_with_its_copy_when_it_is_back(trunk: str, tmp_path: Path, caught: list[Run]) -> None:
    """Its upload then has the delay of all that it missed; killed in between, the run ends with the same weights."""
    out = tmp_path / "out"
    clients = [
        {"name": name, "data": str(write_rows(tmp_path / f"{name}.jsonl", rows))} for name, rows in THREE.items()
    ]
    config: dict[str, Any] = {
        "model": str(model()), "data": {"format": "text", "shuffle": False, "max_length": 64},
        "clients": [{**clients[0], "fails": [1, 2]}, *clients[1:]], "partition": U, "batch_size": 3, "rounds": 4,
        "framework": {"name": "async-sfl", "local_steps": 3, "trunk": trunk}, "aggregator": "dt-asfl",
        "peft": {"name": "lora", "rank": 2}, "optimizer": {"name": "adamw", "lr": 1e-2},
    }  # fmt: skip
    cutlayer.train(config, out=out)
    run = caught[0]
    assert run.counters.lost == {"ann": 2}
    assert all(party.open_graphs == 0 for party in run.parts.parties.values())
    found = [one for one in uploads(out) if one["client"] == "ann"]
    assert [one["round"] for one in found] == [0, 3]
    assert found[1]["base"] == 3  # of the end of round 0
    assert found[1]["delay"] == 2 * 2  # the others' uploads of rounds 1 and 2
    assert run.counters.steps["ann"] == 6  # all local steps of two uploads, none made twice
    before = uploads(out), losses(out), adapter(out)
    for gone in ("checkpoints/round-000004", "adapter"):
        shutil.rmtree(out / gone)
    (out / "summary.json").unlink()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["round-000003"]
    cutlayer.train(resume=out)
    assert (uploads(out), losses(out)) == before[:2]
    assert equal(adapter(out), before[2])
