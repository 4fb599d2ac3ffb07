"""SAP: noise on each token's hidden state, less of it on those tokens that the task needs.

A Split-and-Privatize Framework for Large Language Model Fine-Tuning, 2023.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log1p
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.contracts import IGNORE, Defense, Example
from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.errors import MethodError
from cutlayer.methods.defense._claims import uncovered
from cutlayer.methods.defense._rows import public_states
from cutlayer.methods.defense._tokens import displacement
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig


@method("defense", paper="arXiv:2312.15603", needs=["a frozen head", "classes, or prompts with completions"])
@dataclass
class Sap(Defense):
    """Add multivariate Laplace noise to each token's hidden state, less where the task needs the token (SAP).

    Each position's state is cut to a norm, and gets noise of a uniform direction and a length of Gamma(H), whose
    mean is ``radius``; that of contributing tokens is shorter by ``kappa``. Ours, as the paper's score was not
    found: a token's score is how much the classes of the texts with it differ from those of all texts, times the
    logarithm of how many there are; the highest ``share`` of the client's token types contribute. The class of a
    prompt is the first token of its completion. What it is worth depends on the task: next to nothing where one of
    many words, at any place, decides, as the noise on all others is in the way. Which tokens contribute follows
    from private labels, and anybody sees it: how far a row lies from the nearest clean one tells (area under the
    curve near 1 at kappa 2). So nothing is claimed, though two tokens of one group are d_chi-private with eta.
    Words that matter to the task may be the very ones to hide: ``sensitive`` ones never contribute.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs",)
    radius: Annotated[float, Field(gt=0)] = 1.0  # mean length of the noise, in parts of the public states' median norm
    kappa: Annotated[float, Field(ge=1, le=10)] = 2.0  # by how much it is shorter on contributing tokens
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2  # of the client's token types that contribute
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # norm of a state, in parts of the median; null: none is cut
    sensitive: list[Annotated[str, Field(min_length=1)]] = field(default_factory=list)  # words that never contribute

    contributing: frozenset[int] = field(init=False, default=frozenset(), compare=False)
    length: float = field(init=False, default=0.0, compare=False)  # the mean of the noise
    most: float | None = field(init=False, default=None, compare=False)  # the norm that states are cut to
    types: int = field(init=False, default=0, compare=False)  # of tokens that the client has
    _never: frozenset[int] = field(init=False, default=frozenset(), repr=False, compare=False)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """It needs classes, and noise that keeps its meaning."""
        if config.data.format not in ("classification", "prompt-completion"):
            yield (
                f"scores tokens by the classes of texts, or by how completions begin, and data.format is "
                f"{config.data.format}. Take dchi-embedding, which treats all tokens alike"
            )

    def prepare(self, ground: Ground) -> None:
        """Take the norms from public states.

        Raises:
            MethodError: the head is trained, so that states and noise would not keep their meaning.
        """
        if ground.head_trained:
            raise MethodError(
                "The defense 'sap' needs a head that is not trained. Set partition.head_blocks to 0, or exchange: "
                "splitfrozen."
            )
        norms = torch.cat([states.flatten(0, 1).norm(dim=1) for states in public_states(ground)])
        self.length = self.radius * float(norms.median())
        self.most = None if self.clip is None else self.clip * float(norms.median())
        words = {token for word in self.sensitive for text in (word, f" {word}") for token in ground.tokens_of(text)}
        self._never = frozenset({*ground.specials, *words})

    def know(self, examples: Sequence[Example]) -> None:
        """Find the contributing tokens."""
        told = scores([prompt_and_class(example) for example in examples])
        self.types = len(told)
        ranked = sorted((token for token in told if token not in self._never), key=lambda token: (-told[token], token))
        self.contributing = frozenset(ranked[: round(self.share * self.types)])

    def protect(self, shown: Tensor, about: Shown) -> Tensor:
        """The states [B,T,H], cut and noised row by row; padding is nothing."""
        if about.leg != "send_activations":
            return shown
        values, real = shown.float(), about.real.to(shown.device)
        if self.most is not None:
            values = values * (self.most / values.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        values = values.masked_fill(~real[..., None], 0.0)
        ids = about.batch.input_ids.to(shown.device)
        needed = torch.isin(ids, torch.tensor(sorted(self.contributing), device=ids.device, dtype=ids.dtype))
        length = torch.where(needed, self.length / self.kappa, self.length)
        moved = displacement(values.flatten(0, 1), about.noise(covers=[values])).reshape(values.shape)
        values = values + (moved * (length / values.shape[-1])[..., None]).to(values)
        return values.masked_fill(~real[..., None], 0.0).to(shown.dtype)

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """No bound holds between a token that contributes and one that does not."""
        return Privacy(
            f"noise on each token's state, {self.kappa:g} times less on {len(self.contributing)} of {self.types}",
            "empirical", "inputs", "one token, replaced by another", sends.most, None, None,
            "which tokens get less noise follows from the client's own labels, and how far rows are moved shows it",
            self.most, None, self.length, uncovered("send_activations", ground),
        )  # fmt: skip


def prompt_and_class(example: Example) -> tuple[Sequence[int], int]:
    """The tokens of a text that has a class; of a prompt, and what its completion begins with."""
    if example.labels is None:
        assert example.label is not None
        return example.input_ids, example.label
    first = next((at for at, label in enumerate(example.labels) if label != IGNORE), len(example.labels))
    return example.input_ids[:first], example.labels[first] if first < len(example.labels) else IGNORE


def scores(texts: Iterable[tuple[Sequence[int], int]]) -> dict[int, float]:
    """Of each token how much the classes of its texts differ from all, times the logarithm of their number plus 1."""
    everywhere: Counter[int] = Counter()
    within: dict[int, Counter[int]] = {}
    for tokens, kind in texts:
        everywhere[kind] += 1
        for token in set(tokens):
            within.setdefault(token, Counter())[kind] += 1
    total, found = sum(everywhere.values()), {}
    for token, kinds in within.items():
        count = sum(kinds.values())
        apart = sum(abs(kinds[kind] / count - everywhere[kind] / total) for kind in everywhere)
        found[token] = apart * log1p(count)
    return found
