"""Who takes part in a round: what the selection picks, and of these the share that the framework asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.arrangement import Arranger
from cutlayer.contracts import Framework, Selection
from cutlayer.seeds import derive

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.presence import Presence

FORESEEN = 10_000  # rounds that are drawn ahead


def runs_on(config: RunConfig) -> bool:
    """Whether the virtual clock says how many steps a client makes in a round, so that nobody knows it before."""
    timed = config.profile is not None or any(client.profile is not None for client in config.client_list)
    return timed and config.length[0] == "rounds" and bool(config.build("framework").asynchronous)


def drawn(
    selection: Selection, able: Sequence[str], number: int, participation: float, seed: int, *, size: int | None = None
) -> list[str]:
    """``participation`` of those of ``able`` that the selection picks for round ``number``, drawn from the seed.

    ``size`` says how many, in place of a share.
    """
    chosen = list(selection.pick(number, able))
    count = max(1, math.ceil(participation * len(chosen))) if size is None else size
    if count < len(chosen):
        draw = np.random.default_rng(derive(seed, "participation", number))
        taken = set(draw.choice(len(chosen), size=count, replace=False).tolist())
        chosen = [client for i, client in enumerate(chosen) if i in taken]
    return chosen


def foreseen(
    framework: Framework,
    selection: Selection,
    clients: Sequence[str],
    rounds: int,
    seed: int,
    presence: Presence | None = None,
) -> dict[str, int]:
    """In how many of ``rounds`` rounds each client will take part: a schedule ends where the run does.

    Of a run of more than ``FORESEEN`` rounds that many are drawn, and the rest is taken to be alike.
    """
    count = dict.fromkeys(clients, 0)
    ahead = min(rounds, FORESEEN)
    for number in range(ahead):
        able = framework.eligible(number, clients)
        able = able if presence is None else presence.able(able, number)
        for client in drawn(selection, able, number, framework.participation, seed, size=framework.cohort_size):
            count[client] += 1
    share = selection.share(len(clients)) if isinstance(selection, Arranger) else 1.0
    return {client: round(times * rounds * share / ahead) for client, times in count.items()}
