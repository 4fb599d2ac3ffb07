"""``label-cluster``: groups stand noise that single neighbours do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import class_rows, class_view, record_classes, scored, with_gradients
from cutlayer.methods.attack._classes import matched
from cutlayer.registry import create
from spine import model, often

NAME, NEIGHBOUR = "label-cluster", "label-distance"
NOISES = (0.0, 1.0, 2.0, 4.0)  # in parts of the gradients' standard deviation


@pytest.mark.parametrize("kind", often(["classification", "prompt-completion"], "classification"))
def test_noise_and_sparse_gradients(kind: str, tmp_path: Path) -> None:
    """Eight classes, one known sample each, 320 samples, 256 channels. Seen with noise of 0, 1, 2 and 4 times the
    gradients' own standard deviation: 1.000, 1.000, 1.000, 0.433 against the nearest neighbour's 1.000, 1.000, 0.830,
    0.346 (of a language model 1.000, 1.000, 1.000, 0.554 against 1.000, 1.000, 0.894, 0.321)."""
    made = model("roberta", num_labels=8, hidden_size=256) if kind == "classification" else model(hidden_size=256)
    found = record_classes(
        made, tmp_path, class_rows(320, [0.125] * 8, told=0.3), kind=kind, steps=10, batch_size=32,
        optimizer={"name": "adamw", "lr": 1e-3},
    )  # fmt: skip
    groups, neighbour = create("attack", NAME, {}), create("attack", NEIGHBOUR, {})
    seen = class_view(found, groups)
    size = torch.cat([one.hidden("send_gradients")[:, 0] for one in seen.exchanges]).std(0)

    def share(attack: Any, change: Any) -> float:
        recovered: float = scored(found, attack, with_gradients(seen, change)).token_recovery
        return recovered

    ours, theirs = (
        [share(attack, lambda g, drawn, n=n: g + n * size * torch.randn(g.shape, generator=drawn)) for n in NOISES]
        for attack in (groups, neighbour)
    )
    assert ours[0] == theirs[0] == 1.0
    hard = next(number for number, recovered in enumerate(theirs) if recovered < 0.9)
    assert ours[hard] > theirs[hard] + 0.05
    assert share(groups, _sparse) > 0.95
    assert scored(found, groups, seen.shuffled()).token_recovery < 0.4
    states = create("attack", NAME, {"by": "state", "components": 0})
    assert scored(found, states, seen).token_recovery < 0.5, "nothing has been learned yet"


def _sparse(gradient: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    """The largest tenth of each."""
    kept = gradient.abs().topk(round(0.1 * gradient.shape[-1]), dim=-1).values[..., -1:]
    return gradient * (gradient.abs() >= kept)


def test_names_are_given_one_to_one() -> None:
    costs = torch.tensor([[0.1, 0.2, torch.inf], [0.0, 0.9, torch.inf], [0.5, 0.5, torch.inf]])
    assert matched(costs).tolist() == [1, 0, 2]
    assert matched(torch.tensor([[3.0], [1.0]])).tolist() == [-1, 0]
