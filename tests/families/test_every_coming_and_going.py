"""Clients that come late, leave, are away or are lost in the middle of a round: the others go on without them."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cutlayer
import joint
import unsplit
from cutlayer import registry
from cutlayer.config import load_config
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from cutlayer.links.local import LocalLink
from cutlayer.presence import Presence
from spine import TWO, U, adapter, caught, equal, lines, losses, model, often, resumed  # noqa: F401
from tiny import text_rows, write_rows

EVERY = registry.names("framework")
FOUR = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
GOINGS: dict[str, dict[str, Any]] = {"bob": {"joins": 1}, "cid": {"leaves": 3}, "dan": {"fails": [1]}}
TOGETHER = {"ringsfl"}  # without one of them there is no path
U_ONLY = {"ringsfl"}


def framework_of(name: str, **options: Any) -> dict[str, Any]:
    """A framework's key, with the aggregator that it needs."""
    made = {"framework": {"name": name, **options}}
    return {**made, "aggregator": "dt-asfl"} if registry.load("framework", name).asynchronous else made


def train(out: Path, goings: dict[str, dict[str, Any]], **changes: Any) -> Any:
    """A run of FOUR, whose clients come and go like this."""
    out.parent.mkdir(exist_ok=True)
    config: dict[str, Any] = {
        "model": str(model(num_hidden_layers=5)),
        "data": {"format": "text", "shuffle": False, "max_length": 64},
        "clients": [
            {"name": name, "data": str(write_rows(out.parent / f"{name}.jsonl", rows)), **goings.get(name, {})}
            for name, rows in FOUR.items()
        ],
        "partition": U, "peft": {"name": "lora", "rank": 2, "alpha": 4}, "optimizer": {"name": "adamw", "lr": 1e-2},
        "batch_size": 3, "checkpoint_every": 1000, "rounds": 4, **changes,
    }  # fmt: skip
    return cutlayer.train(config, out=out)


def nothing_is_left(run: Run) -> None:
    """No open graph and no gradient in waiting, at any party."""
    assert all(party.open_graphs == 0 for party in run.parts.parties.values())
    assert all(not client._open and client.slot.idle for client in run.parts.clients.values())
    assert all(slot.idle for party in run.parts.parties.values() for slot in party.slots.values())
    assert all(link._waiting is None for link in run.links.values())


QUICK = {"sequential-sl", "psl", "sfl-v2", "async-sfl", "pairingfl", "ringsfl"}  # each its own way to lose a client
CASES = [
    pytest.param(
        name, partition, clock, marks=() if partition == U and not clock and name in QUICK else pytest.mark.slow
    )
    for name in EVERY
    for partition in (U, TWO)
    for clock in (None, "laptop")
    if name not in U_ONLY or partition == U
]


@pytest.mark.parametrize(("name", "partition", "clock"), CASES)
def test_one_comes_late_one_leaves_one_is_lost(
    name: str, partition: dict[str, Any], clock: str | None, tmp_path: Path, caught: list[Run]
) -> None:
    """The others train in every round; nothing is left open; the same twice, and after a kill between two rounds."""
    options = {"intervals": [2, 1, 1]} if name == "hsfl" else {}
    changes = {"partition": partition, "profile": clock, "checkpoint_every": 1, **framework_of(name, **options)}
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(whole, GOINGS, **changes)
    train(part, GOINGS, **changes)
    resumed(part)
    for run in caught:
        nothing_is_left(run)
    assert losses(part) == losses(whole)
    assert equal(adapter(part), adapter(whole))
    rounds = {client: {one["round"] for one in lines(whole) if one["client"] == client} for client in FOUR}
    assert rounds["bob"] <= {1, 2, 3}
    assert rounds["cid"] <= {0, 1, 2}
    assert caught[0].counters.lost == {"dan": 1}
    if name in TOGETHER:  # dan is lost in the only other round in which all of them are there
        assert all({2} <= made <= {1, 2} for made in rounds.values())  # some had ended their step in round 1
        assert caught[0].counters.rounds == 3
    elif name == "clicooper":  # ann owns the data, and needs the whole chain
        assert rounds == {"ann": {2}, "bob": set(), "cid": set(), "dan": set()}
    elif name == "multisfl":  # two a round, by turns: of the first two clients one is not there yet
        assert rounds == {"ann": {0, 2}, "bob": {2}, "cid": {1}, "dan": {3}}
    elif name == "pairingfl":  # ann and bob, cid and dan; the members take turns
        assert rounds == {"ann": {2}, "bob": {1, 3}, "cid": {0, 2}, "dan": set()}
    else:
        assert rounds == {"ann": {0, 1, 2, 3}, "bob": {1, 2, 3}, "cid": {0, 1, 2}, "dan": {0, 2, 3}}


