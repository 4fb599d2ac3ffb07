"""A joint step: all clients at once against the trunk, which makes one update with their gradients weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cutlayer.contracts import StepResult
from cutlayer.joint import Weighing, shares

if TYPE_CHECKING:
    from cutlayer.driver import Run


async def joint_step(run: Run, clients: Sequence[str], by: Weighing, *, joint_heads: bool = False) -> None:
    """One step of all ``clients`` and one update of their trunk.

    A client's part is updated with the gradient of its own mean loss; with ``joint_heads`` with that times its share,
    which is its part of the joint loss's gradient.
    """
    results: list[StepResult] = []

    async def one(client: str) -> None:
        results.append(await run.step(client, trunk_update=False, head_update=not joint_heads))

    await run.together(one, clients)
    results.sort(key=lambda result: clients.index(result.client))
    weights = shares(run, results, by)
    run.update_slots(weights)
    if joint_heads:
        await run.update_heads(weights)
