"""The server asks a client that may be away for a while: the same bytes again, until each turn has its reply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from logging import getLogger
from typing import Any, TypeVar

from cutlayer.errors import CutlayerError, Disconnected, Gone, NetworkError, Refused, RequestFailed, WireError
from cutlayer.links.net.messages import WINDOW, Packed, pack_whole
from cutlayer.links.net.session import Received, Session
from cutlayer.wire import Frame

LOG = getLogger("cutlayer.net")
T = TypeVar("T")
MOST_TURNS = 2**32


async def on_loop(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Await on this loop what must run on another thread's: ``await on_loop(network, remote.call(frame))``.

    Everything in this package belongs to the loop that its sessions were made on, and is not thread-safe but for this.
    """
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


@dataclass
class _Request:
    packed: Packed
    reply: asyncio.Future[Received]
    sent_on: Session | None = None  # the newest session that it was sent on


class Remote:
    """A client as the server sees it, over as many sessions as it takes.

    A request is sent again, byte for byte, on each new session until its reply has come; the client answers a turn
    once. A client that comes back as another process (another ``instance`` in its hello) no longer holds what it was
    asked about: it is ``stale``, and requests to it end with ``Gone``, those in flight and later ones, until ``renew``
    says that it is taken back from a round that it holds.

    ``retries`` counts requests sent again, ``dropped`` replies that nobody waited for any more (late or duplicate),
    ``reconnects`` sessions after the first, ``seconds_away`` the time without one since then. ``last_turn`` is the
    newest turn that the client has been asked or has told of; a request must have a larger one.

    Args:
        name: the client's name, which its replies must bear.
        patience: seconds that it may stay away before it counts as gone.
        window: requests in flight to it; further ones wait their turn.
    """

    def __init__(self, name: str, *, patience: float, window: int = WINDOW) -> None:
        assert 0 < window <= WINDOW, window  # the client keeps the replies of so many
        self.name, self.patience = name, patience
        self.retries = self.dropped = self.reconnects = self.last_turn = 0
        # What another thread reads at any moment is one tuple each, so that it is never seen half changed.
        self._absence: tuple[float, float | None] = 0.0, None  # seconds before; since when it is away
        self._frames: tuple[int, int, Session | None] = 0, 0, None  # bytes received and sent before, and what counts on
        self._session: Session | None = None
        self._instance: object = None
        self._sessions = 0
        self._requests: dict[int, _Request] = {}  # in flight, in the order of their turns
        self._places = asyncio.Semaphore(window)
        self._new, self._here = asyncio.Event(), asyncio.Event()
        self._gone: Gone | None = None
        self._stale: Gone | None = None
        self._farewell: tuple[str, bool] | None = None
        self.heard = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def seconds_away(self) -> float:
        """Seconds without a session, after the first."""
        before, since = self._absence
        return before + (0.0 if since is None else time.monotonic() - since)

    @property
    def sessions(self) -> int:
        """How many there have been."""
        return self._sessions

    @property
    def in_flight(self) -> int:
        """Requests whose reply has not come."""
        return len(self._requests)

    def frame_bytes(self) -> tuple[int, int]:
        """Bytes of frames received and sent over all sessions, with those that came twice."""
        received, sent, session = self._frames
        return received + (session.received if session else 0), sent + (session.sent if session else 0)

    @property
    def session(self) -> Session | None:
        """The session there is now."""
        return self._session

    @property
    def stale(self) -> bool:
        """Whether it has come back as another process, and nobody has taken it back yet."""
        return self._stale is not None

    @property
    def instance(self) -> object:
        """Which process the newest session was of."""
        return self._instance

    @property
    def closed(self) -> bool:
        """Whether nothing more is asked, whoever comes."""
        return self._farewell is not None

    @property
    def waited_for(self) -> float:
        """Seconds for which it is still waited for, while it is away."""
        now, since = time.monotonic(), self._absence[1]
        return max(self.patience - (now - (since or now)), 0.0)

    def renew(self) -> None:
        """It is taken back: what it is asked from now on begins with what it holds."""
        self._stale = None

    async def attached(self) -> Session:
        """Wait until the client is here."""
        while self._session is None:
            await self._here.wait()
        return self._session

    async def serve(self, session: Session) -> None:
        """Use a session until it is over: what a ``Listener`` is given as ``on_session``, once it knows the client.

        Raises:
            Refused: the hello says what cannot be.
        """
        self.attach(session)
        await session.finished.wait()
        self.detach(session)

    def attach(self, session: Session) -> None:
        """Go on over this session; an earlier one is not used any more.

        Raises:
            Refused: the hello says what cannot be.
        """
        turn = session.hello.get("turn", 0)
        if type(turn) is not int or not 0 <= turn < MOST_TURNS:
            raise Refused(f"Client '{self.name}' says that it was last asked for turn {turn!r}, which is no turn.")
        if self._session is not None:
            self.detach(self._session)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        instance = session.hello.get("instance")
        if self._sessions and instance != self._instance:
            self._stale = Gone(self.name, "it was started again, without what it held before.", "anew")
            self._fail(self._stale)
        self.last_turn = max(self.last_turn, turn)
        self.reconnects += bool(self._sessions)
        self._sessions += 1
        self._absence = self.seconds_away, None
        self._frames = (*self.frame_bytes(), session)
        self._session, self._instance = session, instance
        self._here.set()
        if self._farewell is not None:
            self._tasks = [asyncio.ensure_future(self._part(session))]
            return
        self._gone = None
        self._tasks = [asyncio.ensure_future(work) for work in (self._send(session), self._receive(session))]

    def detach(self, session: Session) -> None:
        """This session is over; the client has ``patience`` seconds from now on to come back."""
        if self._session is not session:
            return
        self._session, self._absence = None, (self.seconds_away, time.monotonic())
        self._frames = (*self.frame_bytes(), None)
        self._here.clear()
        for task in self._tasks:
            task.cancel()
        self._wait()

    async def call(self, frame: Frame) -> Received:
        """Send a request and give its reply: header, tensors and its length in bytes.

        The frame's bytes are taken before anything is awaited, so its tensors may change afterwards. Who cancels this
        is not told of the reply.

        Raises:
            RequestFailed: the client refused it.
            Gone: the client stayed away for too long, left for good, or came back as another process.
            WireError: what came back is no reply to it.
        """
        turn = frame.header.turn
        assert turn > self.last_turn, f"turn {turn} after turn {self.last_turn}"
        self.last_turn = turn
        packed = pack_whole(frame)
        async with self._places:
            if gone := self._stale or self._gone:
                raise gone
            request = _Request(packed, asyncio.get_running_loop().create_future())
            self._requests[turn] = request
            self._new.set()
            if self._session is None:
                self._wait()
            try:
                return await request.reply
            finally:
                del self._requests[turn]

    async def close(self, reason: str = "", *, done: bool = True) -> None:
        """The end: ``done`` tells the client that the run is over. Requests in flight end with ``Gone``.

        A client that is away, or does not hear it, is told when it comes back; ``heard`` is set when it has heard it.
        """
        self._farewell = reason, done
        self._gone = Gone(self.name, reason or "the run is over.", "over")
        self._fail(self._gone)
        if self._session is not None:
            await self._part(self._session)

    async def _part(self, session: Session) -> None:
        assert self._farewell is not None
        reason, done = self._farewell
        await session.close(reason, done=done)
        if session.heard:
            self.heard.set()

    def _wait(self) -> None:
        """Have the requests in flight given up when patience is over."""
        if self._timer is None and self._gone is None:
            left = self.waited_for if self._sessions else self.patience
            self._timer = asyncio.get_running_loop().call_later(left, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        self._gone = Gone(self.name, f"it has been away for {self.patience:g} seconds. It may join again.")
        self._fail(self._gone)

    def _fail(self, error: CutlayerError) -> None:
        for request in self._requests.values():
            if not request.reply.done():
                request.reply.set_exception(error)

    async def _send(self, session: Session) -> None:
        """Send what is in flight, in the order of its turns, then what comes."""
        while True:
            waiting = (r for r in self._requests.values() if r.sent_on is not session and not r.reply.done())
            request = next(waiting, None)
            if request is None:
                self._new.clear()
                await self._new.wait()
                continue
            self.retries += request.sent_on is not None
            request.sent_on = session
            try:
                await session.send(request.packed)
            except CutlayerError:
                return  # whoever receives is told why

    async def _receive(self, session: Session) -> None:
        """Bring replies to those who wait for them."""
        try:
            while True:
                try:
                    header, tensors, length = await session.receive()
                except RequestFailed as error:
                    self._settle(error.turn, RequestFailed(error.turn, error.text, f"Client '{self.name}'"))
                    continue
                if header.sender != self.name:
                    said = f"Client '{self.name}' answered request {header.turn} in the name of '{header.sender}'."
                    self._settle(header.turn, WireError(said))
                else:
                    self._settle(header.turn, (header, tensors, length))
        except Disconnected as error:
            LOG.info("Client '%s' is away: %s", self.name, error, extra={"client": self.name})
        except NetworkError as error:  # it was refused, or has left for good
            self._gone = Gone(self.name, str(error), "left")
            self._fail(self._gone)
        except WireError as error:
            self._fail(error)
            await session.refuse(str(error))
        self.detach(session)

    def _settle(self, turn: int, found: Received | CutlayerError) -> None:
        request = self._requests.get(turn)
        if request is None and turn <= self.last_turn:
            self.dropped += 1
        elif request is None or request.sent_on is None:
            raise WireError(f"Client '{self.name}' answered request {turn}, which nobody had made.")
        elif request.reply.done():
            self.dropped += 1
        elif isinstance(found, CutlayerError):
            request.reply.set_exception(found)
        else:
            request.reply.set_result(found)
