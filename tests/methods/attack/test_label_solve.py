"""``label-solve``: the gradient that a tail returns gives its labels away."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacking import record, scored, view
from cutlayer.audit.public import load_public
from cutlayer.audit.softmax import Top
from cutlayer.errors import MethodError
from cutlayer.registry import create
from spine import TWO, model, often


@pytest.mark.parametrize(
    ("family", "tail"),
    often(
        [(family, tail) for family in ("llama", "gpt2", "gemma2", "opt") for tail in (0, 1)],
        ("llama", 0), ("llama", 1), ("gpt2", 0),
    ),
    ids=str,
)  # fmt: skip
def test_the_labels_of_the_first_step(family: str, tail: int, tmp_path: Path) -> None:
    found = record(model(family), tmp_path, partition={"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": tail})
    attack = create("attack", "label-solve", {})
    seen = view(found, attack)
    got = scored(found, attack, seen)
    assert got.token_recovery > (0.999 if tail == 0 else 0.9)
    assert got.constant < 0.5
    if tail == 0:  # the scale that it fits is one over the counted positions
        counted = sum(int(found.truth(one.key, "labels").counts.sum()) for one in seen.exchanges)
        steps = len(seen.exchanges)
        assert attack.finish(seen).notes["counted"] == pytest.approx(counted / steps, rel=1e-3)


def test_the_controls_fall(tmp_path: Path) -> None:
    found = record(model(), tmp_path, partition={"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 0})
    attack = create("attack", "label-solve", {})
    seen = view(found, attack)
    assert scored(found, attack, seen.shuffled()).token_recovery < 0.3
    assert scored(found, attack, seen.with_other_weights()).token_recovery < 0.3


def test_its_gradients_are_those_of_autograd() -> None:
    """``J^T W^T (p - e_y)`` against the gradient of the loss itself, in one position after another."""
    public = load_public(str(model()))
    hidden = torch.randn(5, public.embedding.shape[1], generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 1, 4, 1, 5])
    top = Top(public, hidden)
    ours = top.predicted() - top.of_labels(labels)
    leaf = hidden.clone().requires_grad_(True)
    logits = public.run_tail(public.num_blocks, leaf[None])[0]
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert leaf.grad is not None
    assert torch.allclose(ours, leaf.grad, atol=1e-6)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    step = 1e-3
    with torch.no_grad():
        ends = [public.run_tail(public.num_blocks, (hidden + sign * step * direction)[None])[0] for sign in (1, -1)]
    assert torch.allclose(top.along(direction), (ends[0] - ends[1]) / (2 * step), atol=1e-2)


def test_a_two_part_run_has_nothing_to_solve(tmp_path: Path) -> None:
    from cutlayer.audit.auditing import audit

    record(model(), tmp_path, partition=TWO)
    from attacking import tree

    with pytest.raises(MethodError, match=r"cannot be played on this run: it reads the messages of a U-shaped run"):
        audit(
            tree(model(), tmp_path, partition=TWO), out=tmp_path / "audit", attacks=["label-solve"],
            frames=tmp_path / "frames", progress=False,
        )  # fmt: skip
