"""Distance correlation of two samples (Székely et al. 2007), and its unbiased form (Székely and Rizzo 2014)."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-9


def distances(points: Tensor) -> Tensor:
    """Distances [n,n] of points [n,d]; where two are the same the gradient is 0 and not NaN."""
    squares = points.square().sum(1)
    squared = squares[:, None] + squares[None, :] - 2 * points @ points.T
    apart = squared > TINY * squares.max()
    return torch.where(apart, squared.where(apart, torch.ones_like(squared)).sqrt(), torch.zeros_like(squared))


def squared_correlation(x: Tensor, z: Tensor) -> Tensor:
    """The square of the distance correlation of x [n,d] and z [n,e], in [0, 1].

    It tends to 1 as the dimensions grow at the same n, whatever x and z have to do with each other.
    """
    a, b = _centred(distances(x)), _centred(distances(z))
    return torch.relu((a * b).mean()) / ((a * a).mean() * (b * b).mean() + TINY**2).sqrt()


def unbiased_correlation(x: Tensor, z: Tensor) -> Tensor:
    """The bias-corrected form of the square, about 0 for independent samples of any dimension; to report."""
    a, b = _u_centred(distances(x)), _u_centred(distances(z))
    return (a * b).sum() / ((a * a).sum() * (b * b).sum() + TINY**2).sqrt()


def _centred(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def _u_centred(matrix: Tensor) -> Tensor:
    n = len(matrix)
    rows = matrix.sum(0, keepdim=True) / (n - 2)
    found = matrix - rows - rows.T + matrix.sum() / ((n - 1) * (n - 2))
    return found - torch.diag(found.diagonal())
