"""Clients take turns with one trunk, and hand the client's part on: one live copy of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cutlayer.contracts import Framework
from cutlayer.methods.framework._cohort import check_options, cohort, ordered
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run


@method("framework", paper="Gupta and Raskar, arXiv:1810.06060; Vepakomma et al., arXiv:1812.00564")
@dataclass(frozen=True)
class SequentialSL(Framework):
    """Clients take turns with one trunk; each hands its part of the model on to the next."""

    local_steps: int = 1  # optimizer steps of a client in its turn
    participation: float = 1.0  # the share of the clients that a round takes
    order: Literal["random", "listed"] = "listed"  # random: a new permutation, from the seed, each round
    optimizer_state: Literal["travel", "reset"] = "travel"  # whether the moments go along

    travels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)

    @property
    def optimizer_travels(self) -> bool:
        """As the option says."""
        return self.optimizer_state == "travel"

    async def round(self, run: Run, number: int) -> None:
        """One turn of every client of the cohort."""
        for client in ordered(run, cohort(run, number, self.participation), self.order, number):
            await run.hand_over(run.holder(), client, optimizer=self.optimizer_state == "travel")
            for _ in range(min(self.local_steps, run.steps_left(client))):
                await run.step(client)

    def evaluators(self, run: Run) -> Sequence[str]:
        """The client that has the live copy."""
        return [run.holder()]
