"""GradPerturb: Laplace noise on the one-hot label, where the gradient of the loss meets it.

Yang et al., Differentially Private Label Protection in Split Learning, arXiv:2203.02073.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.accounting import laplace_epsilon, unavailable
from cutlayer.contracts import IGNORE, Defense
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.methods.defense._claims import uncovered
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig


@method("defense", paper="Yang et al., arXiv:2203.02073", needs=["a U-shaped split: whoever has the labels perturbs"])
@dataclass
class Gradperturb(Defense):
    """Backpropagate softmax minus a noised one-hot label, so that all that follows depends on the noised label alone.

    Of the gradient at the logits only the one-hot label is private. Two one-hots are at an L1 distance of 2, so that
    Laplace noise of scale 2 / epsilon on each class gives epsilon-label-DP; for two classes one draw of scale 1 /
    epsilon along the line between them is enough, as in the paper. The tail is trained with the same gradient, so its
    weights carry no label either. Ours, for a vocabulary: noise on the ``candidates`` alone that the tail finds
    likeliest at a position before it sees the label; a label that is none of them is replaced by one of them at random.
    The form for many classes is ours as well, from the abstract and the survey.
    """

    protects: ClassVar[tuple[Target, ...]] = ("labels",)
    epsilon: Annotated[float, Field(gt=0)] = 8.0  # of a label and a release
    candidates: Annotated[int, Field(ge=2)] = 32  # tokens that noise is put on, of a language model
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-9  # at which several releases are counted together

    def problems(self, config: RunConfig) -> Iterator[str]:
        """The client must make the gradient of the loss."""
        if config.partition.name == "two-part-split":
            yield "needs the labels at the client: in the two-part split they are sent. Take a u-shaped-split"
        yield from unavailable()

    def coefficients(self, logits: Tensor, labels: Tensor, about: Shown) -> Tensor | None:
        """Softmax minus the noised one-hot [B,T,V] (of a classifier [B,K]), of the sum over labels."""
        found = torch.zeros_like(logits, dtype=torch.float32)
        if labels.dim() == 1:
            found[:] = self._released(logits.float(), labels, about)
            return found
        counted = labels[:, 1:] != IGNORE
        found[:, :-1][counted] = self._released(logits[:, :-1][counted].float(), labels[:, 1:][counted], about)
        return found

    def _released(self, logits: Tensor, labels: Tensor, about: Shown) -> Tensor:
        """Of N labels, [N,V]."""
        noise = about.noise(covers=[logits, labels])
        classes = logits.shape[1]
        wanted = torch.zeros_like(logits)
        if classes == 2:
            along = noise.laplace(labels.float()) / self.epsilon
            wanted[:, 1] = labels.float() + along
            wanted[:, 0] = 1 - wanted[:, 1]
            return logits.softmax(-1) - wanted
        allowed = logits.topk(min(self.candidates, classes), dim=-1).indices  # [N,S], without a look at the label
        even = torch.ones(allowed.shape, device=logits.device)
        stand_ins = allowed.gather(1, noise.choice(even)[:, None])
        there = (allowed == labels[:, None]).any(-1, keepdim=True)
        chosen = torch.where(there, labels[:, None], stand_ins)
        hot = (allowed == chosen).float() + noise.laplace(even) * (2 / self.epsilon)
        return logits.softmax(-1) - wanted.scatter(1, allowed, hot)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """The epsilon of a label, by one release a training step of its text."""
        epsilon = laplace_epsilon(1 / self.epsilon, sends.training, self.delta)
        return Privacy(
            "Laplace noise on the one-hot labels, at the gradient of the logits", "local", "labels",
            "one label, replaced by any other, with all inputs the same"
            + (" (of a language model a label is a later input)" if ground.task == "causal" else ""),
            sends.training, epsilon, self.delta if sends.training > 1 else 0.0, "", None, 2.0, 2 / self.epsilon,
            uncovered("send_gradients", ground),
        )  # fmt: skip
