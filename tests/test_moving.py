"""Cuts that move between rounds: nothing is lost, nothing changes but who holds what."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import unsplit
from cutlayer import moving
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from cutlayer.ranks import pairs, refit
from cutlayer.step import split_evaluate
from cutlayer.wire import read_frames
from spine import (  # noqa: F401
    MOSTLY_U,
    adamw,
    adapter,
    block_of,
    by_turns,
    caught,
    equal,
    losses,
    model,
    often,
    resumed,
    train,
    twin_of,
)
from tiny import text_rows

# A planner that gives each client the cuts that are written here, one after the other.
LISTED = """from dataclasses import dataclass
from cutlayer.contracts import Planner
from cutlayer.registry import method


@method("planner")
@dataclass
class Listed(Planner):
    cuts: str = "1"  # of all clients "1,2,3", or of each "ann=1,2;bob=2,2"
    every: int = 1
    asked: int = 0

    def of(self, client):
        parts = dict(part.split("=") for part in self.cuts.split(";")) if "=" in self.cuts else {}
        listed = [int(cut) for cut in parts.get(client, self.cuts).split(",")]
        return listed[min(self.asked, len(listed) - 1)]

    def bounds(self, now):
        return {client: range(0, now.most(client) + 1) for client in now.layouts}

    def start(self, now):
        return {client: self.of(client) for client in now.layouts}

    def plan(self, now):
        self.asked += 1
        return {client: self.of(client) for client in now.layouts}

    def state(self):
        return {"asked": float(self.asked)}

    def restore(self, state):
        self.asked = int(state["asked"])
"""
FOUR = {name: text_rows(3 + i, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
FRAMEWORKS = pytest.mark.parametrize("framework", ["sfl-v1", "sfl-v2"])


@pytest.fixture
def listed(tmp_path: Path) -> Any:
    """The planner's spec for some cuts."""
    (tmp_path / "listed.py").write_text(LISTED)
    return lambda cuts, **more: {"name": str(tmp_path / "listed.py"), "cuts": cuts, **more}


def blocks(count: int = 6) -> Path:
    return model(num_hidden_layers=count)


@by_turns("framework", ["sfl-v1", "sfl-v2"])
def test_one_client_equals_unsplit_wherever_its_cut_goes(
    framework: str, partition: dict[str, Any], listed: Any, tmp_path: Path
) -> None:
    """AdamW's state moves with each block: not one bit differs from a model that was never cut."""
    rows, out = text_rows(9), tmp_path / "out"
    train(
        blocks(), out, {"ann": rows}, partition=partition, framework=framework, rounds=6,
        planner=listed("1,2,3,1,0,4"),
    )  # fmt: skip
    batches = unsplit.text_batches(blocks(), rows, size=3)
    steps = [[batch] for batch in batches * 2]
    reference = unsplit.train(blocks(), steps, adapter=out / "adapter_initial", make_optimizer=adamw)
    assert [loss for _, loss in losses(out)] == reference.losses
    assert equal(adapter(out), reference.state)


@MOSTLY_U
def test_with_sgd_and_a_merge_each_step_the_cuts_do_not_matter(
    partition: dict[str, Any], listed: Any, tmp_path: Path
) -> None:
    """Each block's copies are averaged over whoever holds them, head or trunk, so moved or not is the same."""
    plan = "ann=1,2,3;bob=2,1,1;cid=1,1,2;dan=3,2,1"
    changes: dict[str, Any] = {
        "partition": partition, "framework": "sfl-v1", "rounds": 3, "optimizer": {"name": "sgd", "lr": 0.05},
    }  # fmt: skip
    train(blocks(), tmp_path / "moved", FOUR, planner=listed(plan), **changes)
    train(blocks(), tmp_path / "fixed", FOUR, **changes)
    moved, fixed = adapter(tmp_path / "moved"), adapter(tmp_path / "fixed")
    assert max(float((moved[n] - fixed[n]).abs().max()) for n in fixed) <= 1e-6
    assert not equal(moved, adapter(tmp_path / "moved", "adapter_initial"))


@by_turns("framework", ["sfl-v1", "sfl-v2"])
def test_a_move_leaves_the_logits_as_they_are(
    framework: str, partition: dict[str, Any], listed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No optimizer step in between: each client's loss on a batch, over its own route, before and after."""
    seen: list[tuple[list[float], list[float]]] = []
    original = moving.move

    async def watched(run: Run, cuts: Any) -> None:
        await moving._catch_up(run, run.clients)
        before = [await probe(run, client) for client in run.clients]
        await original(run, cuts)
        seen.append((before, [await probe(run, client) for client in run.clients]))

    async def probe(run: Run, client: str) -> float:
        end, middle, tail, _ = run.route(client)
        return (await split_evaluate(end, middle, tail, batch=0)).loss

    monkeypatch.setattr(moving, "move", watched)
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(f'{{"text": "{row["text"]}"}}\n' for row in text_rows(3, seed=9)))
    train(
        blocks(), tmp_path / "out", FOUR, partition=partition, framework={"name": framework, "participation": 0.5},
        rounds=4, planner=listed("ann=1,2,3,1;bob=2,1,1,1;cid=1,1,2,3;dan=3,2,1,2"), data={"eval": str(held_out)},
    )  # fmt: skip
    assert len(seen) == 3
    for before, after in seen:
        assert before == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("framework", often(["sfl-v1", "sfl-v2"], "sfl-v1"))
