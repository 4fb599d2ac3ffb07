"""A stop at a client in a process of its own: the driver asks it, and passes on between clients what it cannot read."""

from __future__ import annotations

from cutlayer.contracts import SERVER, How, Parcel
from cutlayer.errors import WireError
from cutlayer.links.local import send
from cutlayer.links.network import NetworkLink
from cutlayer.parties.trunk import Place, Trunk, told_how
from cutlayer.sealing import is_sealed
from cutlayer.step import at
from cutlayer.wire import Header


class Relay:
    """A client's stop on the route of another, both elsewhere.

    What the two send each other is counted as it is in one process, once for each frame. That it goes over the server,
    in a request and a reply of this link, is the transport's.

    Args:
        party: stands for the host here.
        place: its blocks, and its neighbours.
        number: which stop of the route it is.
        link: to the host.
        owner: the client whose route it is.
    """

    def __init__(self, party: Trunk, place: Place, number: int, link: NetworkLink, owner: str) -> None:
        self.party, self.place, self.number, self.link, self.owner = party, place, number, link, owner

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4, and 3 again where another party comes next."""
        with at("trunk_forward"):
            out = await self._ask("host_forward", parcel, how, to=self.place.after or self.owner)
        return out if self.place.after is None else self._counted(out)

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """Step 8, and 9 where the route came from another party."""
        with at("trunk_backward"):
            out = await self._ask("host_backward", parcel, how, to=self.place.before or self.owner)
        return out if self.place.before is None else self._counted(out)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Step 4 of the two-part split, forward, loss and backward in one."""
        to = (self.place.before or self.owner) if how.graph else SERVER
        with at("trunk_forward"):
            out = await self._ask("host_tail_step", parcel, how, to=to)
        return out if self.place.before is None or not how.graph else self._counted(out)

    async def leave(self, client: str) -> None:
        """Nothing waits for a client here."""

    async def _ask(self, verb: str, parcel: Parcel, how: How, *, to: str) -> Parcel:
        header, tensors = parcel.open()
        stays = header.sender == self.party.name and not tensors  # the owner runs its own blocks
        if not stays and not is_sealed(header):
            raise WireError(f"An open frame of client '{header.client}' is not passed on to '{self.party.name}'.")
        values = {
            **told_how(how), "trunk_update": how.trunk_update, "trunk_weight": how.trunk_weight, "owner": self.owner,
            "stop": self.number,
        }  # fmt: skip
        asked = Header(
            header.step_name, header.kind, verb, step=header.step, micro=header.micro, values=values, names=header.names
        )
        return await self.link.host(asked, tensors, to=to)

    def _counted(self, parcel: Parcel) -> Parcel:
        header, tensors = parcel.open()
        send(self.link.meter, header, tensors, self.owner)
        return parcel
