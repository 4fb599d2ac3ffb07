"""The link to a client in the same process: the same frames as on a network, on a virtual clock.

A request is encoded, counted, (with a profile) carried for as long as the client's downlink takes, decoded with one
copy, answered, and the reply comes back in the same way. Without a profile time does not pass, and the head's forward
pass is made only when somebody looks at its parcel: a client that waits for its turn then holds no open graph, so a
further simulated client costs its adapter and no more. The numbers are the same either way.

Requests are pipelined: the request of a ``head_forward`` and the acknowledgement of a ``head_backward`` (and those of
``probe`` and ``probed``, which stand for them without backpropagation) are under way
while the parties work, so they are counted as bytes, but nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cutlayer.clock import Clock, Queue, RunClock
from cutlayer.contracts import SERVER, How, Parcel, StepResult
from cutlayer.costs import Profile, leg_seconds
from cutlayer.parties.client import ClientParty
from cutlayer.parties.trunk import told_how
from cutlayer.parties.verbs import VERB_STEPS, answer
from cutlayer.step import at, current_tally
from cutlayer.wire import Frame, Header, Meter, Value, decode, encode
from cutlayer.zeroth import Probe

STEP_VERBS = ("head_forward", "tail_step", "head_backward", "probe", "probed")
BEGINNINGS, ENDS = ("head_forward", "probe"), ("head_backward", "probed")  # whose request, whose reply is pipelined
PASSES = {"probe": 0, "improve": 1, "judge": 1}  # verbs that run forward once for each tensor [B,T,H] but so many


@dataclass(frozen=True)
class Pace:
    """How long a party's work takes: ``seconds(verb, rows, length, graph)`` for a batch of that size.

    ``graph`` False is an evaluation.
    """

    seconds: Callable[[str, int, int, bool], float]

    def of(self, verb: str, header: Header, shapes: Sequence[Sequence[int]]) -> float:
        """The seconds of a verb whose request or reply carries tensors of ``shapes``; without a batch, none."""
        batches = [shape for shape in shapes if len(shape) == 3]
        if not batches:
            return 0.0
        rows, length, _ = batches[0]
        passes = len(batches) - PASSES[verb] if verb in PASSES else 1
        return passes * self.seconds(verb, rows, length, bool(header.values.get("graph", True)))


Booked = tuple[dict[str, float], dict[str, float], dict[str, float]]  # as the fields of ``Queues`` that it keeps


class Queues:
    """The queues of every party: its processor (``work``) and both directions of its access to the network."""

    def __init__(self, clock: RunClock, profiles: Mapping[str, Profile | None]) -> None:
        self.clock, self.profiles = clock, dict(profiles)
        self._queues: dict[str, Queue] = {}
        self.outside: dict[str, float] = {}  # seconds by step name that no step of a client was charged with
        self.busy: dict[str, float] = {}  # of a round, by party: seconds in which it or its link worked, each once
        self._until: dict[str, float] = {}  # by party: the end of what it has begun

    def booked(self) -> Booked:
        """What was spent so far, for ``book_again``."""
        return dict(self.outside), dict(self.busy), dict(self._until)

    def book_again(self, booked: Booked) -> None:
        """Forget what was spent since: an evaluation takes no time."""
        self.outside, self.busy, self._until = booked

    def of(self, party: str, what: str, *, workers: int = 1) -> Queue:
        """The queue ``what`` of a party."""
        name = f"{party} {what}"
        if name not in self._queues:
            self._queues[name] = self.clock.queue(name, capacity=workers)
        return self._queues[name]

    async def carry(self, frame: Frame) -> None:
        """Let the time of a frame's transfer pass.

        It takes half of each end's round trip, and its bits at the slower of the sender's uplink and the receiver's
        downlink; the sender's uplink (a server's client: the receiver's downlink) is busy meanwhile. Parties without a
        profile have none of their own to add: the link between a client and the server is the client's.
        """
        header = frame.header
        if header.sender == header.receiver:
            return
        sender, receiver = self.profiles.get(header.sender), self.profiles.get(header.receiver)
        rates = ([sender.up] if sender else []) + ([receiver.down] if receiver else [])
        if not rates:
            return
        rtt = sum(profile.rtt for profile in (sender, receiver) if profile is not None)
        queue = self.of(header.sender, "up") if sender else self.of(header.receiver, "down")
        async with queue(header.client):
            ends = (header.sender, header.receiver)
            await self.spend(
                header.step_name, leg_seconds(frame.length, min(rates), rtt), header.client, busy=ends,
                own=header.client in ends,
            )  # fmt: skip

    async def spend(self, step_name: str, seconds: float, key: str, *, busy: Iterable[str], own: bool) -> None:
        """Let time pass under the step's name.

        Args:
            step_name: one of the eleven.
            seconds: how long.
            key: the order of those who wake at one instant.
            busy: the parties that it keeps at work, or their links.
            own: it is the own work, or link, of the step's client.
        """
        self._work(busy, seconds)
        tally = current_tally()
        if tally is not None:
            tally.virtual[step_name] += seconds
            tally.own += seconds if own else 0.0
        else:
            self.outside[step_name] = self.outside.get(step_name, 0.0) + seconds
        await self.clock.sleep(seconds, key=key)

    def _work(self, parties: Iterable[str], seconds: float) -> None:
        """Count the next ``seconds`` for these, but what of them was counted already: a link works beside a processor.

        Time only moves on, so what was counted lies before now or reaches without a gap from now to its end.
        """
        now = self.clock.now()
        for party in parties:
            counted = max(now, self._until.get(party, now))
            self.busy[party] = self.busy.get(party, 0.0) + max(0.0, now + seconds - counted)
            self._until[party] = max(counted, now + seconds)


class Link(Protocol):
    """The way to one client, wherever it is."""

    turn: int  # requests sent so far

    async def call(self, header: Header, tensors: Sequence[Tensor] = (), *, to: str = SERVER) -> Parcel:
        """Send a request and give the reply, which goes to the party ``to``; first-in first-out."""
        ...

    def abort(self) -> None:
        """Let the client forget every open micro-batch and gradient in waiting."""
        ...

    async def begin(self, rounds: int, updates: int) -> None:
        """Let a client elsewhere be as it was after round ``rounds``; 0: anew, with so many updates before it."""
        ...

    async def keep(self, rounds: int) -> None:
        """Let a client elsewhere write down how it is after round ``rounds``."""
        ...


class LocalLink:
    """Calls one client party in this process; ``asked`` is told of each message of a training step, and may raise."""

    def __init__(
        self, party: ClientParty, *, meter: Meter, queues: Queues, pace: Pace | None = None,
        asked: Callable[[str, str], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        self.party, self.meter, self.queues, self.pace, self.asked = party, meter, queues, pace, asked
        self.turn = 0
        self._waiting: Parcel | None = None

    async def call(self, header: Header, tensors: Sequence[Tensor] = (), *, to: str = SERVER) -> Parcel:
        """Send a request and give the reply, which goes to the party ``to``; first-in first-out."""
        if self._waiting is not None:
            self._waiting.open()
            self._waiting = None
        name = self.party.name
        if header.verb in STEP_VERBS and header.values.get("graph"):
            self.asked(name, name)
        self.turn += 1
        header = header.but(sender=header.sender or SERVER, receiver=name, client=name, turn=self.turn)
        request = self._send(header, tensors)
        if self.pace is not None and header.verb not in BEGINNINGS:
            await self.queues.carry(request)
        if self.pace is None:
            parcel = Parcel(make=lambda: _open(self._answer(request, to)))
            if header.verb == "head_forward":
                self._waiting = parcel
            else:
                parcel.open()
            return parcel
        async with self.queues.of(name, "work")(name):
            reply = self._answer(request, to)
            seconds = self.pace.of(header.verb, header, [*request.shapes, *reply.shapes])
            await self.queues.spend(VERB_STEPS[header.verb], seconds, name, busy=(name,), own=True)
        if header.verb not in ENDS:
            await self.queues.carry(reply)
        with at(reply.header.step_name):
            return Parcel(*decode(reply))

    def abort(self) -> None:
        """Let the client forget what is under way; a head forward that nobody has looked at is dropped."""
        self.party.abort()
        self._waiting = None

    async def begin(self, rounds: int, updates: int) -> None:
        """The engine's checkpoint has what is needed."""

    async def keep(self, rounds: int) -> None:
        """The engine's checkpoint has what is needed."""

    def _send(self, header: Header, tensors: Sequence[Tensor]) -> Frame:
        """Encode and count."""
        return send(self.meter, header, tensors, self.party.name)

    def _answer(self, request: Frame, to: str) -> Frame:
        with at(request.header.step_name):
            header, tensors = decode(request)
        header, tensors = answer(self.party, header, tensors)
        return self._send(header.but(receiver=to), tensors)


