"""Who takes part in a round, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.seeds import derive

if TYPE_CHECKING:
    from cutlayer.driver import Run

ORDERS = ("random", "listed")


def check_options(local_steps: int, participation: float) -> None:
    """Raise ValueError for what no framework can do."""
    if local_steps < 1:
        raise ValueError(f"local_steps is {local_steps}; it must be 1 or more")
    if not 0 < participation <= 1:
        raise ValueError(f"participation is {participation}; it must be above 0 and at most 1")


def cohort(run: Run, number: int, participation: float) -> list[str]:
    """The clients of a round that have steps left: ``participation`` of those selected, drawn from the seed."""
    chosen = list(run.selection.pick(number, [client for client in run.clients if run.steps_left(client)]))
    if participation < 1:
        count = max(1, math.ceil(participation * len(chosen)))
        draw = np.random.default_rng(derive(run.seed, "participation", number))
        taken = set(draw.choice(len(chosen), size=count, replace=False).tolist())
        chosen = [client for i, client in enumerate(chosen) if i in taken]
    return chosen


def ordered(run: Run, clients: Sequence[str], order: str, *key: object) -> list[str]:
    """``clients`` as listed, or in a permutation drawn from the seed and ``key``."""
    if order == "listed":
        return list(clients)
    draw = np.random.default_rng(derive(run.seed, "order", *key))
    return [clients[i] for i in draw.permutation(len(clients))]
