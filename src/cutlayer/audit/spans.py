"""The texts in a batch, as its mask and positions tell where they stand: padding left out, packed ones apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A text: positions ``[start, stop)`` of a row."""

    row: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """Its part [L, ...] of a tensor [B,T,...]."""
        return tensor[self.row, self.start : self.stop]


def spans_of(hidden: Tensor, about: Mapping[str, Tensor]) -> list[Span]:
    """The texts in a batch, in order.

    Args:
        hidden: what crossed the wire for each position, [B,T,H].
        about: ``mask`` [B,T], true at real tokens, and ``positions`` [B,T], if they crossed the wire.
    """
    mask = about["mask"].bool() if "mask" in about else torch.ones(hidden.shape[:2], dtype=torch.bool)
    positions = about.get("positions")
    found = []
    for row in range(len(hidden)):
        real = mask[row].nonzero().flatten().tolist()
        if not real:
            continue
        begins = [real[0]]
        if positions is not None:  # of packed rows they begin anew with each text
            begins += [place for place in real[1:] if int(positions[row, place]) == 0]
        ends = [*begins[1:], real[-1] + 1]
        found += [Span(row, start, stop) for start, stop in zip(begins, ends, strict=True)]
    return found
