"""Randomised response: labels that are kept with a known probability, or become another of a few. Shape: N labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cutlayer.noise import Noise


def kept_with(epsilon: float, classes: int) -> float:
    """The probability with which a label among so many is kept."""
    return 1 / (1 + (classes - 1) * math.exp(-epsilon))


def flipped(labels: Tensor, classes: int, epsilon: float, noise: Noise) -> Tensor:
    """Labels [N], each kept or any other of so many classes."""
    keep = torch.from_numpy(noise.uniform(len(labels))) < kept_with(epsilon, classes)
    other = noise.choice(torch.ones(len(labels), classes - 1))
    other = other + (other >= labels)
    return torch.where(keep, labels, other)


def with_prior(labels: Tensor, prior: Tensor, epsilon: float, most: int, noise: Noise) -> Tensor:
    """Labels [N] by RR within the tokens that a prior [N,V] finds likeliest: as many (to ``most``) as serve it best."""
    shares, tokens = prior.topk(min(most, prior.shape[1]), dim=-1)
    sizes = torch.arange(1, shares.shape[1] + 1)
    worth = torch.tensor([kept_with(epsilon, int(k)) for k in sizes]) * shares.cumsum(-1)
    best = worth.argmax(-1) + 1  # [N]: how many candidates each position has
    inside = sizes[None] <= best[:, None]
    place = ((tokens == labels[:, None]) & inside).float()
    there = place.any(-1)
    uniform = inside.float()
    keep = torch.where(best > 1, torch.tensor([kept_with(epsilon, int(k)) for k in best]), torch.ones(()))
    others = (uniform - place) / (best - 1).clamp(min=1)[:, None]
    weights = torch.where(there[:, None], keep[:, None] * place + (1 - keep)[:, None] * others, uniform / best[:, None])
    chosen = noise.choice(weights)
    return tokens.gather(1, chosen[:, None])[:, 0]
