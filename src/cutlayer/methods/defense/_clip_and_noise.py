"""Clip and noise: the Gaussian mechanism on what a client shows, and what it guarantees."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clip_and_noise(hidden: Tensor, *, clip: float, sigma: float, generator: torch.Generator) -> Tensor:
    """Hidden states [...,H] with every vector clipped to norm ``clip``, and noise of deviation 2 * clip * sigma.

    Replacing one vector moves it by at most 2 * clip, so ``sigma`` is the noise multiplier of that sensitivity. The
    result is on the graph of ``hidden``; the noise is no part of it.

    Args:
        hidden: what would be shown.
        clip: the largest norm of a vector.
        sigma: the noise multiplier; 0 clips only, and guarantees nothing.
        generator: seeded from a secret of the client, never from the run's seed, which others know.
    """
    norm = torch.linalg.vector_norm(hidden.float(), dim=-1, keepdim=True)
    clipped: Tensor = hidden * (clip / norm.clamp(min=clip)).to(hidden.dtype)
    if not sigma:
        return clipped
    noise = torch.randn(hidden.shape, generator=generator, device=generator.device) * (2 * clip * sigma)
    return clipped + noise.to(clipped)


def epsilon(sigma: float, *, delta: float, releases: int) -> float:
    """The epsilon at ``delta`` of so many released vectors about one token, each with noise multiplier ``sigma``.

    By zero-concentrated privacy (Bun and Steinke, arXiv:1605.02658): each release costs rho = 1 / (2 sigma^2), they
    add up, and epsilon = rho + 2 sqrt(rho ln(1 / delta)). Infinite without noise.
    """
    if not sigma:
        return math.inf
    rho = releases / (2 * sigma**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
