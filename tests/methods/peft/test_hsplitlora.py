"""The row's check: ranks by importance within each budget, exact merges of unequal ranks, and what they lose by SVD.

That the concatenated product of ranks 2, 4 and 8 is the weighted sum, and padded averaging is not, is by hand in
``tests/methods/aggregator/test_lora_products.py``.
"""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer import allotting, moving
from cutlayer.allotment import Matrix
from cutlayer.driver import Run
from cutlayer.engine import Engine
from cutlayer.errors import CutlayerError, MethodError
from cutlayer.methods.peft.hsplitlora import HSplitLora
from cutlayer.models.importance import Frozen
from cutlayer.models.slots import Slot
from cutlayer.parties.federated import FederatedServer
from cutlayer.ranks import pairs
from cutlayer.registry import create
from cutlayer.run import dry_run
from cutlayer.wire import read_frames
from spine import (  # noqa: F401
    MOSTLY_TWO,
    TWO,
    U,
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
)
from test_moving import LISTED
from tiny import make_tokenizer, text_rows

ROWS = {name: text_rows(5 + i, seed=i) for i, name in enumerate(("ann", "bob", "cid"))}
BUDGETS = {"ann": 300, "bob": 900, "cid": 2500}
FRAMEWORKS = pytest.mark.parametrize("framework", ["sfl-v1", "sfl-v2"])
State = Mapping[str, Tensor]


def hsplitlora(**more: Any) -> dict[str, Any]:
    return {
        "name": "hsplitlora", "ranks": [1, 2, 4], "alpha": 8, "budgets": BUDGETS, "server_budget": 4500, "warm_up": 2,
        "refresh": 1, **more,
    }  # fmt: skip


def run(out: Path, *, framework: str = "sfl-v1", participation: float = 1.0, **changes: Any) -> Any:
    defaults: dict[str, Any] = {
        "aggregator": "lora-products", "rounds": 4,
        "framework": {"name": framework, "local_steps": 2, "participation": participation},
        "peft": hsplitlora(), "partition": TWO,
    }  # fmt: skip
    if framework not in ("sfl-v1", "sfl-v2"):
        defaults["framework"] = framework
    return train(model(num_hidden_layers=4), out, ROWS, **{**defaults, **changes})


def product(state: State, a: str) -> Tensor:
    return state[pairs(state)[a]].double() @ state[a].double()


def parameters(state: State) -> int:
    return sum(state[n].numel() for ab in pairs(state).items() for n in ab)


def own(run: Run, client: str) -> dict[str, Tensor]:
    party = run.parts.clients[client]
    return {n: t for n, t in party.slot.get().items() if n in party.names("own")}


def trained_at(run: Run, name: str) -> dict[str, Tensor]:
    """What a trunk trains now: the blocks between head and tail of those who use it."""
    slot = run.parts.server.slots[name]
    users = [c for c in run.clients if slot in run.slots_of([c])]
    blocks = {b for c in users for b in run.parts.layouts[c].middle}
    return {n: t for n, t in slot.get().items() if block_of(n) in blocks}


def trunks_budget(run: Run) -> int:
    return 4500 // len(run.parts.server.slots)


# The importance of a matrix.


def test_the_gradient_is_estimated_from_that_of_a_random_adapter() -> None:
    """Of a matrix of rank one, of full rank, and of one that is zero outside a corner; right in the mean over draws."""
    draw = torch.Generator().manual_seed(0)
    peft, frozen = HSplitLora(), Frozen(norm=3.0, entries=40 * 24, scaling=0.5)
    corner = torch.zeros(40, 24)
    corner[:3, :3] = torch.randn(3, 3, generator=draw)
    outer = torch.outer(torch.randn(40, generator=draw), torch.randn(24, generator=draw))
    for gradient in (torch.randn(40, 24, generator=draw), outer, corner):
        found = []
        for _ in range(300):
            a = (torch.rand(8, 24, generator=draw) * 2 - 1) / 24**0.5
            found.append(float(peft.score(frozen.scaling * gradient @ a.T, a, frozen)))  # dL/dB = scaling G A^T
        exact = float(gradient.norm()) * frozen.norm / frozen.entries
        assert (sum(value**2 for value in found) / len(found)) ** 0.5 == pytest.approx(exact, rel=0.05)
        assert exact >= float((gradient * frozen.norm / gradient.numel() ** 0.5).abs().mean()) * 0.5


