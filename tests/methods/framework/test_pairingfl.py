"""The row's check: SFL-V1's numbers with the trunk at a peer, no activation at the server, and where that pays."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from spine import MOSTLY_U, PARTITIONS, TWO, adapter, caught, equal, losses, model, often, train  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(3 + 3 * i, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
DATA = ("ann", "cid")  # the first of each pair


def pairing(**options: Any) -> dict[str, Any]:
    return {"name": "pairingfl", **options}


@MOSTLY_U
def test_a_equals_sfl_v1_with_the_same_data_clients(partition: dict[str, Any], tmp_path: Path) -> None:
    common = {"partition": partition, "rounds": 3}
    framework = pairing(roles="fixed", local_steps=2)
    train(model(), tmp_path / "pairs", ROWS, framework=framework, **common)
    few = {name: ROWS[name] for name in DATA}
    sfl = {"name": "sfl-v1", "local_steps": 2, "moments": "keep"}
    train(model(), tmp_path / "sfl", few, framework=sfl, **common)
    assert sorted(losses(tmp_path / "pairs")) == sorted(losses(tmp_path / "sfl"))
    assert equal(adapter(tmp_path / "pairs"), adapter(tmp_path / "sfl"))


def server_bytes(run: Run) -> int:
    return sum(n for pair, n in run.meter.by_pair.items() if "server" in pair)


@PARTITIONS
def test_b_the_server_sees_parameters_and_no_activation(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    from cutlayer.wire import read_frames

    wire = tmp_path / "wire"
    train(model(), tmp_path / "out", ROWS, partition=partition, framework=pairing(), rounds=2, record_wire=str(wire))
    seen, between = set(), set()
    for line, _, _ in read_frames(wire):
        at_server = "server" in (line["sender"], line["receiver"])
        (seen if at_server else between).add(line["kind"])
        if not at_server:
            assert {line["sender"], line["receiver"]} in ({"ann", "bob"}, {"cid", "dan"})
    assert seen == {"control", "ack", "state"}
    assert {"activations", "gradient"} <= between


@pytest.mark.parametrize("tried", [(1, 2, 3, 4), pytest.param(range(1, 9), marks=pytest.mark.slow)], ids=["few", "all"])
def test_c_it_pays_at_the_server_from_so_many_local_steps_on(
    tried: Sequence[int], tmp_path: Path, caught: list[Run]
) -> None:
    """SFL-V1 moves the hidden states of E steps through the server, pairs move the top part's parameters instead."""
    rows = {name: text_rows(3, seed=i, shortest=6, longest=6) for i, name in enumerate(ROWS)}
    few = {name: rows[name] for name in DATA}
    common = {"partition": TWO, "rounds": 1, "peft": {"name": "lora", "rank": 2}}
    saving = {}
    for local in tried:
        train(model(), tmp_path / f"p{local}", rows, framework=pairing(roles="fixed", local_steps=local), **common)
        pairs = server_bytes(caught[-1])
        train(model(), tmp_path / f"s{local}", few, framework={"name": "sfl-v1", "local_steps": local}, **common)
        saving[local] = server_bytes(caught[-1]) - pairs
    pays = [local for local, saved in saving.items() if saved > 0]
    top = sum(t.numel() * 4 for t in caught[-1].parts.server.slots["ann"].get().values())
    step = caught[-1].meter.by_step["send_activations"] / (2 * tried[-1])  # of a client-step, labels included
    assert pays == list(range(pays[0], tried[-1] + 1))
    assert tried[0] < pays[0] < tried[-1]
    assert abs(pays[0] - top / step) <= 1


def test_roles_alternate_and_everybody_has_the_merged_model(tmp_path: Path, caught: list[Run]) -> None:
    train(model(), tmp_path / "out", ROWS, framework=pairing(), rounds=4)
    run = caught[0]
    assert run.counters.steps == dict.fromkeys(ROWS, 2)
    assert dict(run.parts.foreseen) == run.counters.steps
    assert [c for c, _ in losses(tmp_path / "out")] == ["ann", "cid", "bob", "dan"] * 2


def test_at_rate_nothing_no_merge_or_swap_changes_anything(tmp_path: Path, caught: list[Run]) -> None:
    """Heads and hosted blocks reach the right places: any mix-up would change the model."""
    train(model(), tmp_path / "out", ROWS, framework=pairing(), rounds=3, optimizer={"name": "sgd", "lr": 0.0})
    start = adapter(tmp_path / "out", "adapter_initial")
    assert equal(adapter(tmp_path / "out"), start)


@pytest.mark.parametrize("length", often([{"steps": 3}, {"epochs": 1}], {"epochs": 1}), ids=str)
def test_runs_counted_in_steps_come_to_their_end(length: dict[str, int], tmp_path: Path, caught: list[Run]) -> None:
    for roles in ("alternate", "fixed"):
        train(model(), tmp_path / roles, ROWS, framework=pairing(roles=roles), **length)
        run = caught[-1]
        who = ROWS if roles == "alternate" else DATA
        assert {c: s for c, s in run.counters.steps.items() if s} == {c: run.parts.planned[c] for c in who}


def test_who_has_no_partner_is_refused(tmp_path: Path) -> None:
    three = {name: ROWS[name] for name in ("ann", "bob", "cid")}
    with pytest.raises(CutlayerError, match="an even number of clients, not 3"):
        train(model(), tmp_path / "out", three, framework="pairingfl")
    with pytest.raises(CutlayerError, match="'dan' is in 0 pairs"):
        train(model(), tmp_path / "out", ROWS, framework=pairing(pairs=[["ann", "bob"], ["cid", "ann"]]))


def test_clipping_asks_the_partners_device(tmp_path: Path) -> None:
    """Norm and update of what the partner runs are messages to it: four frames a step more, to each of the two."""
    rows = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob"))}
    frames = {}
    for clip in (None, 0.5):
        out = tmp_path / str(clip)
        frames[clip] = train(model(), out, rows, framework="pairingfl", rounds=1, max_grad_norm=clip).summary["frames"]
    assert frames[0.5] - frames[None] == 8
