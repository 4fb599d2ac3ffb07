"""``model-completion``: what training put into the states tells the classes, without any gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attacking import class_rows, class_view, record_classes, scored
from cutlayer.registry import create
from spine import model, often

NAME = "model-completion"


def trained(root: Path, lr: float, kind: str) -> Any:
    """Four classes, forty epochs of 80 rows... or the same with weights that stay where they are."""
    made = model("roberta", num_labels=4) if kind == "classification" else model()
    return record_classes(
        made, root, class_rows(160, [0.25] * 4, told=0.3), kind=kind, steps=60, batch_size=16,
        optimizer={"name": "adamw", "lr": lr}, peft="full",
    )  # fmt: skip


@pytest.mark.parametrize("kind", often(["classification", "prompt-completion"], "prompt-completion"))
def test_trained_states_tell_more(kind: str, tmp_path: Path) -> None:
    last = range(50, 60)  # an epoch
    shares: dict[str, list[float]] = {"trained": [], "untrained": [], "supervised": []}
    runs = {"trained": trained(tmp_path / "a", 3e-3, kind), "untrained": trained(tmp_path / "b", 1e-12, kind)}
    for name, of, options in (
        ("trained", "trained", {}), ("untrained", "untrained", {}), ("supervised", "trained", {"unlabelled": 0.0}),
    ):  # fmt: skip
        for seed in range(3):
            attack = create("attack", NAME, options)
            seen = replace(class_view(runs[of], attack, last), seed=seed)
            got = scored(runs[of], attack, seen)
            assert got.positions == 160 - 40
            shares[name].append(got.token_recovery)
    print(shares)
    assert scored(runs["trained"], attack, seen.shuffled()).token_recovery < 0.45