def test_a_killed_run_goes_on_with_the_cuts_it_had(framework: str, listed: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "framework": framework, "rounds": 4, "checkpoint_every": 1,
        "planner": listed("ann=1,2,3,1;bob=2,1,1,1;cid=1,1,2,3;dan=3,2,1,2"),
    }  # fmt: skip
    whole = train(blocks(), tmp_path / "whole", FOUR, **changes)
    part = twin_of(tmp_path / "whole")
    again = resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))
    assert again.summary["cuts"] == whole.summary["cuts"]
    assert again.summary["bytes"] == whole.summary["bytes"]


def test_what_a_move_sends(listed: Any, tmp_path: Path) -> None:
    """Up: the block's tensors and their state, in the answer to ``move``. Down: in the state that the client gets."""
    wire = tmp_path / "wire"
    two = {name: FOUR[name] for name in ("ann", "bob")}
    train(
        blocks(), tmp_path / "out", two, framework="sfl-v1", rounds=2, planner=listed("ann=2,1;bob=1,3"),
        partition={"name": "two-part-split", "head_blocks": 1}, record_wire=str(wire),
    )  # fmt: skip
    headers = [header for _, header, _ in read_frames(wire)]
    up = [h.names for h in headers if (h.step_name, h.kind) == ("partition", "state")]
    assert [bool(names) for names in up] == [True, False]  # ann's answer, bob's
    assert all(".layers.1." in name for name in up[0])
    assert any(name.startswith("optimizer/") for name in up[0])
    down = [h.names for h in headers if h.receiver == "bob" and h.step_name == "aggregate" and h.kind == "state"]
    gained = next(names for names in down if any(name.startswith("optimizer/") for name in names))
    assert {block_of(name) for name in gained} == {1, 2}


def test_cuts_outside_the_planners_own_bounds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wild.py").write_text(LISTED.replace("now.most(client) + 1", "2"))
    planner = {"name": str(tmp_path / "wild.py"), "cuts": "1,3"}
    with pytest.raises(CutlayerError, match="gives client 'ann' 3 head blocks, but its own bounds are 0 to 1"):
        train(blocks(), tmp_path / "out", {"ann": FOUR["ann"]}, planner=planner, framework="sfl-v1")


@pytest.mark.parametrize("changes", [{"framework": "psl"}, {"framework": "ringsfl"}, {"aggregator": "mhsl"}])
def test_where_copies_stay_unequal_a_planner_is_refused(changes: dict[str, Any], listed: Any, tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match="blocks change hands where all copies are equal"):
        train(blocks(), tmp_path / "out", FOUR, **{"framework": "sfl-v2", "planner": listed("1,2"), **changes})


def test_refitting_keeps_the_product() -> None:
    """Rank 16 to 16 by SVD and 8 to 16 by padding are the same update; 16 to 8 is the best of rank 8."""
    draw = torch.Generator().manual_seed(0)
    state = {"x.lora_A.w": torch.randn(8, 20, generator=draw), "x.lora_B.w": torch.randn(30, 8, generator=draw)}

    def product(of: dict[str, torch.Tensor]) -> torch.Tensor:
        return of["x.lora_B.w"].double() @ of["x.lora_A.w"].double()

    assert pairs(state) == {"x.lora_A.w": "x.lora_B.w"}
    wide = refit(state, {"x.lora_A.w": 16})
    assert wide["x.lora_A.w"].shape == (16, 20)
    assert float((product(wide) - product(state)).abs().max()) <= 1e-6
    back = refit(wide, {"x.lora_A.w": 8})
    assert float((product(back) - product(state)).abs().max()) <= 1e-5
    low = refit(state, {"x.lora_A.w": 3})
    u, s, vh = torch.linalg.svd(product(state), full_matrices=False)
    best = u[:, :3] * s[:3] @ vh[:3]
    assert float((product(low) - best).abs().max()) <= 1e-5


def test_moves_with_clients_that_come_and_go(listed: Any, tmp_path: Path, caught: list[Run]) -> None:
    """Whoever is away is not moved; whoever is lost in a round is set back, and moved later."""
    rows = {name: text_rows(6, seed=i) for i, name in enumerate(FOUR)}
    plan = "ann=1,2,3,1;bob=2,1,1,1;cid=1,1,2,3;dan=3,2,1,2"
    changes: dict[str, Any] = {"framework": "sfl-v1", "rounds": 4, "planner": listed(plan), "fails": 0.3,
                               "availability": 0.7}  # fmt: skip
    result = train(blocks(), tmp_path / "out", rows, **changes)
    again = train(blocks(), tmp_path / "again", rows, **changes)
    assert equal(adapter(tmp_path / "out"), adapter(tmp_path / "again"))
    assert result.summary["cuts"] == again.summary["cuts"]
    run = caught[0]
    for name, found in result.summary["cuts"].items():
        assert all(run.presence.there(name, number) for number, _ in found["moves"])
        assert found["head_blocks"] == len(run.parts.clients[name].head.blocks)
    assert all(slot.idle for party in run.parts.parties.values() for slot in party.slots.values())
