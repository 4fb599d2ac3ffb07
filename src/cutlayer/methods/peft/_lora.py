"""What the kinds of LoRA share: their options' bounds, and the injection by PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from transformers.pytorch_utils import Conv1D

from cutlayer.models.adapters import TASK_TYPES, inject
from cutlayer.models.families import Anatomy
from cutlayer.models.segment import Base

Targets = str | Sequence[str]


def refuse_options(rank: int, alpha: float, dropout: float, targets: Targets, rank_pattern: Mapping[str, int]) -> None:
    """Raise ValueError for what no adapter can be."""
    if rank < 1 or any(own < 1 for own in rank_pattern.values()):
        raise ValueError("a rank must be 1 or more")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha}; it must be a finite number above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
    entries = [targets] if isinstance(targets, str) else targets
    if not entries or not all(entry.strip() for entry in entries):
        raise ValueError("targets is empty, or an entry of it is; name layers, or take all-linear")
    for pattern in [*([targets] if isinstance(targets, str) else []), *rank_pattern]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from error


def inject_lora(
    model: Any, anatomy: Anatomy, *, task: str, seed: int, rank: int, alpha: float, dropout: float, targets: Targets,
    rank_pattern: Mapping[str, int],
) -> Base:  # fmt: skip
    """Inject the adapters into a model, whole or in part."""
    # PEFT's all-linear leaves out a classifier's last layer; DistilBERT has one more before it, which PEFT would
    # adapt and save as a trained module at once.
    exclude = ["pre_classifier"] if targets == "all-linear" and model.config.model_type == "distilbert" else None
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 stores its matrices so
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, exclude_modules=exclude,
        fan_in_fan_out=transposed, rank_pattern=dict(rank_pattern), task_type=TASK_TYPES[task],
    )  # fmt: skip
    return inject(model, anatomy, config, seed=seed)
