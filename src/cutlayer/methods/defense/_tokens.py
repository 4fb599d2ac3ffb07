"""Tokens that are replaced by others: distances in the public embedding, what is public to set a strength by, labels.

Distances are in float64 and are never made for all pairs at once. Shapes: N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

from cutlayer.contracts import IGNORE, Example
from cutlayer.defense import Ground, Privacy, Sends
from cutlayer.methods.defense._claims import UNCOVERED, unfounded
from cutlayer.noise import Noise
from cutlayer.seeds import derive

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Labels = Literal["sanitised", "true"]
Mode = Literal["once", "fresh"]

AT_ONCE = 1 << 22  # numbers of a table of distances
KEPT = 1 << 24  # numbers of such tables that are kept by token type
SAMPLE = 512  # public random tokens that a strength is set by
USUAL = 0.5  # the share of them that is left unchanged, where nothing else is said
TIGHT = 1e-4  # how near to a share a strength is sought


class Vocabulary:
    """The public embedding as the space in which tokens are replaced.

    Args:
        embedding: the public one [V,H].
        fixed: tokens that are never replaced, and that no other becomes.
    """

    def __init__(self, embedding: Tensor, fixed: Collection[int]) -> None:
        self.embedding = embedding
        self.fixed = torch.zeros(len(embedding), dtype=torch.bool, device=embedding.device)
        self.fixed[torch.tensor(sorted(fixed), dtype=torch.int64)] = True
        self.open = (~self.fixed).nonzero().flatten()  # the others, in the vocabulary's order
        self._rows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.embedding)

    def points(self, tokens: Tensor) -> Tensor:
        """The embeddings [N,H] of tokens [N]."""
        return self.embedding[tokens.to(self.embedding.device)].double()

    def squares(self, points: Tensor) -> Tensor:
        """Squared distances [N,V] of points [N,H] from all tokens; infinite from those that nothing becomes."""
        found = torch.empty(len(points), len(self), dtype=torch.float64, device=points.device)
        sizes = points.square().sum(1, keepdim=True)
        width = max(1, AT_ONCE // points.shape[1])
        for start in range(0, len(self), width):
            part = self.embedding[start : start + width].double()
            found[:, start : start + width] = sizes + part.square().sum(1) - 2 * points @ part.T
        return found.clamp_(min=0).masked_fill_(self.fixed, torch.inf)

    def nearest(self, points: Tensor) -> Tensor:
        """The token [N] that is nearest to each point [N,H]."""
        parts = [self.squares(part).argmin(1) for part in torch.split(points, max(1, AT_ONCE // len(self)))]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=points.device)

    def distances(self, tokens: Tensor) -> Tensor:
        """Distances [N,V] of tokens [N] from all; of those that were asked for before they are kept."""
        asked = tokens.tolist()
        missing = [token for token in dict.fromkeys(asked) if token not in self._rows]
        made: dict[int, Tensor] = {}
        if missing:
            rows = self.squares(self.points(torch.tensor(missing))).sqrt_()
            made = dict(zip(missing, rows, strict=True))
            for token, row in made.items():
                if not self.fixed[token]:
                    row[token] = 0.0
        found = torch.stack([made[token] if token in made else self._rows[token] for token in asked])
        for token in missing:
            if len(self._rows) * len(self) < KEPT:
                self._rows[token] = made[token].clone()
        return found

    def parts(self, tokens: Tensor) -> Iterator[Tensor]:
        """Tokens [N] in pieces whose distances fit into memory."""
        yield from torch.split(tokens, max(1, AT_ONCE // len(self)))

    def sample(self, seed: int, among: Tensor | None = None) -> Tensor:
        """Public random tokens (``among``: of these), all alike: nothing of a client's is in them."""
        generator = torch.Generator().manual_seed(derive("public tokens", seed))
        table = self.open if among is None else among
        chosen = torch.randint(len(table), (SAMPLE,), generator=generator)
        return table[chosen.to(table.device)]


@lru_cache(maxsize=2)
def _vocabulary(embedding: Tensor, fixed: tuple[int, ...]) -> Vocabulary:
    return Vocabulary(embedding, fixed)


def vocabulary_of(ground: Ground) -> Vocabulary:
    """The vocabulary of a run; the same one for all clients that share a base in memory."""
    return _vocabulary(ground.embedding(), tuple(ground.specials))


