"""The row's check, (a) to (d), and a plain simulation of SplitFed V2 for every order and interleaving."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from forgetting import forgetting

import unsplit
import unsplit_clients
from cutlayer.driver import Run
from spine import (  # noqa: F401
    MOSTLY_TWO,
    MOSTLY_U,
    PARTITIONS,
    TWO,
    U,
    adamw,
    adapter,
    block_of,
    caught,
    equal,
    lines,
    losses,
    model,
    train,
)
from tiny import BLOCKS, text_rows

SIZES = {"ann": 6, "bob": 3, "cid": 9}
ROWS = {name: text_rows(size, seed=i) for i, (name, size) in enumerate(SIZES.items())}
AT_CLIENT = {
    "two-part-split": lambda name: block_of(name) < 1,
    "u-shaped-split": lambda name: block_of(name) < 1 or block_of(name) >= BLOCKS - 1,
}


def trunk_of(out: Path) -> dict[str, Any]:
    return {n: t for n, t in adapter(out).items() if not AT_CLIENT["u-shaped-split"](n)}


@pytest.mark.parametrize(
    ("interleave", "order", "partition"),
    [
        ("step", "listed", TWO),
        ("step", "random", U),
        pytest.param("client", "listed", U, marks=pytest.mark.slow),
        ("client", "random", TWO),
    ],
    ids=["step-listed-two-part", "step-random-u-shape", "client-listed-u-shape", "client-random-two-part"],
)
def test_equals_a_plain_simulation(interleave: str, order: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """Losses in order and all tensors bit for bit; the order of turns is read from the run, everything else is not."""
    out = tmp_path / "out"
    framework = {"name": "sfl-v2", "local_steps": 2, "order": order, "interleave": interleave}
    train(model(), out, ROWS, partition=partition, framework=framework, rounds=2)
    turns = [line["client"] for line in lines(out)]
    listed = [*ROWS, *ROWS] if interleave == "step" else [c for c in ROWS for _ in range(2)]
    for first in (0, 6):
        assert sorted(turns[first : first + 6]) == sorted(listed)
        if order == "listed":
            assert turns[first : first + 6] == listed
        for i in range(first, first + 6, 2 if interleave == "client" else 3):
            assert len(set(turns[i : i + (2 if interleave == "client" else 3)])) == (1 if interleave == "client" else 3)
    plan = [*turns[:6], tuple(ROWS), *turns[6:], tuple(ROWS)]
    reference = unsplit_clients.sfl_v2(
        model(), out / "adapter_initial", plan, sizes=SIZES, make_optimizer=adamw,
        of_client=AT_CLIENT[partition["name"]],
        batches={name: unsplit.text_batches(model(), rows, size=3) for name, rows in ROWS.items()},
    )  # fmt: skip
    assert losses(out) == reference.losses
    assert all(equal(adapter(out), state) for state in reference.states.values())


@PARTITIONS
def test_a_with_one_client_it_is_the_split_alone(partition: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(model(), out, {"ann": ROWS["cid"]}, partition=partition, framework="sfl-v2", rounds=6)
    batches = unsplit.text_batches(model(), ROWS["cid"], size=3)
    steps = [[batches[i % 3]] for i in range(6)]
    reference = unsplit.train(model(), steps, adapter=out / "adapter_initial", make_optimizer=adamw)
    assert [loss for _, loss in losses(out)] == reference.losses
    assert equal(adapter(out), reference.state)


def test_b_permutations_give_other_trunks_with_as_many_updates(tmp_path: Path, caught: list[Any]) -> None:
    framework = {"name": "sfl-v2", "order": "listed", "local_steps": 2}
    for name, order in {"abc": "ann bob cid", "cab": "cid ann bob", "again": "ann bob cid"}.items():
        train(model(), tmp_path / name, {c: ROWS[c] for c in order.split()}, framework=framework, rounds=2)
    assert equal(adapter(tmp_path / "abc"), adapter(tmp_path / "again"))
    assert not equal(trunk_of(tmp_path / "abc"), trunk_of(tmp_path / "cab"))
    assert [run.parts.server.slots["shared"].version for run in caught] == [2 * 3 * 2] * 3
    assert {party.slot.version for run in caught for party in run.parts.clients.values()} == {2 * 2}


def test_b_the_random_order_comes_from_seed_round_and_local_step(tmp_path: Path) -> None:
    framework = {"name": "sfl-v2", "local_steps": 3}
    turns = {}
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        train(model(), tmp_path / name, ROWS, framework=framework, rounds=1, seed=seed)
        turns[name] = [line["client"] for line in lines(tmp_path / name)]
    orders = [tuple(turns["a"][i : i + 3]) for i in range(0, 9, 3)]
    assert len(set(orders)) > 1  # a new one for each local step
    assert turns["a"] == turns["b"] != turns["c"]
    assert equal(trunk_of(tmp_path / "a"), trunk_of(tmp_path / "b"))


def test_c_who_comes_early_in_a_round_is_forgotten_unless_steps_interleave(tmp_path: Path) -> None:
    clients = ["ann", "bob", "cid", "dan"]
    found = {}
    for interleave in ("client", "step"):
        framework = {"name": "sfl-v2", "local_steps": 20, "order": "listed", "interleave": interleave}
        found[interleave] = list(forgetting(tmp_path / interleave, clients, framework=framework, rounds=1).values())
    by_client, by_step = found["client"], found["step"]
    assert mean(by_client[:2]) > mean(by_client[2:])
    assert max(by_step) - min(by_step) < 0.5 * (max(by_client) - min(by_client))


@PARTITIONS
def test_d_the_server_holds_one_adapter_set(partition: dict[str, Any], tmp_path: Path, caught: list[Any]) -> None:
    train(model(), tmp_path / "out", ROWS, partition=partition, framework="sfl-v2")
    parts = caught[0].parts
    assert list(parts.server.slots) == ["shared"]
    names = set(parts.server.slots["shared"].get())
    assert names == {n for n in parts.base.initial if not AT_CLIENT[partition["name"]](n)}
    for party in parts.clients.values():
        assert set(party.slot.get()) == set(parts.base.initial) - names


def test_the_merge_counts_the_chosen_weight(tmp_path: Path) -> None:
    """By examples, by label tokens, or all alike: three different results."""
    for by in ("examples", "tokens", "uniform"):
        train(
            model(), tmp_path / by, ROWS, framework="sfl-v2", aggregator={"name": "fedavg", "weight_by": by}, rounds=1
        )
    found = [adapter(tmp_path / by) for by in ("examples", "tokens", "uniform")]
    assert not equal(found[0], found[1])
    assert not equal(found[1], found[2])
    assert equal(trunk_of(tmp_path / "examples"), trunk_of(tmp_path / "uniform"))


@MOSTLY_TWO
def test_who_missed_a_merge_begins_with_it(
    partition: dict[str, Any], tmp_path: Path, caught: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round r begins with the merged part of round r - 1 at every client that takes part, and the result has it too."""
    rounds: dict[int, set[str]] = {}
    original = Run.step

    async def step(self: Any, client: str, **options: Any) -> Any:
        merged = self.federated.before
        if merged:
            assert equal(self.parts.clients[client].slot.get(), merged)
        rounds.setdefault(self.counters.rounds, set()).add(client)
        return await original(self, client, **options)

    monkeypatch.setattr(Run, "step", step)
    framework = {"name": "sfl-v2", "participation": 0.5}
    train(model(), tmp_path / "out", ROWS, partition=partition, framework=framework, rounds=8)
    assert all(len(cohort) == 2 for cohort in rounds.values())
    assert len({frozenset(cohort) for cohort in rounds.values()}) == 3
    assert any("ann" not in rounds[number] for number in range(8))
    merged = caught[0].federated.before
    state = caught[0].state()
    assert equal({n: state[n] for n in merged}, dict(merged))


