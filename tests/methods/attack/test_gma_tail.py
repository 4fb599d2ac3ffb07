"""``gma-tail``: soft labels whose gradient through the public tail is the one that was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import record, scored, view
from cutlayer.audit.public import load_public
from cutlayer.methods.attack._tail import Linear, likely
from cutlayer.registry import create
from spine import model, often

NAME = "gma-tail"


def recorded(root: Path, family: str, tail: int, steps: int) -> Any:
    partition = {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": tail}
    return record(model(family), root, partition=partition, steps=steps, optimizer={"name": "adamw", "lr": 2e-3})


@pytest.mark.parametrize(
    ("family", "tail", "steps"),
    often([(f, tail, steps) for f in ("llama", "gpt2") for tail in (0, 1) for steps in (1, 50)], ("llama", 0, 1)),
)  # fmt: skip
def test_labels_come_back(family: str, tail: int, steps: int, tmp_path: Path) -> None:
    """Seen: 1.000 of all at the first step and after 50 of LoRA, with a block in the tail too; with another model's
    tail at most 0.081. The drift of 50 steps lowers nothing here yet; it leaves 0.08 of the gradient unmatched."""
    found = recorded(tmp_path, family, tail, steps)
    attack = create("attack", NAME, {})
    seen = view(found, attack, rows=2, last=True)
    got = scored(found, attack, seen)
    assert got.token_recovery > max(0.9, got.constant + 0.3)
    assert scored(found, attack, seen.with_other_weights()).token_recovery < 0.3
    notes = attack.finish(seen).notes
    assert notes["ended_at"] < notes["began_at"] / 4


@pytest.mark.slow
def test_a_direction_alone_says_less(tmp_path: Path) -> None:
    """Many soft labels share the direction of the gradient. Seen: 0.38 after 50 steps, where the square finds all."""
    found = recorded(tmp_path, "llama", 0, 50)
    attack, exact = create("attack", NAME, {"distance": "cosine"}), create("attack", NAME, {})
    seen = view(found, attack, rows=3, last=True)
    got = scored(found, attack, seen).token_recovery
    assert attack.finish(seen).notes["ended_at"] < 1e-3
    assert 0.1 < got < scored(found, exact, seen).token_recovery


def test_the_map_is_that_of_autograd() -> None:
    """What labels take off the gradient, and its transpose, against the loss itself."""
    public = load_public(str(model()))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, public.embedding.shape[1], generator=generator)
    labels = torch.tensor([3, 1, 4, 1, 5])
    tail = Linear(public, public.num_blocks - 1, hidden)
    chosen = torch.nn.functional.one_hot(labels, public.vocabulary).float()
    leaf = hidden.clone().requires_grad_(True)
    logits = public.run_tail(public.num_blocks - 1, leaf[None])[0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert leaf.grad is not None
    assert torch.allclose(tail.without - tail.of(chosen), leaf.grad, atol=1e-5)
    direction = torch.randn(hidden.shape, generator=generator)
    assert torch.allclose((tail.along(direction) * chosen).sum(), (tail.of(chosen) * direction).sum(), rtol=1e-3)
    listed = likely(public, public.num_blocks - 1, hidden, leaf.grad, 20)
    assert listed.shape == (5, 20)
    assert sum(int(label) in row for label, row in zip(labels, listed.tolist(), strict=True)) >= 4
