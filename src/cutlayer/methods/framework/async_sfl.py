"""Clients run on without waiting: each uploads its copy when it is ready, and goes on with the newest model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cutlayer.clock import Queue
from cutlayer.contracts import SHARED, Framework, Layout
from cutlayer.errors import MethodError
from cutlayer.methods.framework._cohort import check_options, cohort, newest
from cutlayer.methods.framework._desk import Desk
from cutlayer.methods.framework._turn import Turn
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run


@method(
    "framework",
    paper="ours, for aggregators after the survey, arXiv:2604.24468 (4.4), and SFL-LEO, arXiv:2504.13479",
    needs=("an asynchronous aggregator: dt-asfl, sfl-leo or safsl-window",),
)
@dataclass(frozen=True)
class AsyncSFL(Framework):
    """Split federated learning without a common round: a fast client makes more steps, a slow one holds nobody up.

    A client makes its local steps, uploads its copy with the version that it started from, and goes on with the model
    as it is after its merge. When merges are due and what an upload weighs is the aggregator's: ``dt-asfl``,
    ``sfl-leo`` and ``safsl-window`` ask for clients that run on, and describe no more of a framework than that. What is
    ours:

    - ``trunk: own`` gives each client a trunk of its own at the server, uploaded with its part, as in SFL-V1.
      ``shared`` has one trunk for all, as in SFL-V2, to which the server admits one step at a time in order of arrival;
      only the clients' parts are uploaded then.
    - A round is a period: it lasts until the slowest client has made ``uploads`` of them. Nobody begins another then;
      who is in the middle of one ends it, and the merges of the period are over. So the model can be evaluated and
      saved, and the period is a part of what the run computes: a longer one lets clients run on for longer. A client
      waits at a period's end for those who end theirs, at most for one upload of each.
    - The order of events follows the virtual clock. Without a profile no time passes, and everybody makes exactly
      ``uploads`` of them.

    A client that is lost in the middle keeps its copy, with the version that it started from. When it is back it makes
    the rest of its local steps, and uploads then.

    ``steps`` and ``epochs`` count for each client, so the slow ones go on when the fast have ended.
    """

    local_steps: int = 1  # optimizer steps of a client between two uploads
    uploads: int = 1  # of the slowest client in a round
    participation: float = 1.0  # the share of the clients that a round takes
    trunk: Literal["own", "shared"] = "own"  # a trunk for each client, merged; or one for all
    moments: Literal["keep", "reset"] = "keep"  # of an own trunk's optimizer, when its client takes the new model

    asynchronous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)
        if self.uploads < 1:
            raise ValueError(f"uploads is {self.uploads}; it must be 1 or more")
        if self.trunk == "shared" and self.moments == "reset":
            raise ValueError("moments is reset, but a shared trunk is never merged; take trunk: own, or leave it out")

    @property
    def round_steps(self) -> int:
        """The local steps of each of its uploads."""
        return self.local_steps * self.uploads

    def layouts(
        self, given: Mapping[str, Layout], num_blocks: int, speeds: Mapping[str, float] | None
    ) -> Mapping[str, Layout]:
        """As given.

        Raises:
            MethodError: a block is in the shared trunk and in a client's part.
        """
        if self.trunk == "shared" and len(set(given.values())) > 1:
            raise MethodError(
                "framework 'async-sfl': with different cuts a block would be in the shared trunk and in a client's "
                "part, and the one cannot be merged while others train it. Give all the same cut, or take trunk: own."
            )
        return given

    def slots(self, clients: Sequence[str]) -> Mapping[str, str]:
        """One for each, or one for all."""
        return {client: client if self.trunk == "own" else SHARED for client in clients}

    async def round(self, run: Run, number: int) -> None:
        """One period: everybody trains and uploads until the slowest has made its uploads."""
        clients = cohort(run, number, self.participation)
        desk = Desk(run, clients, trunks=self.trunk == "own", quota=self.uploads)
        turns = run.clock.queue("the trunk") if self.trunk == "shared" else None
        await run.catch_up([c for c in clients if c not in run.counters.unfinished], trunks=desk.trunks)
        await desk.open(lambda client: self._run_on(run, client, desk, turns))

    async def _run_on(self, run: Run, client: str, desk: Desk, turns: Queue | None) -> None:
        """Local steps and an upload, again and again."""
        wrap = None if turns is None else (lambda stop: Turn(stop, turns, client, hold=run.clips))
        while run.steps_left(client) and not desk.over:
            begun = run.counters.unfinished.pop(client, 0)
            for made in range(begun, min(self.local_steps, begun + run.steps_left(client))):
                if await run.step(client, wrap=wrap) is None:
                    run.counters.unfinished[client] = made
                    return
            await desk.exchange(client)
            if self.moments == "reset":
                for slot in run.slots_of([client]):
                    slot.reset_optimizer()

    def evaluators(self, run: Run) -> Sequence[str]:
        """The client of the last merge: it has the newest model."""
        return [newest(run)]
