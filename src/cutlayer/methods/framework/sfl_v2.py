"""One trunk for all: clients run their heads in parallel, the server serves them one after another, heads are averaged.

The trunk is updated after each client and never averaged; the clients' parts (head, and tail in the U-shape) are
merged at the end of the round. Each client's optimizer state stays with it.

A merge is of the clients of its round. So with ``epochs`` of unequal data a client that has made its own steps is in no
later merge, like one that was not drawn: what it taught stays only in what the others go on from. ``rounds`` keeps
everybody to the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cutlayer.clock import Turnstile
from cutlayer.contracts import SERVER, SHARED, Framework, Layout, Stop
from cutlayer.methods.framework._cohort import check_options, cohort, newest, ordered
from cutlayer.methods.framework._turn import Turn
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.arrangement import Arrangement
    from cutlayer.driver import Run


@method("framework", paper="Thapa et al., arXiv:2004.12088")
@dataclass(frozen=True)
class SFLV2(Framework):
    """Heads in parallel, one trunk that serves the clients in turn, heads averaged each round.

    Where the selection makes clusters with models of their own (``csfl``), each has a trunk and averages its own heads.
    """

    replans: ClassVar[bool] = True

    local_steps: int = 1  # optimizer steps of a client in a round
    participation: float = 1.0  # the share of the clients that a round takes
    order: Literal["random", "listed"] = "random"  # random: a new permutation, from the seed, each time
    interleave: Literal["step", "client"] = "step"  # client: all local steps of a client in one turn

    takes = ("clusters",)

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)

    def rerouted(self, arrangement: Arrangement, layouts: Mapping[str, Layout]) -> Mapping[str, Sequence[Stop]]:
        """To the trunk of the cluster, or to that of all."""
        clusters = arrangement.clusters
        return {c: [Stop(SERVER, clusters.get(c, SHARED), layout.middle)] for c, layout in layouts.items()}

    async def round(self, run: Run, number: int) -> None:
        """Local steps in turns, then one merge."""
        clients = cohort(run, number, self.participation)
        await run.catch_up(clients)  # those that the last merge left out
        if self.interleave == "client":
            for client in ordered(run, clients, self.order, number):
                for _ in range(min(self.local_steps, run.steps_left(client))):
                    await run.step(client)
        else:
            for local in range(self.local_steps):
                able = [client for client in clients if run.steps_left(client)]
                turnstile = Turnstile(ordered(run, able, self.order, number, local), run.clock)
                async with asyncio.TaskGroup() as together:
                    for client in able:
                        together.create_task(self._turn(run, client, turnstile), name=client)
        await run.merge(clients)

    async def _turn(self, run: Run, client: str, turnstile: Turnstile) -> None:
        try:
            await run.step(client, wrap=lambda stop: Turn(stop, turnstile, client, hold=run.clips))
        finally:
            turnstile.leave(client)

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any one client of the last merge: after it they hold the same."""
        return [newest(run)]
