"""Who takes part in a round, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.cohorts import drawn
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
    able = [client for client in run.eligible(number) if run.steps_left(client)]
    return drawn(run.selection, able, number, participation, run.seed, size=run.framework.cohort_size)


def ordered(run: Run, clients: Sequence[str], order: str, *key: object) -> list[str]:
    """``clients`` as listed, or in a permutation drawn from the seed and ``key``."""
    if order == "listed":
        return list(clients)
    draw = np.random.default_rng(derive(run.seed, "order", *key))
    return [clients[i] for i in draw.permutation(len(clients))]


async def local_steps(run: Run, client: str, count: int) -> None:
    """``count`` optimizer steps of a client (or as many as a selection says), or as many as it has left."""
    count = run.arrangement.steps.get(client, count)
    for _ in range(min(count, run.steps_left(client))):
        await run.step(client)


def newest(run: Run) -> str:
    """A client that has the last merge; where ranks are unequal, that of those which cuts least of it off.

    Of several, one whose blocks are run by clients that are there.
    """

    def there(client: str) -> bool:
        return not run.presence.away.intersection(run.presence.hosts(client))

    return max(
        run.present or run.clients,
        key=lambda client: (run.counters.merged.get(client, 0), run.adapted(client), there(client)),
    )
