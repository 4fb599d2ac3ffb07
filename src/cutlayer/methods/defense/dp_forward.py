"""DP-Forward: Gaussian noise on each text's matrix of hidden states.

Du et al., DP-Forward: Fine-tuning and Inference on Language Models with Differential Privacy in Forward Pass, CCS 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.accounting import gaussian_epsilon, gaussian_scale, unavailable
from cutlayer.contracts import Defense
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.methods.defense._claims import uncovered, unfounded
from cutlayer.methods.defense._rows import clipped, public_states, row_norms
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Positive = Annotated[float, Field(gt=0)]
USUAL = 8.0  # epsilon of one release, where nothing else is said


@method("defense", paper="arXiv:2309.06746", needs=["an untrained head for a guarantee: else the noise is empirical"])
@dataclass
class DpForward(Defense):
    """Cut each text's hidden states to a norm, and add Gaussian noise to them (DP-Forward, i.i.d. form).

    The noise is that of the analytic Gaussian mechanism with sensitivity twice the norm, since two texts in the ball
    can be that far apart (the authors' code takes it once). Norms are in parts of the median over random tokens through
    the public head, which needs no text of anybody's; the paper divides by a public constant and leaves the rest to the
    receiver, which is the same. ``project`` keeps only the first principal directions of those public states, before
    the norm is cut: the noise's size falls with the root of their number. Evaluation is noised as training is. Ours:
    with ``noise`` the noise is set by hand, and the epsilon that it implies is told. Labels and the gradients of step 7
    are not covered.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs",)
    epsilon: Positive | None = None  # of one release; 8 unless noise is given
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise: Annotated[float, Field(ge=0)] | None = None  # standard deviation, in parts of the public states' RMS
    clip: Positive | None = 1.0  # norm of a text, in parts of the public median; null: none is cut
    project: Annotated[int, Field(ge=1)] | None = None  # directions that are kept

    scale: float = field(init=False, default=0.0, compare=False)  # the standard deviation
    most: float | None = field(init=False, default=None, compare=False)  # the norm that texts are cut to
    _basis: Tensor | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.noise is not None:
            raise ValueError("epsilon and noise are both given; keep one")
        if self.noise is None and self.clip is None:
            raise ValueError("clip is null: without a bound on the norm no noise gives an epsilon. Give clip, or noise")

    def problems(self, config: RunConfig) -> Iterator[str]:
        """The library that counts must be there, where there is something to count."""
        if self.clip is not None:
            yield from unavailable()

    def prepare(self, ground: Ground) -> None:
        """Take the norm and the directions from public states, and the noise from them."""
        states = public_states(ground)
        rows = torch.cat([part.flatten(0, 1) for part in states])
        rms = float(rows.square().mean().sqrt())
        self._basis = None
        if self.project is not None:
            width = min(self.project, rows.shape[1])
            self._basis = torch.linalg.eigh(rows.double().T @ rows.double()).eigenvectors[:, -width:].float()
            states = [part @ self._basis for part in states]
        norms = torch.cat([row_norms(part, torch.ones(part.shape[:2])) for part in states])
        self.most = None if self.clip is None else self.clip * float(norms.median())
        if self.noise is not None:
            self.scale = self.noise * rms
        else:
            assert self.most is not None
            self.scale = gaussian_scale(self.epsilon or USUAL, self.delta) * 2 * self.most

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """The hidden states [B,T,H], projected, cut to the norm and noised; padding is noise alone."""
        if about.leg != "send_activations":
            return shown
        real = about.real.to(shown.device)
        values = shown.float()
        if self._basis is not None:
            self._basis = self._basis.to(values)
            values = values @ self._basis
        values = clipped(values, real, self.most)
        if self.scale:
            values = values + self.scale * about.noise(covers=[values]).normal(values)
        if self._basis is not None:
            values = values @ self._basis.T
        return values.to(shown.dtype)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """The exact epsilon of so many Gaussian releases, where one can be claimed."""
        why, releases = unfounded(ground, "send_activations"), sends.most
        if self.most is None:
            why = "texts are not cut to a norm (clip: null)"
        elif not self.scale:
            why = "there is no noise (noise: 0)"
        epsilon = None
        if not why:
            assert self.most is not None
            epsilon = gaussian_epsilon(self.scale / (2 * self.most), releases, self.delta)
        return Privacy(
            "Gaussian noise on the hidden states of step 3", "empirical" if why else "local", "inputs",
            "one text, replaced by any other", releases, epsilon, None if why else self.delta, why, self.most,
            None if self.most is None else 2 * self.most, self.scale, uncovered("send_activations", ground),
        )  # fmt: skip
