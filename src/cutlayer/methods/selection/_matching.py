"""Matching of data clients with helpers, by a cost [A,U] of each pair."""

from __future__ import annotations

import numpy as np


def greedy(cost: np.ndarray, slowness: np.ndarray) -> list[int]:
    """The helper of each data client: the slowest chooses first, the cheapest that is left."""
    chosen, free = [0] * len(cost), set(range(cost.shape[1]))
    for row in np.argsort(-slowness, kind="stable").tolist():
        chosen[row] = min(free, key=lambda helper: (cost[row, helper], helper))
        free.remove(chosen[row])
    return chosen


def least_sum(cost: np.ndarray) -> list[int]:
    """The helper of each data client, so that the sum of costs is least (Hungarian method)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost)
    return [int(columns[row]) for row in np.argsort(rows)]


def least_maximum(cost: np.ndarray) -> list[int]:
    """The helper of each data client, so that the dearest pair is as cheap as can be; of these, the least sum."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import maximum_bipartite_matching

    steps = np.unique(cost)
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        matched = maximum_bipartite_matching(csr_matrix(cost <= steps[middle]), perm_type="column")
        low, high = (low, middle) if (matched >= 0).all() else (middle + 1, high)
    dear = cost.sum() + 1.0
    return least_sum(np.where(cost <= steps[low], cost, dear))
