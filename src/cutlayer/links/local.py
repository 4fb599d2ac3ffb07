"""The link to a client in the same process: the same frames as on a network, on a virtual clock.

A request is encoded, counted, (with a profile) carried for as long as the client's downlink takes, decoded with one
copy, answered, and the reply comes back in the same way. Without a profile time does not pass, and the head's forward
pass is made only when somebody looks at its parcel: a client that waits for its turn then holds no open graph, so a
further simulated client costs its adapter and no more. The numbers are the same either way.

Requests are pipelined: the request of a ``head_forward`` and the acknowledgement of a ``head_backward`` are under way
while the parties work, so they are counted as bytes, but nobody waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from cutlayer.clock import Clock, Fifo, VirtualClock
from cutlayer.contracts import How, Parcel, StepResult
from cutlayer.costs import Profile, leg_seconds
from cutlayer.parties.client import VERB_STEPS, ClientParty, answer
from cutlayer.parties.trunk import told_how
from cutlayer.step import at, current_tally
from cutlayer.wire import Frame, Header, Meter, Value, decode, encode


@dataclass(frozen=True)
class Pace:
    """How long things take at one party: its profile, and the seconds of a verb's work.

    ``seconds(profile, verb, rows, length, graph)``: for a batch of ``rows`` rows of ``length`` positions; ``graph``
    False is an evaluation.
    """

    profile: Profile
    seconds: Callable[[Profile, str, int, int, bool], float]

    def of(self, verb: str, header: Header, shapes: Sequence[Sequence[int]]) -> float:
        """The seconds of a verb whose request or reply carries tensors of ``shapes``; without a batch, none."""
        batch = next((shape for shape in shapes if len(shape) == 3), None)
        if batch is None:
            return 0.0
        return self.seconds(self.profile, verb, batch[0], batch[1], bool(header.values.get("graph", True)))


class LocalLink:
    """Calls one client party in this process."""

    def __init__(self, party: ClientParty, *, meter: Meter, clock: VirtualClock, pace: Pace | None = None) -> None:
        self.party, self.meter, self.clock, self.pace = party, meter, clock, pace
        self.turn = 0
        self._waiting: Parcel | None = None
        self._queues = {way: Fifo(clock, f"{party.name} {way}") for way in ("down", "work", "up")}

    async def call(self, header: Header, tensors: Sequence[Tensor] = ()) -> Parcel:
        """Send a request and give the reply; first-in first-out."""
        if self._waiting is not None:
            self._waiting.open()
            self._waiting = None
        self.turn += 1
        header = header.but(sender="server", receiver=self.party.name, client=self.party.name, turn=self.turn)
        request = self._send(header, tensors)
        if self.pace is not None and header.verb != "head_forward":
            await self._carry("down", request, self.pace.profile)
        if self.pace is None:
            parcel = Parcel(make=lambda: _open(self._answer(request)))
            if header.verb == "head_forward":
                self._waiting = parcel
            else:
                parcel.open()
            return parcel
        async with self._queues["work"](self.party.name):
            reply = self._answer(request)
            seconds = self.pace.of(header.verb, header, [*request.shapes, *reply.shapes])
            await self._pass(VERB_STEPS[header.verb], seconds)
        if header.verb != "head_backward":
            await self._carry("up", reply, self.pace.profile)
        with at(reply.header.step_name):
            return Parcel(*decode(reply))

    def _send(self, header: Header, tensors: Sequence[Tensor]) -> Frame:
        """Encode and count."""
        with at(header.step_name):
            frame = encode(header, tensors)
            self.meter.count(frame)
        tally = current_tally()
        if tally is not None:
            tally.bytes_up += frame.length if header.receiver == "server" else 0
            tally.bytes_down += frame.length if header.sender == "server" else 0
        return frame

    def _answer(self, request: Frame) -> Frame:
        with at(request.header.step_name):
            header, tensors = decode(request)
        return self._send(*answer(self.party, header, tensors))

    async def _carry(self, way: Literal["down", "up"], frame: Frame, profile: Profile) -> None:
        async with self._queues[way](self.party.name):
            seconds = leg_seconds(frame.length, profile.down if way == "down" else profile.up, profile.rtt)
            await self._pass(frame.header.step_name, seconds)

    async def _pass(self, step_name: str, seconds: float) -> None:
        tally = current_tally()
        if tally is not None:
            tally.virtual[step_name] += seconds
        await self.clock.sleep(seconds, key=self.party.name)


def _open(frame: Frame) -> tuple[Header, list[Tensor]]:
    with at(frame.header.step_name):
        return decode(frame)


class ClientEnd:
    """A client as the driver sees it: both ends of a step, and the tail where the client holds it."""

    def __init__(self, name: str, link: LocalLink) -> None:
        self.name, self.link = name, link

    async def head_forward(self, *, step: int, micro: int, how: How) -> Parcel:
        """Steps 2 and 3."""
        header = Header("head_forward", verb="head_forward", step=step, micro=micro, values={"graph": how.graph})
        return await self.link.call(header)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Steps 5, 6 and 7: what the trunk gave is the request."""
        return await self._pass_on(parcel, "tail_step", how)

    async def head_backward(self, parcel: Parcel, how: How) -> StepResult:
        """Steps 9 and 10."""
        header = (await self._pass_on(parcel, "head_backward", how)).header
        return StepResult(
            self.name, header.step, float(header.value("loss")), int(header.value("tokens")),
            int(header.value("label_tokens")), bool(header.value("last")),
        )  # fmt: skip

    async def _pass_on(self, parcel: Parcel, verb: str, how: How) -> Parcel:
        header, tensors = parcel.open()
        values = {**header.values, **told_how(how)}
        return await self.link.call(header.but(verb=verb, values=values), tensors)

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


class ServerStation:
    """The server's worker on the clock: one queue for all its work."""

    def __init__(self, clock: VirtualClock, pace: Pace | None = None) -> None:
        self.clock, self.pace = clock, pace
        self._queue = Fifo(clock, "server")

    async def work(self, verb: str, parcel: Parcel, graph: bool, do: Callable[[], Parcel]) -> Parcel:
        """Do a verb's work when the worker is free; ``graph`` False is an evaluation."""
        if self.pace is None:
            return do()
        async with self._queue(parcel.header.client):
            header, tensors = parcel.open()
            out = do()
            seconds = self.pace.of(
                verb, header.but(values={**header.values, "graph": graph}), [t.shape for t in tensors]
            )
            tally = current_tally()
            if tally is not None:
                tally.virtual["trunk_backward" if verb == "backward" else "trunk_forward"] += seconds
            await self.clock.sleep(seconds, key="server")
            return out


__all__ = ["ClientEnd", "Clock", "LocalLink", "Pace", "ServerStation"]
