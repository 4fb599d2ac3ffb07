"""One trunk, trained by minibatch SGD on what all clients send; their own parts are trained by federated learning.

From the paper: the trunk makes one update a step with the mean of the clients' gradients, so that it never sees a
skewed one; a client's part is trained with the unscaled gradient of its own loss, E steps long (the framework's
``local_steps``), and then averaged. Ours: other weights, and that a clipped trunk is clipped by itself.

With one trunk step for N batches the trunk makes N times fewer updates than in ``sfl-v2`` at the same rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutlayer.contracts import Joint, Mixing, StepResult
from cutlayer.joint import Meeting, Weighing, shares
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run


@method("mixing", paper="Huang et al., arXiv:2308.11953")
@dataclass(frozen=True)
class MinibatchSFL(Mixing):
    """One trunk with one update a step, by the mean gradient of all clients; their parts are averaged each round."""

    weight_by: Weighing = "uniform"  # of a client's gradient in the trunk's update; tokens: of the step

    def gather(self, run: Run, clients: Sequence[str]) -> Joint:
        """A pool of these clients' steps."""
        return Pool(run, clients, self.weight_by)


class Pool(Joint):
    """Clients whose steps end together: then the trunk is updated with the gradients of all."""

    def __init__(self, run: Run, clients: Sequence[str], by: Weighing) -> None:
        self.run, self.by = run, by
        self.meeting: Meeting[StepResult, None] = Meeting(clients, run.clock, "minibatch-sfl")

    def wrap(self, stop: Any, client: str) -> Any:
        """The stop as it is: gradients of several clients wait side by side in a slot."""
        return stop

    async def done(self, result: StepResult) -> None:
        """Wait for the others, and the update."""
        await self.meeting.bring(result.client, result, self._update)

    async def _update(self, results: Mapping[str, StepResult]) -> Mapping[str, None]:
        await self.run.update_slots(shares(self.run, list(results.values()), self.by), merged=True)
        return dict.fromkeys(results)

    def leave(self, client: str) -> None:
        """Nobody waits for it."""
        self.meeting.leave(client)
