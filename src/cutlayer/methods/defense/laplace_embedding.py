"""Laplace noise on every coordinate of what leaves: the plainest forward defense, and the baseline of the others.

Pan et al., Privacy Risks of General-Purpose Language Models, IEEE S&P 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.accounting import laplace_epsilon, unavailable
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
    paper="Pan et al., IEEE S&P 2020, doi:10.1109/SP40000.2020.00095",
    needs=["an untrained head for a guarantee: else it is empirical"],
)
@dataclass
class LaplaceEmbedding(Defense):
    """Add independent Laplace noise to every coordinate of the hidden states, or round them.

    With ``epsilon`` each text is cut to an L1 norm, and the noise's scale is twice that over epsilon. At the width of a
    language model that drowns the signal, so ``noise`` gives it by hand. ``decimals`` is the paper's rounding, without
    any guarantee. Known from the abstract and re-implementations only: that the norm is in parts of the median over
    random tokens through the public head is ours.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs",)
    epsilon: Positive | None = None  # of one release
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-9  # at which several releases are counted together
    noise: Annotated[float, Field(ge=0)] | None = None  # scale b, in parts of the public states' RMS
    clip: Positive | None = None  # L1 norm of a text, in parts of the public median; with epsilon 1 unless given
    decimals: Annotated[int, Field(ge=0)] | None = None  # to round to, in place of noise

    scale: float = field(init=False, default=0.0, compare=False)  # b
    most: float | None = field(init=False, default=None, compare=False)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """One strength must be given; and the library that counts must be there, where there is something to count."""
        given = [name for name in ("epsilon", "noise", "decimals") if getattr(self, name) is not None]
        if len(given) != 1:
            yield f"give one of epsilon, noise and decimals; there is {' and '.join(given) or 'none'}"
        if self.epsilon is not None or self.clip is not None:
            yield from unavailable()

    def prepare(self, ground: Ground) -> None:
        """Take the norm from public states, and the noise from it."""
        states = public_states(ground)
        norms = torch.cat([row_norms(part, torch.ones(part.shape[:2]), 1.0) for part in states])
        factor = self.clip or (1.0 if self.epsilon is not None else None)
        self.most = None if factor is None else factor * float(norms.median())
        if self.epsilon is not None:
            assert self.most is not None
            self.scale = 2 * self.most / self.epsilon
        elif self.noise is not None:
            self.scale = self.noise * float(torch.cat([part.flatten() for part in states]).square().mean().sqrt())

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """The hidden states [B,T,H], cut to the L1 norm and noised; or rounded."""
        if about.leg != "send_activations":
            return shown
        values = clipped(shown.float(), about.real.to(shown.device), self.most, 1.0)
        if self.decimals is not None:
            values = values + (values.detach().round(decimals=self.decimals) - values.detach())  # straight through
        elif self.scale:
            values = values + self.scale * about.noise(covers=[values]).laplace(values)
        return values.to(shown.dtype)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """The epsilon of so many Laplace releases, where one can be claimed."""
        why, releases = unfounded(ground, "send_activations"), sends.most
        if self.decimals is not None:
            why = "rounding gives no guarantee"
        elif self.most is None:
            why = "texts are not cut to a norm (clip: null)"
        elif not self.scale:
            why = "there is no noise (noise: 0)"
        epsilon = None
        if not why:
            assert self.most is not None
            epsilon = laplace_epsilon(self.scale / (2 * self.most), releases, self.delta)
        return Privacy(
            "rounding of the hidden states of step 3" if self.decimals is not None
            else "Laplace noise on the hidden states of step 3",
            "empirical" if why else "local", "inputs", "one text, replaced by any other", releases, epsilon,
            None if why else self.delta if releases > 1 else 0.0, why, self.most,
            None if self.most is None else 2 * self.most, self.scale, uncovered("send_activations", ground),
        )  # fmt: skip
