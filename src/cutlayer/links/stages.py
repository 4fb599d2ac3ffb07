"""The link to a trunk whose blocks are in other processes: stages of it, one after another, for each slot.

A stage is a ``TrunkParty`` with a stretch of the blocks; a step passes the stages of its slot as it would pass several
parties on a route, and each hands its reply to the next by itself. All of them are one party of the run, so these
frames are not counted: they never leave it. Requests are begun in the order in which the driver comes to them, and each
stage works on them in that order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cutlayer.contracts import How, Parcel
from cutlayer.errors import WireError
from cutlayer.links.ray import Bytes, Failed, arrived, in_one_piece
from cutlayer.models.far import FarSlot
from cutlayer.models.segment import Segment
from cutlayer.models.slots import Key, Slot, parameter_of
from cutlayer.parties.memory import Watch
from cutlayer.parties.trunk import Place, Trunk
from cutlayer.step import at
from cutlayer.wire import Header, decode, encode
from cutlayer.zeroth import Probe

Chain = Sequence[tuple["Stage", str, Mapping[str, Any]]]  # who does which verb where


@dataclass(frozen=True)
class Stage:
    """A process with a stretch of the blocks.

    Args:
        blocks: the stretch.
        top: it has the norm and the head too.
        ask: submits a frame, or the reply that another stage will give, with what is to be done (JSON); gives a
            reference to the reply.
        explain: what to raise for an error that a reference ends with.
    """

    blocks: range
    top: bool
    ask: Callable[[Any, str], Any]
    explain: Callable[[Exception], Exception]

    def part(self, segment: Segment) -> range | None:
        """The blocks of a segment that are here; None: it does not come here."""
        found = range(max(segment.blocks.start, self.blocks.start), min(segment.blocks.stop, self.blocks.stop))
        return found if len(found) or (segment.top and self.top) else None


class StagedTrunk:
    """A party that runs blocks for others, with its slots in stages elsewhere.

    Args:
        party: what it is in the run; its slots are ``FarSlot``s.
        stages: by slot, in the order of the blocks.
        owner: whose a parameter is, as ``Base.owner``.
    """

    def __init__(self, party: Trunk, stages: Mapping[str, Sequence[Stage]], owner: Callable[[str], int | str]) -> None:
        self.name, self.slots, self.seed = party.name, dict(party.slots), party.seed
        self.watch = Watch()
        self._stages, self._open = dict(stages), dict[tuple[Key, Segment], bool]()
        for name, slot in self.slots.items():
            assert isinstance(slot, FarSlot)
            slot.far = Served(self.name, slot, stages[name], owner, self.watch)

    def forward(self, parcel: Parcel, how: How, place: Place) -> Coming:
        """Step 4, stage by stage."""
        chain = [(stage, "forward", where) for stage, where in self._stops(place)]
        if how.graph:
            self._open[_key(parcel.header), place.segment] = bool(parcel.header.value("last"))
        return self._passed(parcel, chain, how, place, "trunk_forward")

    def backward(self, parcel: Parcel, how: How, place: Place) -> Coming:
        """Step 8, from the last stage to the first."""
        key = _key(parcel.header)
        last = self._open.pop((key, place.segment), None)
        if last is None:
            raise WireError(
                f"'{self.name}' has no open graph of client '{key[0]}', step {key[1]}, micro-batch {key[2]}."
            )
        chain = [(stage, "backward", where) for stage, where in reversed(self._stops(place))]
        return self._passed(parcel, chain, how, place, "trunk_backward", updates=last and how.trunk_update)

    def tail_step(self, parcel: Parcel, how: How, place: Place) -> Coming:
        """Step 4 of the two-part split: up through the stages, and down again."""
        *before, (top, where) = self._stops(place)
        chain = [*((stage, "forward", there) for stage, there in before), (top, "tail_step", where)]
        down = [(stage, "backward", there) for stage, there in reversed(before)] if how.graph else []
        updates = how.graph and bool(parcel.header.value("last")) and how.trunk_update
        return self._passed(parcel, chain, how, place, "trunk_forward", down=down, updates=updates)

    def improve(self, parcel: Parcel, place: Place, probe: Probe, *, turn: int, rate: float, last: bool) -> Coming:
        """Step 4 without backpropagation; of a trunk in one stage."""
        more = {"probe": asdict(probe), "turn": turn, "rate": rate, "last": last}
        return self._alone(parcel, place, "improve", more, updates=True, counts=last)

    def judge(self, parcel: Parcel, place: Place, probe: Probe) -> Coming:
        """Step 4 for the client, without backpropagation; of a trunk in one stage."""
        return self._alone(parcel, place, "judge", {"probe": asdict(probe)})

    def abort(self, client: str) -> None:
        """Forget every open graph and gradient in waiting of a client, before the next request."""
        for key in [k for k in self._open if k[0][0] == client]:
            del self._open[key]
        for slot in self.slots.values():
            _served(slot).forget(client)
        told = json.dumps({"verb": "abort", "party": self.name, "client": client})
        for stage in {id(stage): stage for stages in self._stages.values() for stage in stages}.values():
            stage.ask(_control("abort"), told)  # nobody waits: if it fails, so does what comes next

    @property
    def open_graphs(self) -> int:
        """How many forwards wait for their backward."""
        return len(self._open)

    def _stops(self, place: Place) -> list[tuple[Stage, dict[str, Any]]]:
        """The stages that a place's blocks are in, and what each is told of its part."""
        segment = place.segment
        parts = [(stage, stage.part(segment)) for stage in self._stages[place.slot]]
        there = [(stage, blocks) for stage, blocks in parts if blocks is not None]
        found = []
        for number, (stage, blocks) in enumerate(there):
            first, last = number == 0, number == len(there) - 1
            where = {
                "party": self.name, "slot": place.slot, "segment": segment.name, "blocks": [blocks.start, blocks.stop],
                "top": segment.top and last, "before": place.before if first else self.name,
                "after": place.after if last else self.name, "goes_on": not last,
            }  # fmt: skip
            found.append((stage, where))
        return found

    def _alone(
        self, parcel: Parcel, place: Place, verb: str, more: Mapping[str, Any], *, updates: bool = False,
        counts: bool = True,
    ) -> Coming:  # fmt: skip
        ((stage, where),) = self._stops(place)
        chain = [(stage, verb, {**where, **more})]
        return self._passed(parcel, chain, How(), place, "trunk_forward", updates=updates, counts=counts)

    def _passed(
        self, parcel: Parcel, chain: Chain, how: How, place: Place, step_name: str, *, down: Chain = (),
        updates: bool = False, counts: bool = True,
    ) -> Coming:  # fmt: skip
        """Begin a chain of verbs; each one's reply is the request of the next. ``down`` is begun after it."""
        slot = self.slots[place.slot]
        assert isinstance(slot, FarSlot)
        served = _served(slot)
        with at(step_name):
            served.hurry()
            slot.send()
            more = {"how": asdict(how), "factor": slot.factor}
            header, tensors = parcel.open()
            coming = Coming(header.client, in_one_piece(encode(header, tensors)), step_name)
            coming.begin([(stage, json.dumps({"verb": verb, **where, **more})) for stage, verb, where in chain])
            coming.later = [(stage, json.dumps({"verb": verb, **where, **more})) for stage, verb, where in down]
            if coming.later:
                served.waiting.append(coming)
            if updates:
                slot.updated(counts=counts)
        return coming


