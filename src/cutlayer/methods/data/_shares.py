"""What the divisions by drawn shares share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cutlayer.errors import DataError


def draw(generator: np.random.Generator, concentrations: np.ndarray | Sequence[float], *, size: int) -> np.ndarray:
    """Draws of shares from a Dirichlet distribution, a row each.

    NumPy returns no shares for concentrations that vanish or overflow; within these bounds they mean the same.
    """
    return generator.dirichlet(np.clip(concentrations, 1e-300, 1e300), size=size)


def cut(members: Sequence[int], share: np.ndarray) -> list[list[int]]:
    """``members`` in consecutive parts whose sizes follow ``share``; rounding down each border loses no row."""
    borders = [0, *(np.cumsum(share)[:-1] * len(members)).astype(int).tolist(), len(members)]
    return [list(members[start:end]) for start, end in pairwise(borders)]


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to ``total`` in the proportions of ``shares``: rounded down, largest remainders first."""
    exact = total * (shares / shares.sum())
    whole: np.ndarray = np.floor(exact).astype(int)
    first = np.argsort(whole - exact, kind="stable")
    whole[first[: total - int(whole.sum())]] += 1
    return whole


def check_alpha(alpha: float) -> None:
    """Refuse by ValueError what is no concentration; infinity is one."""
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be above 0 (.inf for equal shares).")


def check_enough(rows: int, clients: int, least: int) -> None:
    """Refuse by DataError rows that cannot give each client ``least``."""
    if rows < clients * least:
        raise DataError(
            f"{rows} rows are too few for {clients} clients with at least {least} each. "
            "Add rows, lower min_examples, or take fewer clients."
        )


def rationed(wishes: np.ndarray, there: np.ndarray, size: int) -> np.ndarray:
    """How many rows each client (row) takes of each class (column), so that no class gives more than it has.

    A class that is asked for more is rationed in proportion; those who got too little ask the others, by their wishes.

    Args:
        wishes: each client's shares of the classes.
        there: the rows of each class; enough for all.
        size: the rows of each client.
    """
    taken = np.zeros(wishes.shape, dtype=int)
    while (taken.sum(axis=1) < size).any():
        left = there - taken.sum(axis=0)  # each pass ends with all served, or with one more class at its end
        asked = np.zeros_like(taken)
        for client, wish in enumerate(wishes):
            open_to_it = np.where(left > 0, wish, 0.0)
            share = open_to_it if open_to_it.sum() > 0 else left.astype(float)
            asked[client] = apportion(size - int(taken[client].sum()), share)
        for number, column in enumerate(asked.T):
            taken[:, number] += column if column.sum() <= left[number] else apportion(int(left[number]), column)
    return taken