def lost_at(message: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is lost is so at this message of the round."""
    original = Presence.begin

    def begin(self: Presence, *args: Any) -> None:
        original(self, *args)
        self._messages.update(dict.fromkeys(self._messages, message))

    monkeypatch.setattr(Presence, "begin", begin)


@pytest.mark.parametrize("message", often([0, 1, 2], 1))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sfl-v1", {}), pytest.param("psl", {}, marks=pytest.mark.slow), ("psl", {"grad_scale": "joint"}),
        pytest.param("hsfl", {"intervals": [1, 1, 1]}, marks=pytest.mark.slow),
        ("gsfl", {"groups": 2, "intra": "psl"}), ("p-sl", {"form": "parallel", "cache": 0}),
    ],
    ids=["sfl-v1", "psl", "psl-joint", "hsfl", "gsfl-psl", "p-sl"],
)  # fmt: skip
def test_a_lost_client_counts_as_if_it_had_not_come(
    name: str, options: dict[str, Any], message: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: list[Run]
) -> None:
    """Wherever in its step it is lost, all weights are those of a run that it joins a round later."""
    lost_at(message, monkeypatch)
    options = {**framework_of(name, **options), "rounds": 2, "max_grad_norm": 0.5 if message == 1 else None}
    train(tmp_path / "lost", {"dan": {"fails": [0]}}, **options)
    train(tmp_path / "late", {"dan": {"joins": 1}}, **options)
    lost, late = caught
    assert lost.counters.lost == {"dan": 1}
    assert lost.counters.steps == late.counters.steps
    for client in FOUR:
        assert equal(lost.state(client), late.state(client))


@pytest.mark.parametrize("message", often([0, 1], 1))
@pytest.mark.parametrize("name", often(["sequential-sl", "sfl-v2", "gsfl"], "sequential-sl", "sfl-v2"))
def test_before_its_turn_at_a_common_trunk_is_over_too(
    name: str, message: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: list[Run]
) -> None:
    """What the trunk had learnt of a lost client's step by then stays; before its backward pass that is nothing."""
    lost_at(message, monkeypatch)
    for out, goings in (("lost", {"fails": [1]}), ("away", {})):
        if out == "away":
            monkeypatch.setattr(Presence, "there", lambda self, client, number: (client, number) != ("bob", 1))
        options = {"order": "listed"} if name == "sfl-v2" else {}
        train(tmp_path / out, {"bob": goings}, **framework_of(name, **options), rounds=3)
    lost, away = caught
    assert lost.counters.lost == {"bob": 1}
    assert lost.counters.steps == away.counters.steps
    for client in ("ann", "cid", "dan"):
        assert equal(lost.state(client), away.state(client))
    assert equal(adapter(tmp_path / "lost"), adapter(tmp_path / "away"))


def test_the_merge_is_that_of_the_survivors(tmp_path: Path) -> None:
    """FedAvg of unsplit models of those who stayed, weighted among themselves."""
    out = tmp_path / "out"
    framework = framework_of("sfl-v1", local_steps=2, moments="keep")
    train(out, {"dan": {"fails": [0]}}, **framework, rounds=1, optimizer={"name": "sgd", "lr": joint.LR})
    stayed = {name: rows for name, rows in FOUR.items() if name != "dan"}
    folder = model(num_hidden_layers=5)
    reference = joint.fedavg(
        folder, out / "adapter_initial", rounds=1, local_steps=2, sizes={n: len(r) for n, r in stayed.items()},
        batches={n: unsplit.text_batches(folder, r, size=3) for n, r in stayed.items()}, make_optimizer=joint.sgd,
    )  # fmt: skip
    assert max(float((adapter(out)[n] - reference[n]).abs().max()) for n in reference) <= 1e-6


@pytest.mark.parametrize("name", EVERY)
def test_a_round_in_which_all_are_lost_passes(name: str, tmp_path: Path, caught: list[Run]) -> None:
    """Nothing is merged, and the run goes on."""
    train(tmp_path / "out", {}, **framework_of(name), rounds=2, fails=[0])
    run = caught[0]
    nothing_is_left(run)
    assert run.counters.rounds == 2
    assert run.counters.lost
    assert sum(line["round"] == 1 for line in lines(tmp_path / "out")) >= (1 if name == "clicooper" else 2)


def test_a_late_client_begins_with_the_current_model(tmp_path: Path, caught: list[Run]) -> None:
    """Also the first of the list, and with a learning rate of 0 it is the others' merge to the last bit."""
    for name in ("sfl-v1", "sfl-v2", "sequential-sl"):
        train(tmp_path / name, {"ann": {"joins": 2}}, **framework_of(name), rounds=3)
        assert caught[-1].counters.steps == {"ann": 1, "bob": 3, "cid": 3, "dan": 3}
    still = {"optimizer": {"name": "sgd", "lr": 0.0}}
    train(tmp_path / "still", {"ann": {"joins": 2}}, **framework_of("sfl-v1"), rounds=3, **still)
    assert equal(caught[-1].state("ann"), caught[-1].state("bob"))


def test_a_schedule_ends_with_the_run(tmp_path: Path, caught: list[Run]) -> None:
    """Steps are foreseen with joins, leaves and availability; not with losses."""
    goings = {"bob": {"joins": 3}, "cid": {"leaves": 2}, "dan": {"availability": 0.5}}
    train(tmp_path / "out", goings, **framework_of("sfl-v1"), rounds=6)
    run = caught[0]
    assert run.counters.steps == dict(run.parts.foreseen)
    assert (run.counters.steps["ann"], run.counters.steps["bob"]) == (6, 3)
    assert run.counters.steps["cid"] == 2
    assert 0 < run.counters.steps["dan"] < 6


def test_a_length_in_steps_waits_for_who_comes_and_not_for_who_left(tmp_path: Path, caught: list[Run]) -> None:
    goings = {"bob": {"joins": 5}, "cid": {"leaves": 1}, "dan": {"availability": 0.3}}
    train(tmp_path / "out", goings, **framework_of("sfl-v2"), steps=2, rounds=None)
    assert caught[0].counters.steps == {"ann": 2, "bob": 2, "cid": 1, "dan": 2}
    assert caught[0].parts.foreseen == {"ann": 2, "bob": 2, "cid": 1, "dan": 2}


def test_a_probability_is_drawn_from_the_seed_by_client_and_round(tmp_path: Path) -> None:
    config = load_config({"model": "m", "data": {"train": "x"}, "clients": 4, "availability": 0.7, "fails": 0.3})
    presence = Presence(config, dict.fromkeys(config.client_names, ()))
    there = [(c, n) for c in config.client_names for n in range(500) if presence.there(c, n)]
    assert 0.67 < len(there) / 2000 < 0.73
    count = 0
    for number in range(500):
        presence.begin(number, config.client_names, 1, dict.fromkeys(config.client_names, True))
        count += len(presence._messages)
        assert set(presence._messages.values()) <= {0, 1, 2}
    assert 0.27 < count / 2000 < 0.33


@pytest.mark.parametrize(
    ("goings", "changes", "said"),
    [
        ({"ann": {"joins": 2, "leaves": 2}}, {}, r"clients.0.leaves is 2, but it joins in round 2"),
        ({"bob": {"joins": 4}}, {}, r"clients.1.joins is 4, but the run has 4 rounds"),
        ({}, {"availability": 0.0}, "availability"),
        ({}, {"fails": 1.0}, "fails"),
        ({"ann": {"joins": 2}, "bob": {"leaves": 1}}, {"framework": "ringsfl"}, "nobody is ever there"),
        ({client: {"availability": 1e-9} for client in FOUR}, {}, "in 4 rounds nobody is ever there"),
    ],
)
def test_refusals(goings: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """In words, before a model is loaded."""
    with pytest.raises(CutlayerError, match=said):
        train(tmp_path / "out", goings, **changes)
    assert not (tmp_path / "out").exists()


def test_a_run_without_end_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has steps left and is never there again: an error that says so, and no hang."""
    monkeypatch.setattr(Presence, "there", lambda self, client, number: number == 0)
    with pytest.raises(CutlayerError, match=r"made no step, like the 1000 before it.*availability"):
        train(tmp_path / "out", {"ann": {"availability": 0.5}}, **framework_of("sfl-v1"), steps=2, rounds=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"framework": "sfl-v1", "mixing": "minibatch-sfl"},
        {"framework": "sfl-v1", "mixing": "three-tier-sl"},
        {"framework": {"name": "psl", "joint": "concatenate"}},
    ],
    ids=["minibatch-sfl", "three-tier-sl", "concatenate"],
)
def test_where_batches_meet_nobody_may_be_lost(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match="a step that one of them is lost in cannot be taken apart"):
        train(tmp_path / "out", {"dan": {"fails": [1]}}, **changes)


@pytest.mark.parametrize("message", [3, 6, 8])
def test_a_ring_is_set_back_wherever_one_is_lost(
    message: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: list[Run]
) -> None:
    """Gradients of steps that had ended wait on the others' devices."""
    lost_at(message, monkeypatch)
    train(tmp_path / "out", {"dan": {"fails": [0]}}, **framework_of("ringsfl"), rounds=2)
    nothing_is_left(caught[0])
    assert caught[0].counters.lost == {"dan": 1}


@pytest.mark.parametrize(
    "framework",
    often([{"name": name} for name in ("sfl-v1", "sfl-v2", "psl", "gsfl", "p-sl", "hsfl")]
    + [{"name": name, "order": "random"} for name in ("sequential-sl",)], {"name": "sequential-sl", "order": "random"}),
    ids=lambda options: options["name"],
)  # fmt: skip
def test_who_is_lost_is_asked_for_nothing_more_in_the_round(
    framework: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: list[Run]
) -> None:
    """Not even for a part that it has and would hand on: over a network it could not answer."""
    original, lost = LocalLink.call, []

    async def call(self: LocalLink, *args: Any, **options: Any) -> Any:
        assert self.party.name not in caught[-1].presence.lost, f"{self.party.name} is asked for {args[0].verb}"
        lost.extend(caught[-1].presence.lost)
        return await original(self, *args, **options)

    monkeypatch.setattr(LocalLink, "call", call)
    train(tmp_path / "run", {name: {"fails": 0.5} for name in FOUR}, framework=framework, rounds=6)
    assert len(set(lost)) > 1
