"""A trunk for each client: pairs train in parallel like whole models, and all of it is averaged each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cutlayer.contracts import Framework
from cutlayer.methods.framework._cohort import check_options, cohort, local_steps, newest
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run


@method("framework", paper="Thapa et al., arXiv:2004.12088")
@dataclass(frozen=True)
class SFLV1(Framework):
    """Each client trains with a trunk of its own; heads and trunks are averaged at the end of the round.

    That is FedAvg of the whole model. Trunk copies are adapters on one frozen base. With LoRA the factors A and B are
    averaged, which is not the average of their products (published practice; an aggregator may do better). Where the
    selection makes clusters with models of their own (``csfl``), each cluster is averaged by itself.
    """

    replans: ClassVar[bool] = True
    merges = True

    local_steps: int = 1  # optimizer steps of a client in a round
    participation: float = 1.0  # the share of the clients that a round takes
    moments: Literal["keep", "average", "reset"] = "average"  # of the trunks' optimizers, when they are merged

    joinable: ClassVar[bool] = True
    takes = ("clusters",)

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)

    def slots(self, clients: Sequence[str]) -> Mapping[str, str]:
        """One for each."""
        return {client: client for client in clients}

    async def round(self, run: Run, number: int) -> None:
        """Local steps of all at once, then one merge of everything."""
        clients = cohort(run, number, self.participation)
        await run.catch_up(clients, trunks=True)
        await run.together(lambda client: local_steps(run, client, self.local_steps), clients)
        await run.merge(clients, trunks=True, moments=self.moments)

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any one client of the last merge: after it they hold the same."""
        return [newest(run)]