def test_the_first_steps_scores_follow_the_gradient_of_the_frozen_matrices(tmp_path: Path, caught: list[Run]) -> None:
    """Against dL/dW by autograd on the uncut model: within a factor of two for each, and in about the same order."""
    rows, folder = text_rows(3, seed=5), model(num_hidden_layers=4)
    train(
        folder, tmp_path / "out", {"ann": rows}, framework="sfl-v1", aggregator="lora-products", rounds=1,
        peft={"name": "hsplitlora", "ranks": [16], "alpha": 16}, partition=U,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = make_tokenizer()
    total, tokens = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"])["input_ids"] + [2]])
        count = ids.numel() - 1
        total, tokens = total + plain(input_ids=ids, labels=ids).loss * count, tokens + count
    (total / tokens).backward()
    wanted, found = [], []
    parts = caught[0].parts
    for slot in (parts.clients["ann"].slot, parts.server.slots["ann"]):
        assert slot.importance is not None
        assert slot.importance.steps == 1
        for a, score in slot.importance.scores.items():
            weight = plain.get_parameter(a.split(".lora_A.")[0] + ".weight")
            assert weight.grad is not None
            wanted.append(float(weight.grad.norm() * weight.detach().norm() / weight.numel()))
            found.append(score)
    assert len(found) == 4 * 7
    ratios = [a / b for a, b in zip(found, wanted, strict=True)]
    assert min(ratios) > 0.5
    assert max(ratios) < 2
    order = torch.stack([torch.tensor(x).argsort().argsort().double() for x in (found, wanted)])
    assert float(torch.corrcoef(order)[0, 1]) > 0.9


def test_importance_is_against_the_mean_of_the_same_place_in_all_blocks(caught: list[Run], tmp_path: Path) -> None:
    run(tmp_path / "out", rounds=1)
    base = caught[0].parts.base
    names = [n for n in sorted(pairs(base.initial)) if ".q_proj." in n]
    scores = {"ann": {names[0]: 2.0}, "server/ann": {names[1]: 4.0, names[2]: 6.0}}
    assert allotting.importances(base, scores, "ann", names) == dict(zip(names, (0.5, 1.0, 1.5, 1.0), strict=True))
    assert allotting.importances(base, {}, "ann", names) == dict.fromkeys(names, 1.0)
    other = next(n for n in pairs(base.initial) if ".down_proj." in n)
    assert allotting.importances(base, scores, "ann", [other]) == {other: 1.0}  # of a kind that nobody measured


# Ranks within a budget.


def test_ranks_by_hand() -> None:
    """Costs 10 and 20; the next rank goes to the most importance for its parameters."""
    peft = HSplitLora(ranks=[1, 2, 4])
    two = [Matrix("a", 10, 1.0), Matrix("b", 20, 3.0)]
    # Gains for each parameter: b 0->1 0.15, 1->2 0.15, a 0->1 0.1, 1->2 0.1, b 2->4 0.075, a 2->4 0.05.
    wanted = {
        20: (0, 1),
        29: (0, 1),
        30: (1, 1),
        40: (0, 2),
        50: (1, 2),
        60: (2, 2),
        99: (4, 2),
        100: (2, 4),
        120: (4, 4),
    }
    for budget, (a, b) in wanted.items():
        assert peft.allot(two, budget, holder="ann") == {"a": a, "b": b}, budget
    assert peft.allot(two, None, holder="ann") == {"a": 4, "b": 4}
    assert peft.allot([], 5, holder="ann") == {}
    assert peft.allot([Matrix("b", 10, 1.0), Matrix("a", 10, 1.0)], 10, holder="ann") == {"b": 1, "a": 0}


def test_the_budget_is_used_until_nothing_more_fits() -> None:
    draw = torch.Generator().manual_seed(0)
    peft = HSplitLora()
    for seed in range(50):
        scores = torch.rand(14, generator=draw).tolist()
        matrices = [Matrix(str(i), 20 + 7 * (i % 4), score) for i, score in enumerate(scores)]
        budget = 41 + 61 * seed
        ranks = peft.allot(matrices, budget, holder="ann")
        left = budget - sum(ranks[one.name] * one.cost for one in matrices)
        assert left >= 0
        for one in matrices:
            at = [0, *peft.ranks].index(ranks[one.name])
            assert at == len(peft.ranks) or (peft.ranks[at] - ranks[one.name]) * one.cost > left
        same = [one for one in matrices if one.cost == 20]
        by_score = [ranks[one.name] for one in sorted(same, key=lambda one: one.importance)]
        assert by_score[-1] >= by_score[0]


def test_a_budget_below_the_smallest_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="budget of 'bob' is 5 trained parameters, but its smallest adapter has 48"):
        run(tmp_path / "out", peft=hsplitlora(budgets={"bob": 5}))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, dict[str, int]]]:
    """The ranks of every holder at the end of each round, each within its budget to the parameter."""
    seen: list[dict[str, dict[str, int]]] = []
    original = Engine._round

    async def watch(self: Engine) -> None:
        await original(self)
        found = {}
        for client in self.run.clients:
            state = own(self.run, client)
            assert parameters(state) <= BUDGETS[client]
            found[client] = {a: len(state[a]) for a in pairs(state)}
        for name in self.run.parts.server.slots:
            state = trained_at(self.run, name)
            assert parameters(state) <= trunks_budget(self.run)
            found[f"server/{name}"] = {a: len(state[a]) for a in pairs(state)}
        seen.append(found)

    monkeypatch.setattr(Engine, "_round", watch)
    return seen