def send(meter: Meter, header: Header, tensors: Sequence[Tensor], client: str) -> Frame:
    """Encode and count a frame, in the step of ``client``; one to the party itself never leaves its device."""
    with at(header.step_name):
        frame = encode(header, tensors)
        if header.sender == header.receiver:
            return frame
        meter.count(frame)
    tally = current_tally()
    if tally is not None:
        tally.bytes_up += frame.counted if header.sender == client else 0
        tally.bytes_down += frame.counted if header.receiver == client else 0
        tally.bytes_between += frame.counted if client not in (header.sender, header.receiver) else 0
    return frame


class Carrier:
    """Carries parcels between parties neither of which is the step's client (relays, edges, rings)."""

    def __init__(self, meter: Meter, queues: Queues) -> None:
        self.meter, self.queues = meter, queues

    async def carry(self, parcel: Parcel) -> Parcel:
        """The parcel as it arrives: encoded, counted, and copied once."""
        header, tensors = parcel.open()
        frame = send(self.meter, header, tensors, header.client)
        await self.queues.carry(frame)
        with at(header.step_name):
            return Parcel(*decode(frame))


def _open(frame: Frame) -> tuple[Header, list[Tensor]]:
    with at(frame.header.step_name):
        return decode(frame)


class ClientEnd:
    """A client as the driver sees it: both ends of a step, and the tail where the client holds it.

    ``first`` and ``last`` are the parties at the two ends of the route between: they get its activations and gradients.
    """

    def __init__(self, name: str, link: Link, *, first: str = SERVER, last: str = SERVER) -> None:
        self.name, self.link, self.first, self.last = name, link, first, last

    async def head_forward(self, *, step: int, micro: int, how: How) -> Parcel:
        """Steps 2 and 3."""
        header = Header("head_forward", verb="head_forward", step=step, micro=micro, values={"graph": how.graph})
        return await self.link.call(header, to=self.first)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Steps 5, 6 and 7: what the trunk gave is the request."""
        return await self._pass_on(parcel, "tail_step", how, to=self.last if how.graph else SERVER)

    async def head_backward(self, parcel: Parcel, how: How) -> StepResult:
        """Steps 9 and 10."""
        header = (await self._pass_on(parcel, "head_backward", how)).header
        return StepResult(
            self.name, header.step, float(header.value("loss")), int(header.value("tokens")),
            int(header.value("label_tokens")), bool(header.value("last")),
        )  # fmt: skip

    async def probe(self, probe: Probe, *, step: int, micro: int) -> Parcel:
        """Steps 2 and 3 without backpropagation."""
        values: dict[str, Value] = {
            "graph": True, "directions": probe.directions, "mu": probe.mu, "copy": probe.copy
        }  # fmt: skip
        header = Header("head_forward", verb="probe", step=step, micro=micro, values=values)
        return await self.link.call(header, to=self.first)

    async def probed(self, parcel: Parcel) -> None:
        """Steps 9 and 10 without backpropagation."""
        await self.link.call(*parcel.open())

    async def _pass_on(self, parcel: Parcel, verb: str, how: How, *, to: str = SERVER) -> Parcel:
        header, tensors = parcel.open()
        values = {**header.values, **told_how(how)}
        return await self.link.call(header.but(verb=verb, values=values), tensors, to=to)

    async def ask(self, verb: str, values: Mapping[str, Value] | None = None, **more: Tensor) -> Parcel:
        """Any other verb, with values and tensors."""
        header = Header(VERB_STEPS[verb], "state" if more else "control", verb, values=values or {}, names=tuple(more))
        return await self.link.call(header, list(more.values()))

    async def put(self, state: dict[str, Tensor], *, version: int = -1, reset: bool = False) -> None:
        """Step 11: give the client tensors for its slot."""
        header = Header(
            "aggregate", "state", "set_state", values={"version": version, "reset": reset}, names=tuple(state)
        )
        await self.link.call(header, list(state.values()))

    async def leave(self, client: str) -> None:
        """A client holds nothing for others."""


class Station:
    """A party's worker on the clock: one queue for all its work, or as many as it has workers."""

    def __init__(self, party: str, queues: Queues, *, workers: int = 1) -> None:
        self.party, self.queues, self.workers = party, queues, workers

    async def work(
        self, verb: str, parcel: Parcel, graph: bool, do: Callable[[], Parcel | Awaitable[Parcel]],
        pace: Pace | None = None,
    ) -> Parcel:  # fmt: skip
        """Do a verb's work when a worker is free; ``graph`` False is an evaluation.

        What ``do`` has only begun, in other processes, goes on while virtual time passes.
        """
        if pace is None:
            return await _there(do())
        async with self.queues.of(self.party, "work", workers=self.workers)(parcel.header.client):
            header, tensors = parcel.open()
            out = do()
            about = header.but(values={**header.values, "graph": graph})
            step_name = "trunk_backward" if verb == "backward" else "trunk_forward"
            seconds = pace.of(verb, about, [t.shape for t in tensors])
            await self.queues.spend(step_name, seconds, self.party, busy=(self.party,), own=False)
            return await _there(out)


async def _there(out: Parcel | Awaitable[Parcel]) -> Parcel:
    return out if isinstance(out, Parcel) else await out


__all__ = ["Carrier", "ClientEnd", "Clock", "Link", "LocalLink", "Pace", "Queues", "Station", "send"]
