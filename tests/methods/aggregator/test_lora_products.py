"""The rows' checks: the products' mean is exact, its cut loses the discarded singular values and no more."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.driver import Run
from cutlayer.parties.federated import FederatedServer
from cutlayer.registry import create
from spine import PARTITIONS, U, adapter, caught, equal, losses, model, resumed, train, twin_of  # noqa: F401
from tiny import text_rows

A, B = "layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight"
OUT, IN = 40, 24
ROWS = {name: text_rows(4 + i, seed=i) for i, name in enumerate(("ann", "bob", "cid"))}
State = dict[str, Tensor]


def pair(rank: int, seed: int, dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (OUT, IN)) -> State:
    draw = torch.Generator().manual_seed(seed)
    made = {A: torch.randn(rank, sizes[1], generator=draw), B: torch.randn(sizes[0], rank, generator=draw)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def product(state: Mapping[str, Tensor], a: str = A) -> Tensor:
    return state[a.replace("lora_A", "lora_B")].double() @ state[a].double()


def shapes(rank: int, sizes: tuple[int, int] = (OUT, IN)) -> dict[str, Sequence[int]]:
    return {A: (rank, sizes[1]), B: (sizes[0], rank)}


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


STATES = {"a": pair(2, 1), "b": pair(4, 2), "c": pair(8, 3)}
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}
MEAN = sum((product(STATES[c]) * w for c, w in WEIGHTS.items()), torch.zeros(()))


def test_ranks_2_4_8_by_hand() -> None:
    """The merged factors give the weighted sum of the products; padded averaging is clearly off."""
    merged = create("aggregator", "lora-products").merge({}, STATES, WEIGHTS)
    assert merged[A].shape == (14, IN)
    assert merged[B].shape == (OUT, 14)
    assert float((product(merged) - MEAN).abs().max()) < 1e-12
    padded = create("aggregator", "lora-products", {"how": "pad"}).merge({}, STATES, WEIGHTS)
    assert padded[A].shape == (8, IN)
    by_hand = WEIGHTS["a"] * STATES["a"][A][1] + WEIGHTS["b"] * STATES["b"][A][1] + WEIGHTS["c"] * STATES["c"][A][1]
    assert torch.allclose(padded[A][1], by_hand)
    assert torch.allclose(padded[A][7], WEIGHTS["c"] * STATES["c"][A][7])
    assert relative(product(padded), MEAN) > 0.3


@pytest.mark.parametrize("rank", [1, 2, 5, 8, 13])
def test_a_cut_loses_exactly_the_discarded_singular_values(rank: int) -> None:
    aggregator = create("aggregator", "lora-products")
    fitted = aggregator.fit(aggregator.merge({}, STATES, WEIGHTS), shapes(rank))
    assert fitted[A].shape == (rank, IN)
    assert fitted[B].shape == (OUT, rank)
    values = torch.linalg.svdvals(MEAN)
    assert torch.allclose(torch.linalg.svdvals(product(fitted))[:rank], values[:rank], atol=1e-10)
    lost = torch.linalg.svdvals(product(fitted) - MEAN)
    assert torch.allclose(lost[: 14 - rank], values[rank:14], atol=1e-10)
    assert aggregator.discarded == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-9)
    assert torch.allclose(fitted[A].norm(dim=1), fitted[B].norm(dim=0))  # balanced


@pytest.mark.parametrize(("has", "gets"), [(16, 16), (8, 16)])
def test_a_models_logits_stay_when_a_rank_stays_or_grows(has: int, gets: int) -> None:
    ids = torch.arange(3, 27).reshape(2, 12)
    base = AutoModelForCausalLM.from_pretrained(model())(input_ids=ids).logits.detach()
    logits, states = [], []
    for rank in (has, gets):
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model()), LoraConfig(r=rank, lora_alpha=2 * rank))
        names = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        if rank == has and not states:
            draw = torch.Generator().manual_seed(0)
            for parameter in names.values():
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
        else:
            aggregator = create("aggregator", "lora-products")
            merged = aggregator.merge({}, {"ann": states[0]}, {"ann": 1.0})
            fitted = aggregator.fit(merged, {n: tuple(p.shape) for n, p in names.items()})
            assert fitted.keys() == names.keys()
            assert aggregator.discarded < 1e-6
            for name, parameter in names.items():
                parameter.data.copy_(fitted[name])
        states.append({n: p.detach().clone() for n, p in names.items()})
        logits.append(adapted(input_ids=ids).logits.detach())
    assert float((logits[0] - base).abs().max()) > 0.01
    assert float((logits[0] - logits[1]).abs().max()) < (1e-5 if has == gets else 1e-6) * float(logits[0].abs().max())


def test_a_rank_that_grows_gets_rows_that_can_train() -> None:
    aggregator = create("aggregator", "lora-products")
    merged = aggregator.merge({}, {"a": STATES["a"]}, {"a": 1.0})
    fitted = aggregator.fit(merged, shapes(6))
    again = create("aggregator", "lora-products").fit(merged, shapes(6))
    assert torch.allclose(product(fitted), product(STATES["a"]), atol=1e-12)
    assert torch.equal(fitted[A], again[A])
    assert fitted[B][:, 2:].eq(0).all()
    bound = 1 / math.sqrt(IN)
    assert 0.5 * bound < float(fitted[A][2:].abs().max()) <= bound
    assert torch.linalg.matrix_rank(fitted[A]) == 6


@pytest.mark.parametrize("how", ["svd", "pad"])
def test_untrained_adapters_stay_able_to_train(how: str) -> None:
    """B = 0 everywhere: balanced factors of it would be zero on both sides, for ever."""
    states = {c: {A: s[A], B: torch.zeros_like(s[B])} for c, s in STATES.items()}
    aggregator = create("aggregator", "lora-products", {"how": how})
    fitted = aggregator.fit(aggregator.merge({}, states, WEIGHTS), shapes(4))
    assert fitted[B].eq(0).all()
    assert torch.linalg.matrix_rank(fitted[A]) == 4
    assert aggregator.discarded == 0.0


def test_equal_inputs_come_back_and_only_the_rank_that_is_there_is_kept() -> None:
    """Also where the concatenation is larger than the matrix itself."""
    same = {client: {n: t.clone() for n, t in pair(6, 4).items()} for client in "abcdefgh"}
    aggregator = create("aggregator", "lora-products")
    merged = aggregator.merge({}, same, dict.fromkeys(same, 1 / 8))
    assert len(merged[A]) == 6
    fitted = aggregator.fit(merged, shapes(6))
    assert torch.allclose(product(fitted), product(same["a"]), atol=1e-12)
    assert aggregator.discarded == 0.0
    many = {str(i): pair(6, i) for i in range(8)}  # sum of ranks 48, above both sizes
    merged = aggregator.merge({}, many, dict.fromkeys(many, 1 / 8))
    assert len(merged[A]) == IN
    assert torch.allclose(product(merged), sum((product(s) for s in many.values()), torch.zeros(())) / 8, atol=1e-12)
    again = dict.fromkeys("xyz", merged)
    for _ in range(3):
        merged = aggregator.merge(merged, again, dict.fromkeys(again, 1 / 3))
    assert len(merged[A]) == IN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept_and_sums_are_made_in_double(dtype: torch.dtype) -> None:
    states = {client: {n: t.to(dtype) for n, t in state.items()} for client, state in STATES.items()}
    wanted = sum((product(states[c]) * w for c, w in WEIGHTS.items()), torch.zeros(()))
    aggregator = create("aggregator", "lora-products")
    merged = aggregator.merge({}, states, WEIGHTS)
    fitted = aggregator.fit(merged, shapes(16))
    assert {t.dtype for t in (*merged.values(), *fitted.values())} == {dtype}
    assert relative(product(fitted), wanted) < 2 * torch.finfo(dtype).eps


def test_the_rest_is_averaged_and_optimizer_state_of_factors_is_left_alone() -> None:
    extra = {"a": {"score.weight": torch.tensor([1.0, 3.0])}, "b": {"score.weight": torch.tensor([5.0, 3.0])}}
    moments = {f"optimizer/{A}/exp_avg": torch.zeros(3), "optimizer/score.weight/step": torch.ones(())}
    states = {client: {**STATES[client], **extra[client], **moments} for client in extra}
    merged = create("aggregator", "lora-products").merge({}, states, {"a": 0.75, "b": 0.25})
    assert set(merged) == {A, B, "score.weight", "optimizer/score.weight/step"}
    assert merged["score.weight"].tolist() == [2.0, 3.0]


def test_a_pair_is_averaged_over_its_holders_in_any_order() -> None:
    states = {"a": STATES["a"], "b": STATES["b"], "c": {"other": torch.ones(2)}}
    aggregator = create("aggregator", "lora-products")
    merged = aggregator.merge({}, states, WEIGHTS)
    wanted = (0.5 * product(STATES["a"]) + 0.2 * product(STATES["b"])) / 0.7
    assert torch.allclose(product(merged), wanted, atol=1e-12)
    assert equal(dict(merged), dict(aggregator.merge({}, dict(reversed(states.items())), WEIGHTS)))


def test_rank_0_is_no_update() -> None:
    """Among the holders, at a receiver, and everywhere."""
    none = {A: torch.zeros(0, IN, dtype=torch.float64), B: torch.zeros(OUT, 0, dtype=torch.float64)}
    aggregator = create("aggregator", "lora-products")
    merged = aggregator.merge({}, {"a": STATES["a"], "b": none}, {"a": 0.25, "b": 0.75})
    assert torch.allclose(product(merged), 0.25 * product(STATES["a"]), atol=1e-12)
    assert {n: tuple(t.shape) for n, t in aggregator.fit(merged, shapes(0)).items()} == shapes(0)
    assert aggregator.discarded == pytest.approx(1.0)
    nothing = aggregator.merge({}, {"a": none, "b": none}, {"a": 0.25, "b": 0.75})
    fitted = aggregator.fit(nothing, shapes(4))
    assert aggregator.discarded == 0.0
    assert fitted[B].eq(0).all()
    assert torch.linalg.matrix_rank(fitted[A]) == 4


@PARTITIONS
def test_a_run_gives_all_the_mean_of_the_clients_products(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each client ends with is the best of its rank of the weighted mean of what they had trained."""
    seen: list[tuple[dict[str, State], dict[str, float]]] = []
    original = FederatedServer.merge

    def merge(self: FederatedServer, states: Any, weights: Any = None, cluster: str = "") -> Any:
        copied = {c: {n: t.clone() for n, t in s.items()} for c, s in states.items()}
        total = sum(self.sizes[c] for c in states)
        seen.append((copied, {c: self.sizes[c] / total for c in states}))
        return original(self, states, weights, cluster)

    monkeypatch.setattr(FederatedServer, "merge", merge)
    train(
        model(), tmp_path / "out", ROWS, partition=partition, framework={"name": "sfl-v1", "local_steps": 2},
        aggregator="lora-products", rounds=2,
    )  # fmt: skip
    states, weights = seen[-1]
    assert len(set(weights.values())) == 3
    run = caught[0]
    final = {client: run.state(client) for client in ROWS}
    assert equal(final["ann"], final["bob"])
    factors = [name for name in final["ann"] if "lora_A" in name]
    assert len(factors) >= 3 * 7
    cross = []
    for a in factors:
        mean = sum((product(states[c], a) * w for c, w in weights.items()), torch.zeros(()))
        u, s, vh = torch.linalg.svd(mean)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert float((product(final["ann"], a) - best).abs().max()) < 1e-5 * float(s[0])
        b = a.replace("lora_A", "lora_B")
        factored = {n: sum((states[c][n].double() * w for c, w in weights.items()), torch.zeros(())) for n in (a, b)}
        cross.append(relative(product(factored, a), mean))
        assert all(final["ann"][n].isfinite().all() for n in (a, b))
    assert min(cross) > 1e-3  # fedavg would have given something else
    assert 0 < run.federated.aggregator.discarded < 1


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """With one client left out of each round, who catches up from what the checkpoint holds."""
    train(
        model(), tmp_path / "whole", ROWS, partition=U, framework={"name": "sfl-v1", "participation": 0.7},
        aggregator="lora-products", rounds=4, checkpoint_every=1,
    )  # fmt: skip
    part = twin_of(tmp_path / "whole")
    resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))
