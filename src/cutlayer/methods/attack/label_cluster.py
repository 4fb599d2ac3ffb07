"""Groups of gradients (or states) over the run, named by one known sample of each class.

Liu et al., Similarity-based Label Inference Attack against Training and Inference of Split Learning, TIFS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.audit.classes import samples_of
from cutlayer.audit.scores import MISSING, Guesses
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.methods.attack._classes import groups, matched, standardised, to_classes, unit
from cutlayer.registry import method
from cutlayer.threat import Threat


@method(
    "attack",
    paper="Liu et al., arXiv:2203.05222",
    needs=["a U-shaped split, and rows of one label each: a classifier, or completions of one token"],
)
@dataclass
class LabelCluster(Attack):
    """Group the samples by k-means and name the groups by one known sample of each class (Kuhn-Munkres).

    The mean of a group is nearly free of noise, so this stands more noise than ``label-distance``.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations", "return_activations", "send_gradients"), knows=("classes", "labelled"),
        target="labels", tail_at="client", classes="several", labelled=1,
    )  # fmt: skip
    by: Literal["gradient", "state"] = "gradient"
    components: Annotated[int, Field(ge=0)] = 50  # principal ones that are kept before; 0: as it is

    def prepare(self, view: View) -> None:
        """Nothing is learned before."""

    def finish(self, view: View) -> Guesses:
        """The class of each sample's group."""
        found = samples_of(view.exchanges, view.labelled, ["return_activations", "send_gradients"])
        vectors = (
            unit(found.sent["send_gradients"])
            if self.by == "gradient"
            else standardised(found.sent["return_activations"])
        )
        vectors = principal(vectors, self.components)
        classes = list(view.classes)
        of = groups(vectors, len(classes), seed=view.seed)
        means = torch.stack([vectors[of == group].mean(0) for group in range(int(of.max()) + 1)])
        everything = torch.cat([means, vectors])
        known = torch.cat([torch.full((len(means),), MISSING), found.known])
        named = matched(to_classes(everything, known, classes)[: len(means)])
        labels = torch.tensor([classes[column] if column >= 0 else MISSING for column in named.tolist()])
        return found.guesses(labels[of])


def principal(vectors: Tensor, count: int) -> Tensor:
    """The first principal components [N,count] of vectors [N,H]; the vectors themselves where there are no more."""
    if not 0 < count < min(vectors.shape):
        return vectors
    centred = (vectors - vectors.mean(0)).double()
    _, _, rows = torch.linalg.svd(centred, full_matrices=False)
    found: Tensor = (centred @ rows[:count].T).float()
    return found
