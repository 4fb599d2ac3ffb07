"""How much an upload counts for that started from an old version of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cutlayer.contracts import Upload, Window

Penalty = Literal["power", "exponential", "inverse"]


@dataclass(frozen=True)
class StalenessWeights:
    """s(d) for a delay of d versions: 1 without delay, falling from there, and 0 beyond the cut-off."""

    penalty: Penalty
    rate: float  # p or k
    cutoff: int | None = None  # the last delay that counts

    def __post_init__(self) -> None:
        if not (self.rate >= 0 and math.isfinite(self.rate)):
            raise ValueError(f"rate is {self.rate}; it must be a finite number from 0 on")

    def of(self, delay: int) -> float:
        """(1+d)^-p, exp(-k d), or 1 / (1 + k d)."""
        if self.cutoff is not None and delay > self.cutoff:
            return 0.0
        if self.penalty == "power":
            return float((1 + delay) ** -self.rate)
        return math.exp(-self.rate * delay) if self.penalty == "exponential" else 1 / (1 + self.rate * delay)

    def normalised(self, uploads: Sequence[Upload]) -> list[float]:
        """w_i s(d_i) of uploads that are merged together, scaled to sum to 1; all 0 where nothing counts."""
        raw = [upload.weight * self.of(upload.delay) for upload in uploads]
        total = math.fsum(raw)
        return [one / total if total else 0.0 for one in raw]


def check_buffer(buffer: int) -> None:
    """Raise ValueError for a number of uploads that cannot be merged together."""
    if buffer < 1:
        raise ValueError(f"buffer is {buffer}; it must be 1 or more")


def buffered(buffer: int) -> Window:
    """A merge of so many uploads at a time."""
    return Window(uploads=buffer, most=buffer)
