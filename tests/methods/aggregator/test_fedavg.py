"""Means that can be checked by hand."""

from __future__ import annotations

import torch

from cutlayer.registry import create


def test_the_weighted_mean_by_hand() -> None:
    states = {
        "a": {"w": torch.tensor([1.0, 2.0])},
        "b": {"w": torch.tensor([3.0, 6.0])},
        "c": {"w": torch.tensor([11.0, 0.0])},
    }
    merged = create("aggregator", "fedavg").merge({}, states, {"a": 0.5, "b": 0.25, "c": 0.25})
    assert merged["w"].tolist() == [4.0, 2.5]  # 0.5 * 1 + 0.25 * 3 + 0.25 * 11 and 0.5 * 2 + 0.25 * 6


def test_arrival_order_changes_no_bit_and_equals_stay() -> None:
    source = torch.Generator().manual_seed(0)
    states = {name: {"w": torch.randn(50, generator=source)} for name in "dacb"}
    weights = dict(zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True))
    fedavg = create("aggregator", "fedavg")
    one = fedavg.merge({}, states, weights)["w"]
    other = fedavg.merge({}, dict(sorted(states.items())), dict(reversed(weights.items())))["w"]
    assert torch.equal(one, other)
    same = {name: {"w": states["a"]["w"].clone()} for name in "abc"}
    again = fedavg.merge({}, same, dict.fromkeys("abc", 1 / 3))
    assert torch.equal(again["w"], states["a"]["w"])


def test_a_tensor_is_averaged_over_its_holders() -> None:
    """Unequal cuts: who does not hold a block has no say in it and gets none."""
    states = {"a": {"x": torch.tensor([2.0]), "y": torch.tensor([5.0])}, "b": {"x": torch.tensor([6.0])}}
    fedavg = create("aggregator", "fedavg")
    merged = fedavg.merge({}, states, {"a": 0.75, "b": 0.25})
    assert {n: t.tolist() for n, t in merged.items()} == {"x": [3.0], "y": [5.0]}
    assert fedavg.fit(merged, {"x": (1,)}) == {"x": merged["x"]}


def test_what_is_one_tensor_for_all_is_copied() -> None:
    """A trunk that serves all clients stands as it is, but the merged state does not change when it trains on."""
    trunk = torch.ones(3)
    states = {name: {"w": trunk} for name in "ab"}
    merged = create("aggregator", "fedavg").merge({}, states, {"a": 0.3, "b": 0.7})
    trunk.add_(1)
    assert merged["w"].tolist() == [1.0] * 3


def test_inputs_are_left_alone_and_types_are_kept() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        states = {"a": {"w": torch.ones(3, dtype=dtype)}, "b": {"w": torch.full((3,), 2.0, dtype=dtype)}}
        merged = create("aggregator", "fedavg").merge({}, states, {"a": 0.5, "b": 0.5})
        assert merged["w"].dtype == dtype
        assert merged["w"].tolist() == [1.5] * 3
        merged["w"].zero_()
        assert states["a"]["w"].tolist() == [1.0] * 3
