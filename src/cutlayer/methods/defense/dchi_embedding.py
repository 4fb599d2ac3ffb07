"""d_chi-privacy: each token becomes the one that is nearest to its embedding plus noise.

Chatzikokolakis et al., Broadening the Scope of Differential Privacy Using Metrics, PETS 2013; for text: Feyisetan et
al., Privacy- and Utility-Preserving Textual Analysis via Calibrated Multivariate Perturbations, WSDM 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.contracts import Defense, Example
from cutlayer.defense import Ground, Privacy, Sends
from cutlayer.methods.defense._tokens import (
    USUAL,
    Labels,
    Mode,
    Texts,
    Vocabulary,
    displacement,
    kept_words,
    label_problems,
    metric,
    vocabulary_of,
)
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.seeds import derive
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig


@method("defense", paper="Feyisetan et al., WSDM 2020, doi:10.1145/3336191.3371856")
@dataclass
class DchiEmbedding(Defense):
    """Replace each token by the one nearest to its embedding plus multivariate Laplace noise (d_chi-privacy).

    The noise has density proportional to exp(-eta * length): a uniform direction, a length of Gamma(H, 1 / eta), both
    drawn for each token. Two tokens give the same output with odds that differ by at most exp(eta * distance) in the
    public embedding; that is no (epsilon, delta). Ours: ``unchanged`` sets eta so that this share of public random
    tokens stays, since eta says little at the width of a language model. Frequent tokens lie further from others, so
    that of real text more stays.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs", "labels")
    eta: Annotated[float, Field(gt=0)] | None = None  # rate per unit of distance; smaller hides more
    unchanged: Annotated[float, Field(gt=0, lt=1)] | None = None  # share of random tokens that stay; 0.5 without eta
    labels: Labels = "sanitised"  # of a language model: those of the new text, or the true ones (U-shape only)
    mode: Mode = "once"  # a text is replaced once, or anew in each epoch, which adds up

    rate: float = field(init=False, default=0.0, compare=False)  # eta, as it is used
    stay: float = field(init=False, default=0.0, compare=False)  # the share of public random tokens that stay
    _vocabulary: Vocabulary = field(init=False, repr=False, compare=False)
    _texts: Texts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.eta is not None and self.unchanged is not None:
            raise ValueError("eta and unchanged are both given; keep one")

    @property
    def fresh(self) -> bool:
        """Whether each epoch has texts of its own."""
        return self.mode == "fresh"

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Labels that are sent must not be the text that is hidden."""
        yield from label_problems(config, self.labels)

    def prepare(self, ground: Ground) -> None:
        """Set eta by public random tokens."""
        self._vocabulary = vocabulary_of(ground)
        self._texts = Texts(self._vocabulary, keep=not self.fresh)
        limits = _limits(self._vocabulary, ground.seed)
        self.rate = self.eta or float(limits.quantile(self.unchanged or USUAL))
        self.stay = float((limits <= self.rate).double().mean())

    def example(self, example: Example, noise: Noise) -> Example:
        """The example with its tokens replaced."""
        return self._texts.changed(example, noise, self.labels, self._replaced)

    def _replaced(self, tokens: Tensor, noise: Noise) -> Tensor:
        points = self._vocabulary.points(tokens)
        return self._vocabulary.nearest(points + displacement(points, noise) / self.rate)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """eta for each version of a text that left."""
        mechanism = f"nearest token to the embedding plus noise of rate eta {self.rate:.4g} ({kept_words(self.stay)})"
        return metric(ground, sends, mechanism, self.rate, labels=self.labels, mode=self.mode)


def _limits(vocabulary: Vocabulary, seed: int) -> Tensor:
    """For public random tokens the eta from which on each stays, under noise that is drawn publicly.

    A token stays where noise n / eta leaves it nearer than every other, which lies at d: eta > 2 n.d / |d|^2.
    """
    noise, found = Noise(derive("public displacements", seed).to_bytes(8, "little"), "public"), []
    for part in vocabulary.parts(vocabulary.sample(seed)):
        points = vocabulary.points(part)
        moved = displacement(points, noise)
        apart = vocabulary.squares(points)
        along = (vocabulary.squares(points + moved) - apart - moved.square().sum(1, keepdim=True)).neg()
        ratio = torch.where((apart > 0) & apart.isfinite(), along / apart, -torch.inf)
        found.append(ratio.scatter(1, part[:, None].to(ratio.device), -torch.inf).amax(1))
    return torch.cat(found)