@pytest.fixture
def moving_cuts(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "listed.py").write_text(LISTED)
    return {"name": str(tmp_path / "listed.py"), "cuts": "ann=1,2,1,0;bob=2,1,1,2;cid=1,1,2,1"}


@pytest.mark.parametrize(
    ("framework", "partition", "moves"),
    often(
        itertools.product(["sfl-v1", "sfl-v2"], [TWO, U], [False, True]),
        ("sfl-v1", TWO, True), ("sfl-v2", U, False),
    ),
)  # fmt: skip
def test_ranks_obey_each_budget_in_every_round(
    framework: str, partition: dict[str, Any], moves: bool, watched: list[Any], moving_cuts: Any, tmp_path: Path
) -> None:
    """Also where a planner moves cuts in the same rounds. They change after the warm-up of a step, and go on to."""
    more = {"planner": moving_cuts} if moves else {"cuts": {"bob": 2}}
    result = run(tmp_path / "out", framework=framework, partition=partition, **more)
    assert len(watched) == 4
    assert any(watched[0][holder] != watched[-1].get(holder) for holder in watched[0])
    assert any(0 in ranks.values() for ranks in watched[-1].values())
    told = result.summary["ranks"]
    assert set(told) == set(watched[-1])
    for holder, found in told.items():
        assert found["budget"] == BUDGETS.get(holder, 4500 // (len(told) - 3))
        assert found["parameters"] <= found["budget"]
        assert found["decided_after_round"] == 3
        assert sorted(found["ranks"].values()) == sorted(watched[-1][holder].values())


@pytest.mark.parametrize(
    ("planted", "holder"),
    often([(0, "cid"), (3, "server/cid")], (3, "server/cid")),
    ids=["at the client", "in the trunk"],
)
def test_a_planted_important_matrix_gets_more(
    planted: int, holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is a hundred times what it would be; those of its kind in other blocks get less."""
    place = f"layers.{planted}.mlp.down_proj"
    original = Slot.collect

    def collect(self: Slot, names: Any, key: Any, *, weight: float = 1.0) -> None:
        names = list(names)
        for name in names:
            grad = self.params[name].grad
            if grad is not None and place in name:
                self.params[name].grad = 100 * grad
        original(self, names, key, weight=weight)

    found = {}
    for name in ("plain", "planted"):
        if name == "planted":
            monkeypatch.setattr(Slot, "collect", collect)
        result = run(
            tmp_path / name, rounds=2, peft=hsplitlora(ranks=[1, 2, 4, 8], budgets={}, budget=1200, server_budget=6000),
            partition={"name": "two-part-split", "head_blocks": 2},
        )  # fmt: skip
        found[name] = result.summary["ranks"][holder]["ranks"]
    (this,) = [name for name in found["planted"] if name.endswith(place)]
    others = [name for name in found["planted"] if name.endswith("mlp.down_proj") and name != this]
    assert found["planted"][this] == max(found["planted"].values()) > found["plain"][this]
    assert others
    assert all(found["planted"][n] <= found["plain"][n] for n in others)
    assert max(found["planted"][n] for n in others) < found["planted"][this]


def test_a_dry_run_tells_what_the_budgets_allow(tmp_path: Path) -> None:
    result = run(tmp_path / "out", rounds=1)
    told = dry_run(tmp_path / "out" / "run.yaml").summary["parties"]
    for name, party in result.summary["parties"].items():
        assert told[name]["trainable_parameters"] == party["trainable_parameters"]
        assert party["trainable_parameters"] <= BUDGETS.get(name, 4500)


# Training and merging.


@MOSTLY_TWO
def test_one_rank_and_no_budget_is_plain_lora(partition: dict[str, Any], tmp_path: Path) -> None:
    """Watching the gradients and asking for the importance changes no number."""
    plain = {"name": "lora", "rank": 4, "alpha": 8}
    same = hsplitlora(ranks=[4], budgets={}, server_budget=None)
    for name, peft in (("plain", plain), ("same", same)):
        run(tmp_path / name, peft=peft, partition=partition, max_grad_norm=0.5, gradient_accumulation=2, rounds=3)
    assert losses(tmp_path / "plain") == losses(tmp_path / "same")
    assert equal(adapter(tmp_path / "plain"), adapter(tmp_path / "same"))


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, dict[str, Tensor]], dict[str, float], State]]:
    """Of every merge: the clients' copies, their shares, and what came out."""
    seen: list[Any] = []
    original = FederatedServer.merge

    def merge(self: FederatedServer, states: Any, weights: Any = None, cluster: str = "") -> Any:
        copied = {c: {n: t.clone() for n, t in s.items()} for c, s in states.items()}
        total = sum(self.sizes[c] for c in states)
        merged = original(self, states, weights, cluster)
        seen.append((copied, {c: self.sizes[c] / total for c in states}, dict(merged)))
        return merged

    monkeypatch.setattr(FederatedServer, "merge", merge)
    return seen


@by_turns("framework", ["sfl-v1", "sfl-v2"])
def test_the_merged_weights_are_the_mean_of_the_products(
    framework: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run], merges: list[Any]
) -> None:
    """W0 + the weighted mean of the clients' updates, to 1e-5; each client's own part differs from it by exactly the
    singular values beyond its rank; factors averaged after padding are clearly off."""
    told = run(tmp_path / "out", framework=framework, partition=partition).summary["ranks"]
    states, shares, merged = merges[-1]
    base, now = caught[0].parts.base, caught[0]
    assert now.evaluators() == ["cid"]  # of those with the merge, who has the most of it: theirs is the result
    padded = create("aggregator", "lora-products", {"how": "pad"}).merge({}, states, shares)
    unequal, off, cut = 0, [], 0
    left_out = {client: [0.0, 0.0] for client in ROWS}  # squared: beyond the ranks, and all
    for a in pairs(merged):
        holders = [c for c in states if a in states[c]]
        ranks = {len(states[c][a]) for c in holders}
        unequal += len(ranks) > 1
        layer = base.model.get_submodule(a.split(".lora_A.")[0])
        scaling, frozen = layer.scaling["default"], layer.get_base_layer().weight.double()
        total = sum(shares[c] for c in holders)
        updates = [product(states[c], a) * (shares[c] / total) for c in holders]
        wanted = frozen + scaling * sum(updates, torch.zeros(()))
        assert float((frozen + scaling * product(merged, a) - wanted).abs().max()) <= 1e-5
        values = torch.linalg.svdvals(wanted - frozen)
        for client in ROWS:
            mine = own(now, client)
            if a in mine:
                lost = torch.linalg.svdvals(frozen + scaling * product(mine, a) - wanted)
                beyond = values[len(mine[a]) :]
                assert torch.allclose(lost[: len(beyond)], beyond, atol=1e-6)
                left_out[client][0] += float(beyond.norm()) ** 2
                left_out[client][1] += float(values.norm()) ** 2
                cut += bool(beyond.norm() > 0.1 * values.norm())
        if float(values[0]) > 1e-6 and len(ranks) > 1:
            off.append(float((scaling * product(padded, a) - wanted + frozen).norm() / values.norm()))
    for client, (lost_squared, all_squared) in left_out.items():
        assert told[client]["discarded"] == pytest.approx((lost_squared / all_squared) ** 0.5, abs=1e-5)
    assert left_out["ann"][0] > 0.01 * left_out["ann"][1]
    assert unequal >= 3
    assert cut >= 3
    assert min(off) > 0.02
    assert sum(off) / len(off) > 0.2


@pytest.mark.parametrize(
    ("framework", "partition"), often(itertools.product(["sfl-v1", "sfl-v2"], [TWO, U]), ("sfl-v1", TWO), ("sfl-v2", U))
)
def test_the_result_is_an_ordinary_adapter(framework: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """PEFT loads it, with one scaling, and gives the split run's loss; rank 0 is written as zeros of rank 1."""
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps(text_rows(1, seed=9)[0]) + "\n")
    folder, out = model("gpt2", n_layer=4), tmp_path / "out"  # whose matrices are stored transposed
    result = train(
        folder, out, ROWS, partition=partition, framework={"name": framework, "local_steps": 2},
        aggregator="lora-products", rounds=3, peft=hsplitlora(server_budget=900), data={"eval": str(held_out)},
    )  # fmt: skip
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out / "adapter")
    ids = torch.tensor([make_tokenizer()(text_rows(1, seed=9)[0]["text"])["input_ids"] + [2]])
    with torch.no_grad():
        loss = float(plain.eval()(input_ids=ids, labels=ids).loss)
    found = result.summary["eval"]
    assert found["after"]["loss"] == pytest.approx(loss, abs=1e-6)
    assert found["after"]["loss"] != pytest.approx(found["before"]["loss"], abs=1e-3)
    layers = [m for m in plain.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    assert {layer.scaling["default"] for layer in layers} == {2.0}
    none = [layer for layer in layers if not layer.lora_B["default"].weight.any()]
    assert none
    assert all(layer.r["default"] == 1 for layer in none)


@pytest.mark.parametrize("framework", often(["sfl-v1", "sfl-v2"], "sfl-v2"))
def test_a_killed_run_goes_on_to_the_same_weights(framework: str, moving_cuts: Any, tmp_path: Path) -> None:
    """Ranks and cuts that change, clients left out of a round or lost in it; the same run twice is the same."""
    changes: dict[str, Any] = {
        "framework": framework, "participation": 0.7, "fails": 0.2, "rounds": 5, "checkpoint_every": 1,
        "planner": moving_cuts, "peft": hsplitlora(refresh=2),
    }  # fmt: skip
    found = {}
    for name in ("whole", "part"):
        found[name] = run(tmp_path / name, **changes).summary
    assert equal(adapter(tmp_path / "part"), adapter(tmp_path / "whole"))  # twice the same run
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    part = tmp_path / "part"
    found["part"] = resumed(part).summary
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))
    assert found["part"]["ranks"] == found["whole"]["ranks"]
    assert found["part"]["bytes"] == found["whole"]["bytes"]
    assert sum(found["whole"]["lost"].values()) > 0
    rounds = {holder: told["decided_after_round"] for holder, told in found["whole"]["ranks"].items()}
    assert max(filter(None, rounds.values())) >= 3