class Texts:
    """What replaces the tokens of texts; of texts that are used again it is kept.

    Args:
        vocabulary: whose ``fixed`` tokens stay.
        keep: whether the same text comes again with the same noise.
    """

    def __init__(self, vocabulary: Vocabulary, *, keep: bool) -> None:
        self._vocabulary, self._keep = vocabulary, keep
        self._made: dict[bytes, array[int]] = {}

    def changed(
        self, example: Example, noise: Noise, labels: Labels, replaced: Callable[[Tensor, Noise], Tensor]
    ) -> Example:
        """An example with other tokens.

        Args:
            example: the true one.
            noise: its own.
            labels: whether the labels of a language model are those of the new text.
            replaced: gives what stands for tokens [N], none of which is fixed.
        """

        def each(true: Tensor, noise: Noise) -> Tensor:
            free = ~self._vocabulary.fixed.cpu()[true]
            if free.any():
                true[free] = replaced(true[free], noise).cpu()
            return true

        return self.rewritten(example, noise, labels, each)

    def rewritten(
        self, example: Example, noise: Noise, labels: Labels, text: Callable[[Tensor, Noise], Tensor]
    ) -> Example:
        """The same, where ``text`` gives what stands for all tokens [T] of a text."""
        ids = self._made.get(noise.key)
        if ids is None:
            ids = array("i", text(torch.tensor(example.input_ids, dtype=torch.int64), noise).tolist())
            if self._keep:
                self._made[noise.key] = ids
        return with_tokens(example, ids.tolist(), labels)


def with_tokens(example: Example, ids: Sequence[int], labels: Labels) -> Example:
    """An example with these tokens; its labels, where it has some, are those or its own."""
    told = example.labels
    if told is not None and labels == "sanitised":
        told = [label if label == IGNORE else token for label, token in zip(told, ids, strict=True)]
    return replace(example, input_ids=ids, labels=told)


def drawn(vocabulary: Vocabulary, tokens: Tensor, noise: Noise, weights: Callable[[Tensor], Tensor]) -> Tensor:
    """For each of tokens [N] another [N], by weights [N,V] >= 0 that follow from distances [N,V]."""
    found = []
    for part in vocabulary.parts(tokens):
        types, where = torch.unique(part, return_inverse=True)
        found.append(noise.choice(weights(vocabulary.distances(types))[where]))
    return torch.cat(found)


def displacement(points: Tensor, noise: Noise) -> Tensor:
    """Noise [N,H] for points [N,H] with density proportional to exp(-length)."""
    directions = noise.normal(points).double()
    lengths = torch.from_numpy(noise.gamma(points.shape[1], len(points))).to(points.device)
    found: Tensor = directions / directions.norm(dim=1, keepdim=True) * lengths[:, None]
    return found


def strength_for(share: float, kept: Callable[[float], float], low: float, high: float) -> float:
    """The strength between two at which a share that rises with it is this one; the nearer end where none is."""
    if kept(low) >= share:
        return low
    if kept(high) <= share:
        return high
    return float(brentq(lambda strength: kept(strength) - share, low, high, rtol=TIGHT))


def label_problems(config: RunConfig, labels: Labels) -> Iterator[str]:
    """A sentence, if the labels that a run sends are the text that is hidden."""
    if labels == "true" and config.partition.name == "two-part-split" and config.data.format != "classification":
        yield (
            "would send the true text as labels: in the two-part split they go to the server. Take labels: sanitised, "
            "or a u-shaped-split"
        )


def releases_of(mode: Mode, sends: Sends) -> int:
    """How many versions of a text left; what is evaluated is replaced once."""
    return max(min(1, sends.most), sends.training if mode == "fresh" else 0)


def doubt(ground: Ground, labels: Labels) -> str:
    """Why no bound holds for the messages of step 3, in words; empty: one does.

    Where labels are those of the new text, or classes, all that the client trains on is made of what it has released.
    """
    return unfounded(ground, "send_activations") if labels == "true" and ground.task == "causal" else ""


def open_still(ground: Ground, labels: Labels) -> str:
    """What the replacement of tokens does not cover, in words."""
    if ground.task != "causal":
        also = "the classes; "
    elif labels == "true":
        also = "the gradients of step 7, from which the true labels, which are the text, can be solved; "
    else:
        also = ""
    return f"{also}special tokens, which stay; {UNCOVERED}"


def metric(
    ground: Ground, sends: Sends, mechanism: str, rate: float, *, labels: Labels, mode: Mode
) -> Privacy:  # fmt: skip
    """What a mechanism has spent where two tokens' log-odds of an output differ by ``rate`` a unit of distance."""
    why, releases = doubt(ground, labels), releases_of(mode, sends)
    return Privacy(
        mechanism, "empirical" if why else "metric", "inputs",
        "one token, replaced by another, in parts of their distance in the public embedding", releases,
        None if why else rate * releases, None, why, not_covered=open_still(ground, labels),
    )  # fmt: skip


def kept_words(share: float, of: str = "public random tokens") -> str:
    """The share of tokens that stay, in words."""
    return f"{share:.0%} of {of} stay as they are"
