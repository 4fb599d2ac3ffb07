"""RANTEXT: each token is drawn from those within a distance that is random itself.

Tong et al., InferDPT: Privacy-preserving Inference for Black-box Large Language Models, arXiv:2310.12214, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
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
    kept_words,
    label_problems,
    open_still,
    releases_of,
    strength_for,
    vocabulary_of,
)
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.seeds import derive
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

SLOW = 2.0  # the epsilon from which on the list's own grows slowly
TRIES = 5  # radii that are drawn until another token is within one
RANGES = ((SLOW, 1e4), (1e-3, SLOW * (1 - 1e-9)))  # of epsilon, in which it is sought


@method("defense", paper="arXiv:2310.12214")
@dataclass
class Rantext(Defense):
    """Replace each token by one drawn from those within a random distance, nearer ones more often (RANTEXT).

    The distance is the length of Laplace noise whose scale is the range of each coordinate of the public embedding over
    epsilon (above 2: over a slowly growing number that the authors fitted), times ``radius``. The exponential mechanism
    then draws among the tokens within it. The authors claim epsilon for a token; the list itself depends on the token,
    so that none is claimed here. Nor is a token better hidden than in a group of that size: who knows the sampler
    guesses 0.40 of 200 words of a small Llama at epsilon 3, with 22 candidates, and of CusText's groups of 22 0.15.
    Where no other token is near enough in five draws, it is the token or its neighbour. Ours: ``radius``, since at the
    width of a language model the length hardly varies; ``unchanged`` sets epsilon so that this share of public random
    tokens stays; numbers are tokens as any other (the authors draw from 1 to 1000).
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs", "labels")
    epsilon: Annotated[float, Field(gt=0)] | None = None  # the authors', nominal
    unchanged: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # share of random tokens that stay; 0.5 without epsilon
    )
    radius: Annotated[float, Field(gt=0)] = 1.0  # of the list of candidates, in parts of the authors'
    labels: Labels = "sanitised"  # of a language model: those of the new text, or the true ones (U-shape only)
    mode: Mode = "once"  # a text is replaced once, or anew in each epoch, which adds up

    rate: float = field(init=False, default=0.0, compare=False)  # epsilon, as it is used
    stay: float = field(init=False, default=0.0, compare=False)  # the share of public random tokens that stay
    listed: float = field(init=False, default=0.0, compare=False)  # how many candidates they have, on average
    _ranges: Tensor = field(init=False, repr=False, compare=False)  # of the coordinates of the embedding [H]
    _vocabulary: Vocabulary = field(init=False, repr=False, compare=False)
    _texts: Texts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.unchanged is not None:
            raise ValueError("epsilon and unchanged are both given; keep one")

    @property
    def fresh(self) -> bool:
        """Whether each epoch has texts of its own."""
        return self.mode == "fresh"

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Labels that are sent must not be the text that is hidden."""
        yield from label_problems(config, self.labels)

    def prepare(self, ground: Ground) -> None:
        """Take the ranges of the coordinates, and set epsilon by public random tokens."""
        self._vocabulary = vocabulary = vocabulary_of(ground)
        self._texts = Texts(vocabulary, keep=not self.fresh)
        points = vocabulary.embedding[vocabulary.open]
        self._ranges = (points.amax(0) - points.amin(0)).double()
        sample = vocabulary.sample(ground.seed)
        noise = Noise(derive("public radii", ground.seed).to_bytes(8, "little"), "public")
        stays = partial(self._stays, sample, torch.stack([self._radii(len(sample), noise) for _ in range(TRIES)]))
        if self.epsilon is not None:
            self.rate = self.epsilon
        else:
            share = self.unchanged or USUAL
            # At SLOW the lists become much shorter at once: the share that is sought may lie in the gap.
            found = [strength_for(share, lambda rate: stays(rate)[0], *ends) for ends in RANGES]
            self.rate = min(found, key=lambda rate: abs(stays(rate)[0] - share))
        self.stay, self.listed = stays(self.rate)

    def _stays(self, sample: Tensor, radii: Tensor, rate: float) -> tuple[float, float]:
        """The mean chance of tokens to stay at this epsilon, and how many candidates they have.

        Args:
            sample: public tokens [N].
            radii: for each some that were drawn, [TRIES,N].
            rate: the epsilon.
        """
        chance, count = 0.0, 0
        for part, drawn in zip(*map(self._vocabulary.parts, (sample, radii.T)), strict=True):
            weights = self._weights(part, rate, iter(drawn.T).__next__)
            chance += float((weights.gather(1, part[:, None]) / weights.sum(1, keepdim=True)).sum())
            count += int((weights > 0).sum())
        return chance / len(sample), count / len(sample)

    def _weights(self, tokens: Tensor, rate: float, radius: Callable[[], Tensor]) -> Tensor:
        """The odds [N,V] of what tokens [N] become; ``radius`` draws [N] for an epsilon of the list of 1."""
        distances = self._vocabulary.distances(tokens)
        nearest = distances.scatter(1, tokens[:, None].to(distances.device), torch.inf).amin(1)
        radii = radius() / fitted(rate)
        for _ in range(TRIES - 1):
            alone = radii <= nearest
            if not alone.any():
                break
            radii = torch.where(alone, radius() / fitted(rate), radii)
        alone = radii <= nearest
        radii = torch.where(alone, nearest, radii)[:, None]
        within = (distances < radii) | (alone[:, None] & (distances <= radii))
        return torch.exp(-rate / 2 * distances / radii).where(within, 0.0)  # but for what all have: exp(rate / 2)

    def _radii(self, count: int, noise: Noise) -> Tensor:
        """Radii [N] for an epsilon of the list of 1."""
        drawn = noise.laplace(self._ranges.expand(count, -1)).double()
        found: Tensor = (drawn * self._ranges).norm(dim=1) * self.radius
        return found

    def example(self, example: Example, noise: Noise) -> Example:
        """The example with its tokens replaced."""
        return self._texts.changed(example, noise, self.labels, self._replaced)

    def _replaced(self, tokens: Tensor, noise: Noise) -> Tensor:
        found = []
        for part in self._vocabulary.parts(tokens):
            found.append(noise.choice(self._weights(part, self.rate, partial(self._radii, len(part), noise))))
        return torch.cat(found)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """Nothing that could be proven."""
        return Privacy(
            f"token drawn from about {self.listed:.0f} within a random distance, epsilon {self.rate:.4g} nominal "
            f"({kept_words(self.stay)})",
            "empirical", "inputs", "one token, replaced by any other", releases_of(self.mode, sends),
            why="which tokens may come out depends on the one that is hidden, so that the authors' epsilon is nominal",
            not_covered=open_still(ground, self.labels),
        )  # fmt: skip


def fitted(epsilon: float) -> float:
    """The epsilon of the list's radius for that of a token, as the authors' code has it."""
    if epsilon < SLOW:
        return epsilon
    return 0.0165816 * math.log(19.0647216 * epsilon - 38.1294334) + 9.3110838
