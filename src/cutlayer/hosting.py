"""A client that is alone in its process and runs blocks for others: what it must hold for that, and how it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, How, Layout, Parcel
from cutlayer.errors import WireError
from cutlayer.leading import Lead
from cutlayer.leaving import TRUNK_VERBS
from cutlayer.models.loading import Part
from cutlayer.models.segment import Base
from cutlayer.models.slots import Slot
from cutlayer.parties.trunk import Place, TrunkParty
from cutlayer.presence import Routes
from cutlayer.trunk_slot import KeptTrunk, TrunkSlot
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


def stops_of(lead: Lead, name: str, layouts: Mapping[str, Layout]) -> list[Hosted]:
    """The stops at a client that a selection has said: of each route the only one, with all between head and tail."""
    return [
        Hosted(owner, 0, lead.slot or name, layouts[owner].middle, not layouts[owner].tail_at_client, None, None)
        for owner in lead.owners
    ]


def part_of(layout: Layout, hosted: Sequence[Hosted] = ()) -> Part:
    """What a client holds of the model: its head, in the U-shape its tail, and the blocks that it runs for others."""
    tail = layout.tail if layout.tail_at_client else range(0)
    top = layout.tail_at_client or any(stop.top for stop in hosted)
    also = frozenset(block for blocks in (tail, *(stop.blocks for stop in hosted)) for block in blocks)
    return Part(0, len(layout.head), bottom=True, top=top, also=also)


class Hosting:
    """A client's stops on the routes of others.

    It trains its copy of the blocks in the client's own slot, or, where groups have a trunk each, in a slot beside it.

    Args:
        config: the run.
        name: the client's name.
        slot: the client's.
        layouts: by client.
    """

    def __init__(self, config: RunConfig, name: str, slot: Slot, layouts: Mapping[str, Layout]) -> None:
        self.config, self.name, self.layouts, self._own = config, name, layouts, slot
        self.kept: KeptTrunk | None = None  # as a checkpoint has it, until the server has said that it is still there
        self.trunk: TrunkSlot | None = None
        self.party = TrunkParty(name, {}, seed=config.seed)
        self._places: dict[tuple[str, int], Place] = {}

    def follow(self, stops: Sequence[Hosted], base: Base, lead: Lead | None = None) -> None:
        """Run these from now on; ``base`` has the blocks, ``lead`` is what the server said.

        Raises:
            WireError: others' batches are under way.
        """
        if self.party.open_graphs:
            raise WireError(f"'{self.name}' was told whose blocks it runs while batches of others were under way.")
        places = {(stop.owner, stop.number): stop.place(base) for stop in stops}
        slots = {stop.slot: self._own for stop in stops}
        if lead is None or not lead.slot:
            self.trunk = None
        else:
            if self.trunk is None or not self.trunk.is_of(lead):
                names = {name for place in places.values() for name in place.segment.names}
                users = [self.layouts[owner] for owner in lead.owners]
                self.trunk = TrunkSlot(self.config, self.name, lead, base, names, users, self.kept)
            self.trunk.last_for(lead.total)
            slots = {lead.slot: self.trunk.slot}
        self.kept, self._places = None, places
        self.party = TrunkParty(self.name, slots, seed=self.config.seed)

    def held(self) -> KeptTrunk | None:
        """What a checkpoint needs of a trunk beside the client's own part."""
        return self.kept if self.trunk is None else self.trunk.kept()

    def answer(self, header: Header, tensors: Sequence[Tensor]) -> tuple[Header, list[Tensor]]:
        """Do the work that a request asks for; the answer is for whoever is next on the route.

        Raises:
            WireError: it came out of order, or too much is under way.
        """
        if header.verb in TRUNK_VERBS:
            if self.trunk is None or self.trunk.slot.name != header.slot:
                raise WireError(f"'{header.verb}' is about '{header.slot}', which is not trained at '{self.name}'.")
            return self.trunk.answer(header, tensors)
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
