"""Low-rank adapters by PEFT: a trained B·A beside each frozen matrix."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import MethodError
from cutlayer.methods.peft._targets import target_problems
from cutlayer.models.adapters import TASK_TYPES, inject
from cutlayer.models.families import Anatomy
from cutlayer.models.segment import Base
from cutlayer.registry import method


@method("peft", paper="Hu et al., arXiv:2106.09685")
@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on frozen weights (PEFT's LoRA)."""

    rank: int = 8
    alpha: float = 16  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"  # PEFT's target_modules: a list of names, or a pattern of whole paths
    rank_pattern: dict[str, int] = field(default_factory=dict)  # PEFT's: a layer's name or pattern -> its rank

    def __post_init__(self) -> None:
        if self.rank < 1 or any(rank < 1 for rank in self.rank_pattern.values()):
            raise ValueError("a rank must be 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}; it must be a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        entries = [self.targets] if isinstance(self.targets, str) else self.targets
        if not entries or not all(entry.strip() for entry in entries):
            raise ValueError("targets is empty, or an entry of it is; name layers, or take all-linear")
        for pattern in [*([self.targets] if isinstance(self.targets, str) else []), *self.rank_pattern]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from error

    def check(self, model: Any, anatomy: Anatomy, *, task: str) -> None:
        """Refuse a target that no layer is, and a rank that no layer can have."""
        if problems := list(target_problems(model, self.targets, self.rank, self.rank_pattern, task=task)):
            raise MethodError(f"peft 'lora': {' '.join(problems)}")

    def prepare(self, model: Any, anatomy: Anatomy, *, task: str, seed: int) -> Base:
        """Inject the adapters into a model, whole or in part."""
        # PEFT's all-linear leaves out a classifier's last layer; DistilBERT has one more before it, which PEFT would
        # adapt and save as a trained module at once.
        exclude = (
            ["pre_classifier"] if self.targets == "all-linear" and model.config.model_type == "distilbert" else None
        )
        transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 stores its matrices so
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.targets,
            exclude_modules=exclude, fan_in_fan_out=transposed, rank_pattern=dict(self.rank_pattern),
            task_type=TASK_TYPES[task],
        )  # fmt: skip
        return inject(model, anatomy, config, seed=seed)
