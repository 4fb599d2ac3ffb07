"""Packed examples do not see each other: in every causal family, each computes what it computes alone.

The attention weights are amplified, or a random model would hardly show that something leaks.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import unsplit
from cutlayer.models.loading import load_model
from cutlayer.models.segment import Base, Segment
from spine import LR, TWO, U, adapter, equal, losses, model, often, train
from tiny import BLOCKS, CLASSIFIERS, FAMILIES, VOCAB, text_rows

CAUSAL = [family for family in FAMILIES if family not in CLASSIFIERS]
WINDOWS = {"mistral": 5, "qwen2": 5, "gemma2": 5, "gemma3": 5, "phi3": 5}  # shorter than an example, and than a row
LENGTHS = [7, 3, 9, 1, 6]
STRONGER = 12.0


@lru_cache
def sharp(family: str) -> Path:
    """A tiny model that attends strongly."""
    folder = model(family, **({"sliding_window": WINDOWS[family]} if family in WINDOWS else {}))
    sharper = folder.with_name(f"{folder.name}-sharp")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    attending = [p for n, p in loaded.named_parameters() if re.search("attn|attention", n) and p.dim() == 2]
    assert len(attending) >= 2 * BLOCKS
    with torch.no_grad():
        for weight in attending:
            weight.mul_(STRONGER)
    loaded.save_pretrained(sharper)
    for path in folder.glob("tokenizer*"):
        (sharper / path.name).write_bytes(path.read_bytes())
    return sharper


def test_every_family_is_here() -> None:
    assert len({family.split("-")[0] for family in CAUSAL}) == 12


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_packed_example_is_computed_as_if_alone(
    family: str, attention: str | None, precision: str, tolerance: float
) -> None:
    """Through a head, a trunk and a tail; and what leaks where positions do not keep them apart is far larger."""
    whole, shape = load_model(sharp(family), precision=precision, attn_implementation=attention)
    base = Base(whole, shape)
    parts = [
        Segment(base, "head", range(1), bottom=True), Segment(base, "trunk", range(1, BLOCKS - 1)),
        Segment(base, "tail", range(BLOCKS - 1, BLOCKS), top=True),
    ]  # fmt: skip
    source = torch.Generator().manual_seed(1)
    examples = [torch.randint(3, VOCAB, (1, length), generator=source) for length in LENGTHS]
    row = torch.cat(examples, dim=1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        hidden: Any = parts[0].forward({}, input_ids=row, position_ids=positions)
        hidden = parts[1].forward({}, hidden=hidden, position_ids=positions)
        packed = parts[2].forward({}, hidden=hidden, position_ids=positions).logits
        base.install(None)
        alone = torch.cat([whole(input_ids=ids, use_cache=False).logits for ids in examples], dim=1)
        joined = whole(input_ids=row, attention_mask=torch.ones_like(row), position_ids=positions, use_cache=False)
    scale = float(alone.float().std())
    apart = float((packed - alone).abs().max()) / scale
    leaked = float((joined.logits - alone)[:, LENGTHS[0] :].abs().max()) / scale
    assert apart <= tolerance
    assert leaked > 0.5


def block_diagonal(batch: unsplit.Micro) -> unsplit.Micro:
    """With the mask that Transformers' OPT does not make: a position sees itself and what is before it in its text."""
    positions = batch["position_ids"]
    number = (positions == 0).cumsum(-1)
    length = positions.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    same: Tensor = number[:, :, None] == number[:, None, :]
    return {**batch, "attention_mask": (same & before)[:, None]}


QUICK = [("gpt2", U), ("opt", TWO), ("llama", TWO), ("gemma3", U)]


@pytest.mark.parametrize(
    ("family", "partition"), often([(family, partition) for family in CAUSAL for partition in (TWO, U)], *QUICK)
)
def test_packed_split_equals_packed_unsplit(family: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """Losses, and by plain SGD the gradients, of six steps: no difference at all."""
    folder, out, rows, length = sharp(family), tmp_path / "out", text_rows(12), 20
    train(
        folder, out, {"client-0": rows}, partition=partition, steps=6, batch_size=2,
        optimizer={"name": "sgd", "lr": LR}, data={"packing": True, "max_length": length},
    )  # fmt: skip
    batches = unsplit.packed_batches(folder, rows, size=2, length=length)
    assert any((batch["position_ids"] == 0).sum() > len(batch["position_ids"]) for batch in batches)
    if family.startswith("opt"):
        batches = [block_diagonal(batch) for batch in batches]
    steps = [[batches[number % len(batches)]] for number in range(6)]
    reference = unsplit.train(
        folder, steps, adapter=out / "adapter_initial", make_optimizer=lambda params: torch.optim.SGD(params, lr=LR)
    )
    assert [loss for _, loss in losses(out)] == reference.losses
    assert equal(adapter(out), reference.state)
    assert not equal(adapter(out), adapter(out, "adapter_initial"))
