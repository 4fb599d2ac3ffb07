"""A joint step: all clients at once against the trunk, which makes one update with their gradients weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from cutlayer.contracts import StepResult

if TYPE_CHECKING:
    from cutlayer.driver import Run

Weighing = Literal["tokens", "examples", "uniform"]


def shares(run: Run, results: Sequence[StepResult], by: Weighing) -> dict[str, float]:
    """Each client's weight c_i in a joint step, summing to 1.

    ``tokens``: by the label tokens of this step, so that the joint loss is the mean over all of them; ``examples``: by
    the clients' data, ``uniform``: the same for all.
    """
    measured = {
        "tokens": {r.client: float(r.label_tokens) for r in results},
        "examples": {r.client: run.sizes[r.client]["examples"] for r in results},
        "uniform": {r.client: 1.0 for r in results},
    }[by]
    total = sum(measured.values())
    if not total:  # not one label in the whole step: nothing is learnt, whatever the weights
        return {r.client: 1 / len(results) for r in results}
    return {client: value / total for client, value in measured.items()}


async def joint_step(run: Run, clients: Sequence[str], by: Weighing, *, joint_heads: bool = False) -> None:
    """One step of all ``clients`` and one update of their trunk.

    A client's part is updated with the gradient of its own mean loss; with ``joint_heads`` with that times its share,
    which is its part of the joint loss's gradient.
    """
    results: list[StepResult] = []

    async def one(client: str) -> None:
        if result := await run.step(client, trunk_update=False, head_update=not joint_heads):
            results.append(result)  # of those that were not lost

    await run.together(one, clients)
    results.sort(key=lambda result: clients.index(result.client))
    weights = shares(run, results, by)
    run.update_slots(weights)
    if joint_heads:
        await run.update_heads(weights)
