"""Solve the labels from the gradient that the client's tail returns, through the public norm and head.

Ours: neither the survey nor a paper that we know has it in this form. Step 7 carries the gradient of the loss at what
the trunk gave. Below a softmax that gradient is a known function of the label and of one number, the loss's scale.
Blocks of the tail are undone first, by solving with their transposed Jacobian; then every position has a label that
explains its gradient, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cutlayer.audit.scores import MISSING, Guesses
from cutlayer.audit.softmax import Top, solved, through_blocks
from cutlayer.audit.spans import spans_of
from cutlayer.audit.threat import Threat
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.registry import method

SILENT = 1e-12  # a squared gradient so small, in parts of the largest, is of a position without a label


@method("attack", needs=["a U-shaped split of a causal language model whose base weights are public"])
@dataclass
class LabelSolve(Attack):
    """Solve the softmax gradient of step 7 for the labels, with its scale fitted (ours; the strongest on labels).

    ``shortlist``: candidates at a position, by how much their logits rise against the gradient.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("return_activations", "send_gradients"), knows=("architecture", "weights"), target="labels",
        tail_at="client", causal=True,
    )  # fmt: skip
    shortlist: int = 32

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise ValueError(f"shortlist is {self.shortlist}; it must be 1 or more")

    def finish(self, view: View) -> Guesses:
        """The labels of all micro-batches that were read."""
        tokens, scales, unexplained = {}, [], []
        for one in view.exchanges:
            hidden, gradient = one.hidden("return_activations"), one.hidden("send_gradients")
            found = torch.full(hidden.shape[:2], MISSING, dtype=torch.int64)
            spans = spans_of(hidden, one.about)
            below = [through_blocks(view.public, view.tail_start, span.of(hidden), span.of(gradient)) for span in spans]
            states, gradients = torch.cat([s for s, _ in below]), torch.cat([g for _, g in below])
            size = gradients.square().sum(-1)
            speaks = size > SILENT * size.max()
            if bool(speaks.any()):
                top = Top(view.public, states[speaks])
                own = gradients[speaks].to(top.hidden)
                labels, left, scale = solved(top, own, self.shortlist)
                said = torch.full((len(states),), MISSING, dtype=torch.int64)
                said[speaks] = labels.cpu()
                for span, part in zip(spans, torch.split(said, [len(span) for span in spans]), strict=True):
                    found[span.row, span.start : span.stop] = part
                scales.append(scale)
                unexplained.append(float(left.median()))
            tokens[one.key] = found
        notes = {"counted": _mean(scales), "unexplained": _mean(unexplained)}
        return Guesses(tokens, notes=notes)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / max(1, len(numbers))
