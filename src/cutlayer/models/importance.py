"""How much the matrices of a slot matter, watched at its optimizer steps; only where a method asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlayer.ranks import pairs


@dataclass(frozen=True)
class Frozen:
    """The matrix under an adapter: its Frobenius norm and number of entries, and the adapter's ``scaling``."""

    norm: float
    entries: int
    scaling: float


UNKNOWN = -1.0  # stands in a client's answer for a matrix that it has not measured
Score = Callable[[Tensor, Tensor, Frozen], Tensor]  # of dL/dB [d_out, r] and A [r, d_in]; a number


class Importance:
    """A running mean of each matrix's score over the optimizer steps of one slot. It changes no number of the run.

    Args:
        params: the slot's.
        frozen: by the name of a factor A: what is under it.
        score: a step's score of one matrix.
        decay: of the running mean.
    """

    def __init__(
        self, params: Mapping[str, Parameter], frozen: Mapping[str, Frozen], score: Score, *, decay: float
    ) -> None:
        self._params, self._frozen, self._score, self._decay = params, frozen, score, decay
        self._pairs = pairs(params)
        self.steps = 0
        self.scores: dict[str, float] = {}  # by the name of a factor A; one that never had a gradient is absent

    def see(self, gradients: Mapping[str, Tensor]) -> None:
        """Take the summed gradient of a step in; a matrix of rank 0 has none, and keeps what it had."""
        self.steps += 1
        found = {
            a: self._score(gradients[b], self._params[a].detach(), self._frozen[a]).double()
            for a, b in self._pairs.items()
            if b in gradients and gradients[b].numel()
        }
        if not found:
            return
        for a, value in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
            if math.isfinite(value):
                before = self.scores.get(a, value)
                self.scores[a] = self._decay * before + (1 - self._decay) * value

    def state(self) -> dict[str, Any]:
        """For checkpoints; JSON keeps its numbers exactly."""
        return {"steps": self.steps, "scores": dict(self.scores)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what ``state`` gave."""
        self.steps, self.scores = state["steps"], dict(state["scores"])
