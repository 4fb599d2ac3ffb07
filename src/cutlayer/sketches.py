"""What a client may tell of its data so that others can group it: a few numbers, made at the client, sent if asked.

Nothing here is told unless the run names a selection that asks for a sketch, and the client's own copy of the run says
which. A sketch leaks: ``labels`` are the client's class proportions, ``tokens`` and ``lengths`` say what its texts are
like, ``features`` is the mean of what its head makes of them; ``hash`` keeps one bit of each of a few projections of
the features. None of that is encrypted. ``noise`` blurs histograms and features, ``flip`` the bits of a hash.

A hash is made with projections that the clients share and the server does not know; noise and flips come from a secret
of each client's own and from what they hide: told again, the same looks the same, and what has changed is blurred anew.
So each telling of something new adds to what is known, and over many the noise averages out. Between real parties the
clients agree on the one secret among themselves, and each draws the other. In a simulation all parties are one process,
and so that a run can be repeated both are derived from the run's seed; they are in no frame.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cutlayer.contracts import Batch, Example
from cutlayer.seeds import derive

Kind = Literal["labels", "lengths", "tokens", "features", "hash"]
BUCKETS = 64  # of the histogram of tokens
LENGTHS = 32  # classes of length: two for each doubling
COMMON_ROWS, COMMON_LENGTH = 64, 16  # of the common text whose mean feature is subtracted
ROUNDING = 1e-3  # by which the sum or the length of float32 numbers may miss 1


@dataclass(frozen=True)
class Sketch:
    """What a client tells.

    ``labels``: proportions of the classes [C]. ``lengths``: of its texts' lengths, two classes a doubling [32].
    ``tokens``: of its tokens, hashed into buckets [64]. ``features``: the mean over ``rows`` of its texts of what its
    head makes of them, pooled over tokens, less the same of a text that all clients have, of length 1 [H]. ``hash``:
    the signs of ``bits`` random projections of that feature, each flipped with probability ``flip`` [bits].
    ``noise`` is the scale of Laplace noise on each number (not of a hash), drawn at the client.
    """

    kind: Kind
    rows: int = 64
    bits: int = 256
    flip: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows is {self.rows}; it must be 1 or more")
        if self.bits < 8 or self.bits % 8:
            raise ValueError(f"bits is {self.bits}; it must be a multiple of 8")
        if not 0 <= self.flip < 0.5:
            raise ValueError(f"flip is {self.flip}; it must be at least 0 and below 0.5, where nothing is left")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise is {self.noise}; it must be 0 or more")

    @property
    def sees_head(self) -> bool:
        """Whether the sketch depends on what the client's head now is."""
        return self.kind in ("features", "hash")

    def shape(self, *, classes: int, hidden: int) -> tuple[int, ...]:
        """Of what is told, where the task has so many classes, and hidden states are of this size."""
        sizes = {"labels": classes, "lengths": LENGTHS, "tokens": BUCKETS, "features": hidden, "hash": self.bits // 8}
        return (sizes[self.kind],)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is told."""
        return torch.uint8 if self.kind == "hash" else torch.float32

    def possible(self, told: Tensor) -> bool:
        """Whether numbers of its shape and type can be such a sketch: proportions, or a vector of length 1 or 0."""
        if self.kind == "hash":
            return True
        if self.kind == "features":
            length = float(told.double().norm())
            return abs(length - 1) < ROUNDING or length == 0
        return bool((told >= 0).all()) and abs(float(told.double().sum()) - 1) < ROUNDING


@dataclass(frozen=True)
class Teller:
    """Makes one client's sketch, at the client.

    Args:
        sketch: what it agreed to tell.
        client: its name.
        examples: its training examples.
        collate: makes a batch of a few examples.
        classes: how many the task has; 0 for free text.
        vocabulary: how many tokens the model knows.
        seed: the run's.
        common: text that all clients have, in a simulation the run's evaluation data. Without any it is random tokens,
            drawn from the seed; what real texts have in common is then left in the features, and they look more alike
            than they are.
        shared: a secret of all clients, unknown to the server: of projections; None: they have agreed on none.
        own: a secret of this client: of noise and flips.
    """

    sketch: Sketch
    client: str
    examples: Sequence[Example]
    collate: Callable[[Sequence[Example]], Batch]
    classes: int
    vocabulary: int
    seed: int
    shared: int | None
    own: int
    common: Sequence[Example] = ()

    def tell(self, head: Callable[[Batch], Tensor]) -> Tensor:
        """The sketch: float32 numbers [D], or a hash's bits, packed [bits / 8].

        ``head`` gives the hidden states [B,T,H] of a batch.
        """
        kind = self.sketch.kind
        if kind == "hash":
            assert self.shared is not None  # or the client would not have taken its seat
            return torch.from_numpy(hashed(self._feature(head), self.sketch, shared=self.shared, own=self.own))
        if kind == "features":
            return torch.from_numpy(unit(self._blurred(self._feature(head))).astype(np.float32))
        counts = {"labels": self._labels, "lengths": self._lengths, "tokens": self._tokens}[kind]()
        mix = np.clip(self._blurred(counts / counts.sum()), 0, None)
        total = mix.sum()
        return torch.from_numpy((mix / total if total else np.full(mix.size, 1 / mix.size)).astype(np.float32))

    def _labels(self) -> np.ndarray:
        return np.bincount([int(e.label or 0) for e in self.examples], minlength=self.classes).astype(float)

    def _lengths(self) -> np.ndarray:
        classes = [min((len(e.input_ids) ** 2).bit_length() - 1, LENGTHS - 1) for e in self.examples]  # floor(2 log2)
        return np.bincount(classes, minlength=LENGTHS).astype(float)

    def _tokens(self) -> np.ndarray:
        ids = np.concatenate([np.asarray(e.input_ids, dtype=np.uint64) for e in self.examples])
        return np.bincount(bucket_of(ids), minlength=BUCKETS).astype(float)

    def _feature(self, head: Callable[[Batch], Tensor]) -> np.ndarray:
        """The mean pooled feature of its texts less that of the common one, of length 1."""
        common = self.common[:: max(1, len(self.common) // COMMON_ROWS)][:COMMON_ROWS] or self._random_text()
        own = self.examples[: self.sketch.rows]
        return unit(pooled_mean(own, self.collate, head) - pooled_mean(common, self.collate, head))

    def _random_text(self) -> list[Example]:
        draw = np.random.default_rng(derive("common text of sketches", self.seed))
        drawn = draw.integers(0, self.vocabulary, size=(COMMON_ROWS, COMMON_LENGTH)).tolist()
        return [
            Example(input_ids=ids, labels=None if self.classes else ids, label=0 if self.classes else None)
            for ids in drawn
        ]

    def _blurred(self, clean: np.ndarray) -> np.ndarray:
        """The values with noise: the same for the same values, and fresh for others, so that two do not cancel it."""
        if not self.sketch.noise:
            return clean
        draw = np.random.default_rng(derive("noise of sketches", self.own, digest(clean)))
        return clean + draw.laplace(scale=self.sketch.noise, size=clean.size)


def simulated_secrets(seed: int, client: str) -> tuple[int, int]:
    """The secret of all clients and one client's own, in a simulation; see the head of this module."""
    return derive("secret of the clients, in a simulation", seed), derive("secret of a client", seed, client)


def bucket_of(ids: np.ndarray) -> np.ndarray:
    """The bucket of each token, the same everywhere (multiplicative hashing)."""
    return ((ids.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(2**32) >> np.uint64(26)).astype(np.int64)


def pooled_mean(
    examples: Sequence[Example], collate: Callable[[Sequence[Example]], Batch], head: Callable[[Batch], Tensor]
) -> np.ndarray:
    """The mean over examples of the mean over their tokens of the hidden states [H], in float64."""
    rows = []
    for start in range(0, len(examples), 8):
        batch = collate(examples[start : start + 8])
        hidden = head(batch).detach().to("cpu", torch.float64)
        mask = torch.ones(hidden.shape[:2]) if batch.attention_mask is None else batch.attention_mask
        mask = mask.to(hidden.dtype)[..., None]
        rows.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
    return np.asarray(np.concatenate(rows).mean(0))


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length 1; nothing stays nothing."""
    length = np.linalg.norm(vector)
    return vector / length if length else vector


def hashed(feature: np.ndarray, sketch: Sketch, *, shared: int, own: int) -> np.ndarray:
    """The signs of the secret's projections of a feature [D], packed into bytes.

    The bits that ``flip`` turns are a client's own: the same each time for the same signs, and others for others, so
    that neither asking again nor asking of another head undoes it.
    """
    draw = np.random.default_rng(derive("projections", shared))
    signs = draw.standard_normal((sketch.bits, feature.size)) @ feature >= 0
    turns = np.random.default_rng(derive("flips", own, digest(signs)))
    return np.packbits(signs ^ (turns.random(sketch.bits) < sketch.flip))


def digest(clean: np.ndarray) -> str:
    """Of values as they are before they are blurred; equal values have one digest (0 and -0 too)."""
    return hashlib.sha256((clean + 0.0).tobytes()).hexdigest()


def as_told(sketch: Sketch, told: Tensor) -> np.ndarray:
    """What came, as numbers: a hash's bits as -1 and 1."""
    if sketch.kind == "hash":
        return np.unpackbits(told.numpy()).astype(np.float64) * 2 - 1
    return told.double().numpy()


def hash_similarity(first: np.ndarray, second: np.ndarray, *, flip: float = 0.0) -> float:
    """The cosine of two features, estimated from their hashes (-1 and 1).

    Bits agree as often as the angle allows: their mean product is 1 - 2 angle / pi, and flips shrink it by (1-2p)^2.
    """
    product = float(first @ second) / first.size / (1 - 2 * flip) ** 2
    return float(np.cos(np.pi * (1 - float(np.clip(product, -1, 1))) / 2))
