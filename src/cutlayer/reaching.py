"""The trunks' slots, wherever they are: in this process, or on the device of a client elsewhere that trains them.

What stands here for a slot elsewhere has its names and shapes, and the values and the version that the last merge
brought. Between merges nobody here needs more. Requests that only reach such a slot are counted as in a simulation,
where nobody needs them: not at all; its tensors are counted where they are merged.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cutlayer.asking import WEIGHT
from cutlayer.contracts import SERVER, State, Stop
from cutlayer.links.local import Link
from cutlayer.links.network import NetworkLink
from cutlayer.losing import Losing
from cutlayer.models.slots import Slot
from cutlayer.parties.verbs import VERB_STEPS
from cutlayer.wire import Header, Value


class Reaching(Losing):
    """The part of a run that reads, writes and updates trunks' slots. ``Run`` sets these."""

    links: Mapping[str, Link]

    def elsewhere(self, stop: Stop) -> NetworkLink | None:
        """The way to the client that trains a stop's slot beside its own part, in a process of its own."""
        link = self.links.get(stop.party)
        return link if isinstance(link, NetworkLink) and not self.parts.own(stop) else None

    async def slot_state(self, stop: Stop, *, optimizer: bool) -> State:
        """What is trained in a slot, with the optimizer's state if it is wanted."""
        slot, link = self.parts.slot(stop), self.elsewhere(stop)
        if link is None:
            return slot.get(optimizer=optimizer)
        header, tensors = await _ask(link, "host_get", slot, {"optimizer": optimizer})
        slot.put(tensors, version=int(header.value("version")))
        return tensors

    async def put_slot(self, stop: Stop, state: Mapping[str, Tensor], *, reset: bool = False) -> None:
        """Give a slot tensors; ``reset`` forgets the optimizer's state first. Who is away gets them when it is back."""
        slot, link = self.parts.slot(stop), self.elsewhere(stop)
        if reset:
            slot.reset_optimizer()
        slot.put(state)
        if link is not None and (state or reset) and stop.party not in self.presence.away:
            await _ask(link, "host_put", slot, {"reset": reset}, state)

    async def slot_norm(
        self, stop: Stop, weights: Mapping[str, float] | None = None, *, by_tensor: bool = False
    ) -> float:  # fmt: skip
        """The squared norm of the gradient that waits in a slot, as ``Slot.squared_norm`` has it."""
        slot, link = self.parts.slot(stop), self.elsewhere(stop)
        if link is None:
            return slot.squared_norm(weights, by_tensor=by_tensor)
        header, _ = await _ask(link, "host_norm", slot, {"by_tensor": by_tensor, **_told(weights)})
        return float(header.value("squared_norm"))

    async def step_slot(
        self, stop: Stop, *, scale: float, weights: Mapping[str, float] | None = None, rate: float = 1.0,
        by_tensor: bool = False,
    ) -> None:  # fmt: skip
        """One optimizer step of a slot, as ``Slot.update`` makes it."""
        slot, link = self.parts.slot(stop), self.elsewhere(stop)
        if link is None:
            slot.update(scale=scale, weights=weights, rate=rate, by_tensor=by_tensor)
            return
        how: dict[str, Value] = {"scale": scale, "rate": rate, "by_tensor": by_tensor}
        header, _ = await _ask(link, "host_update", slot, {**how, **_told(weights)})
        slot.version = int(header.value("version"))


async def _ask(
    link: NetworkLink, verb: str, slot: Slot, values: Mapping[str, Value], state: Mapping[str, Tensor] | None = None
) -> tuple[Header, dict[str, Tensor]]:
    """Ask a client for something about a slot that it trains for its group."""
    given = state or {}
    kind = "state" if given else "control"
    header = Header(VERB_STEPS[verb], kind, verb, slot=slot.name, values=values, names=tuple(given))
    parcel = await link.host(header, list(given.values()), to=SERVER)
    return parcel.header, parcel.tensors


def _told(weights: Mapping[str, float] | None) -> dict[str, Value]:
    return {f"{WEIGHT}{client}": float(weight) for client, weight in (weights or {}).items()}