class Coming:
    """A parcel that stages are working on.

    The way down of a two-part split's step is begun when its way up has ended, so that the lower stages can begin other
    slots' steps meanwhile: a stage that was told of it would wait for it. Whatever else comes to the same slot is
    begun after it.

    Args:
        client: whose step it is.
        request: what the first stage is asked.
        step_name: one of the eleven.
    """

    def __init__(self, client: str, request: Bytes, step_name: str) -> None:
        self.client, self._step_name = client, step_name
        self._request: Bytes | None = request
        self._begun: list[tuple[Stage, Any]] = []
        self.later: Sequence[tuple[Stage, str]] = ()

    def begin(self, chain: Sequence[tuple[Stage, str]]) -> None:
        """Ask these stages, one with the reply of the other."""
        for stage, told in chain:
            request = self._begun[-1][1] if self._begun else self._request
            self._begun.append((stage, stage.ask(request, told)))

    def go_down(self) -> None:
        """Begin what is left, if anything is."""
        left, self.later = self.later, ()
        self.begin(left)

    def __await__(self) -> Generator[Any, None, Parcel]:
        return self._came().__await__()

    async def _came(self) -> Parcel:
        with at(self._step_name):
            try:
                if self.later:
                    await self._reply()
                    self.go_down()
                return Parcel(*_read(await self._reply()))
            finally:  # whoever remembers this needs no tensor of it
                self.later, self._begun, self._request = (), [], None

    async def _reply(self) -> Any:
        try:
            return await arrived(self._begun[-1][1])
        except Exception as error:
            raise _explained(self._begun, error) from error


