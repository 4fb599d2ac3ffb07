"""The link to a client in an actor on a Ray cluster: the same frames as in one process, as remote calls.

A frame crosses as one array of bytes. Verbs of one client are first-in first-out, since they are submitted in order to
one actor. Ray's work counts as work in an executor, so the virtual clock stands still meanwhile and results are handed
back in the order of the requests: who is ready first decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from cutlayer.contracts import SERVER, Parcel
from cutlayer.errors import CutlayerError, NonFinite, WireError
from cutlayer.links.local import BEGINNINGS, ENDS, STEP_VERBS, Pace, Queues, send
from cutlayer.parties.holder import Answer
from cutlayer.parties.shadow import Shadow
from cutlayer.parties.verbs import VERB_STEPS
from cutlayer.step import at
from cutlayer.wire import Frame, Header, Meter, Value, decode, encode

HOUSEKEEPING = ("begin", "keep", "abort")  # what keeps an actor and the driver together, and is not counted
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Ask = Callable[[Bytes, str], Any]  # submits a frame for the party that gets the reply; gives a Ray reference
Explain = Callable[[Exception], Exception]


@dataclass(frozen=True)
class Failed:
    """A mistake that a user can mend, in words: the name of its error, and what it says."""

    kind: str
    text: str

    def error(self) -> CutlayerError:
        """The error, in another process."""
        return {"NonFinite": NonFinite, "WireError": WireError}.get(self.kind, CutlayerError)(self.text)


class _Submitted(Executor):
    """Takes what is a remote call already for work in a pool."""

    def submit(self, wait: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        """The reply to come."""
        future: Future[Any] = wait(*args)
        return future


class ActorLink:
    """Calls one client in an actor.

    Args:
        mirror: stands for the client here; its slot is that of the client at each checkpoint.
        ask: submits a frame to the client's actor.
        explain: what to raise for an error of Ray's.
        meter: counts what the run sends.
        queues: the queues of all parties.
        pace: how long the client's work takes; None without profiles.
        asked: is told of each message of a training step, and may raise.
    """

    def __init__(
        self, mirror: Shadow, ask: Ask, explain: Explain, *, meter: Meter, queues: Queues, pace: Pace | None = None,
        asked: Callable[[str, str], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        self.mirror, self._ask, self._explain = mirror, ask, explain
        self.meter, self.queues, self.pace, self.asked = meter, queues, pace, asked
        self.turn = 0

    async def call(self, header: Header, tensors: Sequence[Tensor] = (), *, to: str = SERVER) -> Parcel:
        """Send a request and give the reply, which goes to the party ``to``; first-in first-out.

        Raises:
            Gone: the client's actor has died.
        """
        name = self.mirror.name
        if header.verb in STEP_VERBS and header.values.get("graph"):
            self.asked(name, name)
        self.turn += 1
        header = header.but(sender=header.sender or SERVER, receiver=name, client=name, turn=self.turn)
        request = send(self.meter, header, tensors, name)
        if self.pace is None:
            _, parcel = await self._answered(request, to)
            return parcel
        if header.verb not in BEGINNINGS:
            await self.queues.carry(request)
        async with self.queues.of(name, "work")(name):
            reply, parcel = await self._answered(request, to)
            seconds = self.pace.of(header.verb, header, [*request.shapes, *reply.shapes])
            await self.queues.spend(VERB_STEPS[header.verb], seconds, name, busy=(name,), own=True)
        if header.verb not in ENDS:
            await self.queues.carry(reply)
        return parcel

    def abort(self) -> None:
        """Let the client forget what is under way, before the next request."""
        self._ask(in_one_piece(self._told("abort", {})), SERVER)  # nobody waits: if it fails, so does what comes next

    async def begin(self, rounds: int, updates: int) -> None:
        """Let the client be as its mirror is: at the start, or as a checkpoint says."""
        slot = self.mirror.slot
        values: dict[str, Value] = {
            "updates": updates, "version": slot.version, "head_blocks": len(self.mirror.head.blocks)
        }  # fmt: skip
        await self._carried(self._told("begin", values, slot.get(optimizer=True)), SERVER)

    async def keep(self, rounds: int) -> None:
        """Let the mirror be as the client is, for a checkpoint."""
        header, tensors = await self._carried(self._told("keep", {}), SERVER)
        slot = self.mirror.slot
        slot.reset_optimizer()  # where the client's was reset and has made no step since, there is nothing to put
        slot.put(dict(zip(header.names, tensors, strict=True)), version=int(header.value("version")))
        self.mirror.watch.saved = int(header.value("saved"))

    def _told(self, verb: str, values: Mapping[str, Value], state: Mapping[str, Tensor] | None = None) -> Frame:
        """A request that keeps both ends together; it is no part of split learning and not counted."""
        name, state = self.mirror.name, state or {}
        assert verb in HOUSEKEEPING
        kind = "state" if state else "control"
        header = Header("partition", kind, verb, SERVER, name, name, values=values, names=tuple(state))
        return encode(header, list(state.values()))

    async def _answered(self, request: Frame, to: str) -> tuple[Frame, Parcel]:
        with at(VERB_STEPS[request.header.verb]):
            header, tensors = await self._carried(request, to)
        reply = send(self.meter, header, tensors, self.mirror.name)  # it is what came, counted where all is counted
        if request.header.verb == "move":
            self.mirror.on_move(request.header, decoded(request))
        return reply, Parcel(header, tensors)

    async def _carried(self, request: Frame, to: str) -> tuple[Header, list[Tensor]]:
        try:
            found = await arrived(self._ask(in_one_piece(request), to))
        except Exception as error:
            raise self._explain(error) from error
        if isinstance(found, Failed):
            raise found.error()
        assert isinstance(found, np.ndarray)
        return decode(found.data)


async def arrived(reference: Any) -> Any:
    """What a remote call gives; virtual time stands still until it is there."""
    return await asyncio.get_running_loop().run_in_executor(_SUBMITTED, reference.future)


def in_words(work: Callable[[], None]) -> Failed | None:
    """Do what may fail by what a user can mend: that it has, in words, or None."""
    try:
        work()
    except CutlayerError as error:
        return Failed(type(error).__name__, str(error))
    return None


def replied(request: Bytes, to: str | None, handle: Callable[[Header, list[Tensor]], Answer]) -> Bytes | Failed:
    """The other end: the reply to a frame, made by ``handle``, for the party ``to``; None: for whom the reply says."""
    try:
        header, shown = handle(*decode(request.data))
        return in_one_piece(encode(header if to is None else header.but(receiver=to), shown))
    except CutlayerError as error:
        return Failed(type(error).__name__, str(error))


def in_one_piece(frame: Frame) -> Bytes:
    """A frame's bytes, as an array that Ray passes on without a copy of its own."""
    whole = np.empty(frame.length, dtype=np.uint8)
    start = 0
    for chunk in frame.chunks():
        size = len(chunk)
        whole[start : start + size] = np.frombuffer(chunk, dtype=np.uint8)
        start += size
    return whole


def decoded(frame: Frame) -> dict[str, Tensor]:
    """A frame's tensors by name."""
    header, tensors = decode(frame)
    return dict(zip(header.names, tensors, strict=True))


_SUBMITTED = _Submitted()
