"""All clients at once against one trunk, which makes one update a step; the clients' parts are never averaged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cutlayer.contracts import Framework, Layout
from cutlayer.errors import MethodError
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
    models have no batch statistics, with one client's graph in memory at a time. ``joint: concatenate`` makes the real
    batch, padded to its longest row, for as many clients as the trunk's memory allows; it needs the same cut for all.
    The two differ by rounding, and with dropout by the masks: those of the joint batch are drawn for it as a whole.

    ``grad_scale`` is what a client's part is trained with: the gradient of its own mean loss (``local``), or its part
    of the joint loss's gradient (``joint``), which is smaller by its share.
    """

    local_steps: int = 1  # optimizer steps of a client in a round
    participation: float = 1.0  # the share of the clients that a round takes
    weight_by: Literal["tokens", "examples", "uniform"] = "tokens"  # a client's share of the joint loss
    grad_scale: Literal["local", "joint"] = "local"  # a client's part: its own mean loss, or its part of the joint one
    joint: Literal["accumulate", "concatenate"] = "accumulate"  # the joint batch: client after client, or as one batch

    pooled = True
    personal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)

    @property
    def needs_step_tokens(self) -> bool:
        """The weights of a real joint batch must be known before its backward."""
        return self.joint == "concatenate"

    @property
    def asks(self) -> Collection[str]:
        """An update of each part, where what scales it is known after the step of all."""
        return ("update",) if self.grad_scale == "joint" else ()

    def layouts(
        self, given: Mapping[str, Layout], num_blocks: int, speeds: Mapping[str, float] | None
    ) -> Mapping[str, Layout]:
        """As the partition has them.

        Raises:
            MethodError: cuts differ, so that there is no one trunk for a concatenated batch.
        """
        first = next(iter(given))
        other = next((name for name in given if given[name] != given[first]), None)
        if self.joint == "concatenate" and other is not None:
            raise MethodError(
                f"framework 'psl': '{first}' and '{other}' have different cuts, so their batches cannot be "
                "concatenated at one. Give all the same head_blocks and tail_blocks, or take joint: accumulate."
            )
        return given

    async def round(self, run: Run, number: int) -> None:
        """Joint steps, and no merge."""
        clients = cohort(run, number, self.participation)
        for _ in range(self.local_steps):
            if able := [client for client in clients if run.steps_left(client)]:
                await joint_step(
                    run, able, self.weight_by, joint_heads=self.grad_scale == "joint",
                    concatenate=self.joint == "concatenate",
                )  # fmt: skip

    def evaluators(self, run: Run) -> Sequence[str]:
        """All: each has a model of its own."""
        return run.clients
