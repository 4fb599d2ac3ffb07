"""What every framework must do: with one client be unsplit training, and with four on eight blocks run by default."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import unsplit
from cutlayer import registry
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from spine import (  # noqa: F401
    TWO,
    U,
    adamw,
    adapter,
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

EVERY = registry.names("framework")
ALONE: dict[str, dict[str, Any]] = {  # options that a single client needs
    "gsfl": {"groups": 1},
    "hsfl": {"edges": 1},
    "multisfl": {"branches": 1},
}
NOT_ALONE = {"ringsfl", "pairingfl", "clicooper"}  # they need a peer, and say so
U_ONLY = {"ringsfl"}
COME_AND_GO = {"sequential-sl", "psl", "sfl-v2", "async-sfl", "pairingfl", "ringsfl"}
# Those are run twice, and resumed, in test_every_coming_and_going.py; that ringsfl refuses a two-part split is here.
QUICK = {(name, "u-shape") for name in EVERY if name not in COME_AND_GO} | {("ringsfl", "two-part")}
RUN_ON = {name for name in EVERY if registry.load("framework", name).asynchronous}


def with_its_aggregator(name: str) -> dict[str, Any]:
    """A framework that does not wait needs an aggregator that does not either."""
    return {"aggregator": "dt-asfl"} if name in RUN_ON else {}


FOUR = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}


@by_turns("name", sorted(set(EVERY) - NOT_ALONE))
def test_one_client_equals_unsplit(name: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """Losses and all trained tensors after six AdamW steps, without any difference."""
    rows, out, folder = text_rows(9), tmp_path / "out", model(num_hidden_layers=6)
    framework = {"name": name, **ALONE.get(name, {})}
    train(folder, out, {"ann": rows}, partition=partition, framework=framework, steps=6, **with_its_aggregator(name))
    batches = unsplit.text_batches(folder, rows, size=3)
    steps = [[batch] for batch in batches * 2]
    reference = unsplit.train(folder, steps, adapter=out / "adapter_initial", make_optimizer=adamw)
    assert [loss for _, loss in losses(out)] == reference.losses
    assert equal(adapter(out), reference.state)


@pytest.mark.parametrize(
    ("name", "partition"),
    [
        pytest.param(name, partition, id=f"{name}-{kind}", marks=() if (name, kind) in QUICK else pytest.mark.slow)
        for name in EVERY
        for partition, kind in ((TWO, "two-part"), (U, "u-shape"))
    ],
)
def test_four_clients_and_eight_blocks_by_default(
    name: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    """Who brings data trains, nothing is left open, and the same run twice gives the same events and weights."""
    if name in U_ONLY and partition["name"] != "u-shaped-split":
        with pytest.raises(CutlayerError, match="Take partition: u-shaped-split"):
            train(model(num_hidden_layers=8), tmp_path / "out", FOUR, partition=partition, framework=name)
        return
    for out in ("one", "two"):
        # Who does not wait makes many steps while a phone makes one.
        kinds = ("laptop+dsl", "phone+4g", "workstation+lan", "laptop+5g")
        kinds = kinds if name not in RUN_ON else ("laptop+dsl", "laptop+4g", "laptop+dsl", "laptop+4g")
        profiles = dict(zip(FOUR, kinds, strict=True))
        changes = {"partition": partition, "framework": name, "rounds": 2, "profiles": profiles}
        changes |= with_its_aggregator(name)
        train(model(num_hidden_layers=8), tmp_path / out, FOUR, **changes)
    first, second = caught
    assert {client for client, steps in first.counters.steps.items() if steps} == set(
        first.framework.trainers(list(FOUR))
    )
    if name in RUN_ON:
        assert all(steps >= first.parts.foreseen[client] for client, steps in first.counters.steps.items())
    else:
        assert first.counters.steps == dict(first.parts.foreseen)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert [line["virtual_time"] for line in lines(tmp_path / "one")] == [
        line["virtual_time"] for line in lines(tmp_path / "two")
    ]
    for client in FOUR:
        assert equal(first.state(client), second.state(client))
        assert all(torch.isfinite(t).all() for t in first.state(client).values())
    assert all(slot.idle for party in first.parts.parties.values() for slot in party.slots.values())
    assert first.meter.state() == second.meter.state()


@pytest.mark.parametrize("name", sorted(NOT_ALONE))
def test_who_needs_a_peer_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=f"framework '{name}' needs"):
        train(model(), tmp_path / "out", {"ann": text_rows(3)}, framework=name)


@pytest.mark.parametrize("name", often(EVERY, "gsfl", "multisfl", "p-sl"))
def test_a_killed_run_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    """Resumed after the first of three rounds, everything a framework keeps between rounds is there."""
    framework = {
        "name": name,
        **({"local_steps": 1} if "local_steps" in registry.option_fields(registry.load("framework", name)) else {}),
    }
    changes = {"framework": framework, "rounds": 3, "checkpoint_every": 1, **with_its_aggregator(name)}
    train(model(num_hidden_layers=5), tmp_path / "whole", FOUR, **changes)
    part = twin_of(tmp_path / "whole")
    resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))
