"""SanText: each token is drawn from the whole vocabulary, near ones more often; SanText+: only rare ones are hidden.

Yue et al., Differential Privacy for Text Analytics via Natural Text Sanitization, Findings of ACL 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
    drawn,
    kept_words,
    label_problems,
    metric,
    strength_for,
    vocabulary_of,
)
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Share = Annotated[float, Field(gt=0, lt=1)]
PLAIN = 0.3  # how often a token that is not sensitive is replaced, where nothing else is said
RANGE = (1e-3, 1e4)  # of epsilon times the median distance, in which it is sought


@method("defense", paper="Yue et al., Findings of ACL 2021, arXiv:2106.01221")
@dataclass
class Santext(Defense):
    """Replace each token by one drawn from the vocabulary, with odds of exp(-epsilon / 2 * distance) (SanText).

    Two tokens give the same output with odds that differ by at most exp(epsilon * distance) in the public embedding,
    the half paying for the normaliser; that is no (epsilon, delta). ``sensitive`` is SanText+: that share of the
    vocabulary, the rarest tokens, is replaced by each other; others stay but for a part, ``replaced``, that becomes a
    sensitive one, and for them nothing is promised. Ours: ``unchanged`` sets epsilon so that this share of public
    random tokens stays (of real text more does); a token is the rarer the later it stands in the vocabulary, as those
    of merged pairs are made, since counts of private text would tell of it; pieces of a word are drawn one by one.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs", "labels")
    epsilon: Annotated[float, Field(gt=0)] | None = None  # rate per unit of distance; smaller hides more
    unchanged: Share | None = None  # share of random (sensitive) tokens that stay; 0.5 without epsilon
    sensitive: Share | None = None  # share of the vocabulary that is hidden; null: all of it
    replaced: Annotated[float, Field(ge=0, le=1)] | None = None  # share of other tokens that is replaced; 0.3
    labels: Labels = "sanitised"  # of a language model: those of the new text, or the true ones (U-shape only)
    mode: Mode = "once"  # a text is replaced once, or anew in each epoch, which adds up

    rate: float = field(init=False, default=0.0, compare=False)  # epsilon, as it is used
    stay: float = field(init=False, default=0.0, compare=False)  # the share of public random sensitive tokens that stay
    hidden: Tensor = field(init=False, repr=False, compare=False)  # which tokens [V] are sensitive
    _vocabulary: Vocabulary = field(init=False, repr=False, compare=False)
    _texts: Texts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.unchanged is not None:
            raise ValueError("epsilon and unchanged are both given; keep one")
        if self.replaced is not None and self.sensitive is None:
            raise ValueError("replaced is of tokens that are not sensitive, and all are. Give sensitive, too")

    @property
    def fresh(self) -> bool:
        """Whether each epoch has texts of its own."""
        return self.mode == "fresh"

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Labels that are sent must not be the text that is hidden."""
        yield from label_problems(config, self.labels)

    def prepare(self, ground: Ground) -> None:
        """Say what is sensitive, and set epsilon by public random tokens."""
        self._vocabulary = vocabulary = vocabulary_of(ground)
        self._texts = Texts(vocabulary, keep=not self.fresh)
        count = len(vocabulary.open)
        rare = vocabulary.open[count - max(1, round((self.sensitive or 1.0) * count)) :]
        self.hidden = torch.zeros_like(vocabulary.fixed)
        self.hidden[rare] = True
        sample = vocabulary.sample(ground.seed, among=rare)
        if self.epsilon is not None:
            self.rate = self.epsilon
        else:
            typical = float(vocabulary.distances(sample[:1])[0, rare].median()) or 1.0
            low, high = (end / typical for end in RANGE)
            self.rate = strength_for(self.unchanged or USUAL, partial(self._stays, sample), low, high)
        self.stay = self._stays(sample, self.rate)

    def _stays(self, sample: Tensor, rate: float) -> float:
        """The mean chance of sensitive tokens to stay at this epsilon."""
        total = 0.0
        for part in self._vocabulary.parts(sample):
            weights = self._weights(self._vocabulary.distances(part), rate)
            total += float((weights.gather(1, part[:, None]) / weights.sum(1, keepdim=True)).sum())
        return total / len(sample)

    def _weights(self, distances: Tensor, rate: float) -> Tensor:
        """The odds [N,V] of outputs, of distances [N,V]."""
        allowed = distances.masked_fill(~self.hidden, torch.inf)
        return torch.exp(-rate / 2 * (allowed - allowed.amin(1, keepdim=True)))

    def example(self, example: Example, noise: Noise) -> Example:
        """The example with its tokens replaced."""
        return self._texts.changed(example, noise, self.labels, self._replaced)

    def _replaced(self, tokens: Tensor, noise: Noise) -> Tensor:
        coins = torch.from_numpy(noise.uniform(len(tokens)))
        share = PLAIN if self.replaced is None else self.replaced
        changes = self.hidden.cpu()[tokens] | (coins < share)
        found = tokens.clone()
        if changes.any():
            weights = partial(self._weights, rate=self.rate)
            found[changes] = drawn(self._vocabulary, tokens[changes], noise, weights).cpu()
        return found

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """epsilon for each version of a text that left."""
        mechanism = f"token drawn by distance at rate {self.rate:.4g} ({kept_words(self.stay)})"
        told = metric(ground, sends, mechanism, self.rate, labels=self.labels, mode=self.mode)
        if self.sensitive is None:
            return told
        return replace(
            told, mechanism=mechanism.replace("public random", "sensitive public random"),
            neighbours="one sensitive token, replaced by another, in parts of their distance in the public embedding",
            not_covered=f"tokens that are not among the rarest {self.sensitive:.0%}; {told.not_covered}",
        )  # fmt: skip
