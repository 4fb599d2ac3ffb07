"""ProjPert: the gradients of two classes, moved no further than until they are alike enough.

ProjPert: Projection-Based Perturbation for Label Protection in Split Learning Based Vertical Federated Learning, IEEE
TKDE 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from scipy.stats import mannwhitneyu
from torch import Tensor

from cutlayer.contracts import Defense
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.methods.defense._two_classes import Secret, moments, nothing_counted, problems_of, secret_of
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

JITTER = 0.1  # noise on what was moved, in parts of the batch's standard deviation
LEVELS = 257  # of a quantile function
POINTS = 513  # at which two densities are compared
HALVINGS = 20  # of the interval in which the way that is gone lies


@method(
    "defense",
    paper="the survey arXiv:2604.24468, its reference [32]",
    needs=["a U-shaped split", "two classes, or a set of words"],
)
@dataclass
class Projpert(Defense):
    """Move the gradients of two classes towards each other, just until the two are alike enough (after ProjPert).

    Only the aim is the paper's, as far as it could be read: the least change, in Wasserstein distance, under which
    the classes' gradients are close. How is ours. Along the line between the classes' means each example moves from
    its place in its own class towards the same place in the two classes' barycentre, all of them by the same part
    of the way: the smallest at which the two distributions differ by ``advantage`` in total variation, and the area
    under the curve is (1 + advantage) / 2, at most; who guesses is then right no more often than that. A little
    noise hides the places. The length of what is left beside the line is moved in the same way, if it tells the
    classes apart. A micro-batch is taken by itself: what earlier ones showed is not kept, so that a message that is
    made again is the same. The two classes, and what is done with micro-batches of one class, are those of marvell.
    All that the classes differ in beside mean and length stays.
    """

    protects: ClassVar[tuple[Target, ...]] = ("labels",)
    advantage: Annotated[float, Field(gt=0, lt=1)] = 0.2  # how much the two classes may still differ; 0: not at all
    sensitive: list[Annotated[str, Field(min_length=1)]] = field(default_factory=list)  # as of marvell

    _secret: Secret | None = field(init=False, default=None, repr=False, compare=False)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """It needs gradients that the client shows, and two classes."""
        yield from problems_of(config, self.sensitive)

    def prepare(self, ground: Ground) -> None:
        """Find the sensitive tokens, and the norm for batches of one class."""
        self._secret = secret_of(ground, self.sensitive)

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """The gradient [B,T,H] with its examples moved."""
        if about.leg != "send_gradients":
            return shown
        assert self._secret is not None
        return self._secret.shown(shown, about, self.advantage, self.moved)

    def moved(self, examples: Tensor, first: Tensor, noise: Noise) -> Tensor:
        """Gradients [N,D] of the first class [N] and the other, alike enough."""
        line, _, _, gap = moments(examples, first)
        if not gap:
            return examples  # the two means are one
        along = examples @ line
        beside = examples - along[:, None] * line
        lengths = torch.linalg.vector_norm(beside, dim=1)
        if told_apart(lengths, first) > 0.5 + self.advantage / 2:
            wanted = self._alike(lengths, first, noise).clamp(min=0)
            beside = beside * (wanted / lengths.clamp(min=1e-30))[:, None]
        return self._alike(along, first, noise)[:, None] * line + beside

    def _alike(self, values: Tensor, first: Tensor, noise: Noise) -> Tensor:
        """Values [N], moved until the two classes' distributions differ by the advantage."""
        numbers, which = values.double().cpu().numpy(), first.cpu().numpy()
        width = JITTER * float(numbers.std())
        if not width:
            return values
        sides = [numbers[which], numbers[~which]]
        levels = (np.arange(LEVELS) + 0.5) / LEVELS
        curves = [np.quantile(side, levels, method="hazen") for side in sides]
        middle = which.mean() * curves[0] + (1 - which.mean()) * curves[1]
        part = least_part(curves[0], curves[1], middle, width, self.advantage)
        found = np.empty_like(numbers)
        for side, curve, mask in zip(sides, curves, (which, ~which), strict=True):
            draws = noise.uniform(2, len(side))
            ranks = np.empty(len(side))
            ranks[np.lexsort((draws[0], side))] = np.arange(len(side))  # equal values are ranked at random
            place = (ranks + draws[1]) / len(side)
            found[mask] = np.interp(place, levels, (1 - part) * curve + part * middle)
        return torch.from_numpy(found).to(values) + width * noise.normal(values)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """No epsilon: what is bounded is how far two distributions are apart, not two gradients."""
        return nothing_counted(
            ground, sends, f"gradients of two classes moved until they differ by {self.advantage} in total variation",
            "what is shown follows from the gradients of each batch, and is close for the two classes on the whole",
        )  # fmt: skip


def least_part(one: np.ndarray, other: np.ndarray, middle: np.ndarray, width: float, advantage: float) -> float:
    """The smallest part of the way from two quantile functions [L] to their middle at which they are alike enough."""

    def differ(part: float) -> float:
        return apart((1 - part) * one + part * middle, (1 - part) * other + part * middle, width)

    low, high = 0.0, 1.0
    if differ(low) <= advantage:
        return low
    for _ in range(HALVINGS):
        half = (low + high) / 2
        low, high = (low, half) if differ(half) <= advantage else (half, high)
    return high


def apart(one: np.ndarray, other: np.ndarray, width: float) -> float:
    """How well values [L] can be told from others [L], each with Gaussian noise of this standard deviation; 0 to 1.

    The total variation, or, if it is more, how far the area under the curve of the values themselves is from a half,
    doubled: who ranks can be right more often than who decides.
    """
    both = np.concatenate([one, other])
    points = np.linspace(both.min() - 4 * width, both.max() + 4 * width, POINTS)
    shares = [np.exp(-(((points[:, None] - side) / width) ** 2) / 2).mean(1) for side in (one, other)]
    first, second = (share / share.sum() for share in shares)
    area = float((first * (second.cumsum() - second / 2)).sum())
    return max(float(np.abs(first - second).sum()) / 2, abs(2 * area - 1))


def told_apart(values: Tensor, first: Tensor) -> float:
    """How well values [N] tell the first class [N] from the other, as the area under the curve; at least a half."""
    one, other = values[first].cpu().numpy(), values[~first].cpu().numpy()
    area = float(mannwhitneyu(one, other).statistic) / (len(one) * len(other))
    return max(area, 1 - area)
