"""Real text and really pretrained small models, where they are at hand: split equals unsplit, and tuning teaches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cutlayer
import unsplit
from shared import shared

STEPS, SIZE, LR = 8, 4, 1e-3


def e2e_rows(count: int) -> list[dict[str, Any]]:
    """The first rows of the E2E training set as plain text."""
    with gzip.open(shared("data/e2e/train.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(count)]
    return [{"text": f"{row['context']} -> {row['ref']}"} for row in rows]


@pytest.mark.parametrize(
    ("name", "partition"),
    [
        ("llama-tiny-wt2", "u-shaped-split"),
        pytest.param("gpt2-tiny-wt2", "two-part-split", marks=pytest.mark.slow),
        pytest.param("gpt2-tiny-wt2", "u-shaped-split", marks=pytest.mark.slow),
        pytest.param("llama-tiny-wt2", "two-part-split", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_pretrained_model_on_real_text(name: str, partition: str, tmp_path: Path) -> None:
    """The losses of plain Transformers and PEFT at every step, and a lower evaluation loss at the end."""
    model, rows = shared(f"models/{name}"), e2e_rows(64)
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:48]))
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows[48:56]))
    result = cutlayer.train(
        {
            "model": str(model),
            "data": {"train": str(train), "eval": str(held_out), "shuffle": False, "max_length": 128},
            "clients": 1,
            "partition": partition,
            "optimizer": {"name": "adamw", "lr": LR},
            "batch_size": SIZE,
            "steps": STEPS,
        },
        out=tmp_path / "out",
    )
    batches = unsplit.text_batches(model, rows[:48], size=SIZE)
    reference = unsplit.train(
        model, [[batch] for batch in batches[:STEPS]], adapter=tmp_path / "out" / "adapter_initial",
        make_optimizer=lambda params: torch.optim.AdamW(params, lr=LR),
    )  # fmt: skip
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == reference.losses
    trained = load_file(result.adapter / "adapter_model.safetensors")
    assert max(float((trained[key] - reference.state[key]).abs().max()) for key in trained) == 0.0
    assert result.summary["eval"]["after"]["loss"] < result.summary["eval"]["before"]["loss"] - 0.3
