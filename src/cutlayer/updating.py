"""Optimizer steps of a run's parts: clipped by one norm, of trunks with weights, of heads with scales."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cutlayer.arranging import Arranging
from cutlayer.contracts import Rate
from cutlayer.errors import NonFinite
from cutlayer.links.local import ClientEnd
from cutlayer.models.slots import Slot


class Updating(Arranging):
    """The part of a run that updates slots and clients' parts. ``Run`` sets these."""

    rate: Rate | None

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped, so that the update is a verb of its own."""
        return self.config.max_grad_norm is not None

    async def _clipped_update(self, client: str, *, heads: bool, slots: bool) -> None:
        """Scale the gradients of client and trunk by one factor, as ``clip_grad_norm_`` does, and update them.

        What is not updated here (a pool's trunk) is clipped by itself when it is.
        """
        # A slot at the server is at hand; of one on a client's device the norm is asked for, as of the client's own.
        stops = self._stops([client]) if slots else []
        devices = {stop: self.ends[stop.party] for stop in stops if self.parts.own(stop)}

        async def norm(end: ClientEnd) -> float:
            return float((await end.ask("grad_norm")).header.value("squared_norm"))

        squared = 0.0
        for stop in stops:
            squared += await norm(devices[stop]) if stop in devices else await self.slot_norm(stop)
        if heads:
            squared += await norm(self.ends[client])
        scale = self._clip(squared, f"client '{client}'")
        for stop in stops:
            if stop in devices:
                await devices[stop].ask("update", {"scale": scale})
            else:
                await self.step_slot(stop, scale=scale)
        if heads:
            await self.ends[client].ask("update", {"scale": scale})

    def _clip(self, squared: float, whose: str) -> float:
        norm = math.sqrt(squared) if squared >= 0 else math.nan
        if not math.isfinite(norm):
            raise NonFinite(f"The gradient of {whose} is not finite. Lower optimizer.lr or check the data.")
        return 1.0 if self.config.max_grad_norm is None else min(1.0, self.config.max_grad_norm / (norm + 1e-6))

    async def update_slots(self, weights: Mapping[str, float], *, merged: bool = False) -> None:
        """One update of each slot that these clients' steps passed, with their gradients weighted.

        Args:
            weights: in any unit; those of the clients of one slot are scaled to sum to 1.
            merged: what the slot trains is merged, block by block, with what others hold in their heads. Then each
                block's weights are scaled over those who pass it here: with unequal cuts the merge weighs the others.
        """
        stops = {id(self.parts.slot(stop)): stop for stop in reversed(self._stops(weights))}
        for slot in self.slots_of(weights):
            of_slot = {c: w for c, w in weights.items() if slot in self.slots_of([c])}
            stop = stops[id(slot)]
            if self.elsewhere(stop) is None:
                self.update_slot(slot, of_slot, merged=merged)
                continue
            shares = _shares(of_slot)
            squared = await self.slot_norm(stop, shares, by_tensor=merged) if self.clips else 0.0
            scale, rate = self._scale(slot, squared), self._factor(slot, len(of_slot))
            await self.step_slot(stop, scale=scale, weights=shares, rate=rate, by_tensor=merged)

    def update_slot(
        self, slot: Slot, weights: Mapping[str, float], *, participants: int | None = None, merged: bool = False
    ) -> None:
        """One update of a slot with what these have added to it; ``weights`` are scaled to sum to 1.

        ``participants``: how many clients that is, where they are not the names. ``merged``: see ``update_slots``.
        """
        shares = _shares(weights)
        squared = slot.squared_norm(shares, by_tensor=merged) if self.clips else 0.0
        scale, rate = self._scale(slot, squared), self._factor(slot, participants or len(weights))
        slot.update(scale=scale, weights=shares, rate=rate, by_tensor=merged)

    def _scale(self, slot: Slot, squared: float) -> float:
        return self._clip(squared, f"slot '{slot.name}'") if self.clips else 1.0

    def _factor(self, slot: Slot, participants: int) -> float:
        return 1.0 if self.rate is None else self.rate.factor(participants, slot.version)

    async def update_heads(self, scales: Mapping[str, float]) -> None:
        """One update of each client's part, with its gradient scaled."""

        async def one(client: str) -> None:
            end, scale = self.ends[client], scales[client]
            if self.clips:
                found = float((await end.ask("grad_norm")).header.value("squared_norm"))
                scale *= self._clip(found * scale**2, f"client '{client}'")
            await end.ask("update", {"scale": scale})

        await self.reach(one, list(scales))


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that sum to 1."""
    total = sum(weights.values())
    return {client: weight / total for client, weight in weights.items()}
