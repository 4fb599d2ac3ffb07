"""The row's check: the two-tier limits, three tiers with every interval 1, and what the intervals do."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import joint
import unsplit
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from cutlayer.methods.framework.hsfl import HSFL
from cutlayer.models.slots import Slot
from cutlayer.wire import read_frames
from spine import MOSTLY_TWO, MOSTLY_U, TWO, U, adapter, block_of, caught, equal, losses, model, train  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
SGD = {"name": "sgd", "lr": joint.LR}
TOKENS = {"name": "fedavg", "weight_by": "tokens"}


def hsfl(**options: Any) -> dict[str, Any]:
    return {"name": "hsfl", **options}


@MOSTLY_TWO
def test_a_two_tiers_with_one_interval_are_sfl_v1(partition: dict[str, Any], tmp_path: Path) -> None:
    common = {"partition": partition, "rounds": 2}
    train(
        model(num_hidden_layers=4),
        tmp_path / "one",
        ROWS,
        framework={"name": "sfl-v1", "local_steps": 3, "moments": "keep"},
        **common,
    )
    train(
        model(num_hidden_layers=4), tmp_path / "two", ROWS, framework=hsfl(edge_blocks=0, intervals=[3, 3, 3]), **common
    )
    assert sorted(losses(tmp_path / "one")) == sorted(losses(tmp_path / "two"))  # they take turns in other orders
    assert equal(adapter(tmp_path / "one"), adapter(tmp_path / "two"))


@MOSTLY_U
def test_b_three_tiers_merged_every_step_are_the_joint_batch(partition: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    framework = hsfl(intervals=[1, 1, 1])
    train(
        model(num_hidden_layers=4), out, ROWS, partition=partition, framework=framework, optimizer=SGD,
        aggregator=TOKENS, rounds=3, record_wire=str(tmp_path / "wire"),
    )  # fmt: skip
    batches = [unsplit.text_batches(model(num_hidden_layers=4), rows, size=3)[0] for rows in ROWS.values()]
    reference = unsplit.train(
        model(num_hidden_layers=4), [batches] * 3, adapter=out / "adapter_initial", make_optimizer=joint.sgd
    )
    found = adapter(out)
    assert max(float((found[n] - reference.state[n]).abs().max()) for n in found) <= 1e-6
    pairs = {(line["sender"], line["receiver"]) for line, *_ in read_frames(tmp_path / "wire")}
    assert {
        ("ann", "edge-0"),
        ("edge-0", "server"),
        ("server", "edge-0"),
        ("edge-0", "ann"),
        ("bob", "edge-1"),
    } <= pairs


def test_u_shaped_relays_hold_no_token_and_no_label(tmp_path: Path) -> None:
    train(
        model(num_hidden_layers=4),
        tmp_path / "out",
        ROWS,
        partition=U,
        framework="hsfl",
        rounds=1,
        record_wire=str(tmp_path / "wire"),
    )
    for line, header, tensors in read_frames(tmp_path / "wire"):
        for name, tensor in zip(header.names, tensors, strict=True):
            assert name in ("mask", "positions") or tensor.is_floating_point(), (line, name)


def test_c_short_intervals_keep_the_tier_together_and_cost_bytes(
    tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its average the edge tier has drifted less with (8, 2, 1) than with (8, 8, 8); traffic goes by 1/I."""
    spread: dict[str, list[float]] = {}
    original = Run.merge

    async def merge(self: Run, clients: Any, **options: Any) -> None:
        if "blocks" in options and options["blocks"](1):  # the edge's block
            states = [self.state(client) for client in ROWS]
            names = [n for n in states[0] if ".layers.1." in n]
            gaps = [torch.stack([s[n] for s in states]).var(0).mean() for n in names]
            spread.setdefault(self.out.name, []).append(float(torch.stack(gaps).mean()))
        await original(self, clients, **options)

    monkeypatch.setattr(Run, "merge", merge)
    traffic = {}
    for name, intervals in {"often": [8, 2, 1], "rarely": [8, 8, 8]}.items():
        train(
            model(num_hidden_layers=4),
            tmp_path / name,
            ROWS,
            partition=TWO,
            framework=hsfl(intervals=intervals),
            rounds=1,
        )
        run = caught[-1]
        traffic[name] = sum(n for pair, n in run.meter.by_pair.items() if set(pair) == {"edge-0", "server"})
        traffic[f"{name} steps"] = sum(
            n for pair, n in run.meter.by_pair.items() if pair in {("ann", "edge-0"), ("cid", "edge-0")}
        )
    assert max(spread["often"]) < spread["rarely"][0]
    assert len(spread["often"]) == 4
    assert len(spread["rarely"]) == 1
    assert traffic["often steps"] == traffic["rarely steps"]
    one = (traffic["often"] - traffic["rarely"]) / 3  # what one average of the edge tier moves
    assert one > 0
    assert traffic["rarely"] > one


