"""One stream between a client and a server, the same at both ends: frames with credits, heartbeats, an orderly end.

Four things go on at once. One task reads whatever comes, always, and so never keeps the other end from writing. One
writes what the session itself has to say (heartbeats, credits). One watches for silence. And the owner sends and
receives frames. What the other end does wrong ends this session with words, here and there, and touches nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Protocol

from torch import Tensor

from cutlayer.errors import CutlayerError, Disconnected, Dismissed, NetworkError, Refused, RequestFailed, WireError
from cutlayer.links.net.messages import (
    CHUNK,
    MOST_CREDIT,
    WINDOW,
    Message,
    Packed,
    Type,
    cut,
    pack,
    pack_bye,
    pack_frame,
    pack_number,
    read,
)
from cutlayer.wire import Frame, Header, Incoming, Limits

LOG = getLogger("cutlayer.net")
FAREWELL = 5.0  # seconds that a last message may take before the stream is cut
Received = tuple[Header, list[Tensor], int]


class Pipe(Protocol):
    """A stream of messages as gRPC gives it; ``Disconnected`` is all that it raises."""

    async def read(self) -> bytes | None:
        """The next message; None where the other end has ended the stream."""

    async def write(self, data: bytes) -> None:
        """Write a message; returns when the transport has taken it."""

    async def end(self) -> None:
        """Say that no more will be written."""

    def cut(self) -> None:
        """End the stream at once."""


@dataclass(frozen=True)
class Heartbeat:
    """How a dead or frozen other end is noticed.

    ``every``: after so many seconds in which nothing was heard or nothing was said, it is asked whether it is there.
    ``silence``: seconds without a word after which it counts as lost; a link must be able to carry one chunk (1 MiB)
    in that time. The same time is given for the next chunk of a frame that has begun.
    """

    every: float = 20.0
    silence: float = 60.0


class Session:
    """A stream that both ends have agreed on.

    ``peer`` is the common name in the other end's certificate ("" where there is none), ``hello`` and ``welcome`` what
    the two told each other. ``sent`` and ``received`` count bytes of frames. ``ended`` is set when it is over, and
    ``finished`` when the stream need not be kept for last words any more. ``heard``: the other end has answered a
    goodbye that said that the run is done.

    Args:
        pipe: the stream.
        peer: the common name of the other end.
        hello: what the client told.
        welcome: what the server told.
        limits: the most that a frame may hold.
        heartbeat: how a lost other end is noticed.
        window: frames taken before their owner has asked for them.
    """

    def __init__(
        self, pipe: Pipe, *, peer: str, hello: dict[str, Any], welcome: dict[str, Any], limits: Limits | None = None,
        heartbeat: Heartbeat | None = None, window: int = WINDOW,
    ) -> None:  # fmt: skip
        self.peer, self.hello, self.welcome = peer, hello, welcome
        self.sent = self.received = 0
        self.heard = False
        self.ended, self.finished = asyncio.Event(), asyncio.Event()
        self._pipe, self._limits, self._heartbeat = pipe, limits or Limits(), heartbeat or Heartbeat()
        self._inbox: asyncio.Queue[Received | CutlayerError] = asyncio.Queue()
        self._incoming: Incoming | None = None
        self._granted = 0  # frames that the other end may still begin
        self._credits = 0  # frames that we may still begin
        self._end: CutlayerError | None = None
        self._owed_credit, self._owed_pong, self._owed_ping = window, False, False
        self._to_say, self._may_send = asyncio.Event(), asyncio.Event()
        self._one_frame, self._one_message = asyncio.Lock(), asyncio.Lock()
        self._heard = self._moved = self._said = self._asked = time.monotonic()
        self._to_say.set()
        self._tasks: list[asyncio.Task[None]] = []
        for work in (self._read(), self._say(), self._watch()):
            self._start(work)

    async def send(self, frame: Frame | Packed) -> None:
        """Send a frame, as soon as the other end takes one; its tensors may change when this returns.

        A send that is cancelled in the middle of its frame ends the session.

        Raises:
            Disconnected, Refused, Dismissed, WireError: the session is over.
        """
        messages = frame.messages if isinstance(frame, Packed) else pack_frame(frame)
        await self._send(messages)
        self.sent += frame.length

    async def error(self, turn: int, text: str) -> None:
        """Send, in place of a reply, that request ``turn`` was refused, and why.

        Raises:
            Disconnected, Refused, Dismissed, WireError: the session is over.
        """
        await self._send([pack_number(Type.ERROR, turn, text)])

    async def receive(self) -> Received:
        """The next frame: header, tensors, and its length in bytes.

        Raises:
            RequestFailed: the other end refused a request; the session goes on.
            Disconnected, Refused, Dismissed: the session is over.
            WireError: it is over because the other end broke the protocol.
        """
        found = await self._inbox.get()
        if isinstance(found, CutlayerError) and not isinstance(found, RequestFailed):
            self._inbox.put_nowait(found)  # for whoever asks next
            raise found
        self._owed_credit += 1
        self._to_say.set()
        if isinstance(found, RequestFailed):
            raise found
        return found

    async def close(self, reason: str = "", *, done: bool = False) -> None:
        """End the session; ``done``: the other end need not come back. What it has sent before is still received."""
        words = reason or ("The run is done." if done else "The session was closed.")
        await self._part(pack_bye(words, done=done), Dismissed(words) if done else Disconnected(words))

    async def refuse(self, reason: str) -> None:
        """End the session, and tell the other end not to come back."""
        await self._part(pack(Type.REFUSED, cut(reason)), Refused(reason))

    def drop(self, reason: str) -> None:
        """End the session at once: the other end is not there any more."""
        self._over(Disconnected(reason))

    async def _part(self, last: bytes, end: CutlayerError) -> None:
        if self._end is not None:
            await self.finished.wait()
            return
        self._over(end, gently=True)
        try:
            async with asyncio.timeout(FAREWELL):
                async with self._one_message:
                    await self._pipe.write(last)
                await self._pipe.end()
                # The other end may be writing. A stream that ended now would fail its write, and gRPC would then give
                # it that failure in place of our last words; so it is left to the other end, which knows when.
                await asyncio.wait({self._tasks[0]})
        except (TimeoutError, NetworkError) as error:
            LOG.debug("The last words to '%s' were not heard: %s", self.peer, error)
        finally:
            self._stop()

    async def _send(self, messages: Iterable[bytes]) -> None:
        async with self._one_frame:
            while not self._credits:
                self._alive()
                self._may_send.clear()
                await self._may_send.wait()
            self._alive()
            self._credits -= 1
            try:
                for message in messages:
                    await self._write(message)
            except asyncio.CancelledError:
                self._over(Disconnected("Sending was given up in the middle of a frame."))
                raise

    def _alive(self) -> None:
        if self._end is not None:
            raise self._end

    async def _write(self, message: bytes) -> None:
        async with self._one_message:
            self._alive()
            try:
                await self._pipe.write(message)
                self._said = time.monotonic()
            except Disconnected as error:
                self._over(error)
                self._alive()

    def _over(self, end: CutlayerError, *, gently: bool = False) -> None:
        """End it once, for everybody that waits; ``gently``: what was written may still arrive."""
        if self._end is not None:
            return
        self._end = end
        self._incoming = None
        self._inbox.put_nowait(end)
        self._may_send.set()
        self.ended.set()
        if not gently:
            self._stop()

    def _stop(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        self._pipe.cut()
        self.finished.set()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """A task of the session's own: that the session ends is told to its owner, not to the task's."""

        def over(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, CutlayerError):
                LOG.error("A session with '%s' failed here.", self.peer, exc_info=error)
                error = Disconnected("The session failed at this end; its log says why.")
            if error is not None:
                self._over(error)

        task = asyncio.ensure_future(work)
        task.add_done_callback(over)
        self._tasks.append(task)

    async def _read(self) -> None:
        wanted = True
        while (data := await self._pipe.read()) is not None:
            self._heard = time.monotonic()
            try:
                if wanted and self._end is None:
                    self._take(read(data))
                else:  # what comes after our last words is not wanted, but that they were heard is noted
                    self.heard = self.heard or data[:1] == bytes([Type.BYE])
            except Dismissed as end:
                wanted = False
                self._start(self._part(pack_bye("", done=True), end))
            except WireError as error:
                wanted, self._incoming = False, None
                # By another task: a reader that waits to write could wait for an end that waits likewise.
                self._start(self._part(pack(Type.REFUSED, cut(f"The protocol was broken. {error}")), error))
        if wanted:  # else our last words are on their way, and say why it is over
            raise Disconnected("The other end closed the connection without a word.")

    def _take(self, message: Message) -> None:
        """Act on one message.

        Raises:
            WireError: it is not one that may come now.
            Disconnected, Refused, Dismissed: it ends the session.
        """
        match message.type:
            case Type.FRAME_HEAD:
                if self._incoming is not None:
                    raise WireError("A frame begins before the one before it has ended.")
                self._spend()
                self._incoming = Incoming(message.data, self._limits)
                self._progress()
            case Type.CHUNK:
                if self._incoming is None:
                    raise WireError("A chunk came that belongs to no frame.")
                if len(message.data) != min(CHUNK, self._incoming.missing):
                    raise WireError(f"A chunk of {len(message.data)} bytes is neither full nor the last.")
                self._incoming.fill(message.data)
                self._progress()
            case Type.ERROR:
                self._spend()
                self._inbox.put_nowait(RequestFailed(message.number, message.text))
            case Type.CREDIT:
                self._credits += message.number
                if not message.number or self._credits > MOST_CREDIT:
                    raise WireError(f"A CREDIT of {message.number} is not accepted.")
                self._may_send.set()
            case Type.PING:
                self._owed_pong = True
                self._to_say.set()
            case Type.PONG:
                pass  # that something was heard is all that it says
            case Type.REFUSED:
                raise Refused(message.text)
            case Type.BYE:
                raise Dismissed(message.text) if message.number else Disconnected(message.text)
            case _:
                raise WireError(f"A {message.type.name} came after the greetings.")

    def _spend(self) -> None:
        if not self._granted:
            raise WireError("A frame came that this end has not yet agreed to take.")
        self._granted -= 1

    def _progress(self) -> None:
        """Hand over the frame if it is whole."""
        self._moved = time.monotonic()
        incoming = self._incoming
        if incoming is not None and not incoming.missing:
            self._incoming = None
            self.received += incoming.length
            self._inbox.put_nowait((*incoming.done(), incoming.length))

    async def _say(self) -> None:
        """Write credits and heartbeats; those that pile up are said once."""
        while True:
            await self._to_say.wait()
            self._to_say.clear()
            if self._owed_credit:
                count, self._owed_credit = self._owed_credit, 0
                self._granted += count  # before it is written: its answer may come before the writer wakes up
                await self._write(pack_number(Type.CREDIT, count))
            if self._owed_pong:
                self._owed_pong = False
                await self._write(pack(Type.PONG))
            if self._owed_ping:
                self._owed_ping = False
                await self._write(pack(Type.PING))

    async def _watch(self) -> None:
        """Notice silence, and a frame that does not get on."""
        every, silence = self._heartbeat.every, self._heartbeat.silence
        while True:
            await asyncio.sleep(min(every, silence) / 4)
            now = time.monotonic()
            if now - self._heard > silence:
                raise Disconnected(f"The other end has not been heard for {silence:g} seconds.")
            if self._incoming is not None and now - self._moved > silence:
                raise Disconnected(f"A frame that the other end began has not got on for {silence:g} seconds.")
            if now - min(self._heard, self._said) > every and now - self._asked > every:
                self._owed_ping, self._asked = True, now
                self._to_say.set()
