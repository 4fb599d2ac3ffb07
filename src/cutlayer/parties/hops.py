"""The stops between head and tail as a step meets them: a place at a party, its worker, and the way on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cutlayer.contracts import How, Parcel
from cutlayer.links.local import Carrier, Pace, Station
from cutlayer.parties.trunk import Place, Trunk, Worked
from cutlayer.zeroth import Probe


class TrunkHop:
    """A stretch of blocks at a party, served by one slot."""

    def __init__(
        self, party: Trunk, place: Place, station: Station, carrier: Carrier, pace: Pace | None = None
    ) -> None:
        self.party, self.place, self.station, self.carrier, self.pace = party, place, station, carrier, pace

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4, and 3 again where another party comes next."""
        out = await self.station.work(
            "forward", parcel, how.graph, lambda: self.party.forward(parcel, how, self.place), self.pace
        )
        return out if self.place.after is None else await self.carrier.carry(out)

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 8, and 9 where the route came from another party."""
        out = await self.station.work(
            "backward", parcel, how.graph, lambda: self.party.backward(parcel, how, self.place), self.pace
        )
        return out if self.place.before is None else await self.carrier.carry(out)

    async def leave(self, client: str) -> None:
        """Nothing waits for a client here."""


class Hosted:
    """A stop at a client's device; ``asked`` is told of each message to it in a step of ``owner``, and may raise."""

    def __init__(self, stop: Any, owner: str, asked: Callable[[str, str], None]) -> None:
        self.stop, self.owner, self.asked = stop, owner, asked

    def _ask(self, how: How) -> None:
        if how.graph:
            self.asked(self.stop.party.name, self.owner)

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4, if the device is there."""
        self._ask(how)
        out: Parcel = await self.stop.forward(parcel, how)
        return out

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 8, if the device is there."""
        self._ask(how)
        out: Parcel = await self.stop.backward(parcel, how)
        return out

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4 of the two-part split, if the device is there."""
        self._ask(how)
        out: Parcel = await self.stop.tail_step(parcel, how)
        return out

    async def leave(self, client: str) -> None:
        """As at the stop itself."""
        await self.stop.leave(client)


class ServerTail:
    """The rest of the model with the loss (two-part split)."""

    def __init__(
        self, party: Trunk, place: Place, station: Station, carrier: Carrier, pace: Pace | None = None
    ) -> None:
        self.party, self.place, self.station, self.carrier, self.pace = party, place, station, carrier, pace

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4, forward, loss and backward in one."""
        out = await self.station.work(
            "tail_step", parcel, how.graph, lambda: self.party.tail_step(parcel, how, self.place), self.pace
        )
        return out if self.place.before is None or not how.graph else await self.carrier.carry(out)

    async def improve(self, parcel: Parcel, probe: Probe, *, turn: int, rate: float, last: bool) -> Parcel:
        """Step 4 by forward passes only: one update of the slot (see ``TrunkParty``)."""

        def work() -> Worked:
            return self.party.improve(parcel, self.place, probe, turn=turn, rate=rate, last=last)

        return await self.station.work("improve", parcel, False, work, self.pace)

    async def judge(self, parcel: Parcel, probe: Probe) -> Parcel:
        """Step 4 by forward passes only: the slopes for the client."""
        return await self.station.work(
            "judge", parcel, False, lambda: self.party.judge(parcel, self.place, probe), self.pace
        )

    async def leave(self, client: str) -> None:
        """Nothing waits for a client here."""
