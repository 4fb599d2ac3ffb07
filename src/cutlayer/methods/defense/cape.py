"""Cape: a token is replaced by one that is near to it and fits what stands before it.

Wu et al., Cape: Context-Aware Prompt Perturbation Mechanism with Differential Privacy, ICML 2025, arXiv:2505.05922.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.contracts import Defense, Example
from cutlayer.defense import Ground, Privacy, Sends
from cutlayer.errors import MethodError
from cutlayer.methods.defense._tokens import (
    USUAL,
    Labels,
    Mode,
    Texts,
    Vocabulary,
    doubt,
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

RANGE = (1e-3, 1e4)  # of epsilon, in which it is sought
WRITTEN = "the tokens that the client's own public blocks would write"
MODEL = "it draws by the client's own language-model head, "


@method(
    "defense", paper="arXiv:2505.05922", needs=["a u-shaped-split of a causal language model", "time: a pass a token"]
)
@dataclass
class Cape(Defense):
    """Replace each token by one that is near to it and fits the tokens before it (Cape).

    A token's worth is its fit to the context, to the power ``fit``, times its nearness in the public embedding, to the
    power ``near``; both run from 0 to 1 over the vocabulary. Tokens are drawn by the exponential mechanism on worths
    that are rounded to ``buckets`` fixed levels: each output's odds under two tokens differ by at most exp(epsilon).
    With ``strict: false`` it is the paper's own: levels lie between the least and the largest worth, a level is drawn
    by its mean worth and a token evenly within it; the sizes of levels then tell of the token, and nothing holds. Ours:
    the product of the two (the paper's exact form was not at hand); the context is the last ``context`` tokens as they
    were replaced, so that only one true token is in each draw; and the paper's small model is what the client has, its
    own public blocks with nothing between them, which also writes the text that ``unchanged`` is of (of real text far
    less stays: 0.14 of WikiText-2 for 0.5). That is a weak one: of WikiText-2 it is off by 6.2 nats a token (two of
    eight blocks of a small Llama, 5.4 of a small GPT-2), where the whole model is by 3.9 and counts of tokens by 6.0.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs", "labels")
    epsilon: Annotated[float, Field(gt=0)] | None = None  # of one replacement
    unchanged: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # share of self-written text that stays; 0.5 without epsilon
    )
    fit: Annotated[float, Field(ge=0)] = 0.5  # the power of the fit to the context
    near: Annotated[float, Field(ge=0)] = 1.0  # the power of the nearness to the true token
    buckets: Annotated[int, Field(ge=2)] = 50  # levels of worth
    strict: bool = True  # fixed levels, and an epsilon that holds; or the paper's
    context: Annotated[int, Field(ge=1)] = 8  # tokens before it that count
    labels: Labels = "sanitised"  # of a language model: those of the new text, or the true ones
    mode: Mode = "once"  # a text is replaced once, or anew in each epoch, which adds up

    rate: float = field(init=False, default=0.0, compare=False)  # epsilon, as it is used
    stay: float = field(
        init=False, default=0.0, compare=False
    )  # the share that stays of what the client's own model writes
    _guess: Callable[[Tensor], Tensor] = field(init=False, repr=False, compare=False)
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
        """The client must have a language model's head."""
        if config.data.format == "classification":
            yield f"{MODEL}and a classifier has none. Take santext"
        elif config.partition.name == "two-part-split":
            yield f"{MODEL}which the server holds in the two-part split. Take a u-shaped-split, or santext"
        yield from label_problems(config, self.labels)

    def prepare(self, ground: Ground) -> None:
        """Set epsilon by texts of public random tokens, as the client's own model writes them."""
        if ground.guess is None or ground.task != "causal":
            raise MethodError(f"The defense 'cape' cannot work here: {MODEL}and there is none. Take santext.")
        self._guess, self._vocabulary = ground.guess, vocabulary_of(ground)
        self._texts = Texts(self._vocabulary, keep=not self.fresh)
        own, levels = [], []
        for text in self._vocabulary.parts(self._written(ground.seed)):
            made = self._levels(text[:, -1], text[:, :-1])
            own.append(made.at.gather(1, text[:, -1:].to(made.at.device)))
            levels.append((made.sizes, made.values))
        sizes, values = (torch.cat(parts) for parts in zip(*levels, strict=True))
        itself = torch.cat(own)

        def stays(rate: float) -> float:
            return float(Levels(itself, sizes, values, self.strict).chances(rate).mean())

        self.rate = self.epsilon or strength_for(self.unchanged or USUAL, stays, *RANGE)
        self.stay = stays(self.rate)

    def _written(self, seed: int) -> Tensor:
        """Texts [SAMPLE,context + 1] that the client's own public model writes after a random token each."""
        generator = torch.Generator().manual_seed(derive("public texts", seed))
        texts = self._vocabulary.sample(seed).cpu()[:, None]
        for _ in range(self.context):
            chances = torch.cat([self._after(part).cpu() for part in self._vocabulary.parts(texts)])
            allowed = chances.exp().masked_fill(self._vocabulary.fixed.cpu(), 0.0)
            texts = torch.cat([texts, torch.multinomial(allowed, 1, generator=generator)], 1)
        return texts

    def _after(self, contexts: Tensor) -> Tensor:
        """The log-probabilities [N,V] of what comes after contexts [N,T]."""
        logits = self._guess(contexts)[:, -1, : len(self._vocabulary)]
        return logits.double().log_softmax(-1)

    def worths(self, tokens: Tensor, contexts: Tensor) -> Tensor:
        """What each token of the vocabulary is worth [N,V] for tokens [N] after contexts [N,T]; fixed ones -1."""
        fixed = self._vocabulary.fixed
        fit = self._after(contexts)
        low, high = _least(fit, fixed), _most(fit, fixed)
        fit = ((fit - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
        distances = self._vocabulary.distances(tokens).masked_fill(fixed, 0.0)
        nearness = 1 - distances / distances.amax(1, keepdim=True).clamp(min=1e-300)
        return (fit**self.fit * nearness**self.near).masked_fill(fixed, -1.0)

    def _levels(self, tokens: Tensor, contexts: Tensor) -> Levels:
        return levels_of(self.worths(tokens, contexts), self.buckets, strict=self.strict)

    def example(self, example: Example, noise: Noise) -> Example:
        """The example with its tokens replaced, from left to right."""
        return self._texts.rewritten(example, noise, self.labels, self._text)

    def _text(self, true: Tensor, noise: Noise) -> Tensor:
        fixed, new = self._vocabulary.fixed.cpu(), true.clone()
        start = int(self._vocabulary.open[0])  # before the first token stands nothing: any, but always the same
        for at, token in enumerate(true):
            if fixed[token]:
                continue
            before = new[max(0, at - self.context) : at] if at else torch.tensor([start])
            new[at] = noise.choice(self._levels(token[None], before[None]).chances(self.rate))[0]
        return new

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """epsilon for each version of a text that left."""
        why, releases = doubt(ground, self.labels), releases_of(self.mode, sends)
        if not self.strict:
            why = "the sizes of the levels depend on the token that is hidden (strict: false)"
        return Privacy(
            f"token drawn by nearness and fit, epsilon {self.rate:.4g} ({kept_words(self.stay, WRITTEN)})",
            "empirical" if why else "local", "inputs", "one token, replaced by any other", releases,
            None if why else self.rate * releases, None if why else 0.0, why,
            not_covered=open_still(ground, self.labels),
        )  # fmt: skip


@dataclass(frozen=True)
class Levels:
    """Tokens by their worth.

    ``at`` [N,V]: the level of each token; ``sizes`` [N,L]: how many tokens a level has; ``values`` [N,L]: its worth.
    ``strict``: a level is drawn the more often the more tokens it has.
    """

    at: Tensor
    sizes: Tensor
    values: Tensor
    strict: bool

    def chances(self, rate: float) -> Tensor:
        """How likely each token [N,V] is, by the exponential mechanism."""
        odds = torch.exp((self.values - _most(self.values, self.sizes == 0)) * (rate / 2))
        odds = odds.masked_fill(self.sizes == 0, 0.0)
        total = (odds * (self.sizes if self.strict else 1.0)).sum(1, keepdim=True)
        each = odds / total if self.strict else odds / total / self.sizes.clamp(min=1)
        return torch.cat([each, torch.zeros_like(total)], 1).gather(1, self.at)


def levels_of(worths: Tensor, buckets: int, *, strict: bool) -> Levels:
    """The levels of worths [N,V] from 0 to 1 (negative: never drawn, on a level beyond the last).

    Strict: equal parts of [0,1], of the worth of their middles. Else, as in the paper: equal parts of what lies between
    the least worth and the largest, of their tokens' mean worth.
    """
    out = worths < 0
    low, high = (0.0, 1.0) if strict else (_least(worths, out), _most(worths, out))
    width = torch.as_tensor((high - low) / buckets, dtype=worths.dtype).clamp(min=1e-300)
    at = ((worths - low) / width).floor().clamp(0, buckets - 1).long().masked_fill(out, buckets)
    zeros = torch.zeros(len(worths), buckets + 1, dtype=worths.dtype, device=worths.device)
    sizes = zeros.scatter_add(1, at, torch.ones_like(worths))[:, :buckets]
    if strict:
        middles = (torch.arange(buckets, dtype=worths.dtype, device=worths.device) + 0.5) / buckets
        return Levels(at, sizes, middles.expand_as(sizes), strict)
    return Levels(at, sizes, zeros.scatter_add(1, at, worths)[:, :buckets] / sizes.clamp(min=1), strict)


def _least(values: Tensor, out: Tensor) -> Tensor:
    return values.masked_fill(out, torch.inf).amin(1, keepdim=True)


def _most(values: Tensor, out: Tensor) -> Tensor:
    return values.masked_fill(out, -torch.inf).amax(1, keepdim=True)
