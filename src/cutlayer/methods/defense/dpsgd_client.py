"""DP-SGD on what the client trains: each text's gradient is cut to a norm, and noise is added to their sum.

Abadi et al., Deep Learning with Differential Privacy, CCS 2016; in split learning: Gawron and Stubbings, Feature Space
Hijacking Attacks against Differentially Private Split Learning, 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.accounting import gaussian_epsilon, unavailable
from cutlayer.contracts import Defense
from cutlayer.defense import Ground, Privacy, Sends
from cutlayer.errors import MethodError
from cutlayer.methods.defense._claims import UNCOVERED
from cutlayer.methods.defense._rows import public_texts
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Positive = Annotated[float, Field(gt=0)]


@method("defense", paper="Gawron and Stubbings, arXiv:2201.04018", needs=["nothing trained at the server for a claim"])
@dataclass
class DpsgdClient(Defense):
    """Update what the client trains by the sum of its texts' clipped gradients and Gaussian noise (DP-SGD).

    It slows a server down that pulls the client's head where it wants it, by gradients that it makes up, and hides in
    the trained weights of the client whether a text was among those that they were trained on. What leaves in steps 3
    and 7 it does not hide. A text's gradient is that of the sum over its labels, of all that the client trains, head
    and tail together; it is cut after all of it was made, whatever came from the server. The sum over a step's texts,
    with noise of ``multiplier`` times the norm, is divided by the step's label tokens, whose number is taken to be
    public. Texts come in fixed batches, each once an epoch, so nothing is gained by sampling (published: Poisson
    samples): an epoch is one Gaussian release, at twice the norm, as one text is replaced by another. That claim holds
    only if the server trains nothing on the same texts. Ours: the norm in parts of the median over random tokens and
    labels, through the public head and tail with nothing between them; ``norm`` sets it as a number. Each text passes
    head and tail by itself, which takes longer, and a micro-batch needs the client's gradients as often as it has rows.
    """

    protects: ClassVar[tuple[Target, ...]] = ()
    by_example: ClassVar[bool] = True
    multiplier: Annotated[float, Field(ge=0)] = 1.0  # the noise's standard deviation, in parts of the norm
    clip: Positive | None = None  # norm of a text's gradient, in parts of the public median; 1 unless norm is given
    norm: Positive | None = None  # the same as a number; needed in the two-part split
    cut: bool = True  # false: no gradient is cut, for comparison; then multiplier must be 0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    most: float = field(init=False, default=math.inf, compare=False)  # the norm that gradients are cut to

    def __post_init__(self) -> None:
        if self.clip is not None and self.norm is not None:
            raise ValueError("clip and norm are both given; keep one")
        if not self.cut and (self.clip is not None or self.norm is not None):
            raise ValueError("cut is false, but there is a norm to cut to. Leave clip and norm out")
        if not self.cut and self.multiplier:
            raise ValueError("cut is false, and the noise is in parts of the norm. Set multiplier: 0")

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Without a tail there is no public gradient to measure by."""
        if config.partition.name == "two-part-split" and self.cut and self.norm is None:
            yield "needs norm: in the two-part split the client has no loss to measure a public gradient by"
        if self.multiplier:
            yield from unavailable()

    def prepare(self, ground: Ground) -> None:
        """Take the norm from public gradients.

        Raises:
            MethodError: the client trains nothing.
        """
        if not (ground.head_trained or ground.tail_trained):
            raise MethodError(
                "The defense 'dpsgd-client' is about gradients, but there is nothing that the client trains. Give it "
                "blocks by partition.head_blocks or partition.tail_blocks, or leave the defense out."
            )
        if not self.cut:
            return
        if self.norm is not None:
            self.most = self.norm
            return
        assert ground.measured is not None, "refused in the two-part split"
        norms = torch.cat([ground.measured(ids) for ids in public_texts(ground)])
        self.most = (self.clip or 1.0) * float(norms.median())

    def shares(self, norms: Tensor) -> Tensor:
        """What each text's gradient counts, so that none is longer than the norm."""
        return (self.most / norms.clamp(min=1e-300)).clamp(max=1.0)

    def stirred(self, total: Mapping[str, Tensor], noise: Noise) -> Mapping[str, Tensor]:
        """The sum of a step's gradients, with noise."""
        if not self.multiplier:
            return total
        return {name: sums + self.multiplier * self.most * noise.normal(sums) for name, sums in total.items()}

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """The epsilon of the client's trained weights, by one Gaussian release an epoch."""
        why = ""
        if ground.trunk_trained():
            why = "the server trains on the same texts in clear, so that the gradients of other texts depend on them"
        if not self.cut:
            why = "gradients are not cut to a norm (cut: false)"
        elif not self.multiplier:
            why = "there is no noise (multiplier: 0)"
        epsilon = None if why else gaussian_epsilon(self.multiplier / 2, sends.training, self.delta)
        most = self.most if self.cut else None
        return Privacy(
            "Gaussian noise on the sum of a step's clipped gradients", "empirical" if why else "central", "inputs",
            "one text, replaced by another with as many labels", sends.training, epsilon,
            None if why else self.delta, why, most, None if most is None else 2 * most,
            None if most is None else self.multiplier * most,
            f"the messages: it is of the trained weights alone; {UNCOVERED}",
        )  # fmt: skip