def test_a_lost_client_is_as_it_was(tmp_path: Path, caught: list[Run]) -> None:
    """What it measured in a round that does not count, counts not either."""
    run(tmp_path / "out", rounds=2)
    party = caught[0].parts.clients["ann"]
    assert party.slot.importance is not None
    before = party.slot.importance.state()
    caught[0].keep(["ann"])
    party.slot.importance.see({n: torch.ones_like(p) for n, p in party.slot.params.items()})
    assert party.slot.importance.state() != before
    caught[0].set_back("ann")
    assert party.slot.importance.state() == before


def test_what_crosses_the_wire(tmp_path: Path) -> None:
    """A number for each matrix up, a rank for each down, and then adapters of these ranks."""
    wire = tmp_path / "wire"
    run(tmp_path / "out", rounds=3, record_wire=str(wire), peft=hsplitlora(refresh=0))
    asked, told, ranks, later = [], [], [], []
    for _, header, tensors in read_frames(wire):
        named = dict(zip(header.names, tensors, strict=True))
        if "importance" in named:
            asked.append((header.sender, header.step_name, tuple(named["importance"].shape), named["importance"].dtype))
        if header.verb == "move":
            assert header.receiver
            told.append(header.receiver)
            ranks.append((header.receiver, named["ranks"].tolist()))
        if header.step_name == "aggregate" and header.sender in ROWS and told:
            later.append((header.sender, [len(named[a]) for a in pairs(named)]))
    assert sorted(asked) == [(c, "partition", (7,), torch.float64) for c in sorted(ROWS)]  # once, after the warm-up
    assert sorted(told) == sorted(ROWS)
    uploads = dict(row for row in later if row[1])
    assert uploads == dict(ranks)


