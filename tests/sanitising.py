"""Sanitisers on toy vocabularies and on real text, and who guesses the true tokens."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from cutlayer.audit.inverter import fit_means
from cutlayer.audit.public import PublicModel, load_public
from cutlayer.contracts import Defense, Example, Layout
from cutlayer.defense import Ground
from cutlayer.models.loading import load_tokenizer
from cutlayer.noise import Noise
from cutlayer.registry import create
from shared import shared

SPECIALS = (0, 1)
CUT = 2
SHARES = (0.9, 0.5, 0.1)  # of public random tokens that stay


def toy(tokens: int, width: int = 8, *, seed: int = 0, causal: bool = True, **changes: Any) -> Ground:
    """Public things of a vocabulary that lies in clusters, the first two tokens of which are special; no model."""
    draw = torch.Generator().manual_seed(seed)
    middles = torch.randn(5, width, generator=draw)
    embedding = middles[torch.arange(tokens) % 5] + torch.randn(tokens, width, generator=draw) * 0.4
    layout = Layout(range(1), range(1, 3), range(3, 3), tail_at_client=True)
    after = (torch.randn(tokens, tokens, generator=draw) * 2).log_softmax(-1)  # of a model of pairs
    found = Ground(
        layout, "causal" if causal else "classification", 16, head_trained=False, tail_trained=False,
        embedding=lambda: embedding, look=lambda ids: embedding[ids], pull=None, guess=lambda ids: after[ids],
        tokens_of=lambda text: (), measured=None, trunk_trained=lambda: True, classes=0, specials=SPECIALS, seed=0,
    )  # fmt: skip
    return replace(found, **changes)


def made(name: str, ground: Ground, **options: Any) -> Any:
    """A defense that is ready."""
    defense: Defense = create("defense", name, options)
    defense.prepare(ground)
    return defense


def sanitised(defense: Defense, rows: Sequence[Sequence[int]], secret: bytes = b"a client's") -> list[list[int]]:
    """Texts with other tokens."""
    return [
        list(defense.example(Example(row, row), Noise(secret, number, covers=[torch.tensor(row)])).input_ids)
        for number, row in enumerate(rows)
    ]


def frequencies(defense: Defense, token: int, draws: int = 20_000) -> np.ndarray:
    """How often a token became each other one."""
    return np.bincount(sanitised(defense, [[token] * draws])[0], minlength=2)


def fits(counts: np.ndarray, shares: Tensor) -> float:
    """The p-value of counts under these shares; outcomes that are expected less than 5 times are one."""
    expected = shares.double().numpy() * counts.sum()
    seen = np.zeros(len(expected))
    seen[: len(counts)] = counts
    rare = expected < 5
    if rare.any():
        seen, expected = np.append(seen[~rare], seen[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert not seen[~keep].any(), "what is impossible was drawn"
    return float(stats.chisquare(seen[keep], expected[keep] * (seen[keep].sum() / expected[keep].sum())).pvalue)


def odds(shares: Tensor) -> Tensor:
    """The largest log-ratio [N,N] of any output's chance under two inputs, of chances [N,V]."""
    logs = shares.double().log()
    apart = logs[:, None] - logs[None]
    return torch.where(apart.isnan(), 0.0, apart).amax(-1)  # what is impossible under both tells nothing


# -- a real model and real text


@lru_cache
def real() -> PublicModel:
    """The small pretrained Llama."""
    return load_public(str(shared("models/llama-tiny-wt2")))


@lru_cache
def real_ground() -> Ground:
    """What is public where a client holds its first two blocks."""
    public = real()
    embedding = public.embedding
    layout = Layout(range(CUT), range(CUT, 8), range(8, 8), tail_at_client=True)

    def guess(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return public.run_tail(8, public.run_head(CUT, ids))

    return Ground(
        layout, "causal", 128, head_trained=False, tail_trained=False, embedding=lambda: embedding,
        look=lambda ids: public.run_head(CUT, ids), pull=None, guess=guess,
        tokens_of=lambda text: (), measured=None, trunk_trained=lambda: True, classes=0,
        specials=SPECIALS, seed=0,
    )  # fmt: skip


@lru_cache
def real_texts(name: str = "valid", count: int = 16, length: int = 128) -> list[list[int]]:
    """Rows of WikiText-2."""
    with gzip.open(shared(f"data/wikitext-2/{name}.txt.gz"), "rt", encoding="utf-8") as file:
        ids = load_tokenizer(str(shared("models/llama-tiny-wt2")))(file.read(12 * count * length), verbose=False)
    return [ids["input_ids"][at : at + length] for at in range(0, count * length, length)]


def loss(rows: Sequence[Sequence[int]]) -> float:
    """The public model's loss on texts."""
    ids = torch.tensor(rows)
    found = real().next_token(ids)[:, :-1].gather(2, ids[:, 1:, None])
    return -float(found.mean())


def share(rows: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> float:
    """The share of positions where two lists of texts are the same."""
    return float((torch.tensor(rows) == torch.tensor(others)).double().mean())


def at_share(
    name: str, ground: Ground, rows: Sequence[Sequence[int]], stays: float
) -> tuple[Any, list[list[int]]]:  # fmt: skip
    """A defense of which this share of texts stays (within two hundredths), and what it makes of them."""
    low, high = 1.0, 150.0  # of epsilon
    for _ in range(20):
        middle = (low * high) ** 0.5
        defense = made(name, ground, epsilon=middle)
        fed = sanitised(defense, rows)
        found = share(rows, fed)
        if abs(found - stays) < 0.02:
            return defense, fed
        low, high = (middle, high) if found < stays else (low, middle)
    raise AssertionError(f"no strength of {name} leaves {stays} as it is")


def inverted(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens that a linear inverter, fitted on the public head alone, reads in what the head makes of texts."""
    public = real()
    inverter = fit_means(public, CUT, torch.Generator().manual_seed(0))
    hidden = public.run_head(CUT, torch.tensor(rows))
    return inverter.nearest(hidden.flatten(0, 1), 1).view(len(rows), -1).tolist()


def informed(defense: Defense, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The guesses of one who reads the tokens that were fed and has sanitised public text with a secret of its own."""
    public = real_texts("test", 200)
    size = len(real().embedding)
    seen = torch.zeros(size * size, dtype=torch.int32)
    for text, other in zip(public, sanitised(defense, public, b"the attacker's"), strict=True):
        seen.index_add_(0, torch.tensor(other) * size + torch.tensor(text), torch.ones(len(text), dtype=torch.int32))
    counts = seen.view(size, size)
    best = torch.where(counts.sum(1) > 0, counts.argmax(1), torch.arange(size))
    return best[torch.tensor(rows)].tolist()
