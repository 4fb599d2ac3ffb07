"""``label-distance``: one known sample of a class gives away all others of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import class_rows, class_view, record_classes, scored
from cutlayer.audit.scores import MISSING
from cutlayer.methods.attack._classes import to_classes
from cutlayer.registry import create
from spine import model, often

NAME = "label-distance"


def got(found: Any, steps: range, **options: Any) -> Any:
    attack = create("attack", NAME, options)
    seen = class_view(found, attack, steps)
    return scored(found, attack, seen), seen


@pytest.mark.parametrize("kind", often(["classification", "prompt-completion"], "prompt-completion"))
def test_gradients_tell_at_once_and_states_later(kind: str, tmp_path: Path) -> None:
    """Four classes, one known sample each. Seen of a language model, in the first and in the last four steps: 1.000 and
    0.750 by gradients, 0.233 and 0.767 by states (of a classifier: 1.000 and 0.867, 0.267 and 0.367)."""
    classifier = kind == "classification"
    found = record_classes(
        model("roberta", num_labels=4) if classifier else model(), tmp_path, class_rows(320, [0.25] * 4, told=0.3),
        kind=kind, steps=40, batch_size=16, optimizer={"name": "adamw", "lr": 1e-2 if classifier else 3e-3},
        peft={"name": "lora", "rank": 2, "alpha": 4} if classifier else "full",
    )  # fmt: skip
    early, late = range(4), range(36, 40)
    first, seen = got(found, early)
    assert first.token_recovery > 0.95
    assert first.positions == 60
    told = torch.cat([labels[:, 0] for labels in seen.labelled.values()])
    assert int((told != MISSING).sum()) == 4, "of the truth it has what it was promised, and no more"
    states = [got(found, steps, by="state")[0].token_recovery for steps in (early, late)]
    assert states[0] < 0.5 < first.token_recovery
    assert states[1] > states[0] + (0.05 if classifier else 0.3)
    assert got(found, early, by="both")[0].token_recovery > states[0] + 0.3
    attack = create("attack", NAME, {})
    assert scored(found, attack, seen.shuffled()).token_recovery < 0.5


def test_a_class_of_which_nothing_is_known_is_never_said() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    known = torch.tensor([7, -1, 5])
    apart = to_classes(vectors, known, [5, 6, 7])
    assert torch.allclose(apart[:, 0], torch.tensor([2.0, 5**0.5, 0.0]))
    assert apart[:, 1].isinf().all()
    assert torch.allclose(apart[:, 2], torch.tensor([0.0, 1.0, 2.0]))