def test_unequal_cuts_keep_each_tier_to_its_own_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block 1 is at the edge of two paths and at the devices of the others, whose edges have what is their cloud's.

    After every step a block is the same along the paths that have it in a tier whose period is over, and only there.
    """
    seen: list[dict[int, list[str]]] = []  # by block: the clients that have the same copy of it
    original = Run.together

    async def together(self: Run, work: Any, clients: Any) -> None:
        found: dict[int, dict[bytes, list[str]]] = {block: {} for block in range(6)}
        for client in ROWS:
            state = self.state(client)
            for block, copies in found.items():
                copy = b"".join(t.numpy().tobytes() for n, t in state.items() if block_of(n) == block)
                copies.setdefault(copy, []).append(client)
        seen.append({block: [" ".join(names) for names in copies.values()] for block, copies in found.items()})
        await original(self, work, clients)

    monkeypatch.setattr(Run, "together", together)
    train(
        model(num_hidden_layers=6), tmp_path / "out", ROWS, partition=TWO, cuts={"cid": 3, "dan": 3},
        framework=hsfl(intervals=[4, 2, 1]), rounds=2,
    )  # fmt: skip
    everybody, nobody, shallow = ["ann bob cid dan"], ["ann", "bob", "cid", "dan"], ["ann bob", "cid", "dan"]
    equal_now = dict.fromkeys(range(6), everybody)
    cloud = {0: nobody, 1: nobody, 2: shallow, 3: shallow, 4: everybody, 5: everybody}
    edge = {**cloud, 1: shallow, 3: everybody}
    assert seen == [equal_now, cloud, edge, cloud, equal_now, cloud, edge, cloud]


def test_an_average_resets_the_optimizers_of_its_own_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[str] = []
    original = Slot.reset_optimizer

    def reset(self: Slot) -> None:
        if self.optimizer is not None:  # not its first
            resets.append("edge" if any(".layers.1." in name for name in self.params) else "cloud")
        original(self)

    monkeypatch.setattr(Slot, "reset_optimizer", reset)
    train(
        model(num_hidden_layers=4), tmp_path / "out", ROWS, partition=TWO, rounds=1,
        framework=hsfl(intervals=[4, 2, 1], moments="reset"),
    )  # fmt: skip
    assert resets == [*["cloud"] * 8, *["edge"] * 4] * 2


def test_no_client_has_the_name_of_an_edge(tmp_path: Path) -> None:
    """It would be the edge. Where there are no edges, it is a name like any other."""
    rows = dict.fromkeys(("ann", "Edge-1", "edge-2"), ROWS["ann"])
    said = r"clients.1.name is 'Edge-1', which is the name of a party of framework 'hsfl'\. Choose another\."
    for edges in (2, [["ann", "edge-2"], ["Edge-1"]]):
        with pytest.raises(CutlayerError, match=said) as raised:
            train(tmp_path / "no model", tmp_path / "out", rows, framework=hsfl(edges=edges))
        assert "edge-2" not in str(raised.value)
    assert HSFL(edge_blocks=0).parties(list(rows)) == []


def test_a_route_over_a_party_that_the_framework_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its name is kept from clients, each has to be named."""
    monkeypatch.setattr(HSFL, "parties", lambda self, clients: ["edge-0"])
    with pytest.raises(CutlayerError, match="routes client 'bob' over 'edge-1', which is no client"):
        train(model(num_hidden_layers=4), tmp_path / "out", ROWS, framework="hsfl")


def test_cuts_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match="edge_blocks 2 leave the cloud no block"):
        train(model(num_hidden_layers=4), tmp_path / "out", ROWS, partition=U, framework=hsfl(edge_blocks=2))
    with pytest.raises(CutlayerError, match="they must fall from device to cloud"):
        train(model(num_hidden_layers=4), tmp_path / "out", ROWS, framework=hsfl(intervals=[2, 4, 1]))
