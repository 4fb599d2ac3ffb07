"""The reference: plain Transformers and PEFT on the uncut model, written without any of cutlayer's own code.

The one thing shared is the rule by which dropout is seeded, which the caller passes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass
class Unsplit:
    """Losses by optimizer step, and the trained tensors at the end, in host memory; ``norms`` are the gradient's, where
    clipped."""

    losses: list[float]
    state: dict[str, Tensor]
    model: Any
    norms: list[float]


Micro = dict[str, Tensor]


def text_batches(
    folder: Path, rows: Sequence[dict[str, Any]], *, size: int, side: str = "right", label: bool = False
) -> list[Micro]:
    """Micro-batches of ``size`` rows in file order."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer(row["text"])["input_ids"] + ([] if label else [tokenizer.eos_token_id]) for row in rows]
    batches = []
    for start in range(0, len(rows), size):
        chosen = encoded[start : start + size]
        longest = max(len(ids) for ids in chosen)
        ids, mask = [], []
        for one in chosen:
            pad, real = [tokenizer.pad_token_id] * (longest - len(one)), [1] * len(one)
            none = [0] * len(pad)
            ids.append(one + pad if side == "right" else pad + one)
            mask.append(real + none if side == "right" else none + real)
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if label:
            batch["labels"] = torch.tensor([row["label"] for row in rows[start : start + size]])
        else:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        batches.append(batch)
    return batches


def packed_batches(folder: Path, rows: Sequence[dict[str, Any]], *, size: int, length: int) -> list[Micro]:
    """Micro-batches of ``size`` rows, each of as many whole texts as fit into ``length`` tokens, in file order.

    Positions restart at each text (and at the padding), its first label does not count, and there is no mask.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    packed: list[list[list[int]]] = [[]]
    for row in rows:
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        if sum(map(len, packed[-1])) + len(ids) > length:
            packed.append([])
        packed[-1].append(ids)
    batches = []
    for start in range(0, len(packed), size):
        chosen = packed[start : start + size]
        longest = max(sum(map(len, texts)) for texts in chosen)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for texts in chosen:
            missing = longest - sum(map(len, texts))
            batch["input_ids"].append([i for ids in texts for i in ids] + [tokenizer.pad_token_id] * missing)
            batch["labels"].append([i for ids in texts for i in (-100, *ids[1:])] + [-100] * missing)
            batch["position_ids"].append([p for ids in texts for p in range(len(ids))] + [*range(missing)])
        batches.append({name: torch.tensor(values) for name, values in batch.items()})
    return batches


def train(
    folder: Path,
    steps: Sequence[Sequence[Micro]],
    *,
    adapter: Path | None,
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    classifier: bool = False,
    clip: float | None = None,
    before: Callable[[Any, int, int], None] | None = None,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    device: str = "cpu",
) -> Unsplit:
    """Train the uncut model: each step a list of micro-batches, whose loss is the mean over all their label tokens.

    Batches come in host memory, and the result is there; between, everything is on ``device``.
    """
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model: Any = auto.from_pretrained(folder, dtype=dtype, **options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if adapter is not None:
        # Without torch_device PEFT would read the adapter to the first GPU there is.
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True, torch_device=device)
    else:
        # from_pretrained leaves weights where the file is mapped, at any multiple of 8 bytes; for a batch of one row a
        # kernel then adds in another order than on memory of PyTorch's own, where a split run trains them.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    model = model.to(device)  # before the optimizer is made, whose state goes where the parameters are
    # With a cache the keys pass through a concatenation; its memory layout changes the last bits of some backwards.
    model.config.use_cache = False
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(params)
    losses, norms = [], []
    for number, micros in enumerate(steps):
        counts = [_counted(m, classifier) for m in micros]
        total = 0.0
        for micro, (batch, count) in enumerate(zip(micros, counts, strict=True)):
            if before is not None:
                before(model, number, micro)
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            if len(micros) > 1:
                loss = loss * (count / sum(counts))
            loss.backward()
            total += loss.item()
        if clip is not None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(params, clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    state = get_peft_model_state_dict(model) if adapter is not None else model.state_dict()
    return Unsplit(losses, {k: v.detach().cpu().clone() for k, v in state.items()}, model, norms)


def _counted(batch: Micro, classifier: bool) -> int:
    return len(batch["labels"]) if classifier else int((batch["labels"][:, 1:] != -100).sum())