def test_a_client_that_has_made_its_steps_stays_out_of_the_merge(tmp_path: Path) -> None:
    """Epochs of unequal lengths: nobody waits for the short ones, and the last merges are those of who is left."""
    out = tmp_path / "out"
    train(model(), out, ROWS, framework={"name": "sfl-v2", "order": "listed"}, epochs=1)
    assert [line["client"] for line in lines(out)] == ["ann", "bob", "cid", "ann", "cid", "cid"]
    plan = ["ann", "bob", "cid", ("ann", "bob", "cid"), "ann", "cid", ("ann", "cid"), "cid", ("cid",)]
    reference = unsplit_clients.sfl_v2(
        model(), out / "adapter_initial", plan, sizes=SIZES, make_optimizer=adamw,
        of_client=AT_CLIENT["u-shaped-split"],
        batches={name: unsplit.text_batches(model(), rows, size=3) for name, rows in ROWS.items()},
    )  # fmt: skip
    assert losses(out) == reference.losses
    assert equal(adapter(out), reference.states["cid"])


def test_a_schedule_ends_with_the_run_when_rounds_take_some_clients(tmp_path: Path, caught: list[Run]) -> None:
    """Linear decay ends at the last step of each party: its steps are counted as they will be drawn."""
    framework = {"name": "sfl-v2", "participation": 0.5}
    optimizer = {"name": "sgd", "lr": 1.0, "schedule": "linear"}
    train(model(), tmp_path / "out", ROWS, framework=framework, optimizer=optimizer, rounds=9)
    run = caught[0]
    made = run.counters.steps
    assert sum(made.values()) == 18  # two of three in each round
    assert made == dict(run.parts.foreseen)
    assert len(set(made.values())) > 1  # the draw is uneven, so an equal share would not do
    rates = [group["lr"] for group in run.parts.server.slots["shared"].optimizer.param_groups]
    assert rates == pytest.approx([1 / 18])
    for name, party in run.parts.clients.items():
        assert [g["lr"] for g in party.slot.optimizer.param_groups] == pytest.approx([1 / made[name]])


