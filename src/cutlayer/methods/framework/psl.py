"""All clients at once against one trunk, which makes one update a step; the clients' parts are never averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cutlayer.contracts import Framework
from cutlayer.methods.framework._cohort import check_options, cohort
from cutlayer.methods.framework._pool import joint_step
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run


@method("framework", paper="Jeon and Kim, ICOIN 2020; Lin et al. (EPSL), arXiv:2303.15991")
@dataclass(frozen=True)
class PSL(Framework):
    """Clients in parallel, one joint update of the trunk a step, heads that stay with their clients.

    The joint batch is made by gradient accumulation over the clients: the same sum as a concatenated batch, as language
    models have no batch statistics, with one client's graph in memory at a time.

    ``grad_scale`` is what a client's part is trained with: the gradient of its own mean loss (``local``), or its part
    of the joint loss's gradient (``joint``), which is smaller by its share.
    """

    local_steps: int = 1  # optimizer steps of a client in a round
    participation: float = 1.0  # the share of the clients that a round takes
    weight_by: Literal["tokens", "examples", "uniform"] = "tokens"  # a client's share of the joint loss
    grad_scale: Literal["local", "joint"] = "local"  # a client's part: its own mean loss, or its part of the joint one

    pooled: ClassVar[bool] = True
    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)

    async def round(self, run: Run, number: int) -> None:
        """Joint steps, and no merge."""
        clients = cohort(run, number, self.participation)
        for _ in range(self.local_steps):
            if able := [client for client in clients if run.steps_left(client)]:
                await joint_step(run, able, self.weight_by, joint_heads=self.grad_scale == "joint")

    def evaluators(self, run: Run) -> Sequence[str]:
        """All: each has a model of its own."""
        return run.clients
