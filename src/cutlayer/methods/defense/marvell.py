"""Marvell: Gaussian noise that makes the gradients of two classes as alike as its power can.

Li et al., Label Leakage and Protection in Two-party Split Learning, ICLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from scipy.optimize import minimize_scalar
from torch import Tensor

from cutlayer.contracts import Defense
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.methods.defense._two_classes import Secret, moments, nothing_counted, problems_of, secret_of
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

USUAL = 0.4  # the error, where nothing else is said
GROWTH = 1.5  # of the power, until the error is reached
EXACT = 1e-7  # how near the best variances are sought, in parts of their range


@dataclass(frozen=True)
class Variances:
    """Of the noise on either class (the first one, the other), along the line between their means and across it.

    ``sum_kl``: how far the two noised classes are apart: the sum of both Kullback-Leibler divergences, of Gaussians.
    """

    along: tuple[float, float]
    across: tuple[float, float]
    sum_kl: float


@method("defense", paper="Li et al., arXiv:2102.08504", needs=["a U-shaped split", "two classes, or a set of words"])
@dataclass
class Marvell(Defense):
    """Add the Gaussian noise under which the gradients of two classes are the most alike, for its power (Marvell).

    In each micro-batch the means and variances of the two classes' gradients say which noise each class gets along the
    line between the means, and which the less spread one gets in all other directions. ``error`` is the share of wrong
    guesses that is left to who knows the two Gaussians; the power grows until it is reached. Ours: of a language model
    the two classes are positions whose next token is of the ``sensitive`` words or not, each position an example; and
    a micro-batch with fewer than two examples of a class is cut to a public norm and gets noise in all directions,
    which is far more: take words that most batches have. The bound is of one look at classes that are Gaussian;
    who sees a text in many epochs knows more. With blocks in the tail a label also leaves traces at earlier
    positions, which are noised as examples of their own labels.
    """

    protects: ClassVar[tuple[Target, ...]] = ("labels",)
    error: Annotated[float, Field(gt=0, lt=0.5)] | None = None  # share of wrong guesses; 0.4 unless power is given
    power: Annotated[float, Field(ge=0)] | None = None  # of the noise, in parts of the means' squared distance
    sensitive: list[Annotated[str, Field(min_length=1)]] = field(
        default_factory=list
    )  # a language model's: words to keep secret

    _secret: Secret | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.error is not None and self.power is not None:
            raise ValueError("error and power are both given; keep one")

    def problems(self, config: RunConfig) -> Iterator[str]:
        """It needs gradients that the client shows, and two classes."""
        yield from problems_of(config, self.sensitive)

    def prepare(self, ground: Ground) -> None:
        """Find the sensitive tokens, and the norm for batches of one class."""
        self._secret = secret_of(ground, self.sensitive)

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """The noised gradient [B,T,H]."""
        if about.leg != "send_gradients":
            return shown
        assert self._secret is not None
        return self._secret.shown(shown, about, 1 - 2 * (self.error or USUAL), self.noised)

    def noised(self, examples: Tensor, first: Tensor, noise: Noise) -> Tensor:
        """Gradients [N,D] of the first class [N] and the other, with noise."""
        line, spread, share, gap = moments(examples, first)
        if not gap:
            return examples  # the two means are one
        most = None if self.power is not None else (2 - 4 * (self.error or USUAL)) ** 2
        best = best_variances(
            share, (spread[0] / gap, spread[1] / gap), examples.shape[1], self.power if most is None else 1.0, most
        )
        along, across = (gap * (first * one + ~first * other) for one, other in (best.along, best.across))
        found: Tensor = examples + ((along - across).clamp(min=0).sqrt() * noise.normal(along))[:, None] * line
        if any(best.across):
            found = found + across.sqrt()[:, None] * noise.normal(examples)
        return found

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """No epsilon: the noise is made for an error, not for a bound on any two gradients."""
        asked = f"power {self.power}" if self.power is not None else f"an error of {self.error or USUAL}"
        return nothing_counted(
            ground, sends, f"Gaussian noise between the gradients of two classes ({asked})",
            "the noise follows from the gradients of each batch and bounds how well two classes are told apart",
        )  # fmt: skip


def best_variances(
    share: float, spread: tuple[float, float], size: int, power: float | None, most: float | None = None
) -> Variances:
    """The noise that makes two classes the most alike; all numbers in parts of the means' squared distance.

    Args:
        share: of the first class.
        spread: the mean variance of a number, in the first class and the other.
        size: how many numbers an example has.
        power: the mean squared length of the noise.
        most: the ``sum_kl`` at which it is enough; the power grows until then. None: it stays.
    """
    assert power is not None
    found = _best(share, spread, size, power)
    while most is not None and found.sum_kl > most:
        power *= GROWTH
        found = _best(share, spread, size, power)
    return found


def _best(share: float, spread: tuple[float, float], size: int, power: float) -> Variances:
    """The paper's problem, of whose four variances two are free.

    Only the class that is less spread gets noise across, and all that is left of the power goes along the line.
    """
    less_first = spread[0] < spread[1]  # the first class gets the noise across
    weight = share if less_first else 1 - share
    apart = abs(spread[0] - spread[1]) if size > 1 else 0.0

    def of(across: float) -> Variances:
        rest = power - weight * (size - 1) * across  # = share * first + (1 - share) * other, along the line
        least = (across, 0.0) if less_first else (0.0, across)
        low, high = least[0], max(least[0], (rest - (1 - share) * least[1]) / share)

        def along(first: float) -> tuple[float, float]:
            return first, max(least[1], (rest - share * first) / (1 - share))

        def cost(first: float) -> float:
            return _sum_kl(along(first), least, spread, size)

        return Variances(along(at := _lowest(cost, low, high)), least, cost(at))

    limit = min(power / (weight * size), apart)
    return of(_lowest(lambda across: of(across).sum_kl, 0.0, limit)) if limit else of(0.0)


def _lowest(cost: Callable[[float], float], low: float, high: float) -> float:
    if not high > low:
        return low
    found = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": EXACT * (high - low)})
    return min((low, float(found.x), high), key=cost)


def _sum_kl(along: tuple[float, float], across: tuple[float, float], spread: tuple[float, float], size: int) -> float:
    """Of two Gaussians whose means are 1 apart, the sum of both divergences."""
    one, other = along[0] + spread[0], along[1] + spread[1]
    if not (one and other):
        return math.inf
    total = (other + 1) / one + (one + 1) / other - 2
    if any(spread):
        one, other = across[0] + spread[0], across[1] + spread[1]
        if size > 1 and not (one and other):
            return math.inf
        total += (size - 1) * (one / other + other / one - 2) if size > 1 else 0.0
    return total / 2
