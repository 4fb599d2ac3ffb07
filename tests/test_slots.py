"""Slots: sums that do not depend on the order of arrival, tied names, optimizer state that goes on bit for bit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from cutlayer.config import OptimizerConfig, RunConfig
from cutlayer.config_optimizer import optimizer_classes, optimizer_problems
from cutlayer.errors import NonFinite
from cutlayer.models.slots import Slot, new_params
from cutlayer.schedule import learning_rate
from cutlayer.wire import Header, decode, encode

SHAPES = {"layer.A": (4, 3), "layer.B": (5, 4), "norm": (7, 2)}


def params(dtype: torch.dtype = torch.float32) -> dict[str, Parameter]:
    source = torch.Generator().manual_seed(0)
    return {n: Parameter(torch.randn(s, generator=source).to(dtype)) for n, s in SHAPES.items()}


def grads(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=source).to(dtype) * 10 ** (seed % 5 - 2) for n, s in SHAPES.items()}


def sgd(values: list[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(values, lr=1.0)


def same(left: Slot, right: Slot) -> bool:
    a, b = left.get(optimizer=True), right.get(optimizer=True)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# ---------------------------------------------------------------- sums


def test_arrival_order_changes_no_bit() -> None:
    keys = [("b", 0, 0), ("a", 1, 0), ("a", 0, 1), ("c", 0, 0)]
    seen = []
    for order in itertools.permutations(range(4)):
        slot = Slot("s", params(), sgd)
        for i in order:
            slot.add(grads(i), key=keys[i], weight=0.3)
        seen.append((slot.squared_norm(), slot))
        slot.update()
    assert len({norm for norm, _ in seen}) == 1
    assert all(same(slot, seen[0][1]) for _, slot in seen)
    unsorted = [grads(i)["norm"] * 0.3 for i in range(4)]
    assert not torch.equal(sum(unsorted[1:], unsorted[0]), sum(unsorted[2::-1], unsorted[3]))  # the sum is not exact


def test_the_sum_is_the_sorted_sum() -> None:
    slot = Slot("s", params(), sgd)
    slot.add(grads(2), key=("b", 0, 0))
    slot.add(grads(1), key=("a", 0, 1), weight=0.5)
    slot.add(grads(0), key=("a", 0, 0))
    slot.update()
    start = params()
    for name in SHAPES:
        total = grads(0)[name] + grads(1)[name] * 0.5 + grads(2)[name]
        assert torch.equal(slot.params[name], start[name] - total)


def test_closing_folds_and_changes_no_bit() -> None:
    """Accumulation keeps one set of gradients a client, in the order in which it would have been summed."""
    open_, closed = Slot("s", params(), sgd), Slot("s", params(), sgd)
    for micro, client in itertools.product(range(4), ("a", "b")):
        key = (client, 0, micro)
        for slot in (open_, closed):
            slot.add(grads(micro + 10 * (client == "b")), key=key, weight=0.25)
        closed.close(key)
        assert len(closed._pending) <= 2
    assert len(open_._pending) == 8
    # a's four and then b's four on one side, (a's four) + (b's four) on the other
    for client in ("a", "b"):
        one, other = Slot("s", params(), sgd), Slot("s", params(), sgd)
        one._pending = {k: v for k, v in open_._pending.items() if k[0] == client}
        other._pending = {k: v for k, v in closed._pending.items() if k[0] == client}
        one.update(), other.update()
        assert same(one, other)


def test_closing_joins_only_one_client_and_step() -> None:
    slot = Slot("s", params(), sgd)
    for key in (("a", 0, 0), ("a", 1, 0), ("b", 0, 1)):
        slot.add(grads(1), key=key)
        slot.close(key)
    assert set(slot._pending) == {("a", 0, 0), ("a", 1, 0), ("b", 0, 1)}
    slot.close(("z", 0, 3))  # never added to: nothing happens


def test_contributions_are_not_changed_by_the_sum() -> None:
    slot, given = Slot("s", params(), sgd), grads(0)
    slot.add(given, key=("a", 0, 0))
    slot.add(grads(1), key=("a", 0, 1))
    slot.close(("a", 0, 1))
    slot.squared_norm()
    slot.update()
    assert all(torch.equal(given[n], grads(0)[n]) for n in SHAPES)


def test_a_client_that_leaves_takes_its_gradients_along() -> None:
    slot, alone = Slot("s", params(), sgd), Slot("s", params(), sgd)
    for key, seed in ((("a", 0, 0), 0), (("b", 0, 0), 1), (("b", 0, 1), 2)):
        slot.add(grads(seed), key=key)
    slot.drop("b")
    alone.add(grads(0), key=("a", 0, 0))
    assert slot.update() == alone.update() == 1
    assert same(slot, alone)
    assert slot.idle


def test_collect_takes_the_gradient_and_leaves_none() -> None:
    slot = Slot("s", params(), sgd)
    (slot.params["norm"] * 3).sum().backward()
    slot.collect(["norm", "layer.A"], ("a", 0, 0), weight=2.0)
    assert slot.params["norm"].grad is None
    assert slot.squared_norm() == pytest.approx(36 * 14)
    slot.update(scale=0.5)
    assert torch.equal(slot.params["norm"], params()["norm"] - 3)
    assert torch.equal(slot.params["layer.A"], params()["layer.A"])  # no gradient: not touched


def test_the_norm_is_that_of_all_gradients() -> None:
    slot = Slot("s", params(), sgd)
    slot.add(grads(3), key=("a", 0, 0))
    slot.add(grads(3), key=("b", 0, 0))
    flat = torch.cat([2 * g.flatten() for g in grads(3).values()])
    assert slot.squared_norm() == pytest.approx(float(flat.double().square().sum()), rel=1e-5)


def test_an_update_without_gradients_counts_but_moves_nothing() -> None:
    slot = Slot("s", params(), lambda v: torch.optim.AdamW(v, lr=1.0, weight_decay=0.5))
    assert slot.update() == 1
    assert all(torch.equal(slot.params[n], p) for n, p in params().items())
    empty = Slot("s", {}, sgd)
    assert empty.update() == 1
    assert empty.get(optimizer=True) == {}


# ---------------------------------------------------------------- ownership and ties


def test_tied_names_are_one_parameter_with_one_update() -> None:
    shared = Parameter(torch.ones(3))
    slot = Slot(
        "s",
        {"embed": shared, "head": shared, "other": Parameter(torch.zeros(2))},
        lambda v: torch.optim.Adam(v, lr=0.1),
    )
    assert sorted(slot.get()) == ["embed", "other"]
    slot.add({"embed": torch.ones(3)}, key=("a", 0, 0))
    slot.add({"head": torch.ones(3) * 2}, key=("a", 0, 0))
    assert slot.squared_norm() == pytest.approx(27)
    slot.update()
    alone = Parameter(torch.ones(3))
    alone.grad = torch.ones(3) * 3
    torch.optim.Adam([alone], lr=0.1).step()
    assert torch.equal(slot.params["embed"], alone)
    assert slot.params["head"] is slot.params["embed"]
    assert len([n for n in slot.get(optimizer=True) if n.startswith("optimizer/")]) == 3


def test_new_params_share_nothing_with_their_source_but_keep_its_ties() -> None:
    tied = Parameter(torch.ones(3))
    initial = {"a": tied, "b": tied, "c": Parameter(torch.zeros(2))}
    first, second = new_params(initial, ["a", "b", "c"]), new_params(initial, ["b", "c"])
    assert first["a"] is first["b"]
    assert sorted(second) == ["b", "c"]
    addresses = [p.untyped_storage().data_ptr() for p in (tied, initial["c"], first["a"], first["c"], *second.values())]
    assert len(set(addresses)) == 6
    first["a"].data.add_(1)
    assert tied.tolist() == second["b"].tolist() == [1, 1, 1]


def test_put_copies_and_leaves_absent_names_alone() -> None:
    slot, given = Slot("s", params(), sgd), torch.full((7, 2), 4.0)
    before = slot.params["norm"]
    slot.put({"norm": given, "unknown": given}, version=9)
    assert slot.params["norm"] is before
    given.zero_()
    assert slot.params["norm"].eq(4).all()
    assert torch.equal(slot.params["layer.A"], params()["layer.A"])
    assert slot.version == 9
    slot.put({})
    assert slot.version == 9


def test_put_under_gradients_in_waiting_is_a_mistake() -> None:
    slot = Slot("s", params(), sgd)
    slot.add(grads(0), key=("a", 0, 0))
    with pytest.raises(AssertionError, match="gradients in waiting"):
        slot.put(params())


# ---------------------------------------------------------------- optimizer state

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "sgd": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    "adamw": [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}, {"maximize": True}],
    "rmsprop": [{}, {"momentum": 0.9, "centered": True}],
    "adadelta": [{"rho": 0.8}],
}
EVERY = [(name, arguments) for name in sorted(optimizer_classes()) for arguments in ARGUMENTS.get(name, [{}])]


def test_every_optimizer_that_a_run_accepts_is_swept() -> None:
    assert len(optimizer_classes()) >= 12
    assert {"adamw", "adam", "sgd", "adafactor", "adagrad", "rmsprop", "nadam", "radam", "muon"} <= set(
        optimizer_classes()
    )
    for name, arguments in EVERY:
        assert optimizer_problems(OptimizerConfig(name=name, lr=0.01, **arguments)) == []


def over_the_wire(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    header, tensors = decode(encode(Header("aggregate", "state", names=tuple(state)), list(state.values())).bytes())
    return dict(zip(header.names, tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_optimizer_state_travels_and_goes_on_bit_for_bit(
    name: str, arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    config = OptimizerConfig(name=name, lr=0.01, **arguments)

    def make(values: list[Parameter]) -> torch.optim.Optimizer:
        return config.torch_class(values, lr=config.lr, **config.arguments)

    giver, taker = Slot("giver", params(dtype), make), Slot("taker", params(dtype), make)
    for i in range(3):
        giver.add(grads(i, dtype), key=("a", i, 0))
        giver.update()
    taker.add({"layer.A": grads(7, dtype)["layer.A"]}, key=("b", 0, 0))  # it has a state of its own, which must go
    taker.update()
    taker.put(over_the_wire(giver.get(optimizer=True)), version=giver.version)
    for i in range(3, 6):
        assert same(giver, taker)
        assert giver.version == taker.version == i
        for slot in (giver, taker):
            slot.add(grads(i, dtype), key=("a", i, 0))
            slot.update()
    assert same(giver, taker)
    assert any(not torch.equal(giver.params[n], p) for n, p in params(dtype).items())


def test_a_state_that_was_put_is_not_shared() -> None:
    def make(values: list[Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(values, lr=0.1)

    giver, taker = Slot("a", params(), make), Slot("b", params(), make)
    giver.add(grads(0), key=("a", 0, 0))
    giver.update()
    taker.put(giver.get(optimizer=True))
    held = {s.untyped_storage().data_ptr() for s in giver.get(optimizer=True).values()}
    taken = {s.untyped_storage().data_ptr() for s in taker.get(optimizer=True).values()}
    assert not held & taken
    before = {n: t.clone() for n, t in giver.get(optimizer=True).items()}
    taker.add(grads(1), key=("a", 1, 0))
    taker.update()
    assert all(torch.equal(before[n], t) for n, t in giver.get(optimizer=True).items())


def test_resetting_forgets_the_moments_only() -> None:
    slot = Slot("s", params(), lambda v: torch.optim.Adam(v, lr=0.1))
    slot.add(grads(0), key=("a", 0, 0))
    slot.update()
    slot.reset_optimizer()
    assert not [n for n in slot.get(optimizer=True) if n.startswith("optimizer/")]
    assert slot.version == 1


# ---------------------------------------------------------------- schedules


def rates(schedule: str, total: int, **more: Any) -> list[float]:
    config = RunConfig.model_validate(
        {
            "model": "m",
            "data": {"train": "t"},
            "steps": 1,
            "optimizer": {"name": "sgd", "lr": 2.0, "schedule": schedule, **more},
        }
    )
    slot = Slot("s", params(), lambda v: torch.optim.SGD(v, lr=2.0), learning_rate(config, total))
    seen = []
    for i in range(total):
        slot.add(grads(i), key=("a", i, 0))
        slot.update()
        assert slot.optimizer is not None
        seen.append(slot.optimizer.param_groups[0]["lr"])
    return seen


def test_a_schedule_counts_the_slot_s_own_updates() -> None:
    cosine = [math.cos(math.pi * i / 6) + 1 for i in range(6)]
    assert rates("cosine", 6) == pytest.approx(cosine)
    assert rates("linear", 4) == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates("constant", 3) == [2.0] * 3
    assert rates("constant_with_warmup", 4, warmup=2) == pytest.approx([0.0, 1.0, 2.0, 2.0])


def test_a_schedule_goes_on_from_the_version_that_was_put() -> None:
    slot = Slot("s", params(), sgd, lambda updates: 0.5**updates)
    slot.put({}, version=3)
    slot.update()
    assert slot.optimizer is not None
    assert slot.optimizer.param_groups[0]["lr"] == 0.125
    slot.reset_optimizer()
    slot.update()
    assert slot.optimizer.param_groups[0]["lr"] == 0.0625  # of the base rate, not of the last one


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1e13, 3e38])
def test_a_gradient_that_would_overflow_is_not_added(wrong: float) -> None:
    """One client's would be everybody's: sums of squares are infinite, and the slot never again what it was."""
    slot = Slot("all", {"a": Parameter(torch.ones(3)), "b": Parameter(torch.ones(0))}, torch.optim.AdamW)
    slot.add({"a": torch.full((3,), 1e11)}, key=("ann", 0, 0))
    before = slot.squared_norm()
    with pytest.raises(NonFinite, match=r"gradient of client 'bob' at step 4 has the norm (nan|inf|1e\+13)\."):
        slot.add({"a": torch.tensor([0.0, wrong, 0.0]), "b": torch.ones(0)}, key=("bob", 4, 0))
    assert slot.squared_norm() == before
    slot.update()
    assert bool(slot.params["a"].isfinite().all())
