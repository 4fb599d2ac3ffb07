"""A client that is alone in its process and runs blocks for others: what it must hold for that, and how it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cutlayer.contracts import SERVER, How, Layout, Parcel
from cutlayer.errors import WireError
from cutlayer.models.loading import Part
from cutlayer.models.segment import Base
from cutlayer.models.slots import Slot
from cutlayer.parties.trunk import Place, TrunkParty
from cutlayer.presence import Routes
from cutlayer.wire import Header, Value

HOW = ("graph", "update", "head_weight", "trunk_update", "trunk_weight")
ASKED = (*HOW, "owner", "stop")  # what the server says in a request; the rest of the values is the sender's
UNDER_WAY = 64  # graphs of others that are held at a time, at most


@dataclass(frozen=True)
class Hosted:
    """A stop on the route of another client: its number there, its blocks, and who comes before and after it.

    ``before`` and ``after`` are None where that is the owner of the route; ``top``: with the norm, the head and the
    loss.
    """

    owner: str
    number: int
    slot: str
    blocks: range
    top: bool
    before: str | None
    after: str | None

    def place(self, base: Base) -> Place:
        """Where in this process it is worked on; the segment's name seeds its dropout."""
        name = "tail" if self.top else f"trunk{self.number}" if self.number else "trunk"
        return Place(base.segment(name, self.blocks, top=self.top), self.slot, self.before, self.after)


def hosted_stops(name: str, layouts: Mapping[str, Layout], routes: Routes) -> list[Hosted]:
    """The stops of other clients' routes at a client."""
    found = []
    for owner, stops in routes.items():
        parties = [None, *(stop.party for stop in stops), None]
        for number, stop in enumerate(stops):
            if stop.party == name:
                top = not layouts[owner].tail_at_client and number == len(stops) - 1
                found.append(
                    Hosted(owner, number, stop.slot, stop.blocks, top, parties[number], parties[number + 2])
                )  # fmt: skip
    return found


def part_of(layout: Layout, hosted: Sequence[Hosted] = ()) -> Part:
    """What a client holds of the model: its head, in the U-shape its tail, and the blocks that it runs for others."""
    tail = layout.tail if layout.tail_at_client else range(0)
    top = layout.tail_at_client or any(stop.top for stop in hosted)
    also = frozenset(block for blocks in (tail, *(stop.blocks for stop in hosted)) for block in blocks)
    return Part(0, len(layout.head), bottom=True, top=top, also=also)


class Hosting:
    """A client's stops on the routes of others. It trains its copy of the blocks in the client's own slot.

    Args:
        name: the client's name.
        slot: the client's.
        stops: what it runs.
        base: has these blocks.
        seed: the run's seed (for dropout).
    """

    def __init__(self, name: str, slot: Slot, stops: Sequence[Hosted], base: Base, *, seed: int) -> None:
        self.name = name
        self.party = TrunkParty(name, {stop.slot: slot for stop in stops}, seed=seed)
        self._places = {(stop.owner, stop.number): stop.place(base) for stop in stops}

    def answer(self, header: Header, tensors: Sequence[Tensor]) -> tuple[Header, list[Tensor]]:
        """Do the work that a request asks for; the answer is for whoever is next on the route.

        Raises:
            WireError: it came out of order, or too much is under way.
        """
        how = How(
            head_update=bool(header.value("update")), trunk_update=bool(header.value("trunk_update")),
            graph=bool(header.value("graph")), head_weight=float(header.value("head_weight")),
            trunk_weight=float(header.value("trunk_weight")),
        )  # fmt: skip
        place = self._places[header.client, int(header.value("stop"))]
        values: dict[str, Value] = {name: value for name, value in header.values.items() if name not in ASKED}
        parcel = Parcel(header.but(verb="", values=values), list(tensors))
        if header.verb == "host_backward":
            return _answer(self.party.backward(parcel, how, place))
        if header.verb == "host_forward":
            if how.graph and self.party.open_graphs >= UNDER_WAY:
                raise WireError(
                    f"'{self.name}' was asked for {UNDER_WAY} forwards for others, and no backward of them."
                )
            return _answer(self.party.forward(parcel, how, place))
        told, out = _answer(self.party.tail_step(parcel, how, place))
        if not how.graph:  # the result of an evaluation, which is the server's
            told = told.but(sender=self.name, receiver=SERVER)
        return told, out


def _answer(parcel: Parcel) -> tuple[Header, list[Tensor]]:
    header, tensors = parcel.open()
    return header, list(tensors)
