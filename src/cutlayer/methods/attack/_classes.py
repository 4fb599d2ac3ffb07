"""What the attacks on classes share: groups of numbers, and distances to the samples whose label is known.

Shapes: N samples, H hidden size, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor

TINY = 1e-30


def unit(vectors: Tensor) -> Tensor:
    """Vectors [N,H] of length 1."""
    found: Tensor = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(TINY)
    return found


def standardised(states: Tensor) -> Tensor:
    """States [N,H] with mean 0 and variance 1 in each channel."""
    return (states - states.mean(0)) / states.std(0).clamp_min(1e-12)


def upper(values: Tensor) -> Tensor:
    """Which of numbers [N] are in the higher of two groups, by 2-means."""
    found = groups(values[:, None], 2, seed=0)
    if int(found.max()) == 0:
        return torch.zeros(len(values), dtype=torch.bool)
    return found == int(values[found == 1].mean() > values[found == 0].mean())


def above(scores: Tensor, share: float) -> Tensor:
    """Which of scores [N] are higher than the widest gap near the quantile that about so large a share lies above."""
    ordered = scores.sort().values
    count = len(ordered)
    start = max(0, round(count * (1 - 2 * share)) - 1)
    stop = max(start + 1, min(count - 1, round(count * (1 - share / 2))))
    gaps = ordered[start + 1 : stop + 1] - ordered[start:stop]
    if not len(gaps):
        return torch.zeros(count, dtype=torch.bool)
    return scores > ordered[start + int(gaps.argmax())]


def groups(vectors: Tensor, count: int, *, seed: int) -> Tensor:
    """The group [N] of each vector [N,H] by k-means, with ten k-means++ starts."""
    numbers = vectors.double().numpy()
    count = min(count, len(np.unique(numbers, axis=0)))
    made = KMeans(count, n_init=10, random_state=seed).fit(numbers)
    return torch.from_numpy(made.labels_).long()


def to_classes(vectors: Tensor, known: Tensor, classes: Sequence[int]) -> Tensor:
    """The mean distance [N,K] of vectors [N,H] to the known ones of each class; infinite where none is known."""
    apart = [
        torch.cdist(vectors, vectors[known == label]).mean(1)
        if bool((known == label).any())
        else torch.full((len(vectors),), torch.inf)
        for label in classes
    ]
    return torch.stack(apart, 1)


def matched(costs: Tensor) -> Tensor:
    """The column of each row [K] by the cheapest one-to-one assignment of costs [K,K']; -1 where none is left."""
    finite = torch.where(costs.isfinite(), costs, torch.full_like(costs, 1e6))
    rows, columns = linear_sum_assignment(finite.numpy())
    found = torch.full((len(costs),), -1)
    found[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return found
