"""PSLF: a tail that is seen learns flipped labels, and one that never leaves learns the true ones and predicts.

PSLF: Defending Against Label Leakage in Split Learning, CIKM 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.contracts import IGNORE, Defense
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.errors import MethodError
from cutlayer.methods.defense._claims import UNCOVERED
from cutlayer.methods.defense._flips import flipped, with_prior
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig


@method(
    "defense",
    paper="the survey arXiv:2604.24468, section 5.2.1 (PSLF, CIKM 2023)",
    needs=["a U-shaped split whose tail is trained"],
)
@dataclass
class Pslf(Defense):
    """Send gradients of a tail that learns flipped labels only; a second tail learns the true ones and predicts (PSLF).

    Both tails get the same hidden states, but no gradient of the second goes further. The first learns ``flips``
    independent flips of each label, each with its part of epsilon, all alike; they are drawn once and used in every
    epoch. The second never leaves its client: it is in no merge and no hand-over (the first is), and in what the
    client has at the end it stands in the first one's place. So the adapter of a whole run, which a simulation writes,
    has that of the first evaluator. In training the loss of the first tail is told, in an evaluation that of the
    second. max_grad_norm scales both by the first one's factor. It costs a second pass through the tail, and its
    parameters and optimizer state again; the frozen weights are shared. Ours: how several flips are learned; and for a
    language model flips within what a public prior finds likeliest, as label-dp-rr has them (published: two classes).
    """

    protects: ClassVar[tuple[Target, ...]] = ("labels",)
    two_tails: ClassVar[bool] = True
    epsilon: Annotated[float, Field(gt=0)] = 4.0  # of a label, with all its flips
    flips: Annotated[int, Field(ge=1)] = 2  # of each label, each with a part of epsilon
    most: Annotated[int, Field(ge=2)] = 1024  # candidates that are looked at, of a language model

    _ground: Ground | None = field(init=False, default=None, repr=False, compare=False)
    _drawn: dict[bytes, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """It needs two tails."""
        if config.partition.name == "two-part-split":
            yield "needs the tail at the client: in the two-part split the labels are sent. Take a u-shaped-split"

    def prepare(self, ground: Ground) -> None:
        """Keep what is public.

        Raises:
            MethodError: there is nothing to train in the tail, so that two of them would be one.
        """
        if not ground.tail_trained:
            raise MethodError(
                "The defense 'pslf' has a second tail, but nothing in the tail is trained. Set partition.tail_blocks "
                "to 1 or more."
            )
        self._ground = ground

    def learned(self, labels: Tensor, about: Shown) -> Tensor:
        """The flips [B,T,M], or [B,M], of labels [B,T] or [B]."""
        found = torch.full((*labels.shape, self.flips), IGNORE, dtype=labels.dtype)
        for row, label in enumerate(labels.cpu()):
            if labels.dim() == 1:
                found[row] = self._flips(label.reshape(1), torch.zeros(1, dtype=torch.int64), row, about)[0]
                continue
            at = (label[1:] != IGNORE).nonzero().flatten() + 1
            if len(at):
                found[row, at] = self._flips(label[at], at, row, about)
        return found.to(labels.device)

    def _flips(self, labels: Tensor, at: Tensor, row: int, about: Shown) -> Tensor:
        """Those [N,M] of the labels [N] at these positions of a row; drawn when its record first comes."""
        noise = about.noise_of(row)
        if noise.key not in self._drawn:
            assert self._ground is not None
            many, each = labels.repeat_interleave(self.flips), self.epsilon / self.flips
            if self._ground.task == "causal":
                prior = self._prior(at, row, about).repeat_interleave(self.flips, dim=0)
                drawn = with_prior(many, prior, each, self.most, noise)
            else:
                drawn = flipped(many, self._ground.classes, each, noise)
            self._drawn[noise.key] = drawn.reshape(-1, self.flips).to(torch.int32)
        return self._drawn[noise.key].to(labels.dtype)

    def _prior(self, at: Tensor, row: int, about: Shown) -> Tensor:
        """How likely [N,V] each token is at these positions of a row, by what stands before them."""
        assert self._ground is not None
        assert self._ground.guess is not None, "refused in the two-part split"
        real = about.real[row]
        guessed = self._ground.guess(about.batch.input_ids[row][real][None])[0].cpu().softmax(-1)
        before = torch.cat([torch.ones_like(guessed[:1]), guessed])  # behind padding a first token is a label, too
        return before[at - int(real.int().argmax())]

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """Epsilon, once for all: what follows from flipped labels is no further release of them."""
        given = ", with all other tokens the same" if ground.task == "causal" else ""
        return Privacy(
            f"randomised response on the labels, {self.flips} times, in a tail of its own", "local", "labels",
            f"one label, replaced by any other{given}", 1, self.epsilon, 0.0, "", None, None, None,
            f"the inputs, which the activations of step 3 show; what an evaluation tells of the tail that predicts; "
            f"{UNCOVERED}",
        )  # fmt: skip
