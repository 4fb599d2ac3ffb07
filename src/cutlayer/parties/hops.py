"""The server's stops as a step meets them: the trunk of the U-shape, the tail of the two-part split."""

from __future__ import annotations

from cutlayer.contracts import How, Parcel
from cutlayer.links.local import ServerStation
from cutlayer.parties.trunk import TrunkParty


class TrunkHop:
    """The trunk, served by one slot (U-shape)."""

    def __init__(self, party: TrunkParty, slot: str, station: ServerStation) -> None:
        self.party, self.slot, self.station = party, slot, station

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4."""
        return await self.station.work("forward", parcel, how.graph, lambda: self.party.forward(parcel, how, self.slot))

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 8."""
        return await self.station.work(
            "backward", parcel, how.graph, lambda: self.party.backward(parcel, how, self.slot)
        )

    async def leave(self, client: str) -> None:
        """Nothing waits for a client here."""


class ServerTail:
    """The rest of the model with the loss, served by one slot (two-part split)."""

    def __init__(self, party: TrunkParty, slot: str, station: ServerStation) -> None:
        self.party, self.slot, self.station = party, slot, station

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4, forward, loss and backward in one."""
        return await self.station.work(
            "tail_step", parcel, how.graph, lambda: self.party.tail_step(parcel, how, self.slot)
        )

    async def leave(self, client: str) -> None:
        """Nothing waits for a client here."""
