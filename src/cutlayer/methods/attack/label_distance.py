"""The class of the nearest known samples, by the gradient of step 7 or by what the trunk gave (step 5).

Liu and Lyu, Distance-Based Online Label Inference Attacks Against Split Learning, ICASSP 2023; the same measures are in
Liu et al., Similarity-based Label Inference Attack against Training and Inference of Split Learning, TIFS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.audit.classes import Samples, samples_of
from cutlayer.audit.scores import Guesses
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.methods.attack._classes import standardised, to_classes, unit
from cutlayer.registry import method
from cutlayer.threat import Threat


@method(
    "attack",
    paper="Liu et al., arXiv:2203.05222",
    needs=["a U-shaped split, and rows of one label each: a classifier, or completions of one token"],
)
@dataclass
class LabelDistance(Attack):
    """Give each sample the class whose known samples are nearest, by the direction of its gradient or by its state.

    Directions are compared as unit vectors, whose distance is the cosine's; states by the Euclidean distance once each
    channel has mean 0 and variance 1. The paper's auxiliary samples are here samples of the run whose label is known.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations", "return_activations", "send_gradients"), knows=("classes", "labelled"),
        target="labels", tail_at="client", classes="several", labelled=1,
    )  # fmt: skip
    by: Literal["gradient", "state", "both"] = "gradient"
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the gradient, of both

    def prepare(self, view: View) -> None:
        """Nothing is learned before."""

    def finish(self, view: View) -> Guesses:
        """The class of each sample."""
        found = samples_of(view.exchanges, view.labelled, ["return_activations", "send_gradients"])
        classes = list(view.classes)
        nearest = self._distances(found, classes).argmin(1)
        return found.guesses(torch.tensor(classes)[nearest])

    def _distances(self, found: Samples, classes: list[int]) -> Tensor:
        """To each class [N,K]; of both kinds in parts of each kind's mean."""
        kinds = {
            "gradient": (self.weight, unit(found.sent["send_gradients"])),
            "state": (1 - self.weight, standardised(found.sent["return_activations"])),
        }
        if self.by != "both":
            return to_classes(kinds[self.by][1], found.known, classes)
        total = torch.zeros(len(found), len(classes))
        for share, vectors in kinds.values():
            apart = to_classes(vectors, found.known, classes)
            total = total + share * apart / apart[apart.isfinite()].mean().clamp_min(1e-12)
        return total
