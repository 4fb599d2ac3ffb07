"""Randomised response on the labels: trained with labels that were flipped, once, with a known probability.

Warner's randomised response; with a prior: Ghazi et al., Deep Learning with Label Differential Privacy, NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.contracts import IGNORE, Defense, Example
from cutlayer.defense import Ground, Privacy, Sends
from cutlayer.methods.defense._claims import UNCOVERED
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig


@method("defense", paper="Ghazi et al., arXiv:2102.06062", needs=["a classifier, or a U-shaped split"])
@dataclass
class LabelDpRr(Defense):
    """Train with labels that were flipped at random, once for all: each is kept with a probability that epsilon sets.

    A classifier's label is kept with e^epsilon / (e^epsilon + K - 1), or becomes any other of the K classes. Of a
    language model the label of a position is drawn within the ``k`` tokens that a public prior finds likeliest after
    the true prefix, with k chosen by that prior (RR with prior); one that is none of them becomes any of them. Ours:
    the prior is the public head and tail with nothing between them, as the client has no whole model. The prefix is
    itself the labels before, and leaves in step 3: this protects a label given all others.
    """

    protects: ClassVar[tuple[Target, ...]] = ("labels",)
    epsilon: Annotated[float, Field(gt=0)] = 4.0  # of a label
    most: Annotated[int, Field(ge=2)] = 1024  # candidates that are looked at, of a language model

    _ground: Ground | None = field(init=False, default=None, repr=False, compare=False)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """A language model's prior needs the tail at the client."""
        if config.partition.name == "two-part-split" and config.data.format != "classification":
            yield "needs the client's tail for its prior of a language model. Take a u-shaped-split"

    def prepare(self, ground: Ground) -> None:
        """Keep what is public."""
        self._ground = ground

    def example(self, example: Example, noise: Noise) -> Example:
        """The example with its flipped labels."""
        assert self._ground is not None
        if example.label is not None:
            classes = self._ground.classes
            return replace(example, label=int(self.flipped(torch.tensor([example.label]), classes, noise)[0]))
        assert example.labels is not None
        assert self._ground.guess is not None
        ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
        at = (labels[1:] != IGNORE).nonzero().flatten() + 1  # a label stands where its token does
        if len(at):
            prior = self._ground.guess(ids[None])[0].cpu().softmax(-1)[at - 1]
            labels[at] = self.with_prior(labels[at], prior, noise)
        return replace(example, labels=labels.tolist())

    def flipped(self, labels: Tensor, classes: int, noise: Noise) -> Tensor:
        """Labels [N], each kept or any other of so many classes."""
        keep = torch.from_numpy(noise.uniform(len(labels))) < kept_with(self.epsilon, classes)
        other = noise.choice(torch.ones(len(labels), classes - 1))
        other = other + (other >= labels)
        return torch.where(keep, labels, other)

    def with_prior(self, labels: Tensor, prior: Tensor, noise: Noise) -> Tensor:
        """Labels [N] by RR within the tokens that a prior [N,V] finds likeliest, as many as serve it best."""
        shares, tokens = prior.topk(min(self.most, prior.shape[1]), dim=-1)
        sizes = torch.arange(1, shares.shape[1] + 1)
        worth = torch.tensor([kept_with(self.epsilon, int(k)) for k in sizes]) * shares.cumsum(-1)
        best = worth.argmax(-1) + 1  # [N]: how many candidates each position has
        inside = sizes[None] <= best[:, None]
        place = ((tokens == labels[:, None]) & inside).float()
        there = place.any(-1)
        uniform = inside.float()
        keep = torch.where(best > 1, torch.tensor([kept_with(self.epsilon, int(k)) for k in best]), torch.ones(()))
        others = (uniform - place) / (best - 1).clamp(min=1)[:, None]
        weights = torch.where(
            there[:, None], keep[:, None] * place + (1 - keep)[:, None] * others, uniform / best[:, None]
        )
        chosen = noise.choice(weights)
        return tokens.gather(1, chosen[:, None])[:, 0]

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """Epsilon, once for all: what follows from a flipped label is no further release of it."""
        given = ", with all other tokens the same" if ground.task == "causal" else ""
        return Privacy(
            "randomised response on the labels", "local", "labels", f"one label, replaced by any other{given}", 1,
            self.epsilon, 0.0, "", None, None, None,
            f"the inputs, which the activations of step 3 show; {UNCOVERED}",
        )  # fmt: skip


def kept_with(epsilon: float, classes: int) -> float:
    """The probability with which a label among so many is kept."""
    return 1 / (1 + (classes - 1) * math.exp(-epsilon))
