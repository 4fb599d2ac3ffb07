"""The comparison on CUDA, tried on the CPU: other kernels pass its limits, and mistakes do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.models.segment import Base
from cutlayer.parties import trunk
from cutlayer.parties.trunk import TrunkParty
from side_by_side import GPU_LIMITS, SGD, Pair, both, farthest
from spine import U, often


@pytest.mark.parametrize("precision", GPU_LIMITS)
@pytest.mark.parametrize("family", often(["llama", "gpt2", "bert"], "gpt2"))
def test_other_kernels_pass(family: str, precision: str, tmp_path: Path) -> None:
    """Eager attention in the reference, sdpa in the split run: last bits differ, as they may on another device."""
    pair = both(
        family, tmp_path / "out", partition=U, precision=precision, optimizer=SGD, attn_implementation="sdpa",
        theirs={"attn_implementation": "eager"},
    )  # fmt: skip
    assert pair.apart > 0
    pair.within(**GPU_LIMITS[precision])


def positions_twice(patch: pytest.MonkeyPatch) -> None:
    """The trunk adds learned positions to the hidden states again."""
    original = Base.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        for path, kind in self.anatomy.below.items():
            if kind == "zero":
                self._stand_ins[path] = self._around[path]

    patch.setattr(Base, "__init__", init)


def no_mask(patch: pytest.MonkeyPatch) -> None:
    """The server takes padding for text."""
    patch.setattr(trunk, "_mask", lambda tensors, device: None)


def half_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """The server returns a gradient that is a little too small."""
    original = TrunkParty.backward

    def backward(self: Any, *args: Any) -> Any:
        parcel = original(self, *args)
        parcel.tensors["hidden"].mul_(0.5)
        return parcel

    patch.setattr(TrunkParty, "backward", backward)


@pytest.mark.parametrize(
    ("family", "mistake", "precision"),
    [
        pytest.param("gpt2", positions_twice, "float32", marks=pytest.mark.slow),
        ("gpt2", positions_twice, "bfloat16"),
        ("llama", half_a_gradient, "float32"),
        pytest.param("llama", half_a_gradient, "bfloat16", marks=pytest.mark.slow),
        ("bert", no_mask, "float32"),  # so small a model hardly looks at its padding: bfloat16 is noisier than that
    ],
)  # fmt: skip
def test_mistakes_do_not(
    family: str, mistake: Callable[[pytest.MonkeyPatch], None], precision: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By far: a limit ten times as wide would still see them."""
    mistake(monkeypatch)
    pair = both(family, tmp_path / "out", partition=U, precision=precision, optimizer=SGD)
    limits = GPU_LIMITS[precision]
    assert pair.apart > 10 * limits["share"] * pair.moved
    with pytest.raises(AssertionError):
        pair.within(**limits)


def test_numbers_that_are_none_are_not_equal() -> None:
    """A NaN anywhere is a difference."""
    nan = float("nan")
    for ours, apart in (([1.0, nan], 0.0), ([1.0, 2.0], nan)):
        with pytest.raises(AssertionError):
            Pair(ours, [1.0, 2.0], apart, 1.0, None).within(1e9, share=1e9)
    gap = farthest(
        {"a": torch.zeros(1), "b": torch.tensor([nan]), "c": torch.zeros(1)}, dict.fromkeys("abc", torch.zeros(1))
    )
    assert gap != gap
