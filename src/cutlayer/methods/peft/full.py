"""Train every weight of every part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutlayer.contracts import Peft
from cutlayer.models.adapters import full
from cutlayer.models.families import Anatomy
from cutlayer.models.segment import Base
from cutlayer.registry import method


@method("peft")
@dataclass(frozen=True)
class Full(Peft):
    """No adapter: every weight is trained, and the result is a whole model."""

    def check(self, model: Any, anatomy: Anatomy, *, task: str) -> None:
        """Any model will do."""

    def prepare(self, model: Any, anatomy: Anatomy, *, task: str, seed: int) -> Base:
        """Make every weight trainable."""
        return full(model, anatomy)
