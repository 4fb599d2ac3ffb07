"""The link to a client in another process: the same frames as in one process, over its session.

What steps and merges need is counted as it is in a simulation. What only keeps the two processes together (``begin``,
``keep``, ``abort``, ``finish``) is no part of split learning, changes no number, and is counted apart.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from torch import Tensor

from cutlayer.contracts import SERVER, Parcel
from cutlayer.errors import WireError
from cutlayer.links.local import STEP_VERBS, send
from cutlayer.parties.client import VERB_STEPS
from cutlayer.parties.holder import Holder
from cutlayer.step import at
from cutlayer.wire import Frame, Header, Meter, Value, encode

Carry = Callable[[Frame], Awaitable[tuple[Header, list[Tensor]]]]
HOUSEKEEPING = ("begin", "keep", "abort", "finish")


class NetworkLink:
    """Calls one client elsewhere.

    Args:
        name: the client's.
        carry: sends a request's frame and gives the reply, however often the connection breaks meanwhile.
        meter: counts what the run sends.
        asked: is told of each message of a training step, and may raise.
        turn: of the last request that the client has answered to a server before.
        shadow: stands for the client here, and follows it where it moves.
        most: the most head blocks that it may have, where a planner says them.
    """

    def __init__(
        self, name: str, carry: Carry, *, meter: Meter, asked: Callable[[str, str], None] = lambda *_: None,
        turn: int = 0, shadow: Holder | None = None, most: int | None = None,
    ) -> None:  # fmt: skip
        self.name, self.carry, self.meter, self.asked, self.turn = name, carry, meter, asked, turn
        self.shadow, self.most = shadow, most
        self.apart_bytes = 0  # of requests that are counted apart
        self._aborted = False

    async def call(self, header: Header, tensors: Sequence[Tensor] = (), *, to: str = SERVER) -> Parcel:
        """Send a request and give the reply, which is for the party ``to``.

        Raises:
            Gone: the client is away for longer than it is waited for.
            WireError: the reply is none to this request.
        """
        if header.verb in STEP_VERBS and header.values.get("graph"):
            self.asked(self.name, self.name)
        if self._aborted:
            self._aborted = False
            await self.tell("abort")
        request = send(self.meter, self._next(header), tensors, self.name)
        with at(VERB_STEPS[header.verb]):
            reply, found = await self.carry(request)
        if reply.receiver != to or reply.sender != self.name:
            raise WireError(
                f"Client '{self.name}' answered '{header.verb}' with a frame from '{reply.sender}' to "
                f"'{reply.receiver}', not to '{to}'. Both ends need the same version of cutlayer."
            )
        if header.verb == "move" and self.shadow is not None:
            self.shadow.on_move(header, dict(zip(header.names, tensors, strict=True)))
        send(self.meter, reply, found, self.name)  # of equal length: it is what came, counted where all is counted
        return Parcel(reply, found)

    def abort(self) -> None:
        """Let the client forget what is under way, before the next request."""
        self._aborted = True

    async def begin(self, rounds: int, updates: int) -> None:
        """Let the client be as it was after round ``rounds`` (0: anew); its part will have ``updates`` updates."""
        self._aborted = False
        cuts: dict[str, Value] = {}
        if self.shadow is not None and self.most is not None:
            cuts = {"head_blocks": len(self.shadow.head.blocks), "most": self.most}
        await self.tell("begin", {"round": rounds, "updates": updates, **cuts})

    async def keep(self, rounds: int) -> None:
        """Let the client write its checkpoint of round ``rounds``."""
        await self.tell("keep", {"round": rounds})

    async def finish(self) -> None:
        """Let the client write its result."""
        await self.tell("finish")

    async def tell(self, verb: str, values: dict[str, Value] | None = None) -> None:
        """A request that keeps the two processes together."""
        assert verb in HOUSEKEEPING
        frame = encode(self._next(Header("partition", verb=verb, values=values or {})))
        self.apart_bytes += frame.length
        await self.carry(frame)

    def _next(self, header: Header) -> Header:
        self.turn += 1
        return header.but(sender=header.sender or SERVER, receiver=self.name, client=self.name, turn=self.turn)
