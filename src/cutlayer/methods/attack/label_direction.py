"""Two labels by the direction of the gradient: those of one class point one way, those of the other the opposite.

Li et al., Label Leakage and Protection in Two-party Split Learning, ICLR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cutlayer.audit.classes import samples_of
from cutlayer.audit.scores import Guesses
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.methods.attack._classes import above, groups, unit
from cutlayer.registry import method
from cutlayer.threat import Threat


@method(
    "attack",
    paper="Li et al., arXiv:2102.08504",
    needs=["a U-shaped split, and rows of one label each, of two: a classifier, or completions of one token"],
)
@dataclass
class LabelDirection(Attack):
    """Tell two labels apart by the cosine of the gradient of step 7 with that of one sample whose label is known.

    The paper has a softmax of two, where the sign of the cosine is the label. Below a vocabulary all gradients share a
    part, so the mean over all samples is taken off first, and the threshold lies between the two modes of the scores:
    in their widest gap near the share of the rarer label. ``by: groups`` uses no known sample: two groups by angle, of
    which the smaller is taken for the rarer label. Ours: two known samples, one of each label; the score is the
    difference of the cosines with them.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations", "send_gradients"), knows=("classes", "labelled"), target="labels",
        tail_at="client", classes="two", labelled=1,
    )  # fmt: skip
    by: Literal["sample", "groups"] = "sample"
    centred: bool = True  # the mean direction of all samples is taken off

    def prepare(self, view: View) -> None:
        """Nothing is learned before."""

    def finish(self, view: View) -> Guesses:
        """The label of each sample, and how much more its gradient points the rarer label's way."""
        found = samples_of(view.exchanges, view.labelled, ["send_gradients"])
        turned = unit(found.sent["send_gradients"])
        if self.centred:
            turned = unit(turned - turned.mean(0))
        (often, _), (rare, share) = view.classes.items()
        if self.by == "groups":
            of = groups(turned, 2, seed=view.seed)
            smaller = of == int((of == 1).sum() <= (of == 0).sum())
            towards, away = turned[smaller], turned[~smaller]
        else:
            towards, away = turned[found.known == rare], turned[found.known == often]
        scores = _along(turned, towards) - _along(turned, away)
        return found.guesses(torch.where(above(scores, share), rare, often), scores)


def _along(vectors: Tensor, of: Tensor) -> Tensor:
    """The mean cosine [N] of unit vectors [N,H] with some; 0 where there are none."""
    return (vectors @ of.T).mean(1) if len(of) else vectors.new_zeros(len(vectors))
