"""A client answers: each request once, however often the connection breaks and the request is sent again."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging import getLogger
from typing import Any

from torch import Tensor

from cutlayer.errors import CutlayerError, Disconnected, Dismissed, RequestFailed, WireError
from cutlayer.links.net.messages import WINDOW, Packed, Type, pack_number, pack_whole
from cutlayer.links.net.session import Session
from cutlayer.wire import Header, encode

LOG = getLogger("cutlayer.net")
FAILED = "The client failed while it answered; its own log says why."
Connect = Callable[[dict[str, Any]], Awaitable[Session]]
Handle = Callable[[Header, list[Tensor]], tuple[Header, Sequence[Tensor]]]


@dataclass(frozen=True)
class Again:
    """When to try again: after ``first`` seconds, then twice as long each time up to ``most``, half of it by chance.

    After ``give_up`` seconds without a session it is over.
    """

    first: float = 0.5
    most: float = 60.0
    give_up: float = 24 * 3600.0

    def pause(self, tries: int, draw: random.Random | None = None) -> float:
        """Seconds to wait after so many tries; ``draw`` is where chance comes from."""
        seconds: float = min(self.first * 2 ** min(tries, 30), self.most) * (draw or random.Random()).uniform(0.5, 1.0)
        return seconds


async def answer(
    connect: Connect, handle: Handle, *, again: Again | None = None, draw: random.Random | None = None,
    resent: Callable[[int, int], None] = lambda *_: None,
) -> str:  # fmt: skip
    """Serve requests until the other end says that there are no more; its last words.

    ``handle`` runs in a thread of its own, one request after another. What it answered (or the text of the
    ``CutlayerError`` that it raised) is kept as the bytes that were sent, for as many turns as there can be in flight.

    Args:
        connect: opens a session; it is given what the hello must say of this end (``turn``, ``instance``).
        handle: answers a request.
        again: when to try again.
        draw: where chance comes from.
        resent: is told the turn and the bytes of a reply that is about to be sent once more, and may refuse it.

    Raises:
        Refused: the server turned this client away, or it another.
        Disconnected: there was no session for too long.
        WireError: the server broke the protocol.
        Exception: what ``handle`` raised beside a CutlayerError; the server was told that the client failed, no more.
    """
    return await _Answering(connect, handle, again or Again(), draw or random.Random(), resent).run()


@dataclass
class _Asked:
    about: str
    reply: asyncio.Future[Packed | str]  # the reply's bytes, or why the request was refused
    sent: bool = False  # or begun to be


class _Answering:
    def __init__(
        self, connect: Connect, handle: Handle, again: Again, draw: random.Random, resent: Callable[[int, int], None]
    ) -> None:
        self.connect, self.handle, self.again, self.draw, self.resent = connect, handle, again, draw, resent
        self.instance = secrets.token_hex(8)
        self.turn = 0  # the newest that was taken
        self._kept: dict[int, _Asked] = {}  # by turn, oldest first
        self._todo: asyncio.Queue[tuple[Header, list[Tensor], _Asked]] = asyncio.Queue()
        self._crash: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._thread = ThreadPoolExecutor(1, "cutlayer-answer")

    async def run(self) -> str:
        """Connect, serve, and again."""
        working = asyncio.ensure_future(self._work())
        try:
            words = await self._sessions()
            await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
            return words
        finally:
            working.cancel()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _sessions(self) -> str:
        tries, since = 0, time.monotonic()
        while True:
            try:
                session = await self.connect({"turn": self.turn, "instance": self.instance})
                began = self.turn
                try:
                    await self._serve(session)
                finally:
                    since = time.monotonic()
                    tries = 0 if self.turn > began else tries
                    await session.close("This client closed the session.")
            except Dismissed as end:
                return str(end)
            except Disconnected as error:
                if time.monotonic() - since > self.again.give_up:
                    raise
                seconds = self.again.pause(tries, self.draw)
                tries += 1
                LOG.warning("%s Trying again in %.1f seconds.", error, seconds)
                await asyncio.wait({self._crash}, timeout=seconds)
                if self._crash.done():
                    raise self._crash.result() from None

    async def _serve(self, session: Session) -> None:
        """Take requests and send replies until the session is over."""
        outgoing: asyncio.Queue[tuple[int, _Asked]] = asyncio.Queue()
        tasks = [
            asyncio.ensure_future(work) for work in (self._take(session, outgoing), self._reply(session, outgoing))
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, session: Session, outgoing: asyncio.Queue[tuple[int, _Asked]]) -> None:
        while True:
            try:
                header, tensors, _ = await session.receive()
            except RequestFailed as error:
                await session.refuse("A server makes requests, and refuses none.")
                raise WireError("The server sent an error in place of a request.") from error
            outgoing.put_nowait((header.turn, await self._asked(header, tensors)))

    async def _asked(self, header: Header, tensors: list[Tensor]) -> _Asked:
        """The request of this turn: one that is known, or a new one, which is then worked on."""
        about = repr(header)  # text, since a number that is not a number is not equal to itself
        known = self._kept.get(header.turn)
        if known is not None and known.about == about:
            return known
        asked = _Asked(about, asyncio.get_running_loop().create_future())
        if known is not None:
            asked.reply.set_result(f"Turn {header.turn} was another request before.")
        elif header.turn <= self.turn:
            asked.reply.set_result(f"Turn {header.turn} is over; this client was last asked for turn {self.turn}.")
        else:
            while len(self._kept) >= WINDOW:  # the oldest has its reply, unless the server gave up waiting for it
                oldest = next(iter(self._kept))
                await asyncio.wait({self._kept[oldest].reply})
                del self._kept[oldest]
            self.turn = header.turn
            self._kept[header.turn] = asked
            self._todo.put_nowait((header, tensors, asked))
        return asked

    async def _reply(self, session: Session, outgoing: asyncio.Queue[tuple[int, _Asked]]) -> None:
        while True:
            turn, asked = await outgoing.get()
            reply = await asyncio.shield(asked.reply)
            if asked.sent:
                reply = self._again(turn, reply)
            asked.sent = True
            if isinstance(reply, Packed):
                await session.send(reply)
            else:
                await session.error(turn, reply)
            if self._crash.done() and reply == FAILED:
                await session.close("The client failed.")
                raise self._crash.result()

    def _again(self, turn: int, reply: Packed | str) -> Packed | str:
        """A reply that was sent before; or why it may not be sent once more."""
        size = reply.length if isinstance(reply, Packed) else len(pack_number(Type.ERROR, turn, reply))
        try:
            self.resent(turn, size)
        except CutlayerError as error:
            return str(error)
        return reply

    async def _work(self) -> None:
        """Answer what there is, one after another, whether there is a session or not."""
        while True:
            header, tensors, asked = await self._todo.get()
            try:
                found: Packed | str = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._answered, header, tensors
                )
            except CutlayerError as error:
                found = str(error)
            except Exception as error:
                found = FAILED
                self._crash.set_result(error)
            asked.reply.set_result(found)
            if self._crash.done():
                return

    def _answered(self, header: Header, tensors: list[Tensor]) -> Packed:
        """In the thread: the reply as bytes, taken before the next request can change a tensor."""
        reply, out = self.handle(header, tensors)
        return pack_whole(encode(reply.but(turn=header.turn), out))
