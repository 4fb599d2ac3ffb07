"""Randomised response on the labels: trained with labels that were flipped, once, with a known probability.

Warner's randomised response; with a prior: Ghazi et al., Deep Learning with Label Differential Privacy, NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from cutlayer.contracts import IGNORE, Defense, Example
from cutlayer.defense import Ground, Privacy, Sends
from cutlayer.methods.defense._claims import UNCOVERED
from cutlayer.methods.defense._flips import flipped, with_prior
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
        """A language model's prior needs the tail at the client, and a token before each label."""
        if config.partition.name == "two-part-split" and config.data.format != "classification":
            yield "needs the client's tail for its prior of a language model. Take a u-shaped-split"
        if config.data.padding_side == "left" and config.data.format != "classification":
            yield (
                "flips the labels that have a token before them, and with data.padding_side: left a row's first label "
                "has padding. Take padding_side: right"
            )

    def prepare(self, ground: Ground) -> None:
        """Keep what is public."""
        self._ground = ground

    def example(self, example: Example, noise: Noise) -> Example:
        """The example with its flipped labels."""
        assert self._ground is not None
        if example.label is not None:
            classes = self._ground.classes
            return replace(example, label=int(flipped(torch.tensor([example.label]), classes, self.epsilon, noise)[0]))
        assert example.labels is not None
        assert self._ground.guess is not None
        ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
        at = (labels[1:] != IGNORE).nonzero().flatten() + 1  # a label stands where its token does
        if len(at):
            prior = self._ground.guess(ids[None])[0].cpu().softmax(-1)[at - 1]
            labels[at] = with_prior(labels[at], prior, self.epsilon, self.most, noise)
        return replace(example, labels=labels.tolist())

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """Epsilon, once for all: what follows from a flipped label is no further release of it."""
        given = ", with all other tokens the same" if ground.task == "causal" else ""
        return Privacy(
            "randomised response on the labels", "local", "labels", f"one label, replaced by any other{given}", 1,
            self.epsilon, 0.0, "", None, None, None,
            f"the inputs, which the activations of step 3 show; {UNCOVERED}",
        )  # fmt: skip