def test_one_that_has_made_its_epochs_is_in_no_later_merge(tmp_path: Path, caught: list[Run]) -> None:
    """As the docstring says: with epochs of unequal data the early ones are merged no more, and get no more."""
    train(model(), tmp_path / "out", ROWS, framework="sfl-v2", epochs=1, batch_size=3)
    run = caught[0]
    assert run.counters.steps == {"ann": 2, "bob": 1, "cid": 3}
    assert run.counters.merged == {"ann": 2, "bob": 1, "cid": 3}


@MOSTLY_U
def test_unequal_cuts_are_merged_by_block(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block in some heads: their mean with the trunk's copy, which stands for the clients that do not hold it."""
    before: dict[str, Any] = {}
    original = Run.merge

    async def merge(self: Run, clients: Any, **options: Any) -> None:
        before.update({c: {n: t.clone() for n, t in self.state(c).items()} for c in ROWS})
        await original(self, clients, **options)

    monkeypatch.setattr(Run, "merge", merge)
    deep, cuts = model(num_hidden_layers=5), {"ann": 1, "bob": 2, "cid": 3}
    train(deep, tmp_path / "out", ROWS, partition=partition, cuts=cuts, framework="sfl-v2", rounds=1)
    run = caught[0]
    trunk = run.parts.server.slots["shared"].get()
    total = sum(SIZES.values())
    for name, tensor in run.state("ann").items():
        block = block_of(name)
        if block >= 3 and partition["name"] == "two-part-split":
            continue  # nobody's head has it: the trunk's copy stands
        own = {c for c in ROWS if cuts[c] > block or (partition["name"] == "u-shaped-split" and block == 4)}
        if own:
            mean = sum(before[c][name].double() * SIZES[c] for c in ROWS) / total
            assert torch.allclose(tensor.double(), mean, rtol=0, atol=1e-7), name
            assert all(torch.equal(run.state(c)[name], tensor) for c in ROWS), name
        for client in set(ROWS) - own:
            assert torch.equal(run.state(client)[name], trunk[name])
