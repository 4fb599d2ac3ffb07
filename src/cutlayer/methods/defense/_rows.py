"""Norms of records, and what is taken from what is public to measure them by. Shapes: B rows, T positions, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlayer.defense import Ground
from cutlayer.seeds import derive

TEXTS, BATCH = 32, 8  # random texts that norms are taken on


def public_texts(ground: Ground) -> list[Tensor]:
    """Random tokens [B,T]: nothing of a client's is in them."""
    vocabulary = len(ground.embedding())
    generator = torch.Generator().manual_seed(derive("public norms", ground.seed))
    allowed = [token for token in range(vocabulary) if token not in set(ground.specials)]
    table = torch.tensor(allowed)
    found = []
    for _ in range(TEXTS // BATCH):
        found.append(table[torch.randint(len(allowed), (BATCH, ground.length), generator=generator)])
    return found


def public_states(ground: Ground) -> list[Tensor]:
    """Hidden states [B,T,H] of random tokens, as the public head makes them."""
    return [ground.look(ids).float() for ids in public_texts(ground)]


def row_norms(values: Tensor, real: Tensor, order: float = 2.0) -> Tensor:
    """The norm [B] of each record of values [B,T,H], over its real positions [B,T]."""
    kept = values.float() * real[..., None].to(values.device)
    found: Tensor = torch.linalg.vector_norm(kept.flatten(1), order, dim=1)
    return found


def clipped(values: Tensor, real: Tensor, most: float | None, order: float = 2.0) -> Tensor:
    """Records [B,T,H] whose norm is cut to ``most`` (None: left); padded positions, which may tell of others, are 0."""
    kept = values.masked_fill(~real[..., None], 0.0)
    if most is None:
        return kept
    norms = row_norms(values, real, order).clamp(min=1e-30)
    return kept * (most / norms).clamp(max=1.0).to(values)[:, None, None]
