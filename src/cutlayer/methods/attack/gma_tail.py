"""Gradient matching with the pre-trained tail: soft labels whose gradient there is the one that was read.

Chen et al., Unveiling the Vulnerability of Private Fine-Tuning in Split-Based Frameworks for Large Language Models: A
Bidirectionally Enhanced Attack, CCS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.audit.public import PublicModel
from cutlayer.audit.scores import MISSING, Guesses
from cutlayer.audit.spans import spans_of
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.methods.attack._tail import Linear, likely, speaks
from cutlayer.registry import method
from cutlayer.threat import Threat


@method(
    "attack",
    paper="Chen et al., BiSR, arXiv:2409.00960",
    needs=["a U-shaped split of a causal language model whose base weights are public"],
)
@dataclass
class GmaTail(Attack):
    """Search soft labels by gradient descent until their gradient through the public tail is that of step 7.

    One text at a time; a position may have the ``shortlist`` tokens whose logits rise most against the gradient (of all
    positions of the text together). The gradient is a linear map of soft labels as long as the states stay, so it is
    made once, and no step differentiates twice. ``distance: square`` needs the loss's scale, which is fitted first on
    each position's first candidate (ours). ``cosine`` needs none, but soft labels anywhere between the prediction and
    the label give the same direction: the label is then the token that gained most on the prediction (ours, too), and
    far fewer are found.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations", "return_activations", "send_gradients"), knows=("architecture", "weights"),
        target="labels", tail_at="client", causal=True,
    )  # fmt: skip
    distance: Literal["square", "cosine"] = "square"
    steps: Annotated[int, Field(ge=1)] = 150  # of Adam, on each text
    lr: Annotated[float, Field(gt=0)] = 0.2
    shortlist: Annotated[int, Field(ge=2)] = 200  # candidates that each position of a text brings

    def prepare(self, view: View) -> None:
        """Nothing is learned before."""

    def finish(self, view: View) -> Guesses:
        """The labels of all micro-batches that were read, and by how much their gradients differ, first and last."""
        tokens, ends = {}, []
        for one in view.exchanges:
            hidden, gradient = one.hidden("return_activations"), one.hidden("send_gradients")
            found = torch.full(hidden.shape[:2], MISSING, dtype=torch.int64)
            for span in spans_of(hidden, one.about):
                wanted = span.of(gradient)
                if not bool((wanted != 0).any()):
                    continue
                labels, first, last = self._matched(view.public, view.tail_start, span.of(hidden), wanted)
                labels[~speaks(wanted)] = MISSING
                found[span.row, span.start : span.stop] = labels
                ends.append((first, last))
            tokens[one.key] = found
        count = max(1, len(ends))
        notes = {"began_at": sum(first for first, _ in ends) / count, "ended_at": sum(last for _, last in ends) / count}
        return Guesses(tokens, notes=notes)

    def _matched(
        self, public: PublicModel, start: int, hidden: Tensor, gradient: Tensor
    ) -> tuple[Tensor, float, float]:  # fmt: skip
        """The labels [L] of a text, and the distance before and after."""
        listed = likely(public, start, hidden, gradient, self.shortlist)
        tail = Linear(public, start, hidden)
        wanted = gradient.to(tail.without)
        columns = torch.unique(listed)
        first = torch.zeros(tail.shape, device=wanted.device).scatter_(1, listed[:, :1], 1.0)
        made = tail.without - tail.of(first)
        scale = ((made * wanted).sum() / wanted.square().sum()).clamp_min(1e-12)
        inner = torch.zeros(len(listed), len(columns), device=wanted.device, requires_grad=True)
        optimizer = torch.optim.Adam([inner], lr=self.lr)
        distances: list[float] = []
        for _ in range(self.steps):
            with torch.enable_grad():
                soft = inner.softmax(1)
            whole = torch.zeros(tail.shape, device=wanted.device)
            whole[:, columns] = soft.detach()
            made = (tail.without - tail.of(whole)).requires_grad_(True)
            with torch.enable_grad():
                apart = self._apart(made, wanted, scale)
            (back,) = torch.autograd.grad(apart, made)
            optimizer.zero_grad()
            soft.backward(-tail.along(back)[:, columns])  # type: ignore[no-untyped-call]
            optimizer.step()
            distances.append(float(apart.detach()))
        soft = inner.detach().softmax(1)
        if self.distance == "cosine":
            soft = soft - tail.predicted[:, columns]
        return columns[soft.argmax(1)].cpu(), distances[0], distances[-1]

    def _apart(self, made: Tensor, wanted: Tensor, scale: Tensor) -> Tensor:
        """How far a gradient [L,H] is from the one that was read."""
        if self.distance == "cosine":
            return 1 - torch.cosine_similarity(made.flatten(), wanted.flatten(), dim=0)
        return (made - scale * wanted).square().sum() / (scale * wanted).square().sum()
