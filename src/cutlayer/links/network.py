"""The link to a client in another process: the same frames as in one process, over its session.

What steps and merges need is counted as it is in a simulation. What only keeps the two processes together (``begin``,
``hold``, ``keep``, ``retime``, ``lead``, ``abort``, ``finish``) is no part of split learning, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

from torch import Tensor

from cutlayer.asking import HOUSEKEEPING
from cutlayer.contracts import SERVER, Parcel
from cutlayer.errors import CutlayerError, WireError
from cutlayer.leading import Lead
from cutlayer.links.local import STEP_VERBS, send
from cutlayer.parties.holder import Holder
from cutlayer.parties.verbs import VERB_STEPS
from cutlayer.presence import Lost
from cutlayer.step import at
from cutlayer.wire import Frame, Header, Meter, Value, encode

Carry = Callable[[Frame], Awaitable[tuple[Header, list[Tensor]]]]
Judge = Callable[[Header, Sequence[Tensor], Header, Sequence[Tensor]], None]


class NetworkLink:
    """Calls one client elsewhere.

    Args:
        name: the client's.
        carry: sends a request's frame and gives the reply, however often the connection breaks meanwhile.
        meter: counts what the run sends.
        asked: is told of each message of a training step, and may raise.
        turn: of the last request that the client has answered to a server before.
        goes_on: whether the run goes on without the client after this error; then it is ``Lost``.
        wrote: is told of each round that the client has written down.
        shadow: stands for the client here, and follows it where it moves.
        most: the most head blocks that it may have, where a planner says them.
        judge: sees each request and its reply before anybody uses it, and raises WireError if that is none.

    ``held`` is the newest round as at whose begin the client can be set again.
    """

    def __init__(
        self, name: str, carry: Carry, *, meter: Meter, asked: Callable[[str, str], None] = lambda *_: None,
        turn: int = 0, goes_on: Callable[[CutlayerError], bool] = lambda _: False,
        wrote: Callable[[int], None] = lambda _: None, shadow: Holder | None = None, most: int | None = None,
        judge: Judge = lambda *_: None,
    ) -> None:  # fmt: skip
        self.name, self.carry, self.meter, self.asked, self.turn = name, carry, meter, asked, turn
        self.goes_on, self.wrote, self.shadow, self.most = goes_on, wrote, shadow, most
        self.judge = judge
        self.held = 0
        self.apart_bytes = 0  # of requests that are counted apart
        self._lost = False
        self._aborted = False
        self._led: Lead | None = None

    async def call(self, header: Header, tensors: Sequence[Tensor] = (), *, to: str = SERVER) -> Parcel:
        """Send a request and give the reply, which is for the party ``to``.

        Raises:
            Lost: the client does not answer any more, and the run goes on without it.
            Gone: it is away for longer than it is waited for, and the run does not.
            WireError: the reply is none to this request.
        """
        if header.verb in STEP_VERBS and header.values.get("graph"):
            self.asked(self.name, self.name)
        if self._aborted:
            self._aborted = False
            await self.tell("abort")
        request = send(self.meter, self._next(header), tensors, self.name)
        with at(VERB_STEPS[header.verb]):
            reply, found = await self._carried(request, tensors, to)
        if header.verb == "move" and self.shadow is not None:
            self.shadow.on_move(header, dict(zip(header.names, tensors, strict=True)))
        send(self.meter, reply, found, self.name)  # of equal length: it is what came, counted where all is counted
        return Parcel(reply, found)

    async def host(self, header: Header, tensors: Sequence[Tensor], *, to: str) -> Parcel:
        """Send a request of another client's step and give the reply, which is for ``to``; neither is counted here.

        Raises:
            Lost, Gone, WireError: as ``call`` does.
        """
        frame = encode(self._next(header), tensors)
        return Parcel(*await self._carried(frame, tensors, to))

    def refuse(self, error: CutlayerError) -> NoReturn:
        """What the client has sent passed the judge, and yet it cannot be computed with.

        Raises:
            Lost: the run goes on without the client.
            CutlayerError: this one; the run does not.
        """
        said = WireError(f"What client '{self.name}' sent cannot be computed with: {error}")
        if self._lost or not self.goes_on(said):
            raise error
        self._lost = True
        raise Lost(self.name) from error

    def abort(self) -> None:
        """Let the client forget what is under way, before the next request."""
        self._aborted = True

    async def begin(self, rounds: int, updates: int) -> None:
        """Let the client be as it was after round ``rounds`` (0: anew); its part will have ``updates`` updates."""
        self._aborted = self._lost = False
        self._led = None
        cuts: dict[str, Value] = {}
        if self.shadow is not None and self.most is not None:
            cuts = {"head_blocks": len(self.shadow.head.blocks), "most": self.most}
        await self.tell("begin", {"round": rounds, "updates": updates, **cuts})
        self.held = rounds

    async def hold(self, rounds: int) -> None:
        """Let the client remember how it is at the begin of round ``rounds``, unless it has just written that down."""
        if self.held != rounds:
            await self._write("hold", rounds)

    async def keep(self, rounds: int) -> None:
        """Let the client write its checkpoint of round ``rounds``."""
        await self._write("keep", rounds)

    async def _write(self, verb: str, rounds: int) -> None:
        await self.tell(verb, {"round": rounds})
        self.held = rounds
        self.wrote(rounds)

    async def retime(self, ahead: int) -> None:
        """Let the client's learning rate end after so many more updates of its part."""
        await self.tell("retime", {"ahead": ahead})

    async def lead(self, lead: Lead) -> None:
        """Tell the client its place among the others, unless it was told the same already."""
        if lead != self._led:
            await self.tell("lead", lead.values())
            self._led = lead

    async def finish(self) -> None:
        """Let the client write its result."""
        await self.tell("finish")

    async def tell(self, verb: str, values: dict[str, Value] | None = None) -> None:
        """A request that keeps the two processes together."""
        assert verb in HOUSEKEEPING
        frame = encode(self._next(Header("partition", verb=verb, values=values or {})))
        self.apart_bytes += frame.length
        await self._carried(frame, (), SERVER)

    async def _carried(self, frame: Frame, tensors: Sequence[Tensor], to: str) -> tuple[Header, list[Tensor]]:
        if self._lost:  # what it holds is no longer what the run thinks
            raise Lost(self.name)
        try:
            reply, found = await self.carry(frame)
            if reply.receiver != to or reply.sender != self.name:
                raise WireError(
                    f"Client '{self.name}' answered '{frame.header.verb}' with a frame from '{reply.sender}' to "
                    f"'{reply.receiver}', not to '{to}'. Both ends need the same version of cutlayer."
                )
            self.judge(frame.header, tensors, reply, found)
            return reply, found
        except CutlayerError as error:
            if not self.goes_on(error):
                raise
            self._lost = True
            raise Lost(self.name) from error

    def _next(self, header: Header) -> Header:
        self.turn += 1
        return header.but(sender=header.sender or SERVER, receiver=self.name, client=self.name, turn=self.turn)
