"""Clipped gradients with noise at step 7: the plainest backward defense (the survey, section 5.2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.accounting import gaussian_epsilon, laplace_epsilon, unavailable
from cutlayer.contracts import Defense
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.methods.defense._claims import uncovered, unfounded
from cutlayer.methods.defense._rows import clipped, public_states, row_norms
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Positive = Annotated[float, Field(gt=0)]


@method(
    "defense",
    paper="the survey arXiv:2604.24468, its references [114] and [143]",
    needs=["a U-shaped split (in the two-part split the client shows no gradient)"],
)
@dataclass
class ClipNoise(Defense):
    """Cut each text's gradient at the cut to a norm, and add Gaussian or Laplace noise to it before it is shown.

    The gradient is that of the sum over a text's labels, so that its norm does not depend on the other texts. The norm
    is in parts of the median over random tokens and labels through the public head and tail (ours: the survey names
    none). ``multiplier`` is the noise's scale in parts of the sensitivity, which is twice the norm. The tail itself is
    trained with the true gradient: then nothing is claimed, as its weights carry every text into later messages.
    """

    protects: ClassVar[tuple[Target, ...]] = ("labels",)
    multiplier: Annotated[float, Field(ge=0)] = 1.0
    clip: Positive | None = 1.0  # norm of a text's gradient, in parts of the public median; null: none is cut
    noise: Literal["gaussian", "laplace"] = "gaussian"
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    scale: float = field(init=False, default=0.0, compare=False)
    most: float | None = field(init=False, default=None, compare=False)

    def __post_init__(self) -> None:
        if self.clip is None and self.multiplier:
            raise ValueError("clip is null, and the noise is in parts of it. Give clip, or set multiplier: 0")

    @property
    def _order(self) -> float:
        return 2.0 if self.noise == "gaussian" else 1.0

    def problems(self, config: RunConfig) -> Iterator[str]:
        """It needs gradients that the client shows."""
        if config.partition.name == "two-part-split":
            yield "has nothing to do: in the two-part split the client shows no gradient. Take a u-shaped-split"
        if self.clip is not None and self.multiplier:
            yield from unavailable()

    def prepare(self, ground: Ground) -> None:
        """Take the norm from public gradients."""
        self.scale, self.most = 0.0, None
        if self.clip is None or ground.pull is None:
            return
        norms = []
        for states in public_states(ground):
            gradients = ground.pull(states)
            norms.append(row_norms(gradients, torch.ones(gradients.shape[:2], dtype=torch.bool), self._order))
        self.most = self.clip * float(torch.cat(norms).median())
        self.scale = self.multiplier * 2 * self.most

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """The gradient [B,T,H], cut to the norm text by text and noised."""
        if about.leg != "send_gradients" or self.most is None:
            return shown
        values = clipped(shown.float() * about.to_sum, about.real.to(shown.device), self.most, self._order)
        if self.scale:
            noise = about.noise(covers=[values])
            drawn = noise.normal(values) if self.noise == "gaussian" else noise.laplace(values)
            values = values + self.scale * drawn
        return (values / about.to_sum).to(shown.dtype)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """The epsilon of one release a training step of a text, where one can be claimed."""
        why = unfounded(ground, "send_gradients")
        if self.most is None:
            why = "gradients are not cut to a norm (clip: null)"
        elif not self.scale:
            why = "there is no noise (multiplier: 0)"
        epsilon, delta = None, None
        if not why and self.noise == "gaussian":
            epsilon, delta = gaussian_epsilon(self.multiplier, sends.training, self.delta), self.delta
        elif not why:
            epsilon, delta = laplace_epsilon(self.multiplier, sends.training, self.delta), self.delta
        return Privacy(
            f"{self.noise.capitalize()} noise on the gradients of step 7", "empirical" if why else "local", "labels",
            "all labels of one text, replaced by any others", sends.training, epsilon, delta, why, self.most,
            None if self.most is None else 2 * self.most, self.scale, uncovered("send_gradients", ground),
        )  # fmt: skip
