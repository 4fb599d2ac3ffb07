"""``label-direction``: of two labels the gradients point apart, however often each occurs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import class_rows, class_view, record_classes, scored, with_gradients
from cutlayer.audit.scores import auc_error
from cutlayer.registry import create
from spine import model, often

NAME = "label-direction"
KINDS = {"classifier": ("roberta", "classification"), "words": ("llama", "prompt-completion")}


def recorded(root: Path, kind: str, shares: list[float], **changes: Any) -> Any:
    family, form = KINDS[kind]
    rows = class_rows(160, shares, told=0.3)
    return record_classes(model(family), root, rows, kind=form, **{"batch_size": 16, "steps": 10, **changes})


@pytest.mark.parametrize(
    ("kind", "by", "rarer"),
    often(
        [(kind, by, rarer) for kind in KINDS for by in ("sample", "groups") for rarer in (0.5, 0.2)],
        ("classifier", "sample", 0.5), ("words", "groups", 0.2),
    ),
)  # fmt: skip
def test_labels_come_back(kind: str, by: str, rarer: float, tmp_path: Path) -> None:
    """Seen: an AUC of 1.000 and all labels in each case; ``label-norm`` less than 0.3 from chance on equal shares."""
    found = recorded(tmp_path, kind, [1 - rarer, rarer])
    attack = create("attack", NAME, {"by": by})
    seen = class_view(found, attack)
    got = scored(found, attack, seen)
    assert got.positions == 158, "two samples were told"
    if by == "sample" or rarer < 0.5:  # of two halves nobody knows which group is which
        assert got.auc is not None
        assert got.auc > 0.99
        assert got.token_recovery > 0.98
    else:
        assert abs(got.auc - 0.5) > 0.49
    if rarer == 0.5:
        length = create("attack", "label-norm", {})
        other = scored(found, length, class_view(found, length)).auc
        assert other is not None
        assert abs(other - 0.5) < 0.3
    turned = scored(found, attack, with_gradients(seen, _turned)).auc
    few = round(rarer * 158)
    assert turned == pytest.approx(0.5, abs=2.5 * auc_error(few, 158 - few))


def _turned(gradient: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each in a direction of its own: a random rotation keeps the length alone."""
    drawn = torch.randn(gradient.shape, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True) * gradient.norm(dim=-1, keepdim=True)
