"""Low-rank adapters by PEFT: a trained B·A beside each frozen matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cutlayer.contracts import Peft
from cutlayer.errors import MethodError
from cutlayer.methods.peft._lora import inject_lora, refuse_options
from cutlayer.methods.peft._targets import target_problems
from cutlayer.models.families import Anatomy
from cutlayer.models.segment import Base
from cutlayer.registry import method


@method("peft", paper="Hu et al., arXiv:2106.09685")
@dataclass(frozen=True)
class Lora(Peft):
    """Low-rank adapters on frozen weights (PEFT's LoRA)."""

    rank: int = 8
    alpha: float = 16  # the update is scaled by alpha / rank
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"  # PEFT's target_modules: a list of names, or a pattern of whole paths
    rank_pattern: dict[str, int] = field(default_factory=dict)  # PEFT's: a layer's name or pattern -> its rank

    def __post_init__(self) -> None:
        refuse_options(self.rank, self.alpha, self.dropout, self.targets, self.rank_pattern)

    def check(self, model: Any, anatomy: Anatomy, *, task: str) -> None:
        """Refuse a target that no layer is, and a rank that no layer can have."""
        if problems := list(target_problems(model, self.targets, self.rank, self.rank_pattern, task=task)):
            raise MethodError(f"peft 'lora': {' '.join(problems)}")

    def prepare(self, model: Any, anatomy: Anatomy, *, task: str, seed: int) -> Base:
        """Inject the adapters into a model, whole or in part."""
        return inject_lora(
            model, anatomy, task=task, seed=seed, rank=self.rank, alpha=self.alpha, dropout=self.dropout,
            targets=self.targets, rank_pattern=self.rank_pattern,
        )  # fmt: skip
