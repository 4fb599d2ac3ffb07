"""Two labels by the length of the gradient: the rarer one is predicted worse, so its gradients are longer.

Li et al., Label Leakage and Protection in Two-party Split Learning, ICLR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from cutlayer.audit.classes import samples_of
from cutlayer.audit.scores import Guesses
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.methods.attack._classes import TINY, upper
from cutlayer.registry import method
from cutlayer.threat import Threat


@method(
    "attack",
    paper="Li et al., arXiv:2102.08504",
    needs=["a U-shaped split, and rows of one label each, of two: a classifier, or completions of one token"],
)
@dataclass
class LabelNorm(Attack):
    """Tell two labels apart by the length of the gradient of step 7: the rarer label's is taken for the longer.

    The paper's attacker is a party without labels that reads step 9; here it is the server, which reads step 7. Ours:
    the score is the logarithm of the length at the label's position, and the rows of all steps are compared, each
    gradient times the rows of its optimizer step.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations", "send_gradients"), knows=("classes",), target="labels", tail_at="client",
        classes="two",
    )  # fmt: skip
    threshold: Literal["share", "groups"] = "share"  # the rarer label's share is longer, or the longer of two groups

    def prepare(self, view: View) -> None:
        """Nothing is learned before."""

    def finish(self, view: View) -> Guesses:
        """The label of each sample, and how long its gradient is."""
        found = samples_of(view.exchanges, None, ["send_gradients"])
        length = found.sent["send_gradients"].norm(dim=1).clamp_min(TINY).log()
        (often, _), (rare, share) = view.classes.items()
        longer = upper(length) if self.threshold == "groups" else length > length.quantile(1 - share)
        return found.guesses(torch.where(longer, rare, often), length)