def test_optimizer_state_begins_anew_only_where_a_rank_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = [0, 0]
    original = allotting.review

    async def review(run: Run) -> None:
        slots = [party.slot for party in run.parts.clients.values()]
        before = [slot.get(optimizer=True) for slot in slots]
        await original(run)
        for slot, was in zip(slots, before, strict=True):
            now = slot.get(optimizer=True)
            for name in [n for n in was if n.startswith("optimizer/") and n.endswith("/exp_avg")]:
                of = name.split("/")[1]
                changed = was[of].shape != now[of].shape
                assert (name in now) == (not changed)
                checked[changed] += 1

    monkeypatch.setattr(allotting, "review", review)
    run(tmp_path / "out")
    assert min(checked) > 5


def test_a_block_that_moves_to_a_lower_rank_is_kept_whole_for_others(
    tmp_path: Path, moving_cuts: Any, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What late clients catch up with has the trunk's ranks, not those of the client that the block went to."""
    seen: list[tuple[int, int]] = []
    original = moving.move

    async def move(run: Run, cuts: Any) -> None:
        await original(run, cuts)
        for client in cuts:
            mine = own(run, client)
            seen.extend((len(run.federated.before[a]), len(mine[a])) for a in pairs(mine))

    monkeypatch.setattr(moving, "move", move)
    planner = {**moving_cuts, "cuts": "ann=1,2,3,2;bob=1,1;cid=1,1"}
    run(tmp_path / "out", framework="sfl-v2", planner=planner)
    assert seen
    assert any(mine == 0 and all_ > 0 for all_, mine in seen)


# What is refused.


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"ranks": []}, "rising list"),
    ({"ranks": [2, 1]}, "rising list"),
    ({"ranks": [0, 1]}, "rising list"),
    ({"budget": 0}, "budget"),
    ({"budgets": {"ann": -1}}, "ann"),
    ({"server_budget": 0}, "server_budget"),
    ({"warm_up": 0}, "warm_up"),
    ({"refresh": -1}, "refresh"),
    ({"decay": 1.0}, "decay"),
    ({"alpha": 0.0}, "alpha"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_options_out_of_bounds(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HSplitLora(**wrong)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregator": "fedavg"}, "cannot merge. Take aggregator: lora-products"),
        ({"framework": "psl"}, "Take framework sfl-v1 or sfl-v2"),
        ({"framework": "sequential-sl"}, "Take framework sfl-v1 or sfl-v2"),
        ({"exchange": "splitfrozen"}, "Take framework sfl-v1 or sfl-v2"),
        ({"peft": hsplitlora(budgets={"eve": 100})}, "a budget for 'eve', which is no client"),
        ({"peft": hsplitlora(targets=["embed_tokens", "q_proj"])}, "an embedding"),
        ({"peft": hsplitlora(ranks=[1, 64])}, "rank is 64"),
    ],
)  # fmt: skip
def test_runs_that_cannot_have_it_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=said):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