class Served:
    """The stages of a slot (see ``Far``).

    Args:
        party: whose slot it is.
        slot: with the copy that is here.
        stages: in the order of the blocks.
        owner: whose a parameter is, as ``Base.owner``.
        watch: gets the bytes of activations that the party has held.
    """

    def __init__(
        self, party: str, slot: Slot, stages: Sequence[Stage], owner: Callable[[str], int | str], watch: Watch
    ) -> None:
        self._party, self._slot, self._stages, self._owner, self._watch = party, slot.name, stages, owner, watch
        self.waiting: list[Coming] = []  # steps whose way down is perhaps not begun yet

    def hurry(self) -> None:
        """Begin all that is to be done before the next request."""
        for coming in self.waiting:
            coming.go_down()
        self.waiting.clear()

    def forget(self, client: str) -> None:
        """Leave undone what is not begun yet of a client."""
        for coming in self.waiting:
            coming.later = () if coming.client == client else coming.later

    def put(self, state: Mapping[str, Tensor], *, reset: bool) -> None:
        """As ``Far`` says."""
        self.hurry()
        for stage in self._stages:
            part = {n: t for n, t in state.items() if owned(self._owner(parameter_of(n)), stage.blocks, top=stage.top)}
            stage.ask(_control("put", part), self._told("put", reset=reset))

    def get(self, *, moments: bool) -> dict[str, Tensor]:
        """As ``Far`` says."""
        state, saved = dict[str, Tensor](), 0
        for header, tensors in self._asked("get", moments=moments):
            state |= dict(zip(header.names, tensors, strict=True))
            saved += int(header.value("saved"))
        self._watch.saved = max(self._watch.saved, saved)
        return state

    def update(self, factor: float, **how: Any) -> None:
        """As ``Far`` says."""
        self.hurry()
        for stage in self._stages:
            stage.ask(_control("update"), self._told("update", factor=factor, **how))

    def norms(self, weights: Mapping[str, float] | None, *, by_tensor: bool) -> list[list[tuple[Key | None, float]]]:
        """As ``Far`` says."""
        found: list[list[tuple[Key | None, float]]] = []
        for header, tensors in self._asked("norms", weights=weights, by_tensor=by_tensor):
            keys = [tuple(key) if key else None for key in json.loads(str(header.value("keys")))]
            first, norms = (tensor.tolist() for tensor in tensors)
            found.append([(keys[number], norm) for number, norm in zip(first, norms, strict=True)])
        return found

    def _asked(self, verb: str, **more: Any) -> list[tuple[Header, list[Tensor]]]:
        """The replies of all stages, waited for."""
        self.hurry()
        begun = [(stage, stage.ask(_control(verb), self._told(verb, **more))) for stage in self._stages]
        found = []
        for one in begun:
            try:
                found.append(one[1].future().result())
            except Exception as error:
                raise _explained([one], error) from error
        return [_read(reply) for reply in found]

    def _told(self, verb: str, **more: Any) -> str:
        return json.dumps({"verb": verb, "party": self._party, "slot": self._slot, **more})


def owned(owner: int | str, blocks: range, *, top: bool) -> bool:
    """Whether a parameter of that owner (``Base.owner``) is at a stage with these blocks."""
    return owner in blocks if isinstance(owner, int) else owner == "top" and top


def _served(slot: Slot) -> Served:
    assert isinstance(slot, FarSlot)
    assert isinstance(slot.far, Served)
    return slot.far


def _control(verb: str, state: Mapping[str, Tensor] | None = None) -> Bytes:
    """A request that keeps both ends together."""
    state = state or {}
    header = Header("partition", "state" if state else "control", verb, names=tuple(state))
    return in_one_piece(encode(header, list(state.values())))


def _read(found: Any) -> tuple[Header, list[Tensor]]:
    if isinstance(found, Failed):
        raise found.error()
    assert isinstance(found, np.ndarray)
    return decode(found.data)


def _explained(begun: Sequence[tuple[Stage, Any]], error: Exception) -> Exception:
    """What to raise for an error at the end of a chain: that of the first stage that has failed."""
    for stage, reference in begun:
        if (failed := reference.future().exception()) is not None and isinstance(failed, Exception):
            return stage.explain(failed)
    return error


def _key(header: Header) -> Key:
    return header.client, header.step, header.micro
