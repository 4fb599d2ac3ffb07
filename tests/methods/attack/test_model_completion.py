"""``model-completion``: what training put into the states tells the classes, without any gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import class_rows, class_view, record_classes, scored
from cutlayer.audit.messages import Exchange
from cutlayer.audit.scores import MISSING
from cutlayer.audit.view import View
from cutlayer.contracts import Layout
from cutlayer.registry import create
from spine import model

NAME = "model-completion"


@pytest.mark.parametrize("unlabelled", [0.0, 50.0])
def test_a_head_from_a_few_labels(unlabelled: float) -> None:
    """Three clouds of states, two labels each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    states = 1.5 * torch.randn(3, 16, generator=generator)[labels] + torch.randn(90, 16, generator=generator)
    one = Exchange("a", 0, 0, {"return_activations": {"hidden": states[:, None]}}, {})
    told = torch.where(torch.arange(90) < 6, labels + 20, MISSING)[:, None]
    attack = create("attack", NAME, {"unlabelled": unlabelled})
    shares = {20: 0.4, 21: 0.3, 22: 0.3}
    layout = Layout(range(1), range(1, 2), range(2, 3), tail_at_client=True)
    seen = View(attack.threat, [one], layout, _classes=shares, _labelled={one.key: told})
    found = attack.finish(seen).tokens[one.key]
    assert found.shape == (90, 1)
    assert float((found[:, 0] == labels + 20).float().mean()) > 0.8
    assert torch.equal(found, attack.finish(seen).tokens[one.key]), "its draws are its own"


def trained(root: Path, lr: float, kind: str) -> Any:
    """Four classes, six epochs; with a rate of nothing the same with weights that stay where they are."""
    made = model("roberta", num_labels=4) if kind == "classification" else model()
    return record_classes(
        made, root, class_rows(160, [0.25] * 4, told=0.3), kind=kind, steps=60, batch_size=16,
        optimizer={"name": "adamw", "lr": lr}, peft="full",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "prompt-completion"])
def test_trained_states_tell_more(kind: str, tmp_path: Path) -> None:
    """In the last epoch, with 40 labels. Seen, mean of three seeds: 0.69 on trained states, 0.33 on untrained ones (of
    a language model 0.88 and 0.34).

    The catalogue has samples without a label help. They did not: 0.69 against 0.67 without them, and 0.88 against 0.89;
    with one to four labels a class the difference was at most 0.03, either way.
    """
    runs = {lr: trained(tmp_path / str(lr), lr, kind) for lr in (3e-3, 1e-12)}

    def mean(lr: float, **options: Any) -> float:
        total = 0.0
        for seed in range(3):
            attack = create("attack", NAME, options)
            got = scored(runs[lr], attack, replace(class_view(runs[lr], attack, range(50, 60)), seed=seed))
            assert got.positions == 160 - 40
            total += got.token_recovery / 3
        return total

    whole = mean(3e-3)
    assert whole > 0.6
    assert mean(1e-12) < 0.45
    assert mean(3e-3, unlabelled=0.0) == pytest.approx(whole, abs=0.05)
    attack = create("attack", NAME, {})
    seen = class_view(runs[3e-3], attack, range(50, 60))
    assert scored(runs[3e-3], attack, seen.shuffled()).token_recovery < 0.45
