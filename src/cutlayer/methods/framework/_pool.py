"""A joint step: all clients at once against the trunk, which makes one update with their gradients weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cutlayer.contracts import StepResult
from cutlayer.joint import Weighing, shares
from cutlayer.methods.framework._concatenation import JOINT, Concatenation

if TYPE_CHECKING:
    from cutlayer.driver import Run


async def joint_step(
    run: Run,
    clients: Sequence[str],
    by: Weighing,
    *,
    joint_heads: bool = False,
    concatenate: bool = False,
    merged: bool = False,
) -> None:
    """One step of all ``clients`` and one update of their trunk.

    A client's part is updated with the gradient of its own mean loss; with ``joint_heads`` with that times its share,
    which is its part of the joint loss's gradient. With ``concatenate`` the trunk works on one batch of them all.
    ``merged``: the trunk is merged by block afterwards (see ``Run.update_slots``).
    """
    results: list[StepResult] = []
    batch = Concatenation(run, clients, by) if concatenate and len(clients) > 1 else None

    async def one(client: str) -> None:
        wrap = None if batch is None else lambda stop: batch.wrap(stop, client)
        if result := await run.step(client, wrap=wrap, trunk_update=False, head_update=not joint_heads):
            results.append(result)  # of those that were not lost

    try:
        await run.together(one, clients)
    except BaseException:
        run.abort_joint(JOINT)
        raise
    results.sort(key=lambda result: clients.index(result.client))
    weights = shares(run, results, by)
    if batch is None:
        await run.update_slots(weights, merged=merged)
    else:
        run.update_slot(run.slots_of(clients)[0], {JOINT: 1.0}, participants=len(clients))
    if joint_heads:
        await run.update_heads(weights)
