"""The server's end: who may come in, how many at once, and that nobody who misbehaves is in another's way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from logging import getLogger
from typing import Any
from urllib.parse import unquote

import grpc

from cutlayer.errors import CutlayerError, Disconnected, NetworkError, Refused, WireError
from cutlayer.links.net.connecting import check_versions, versions
from cutlayer.links.net.grpc_pipe import METHOD, SERVICE, GrpcPipe, Options, options
from cutlayer.links.net.messages import Type, cut, pack, pack_bye, pack_greeting, read, read_greeting
from cutlayer.links.net.room import EACH, Room
from cutlayer.links.net.session import FAREWELL, Heartbeat, Session
from cutlayer.links.net.tls import Credentials, Peer, has_address, is_loopback, peer_of, split_address
from cutlayer.wire import Limits

LOG = getLogger("cutlayer.net")
NAME = 200  # characters of a client's name
STREAMS = 16  # on one connection with a certificate; a client has one session on each
QUIET = 10.0  # seconds in which who is turned away at the door, and why, is logged once

Admit = Callable[[str, str, dict[str, Any]], Awaitable[dict[str, Any]]]
OnSession = Callable[[Session], Awaitable[None]]


class Listener:
    """Takes sessions on one address.

    A second session of the same client (certificate, run, name, and what it comes for) replaces the first: a client
    that lost its connection is back before the server has noticed. Who is revoked, or has more streams open than one
    certificate may have, is turned away at once by the status of the stream, and takes up no room.

    Args:
        bind: ``HOST:PORT``; port 0 lets the system choose.
        credentials: the server's; None for plain text, which is only offered to this machine itself.
        admit: is given the peer's common name, its token and its hello, and gives what the welcome is to say; it
            raises ``Refused`` (do not come back) or ``Disconnected`` (come back later). It must check that the name in
            the hello belongs to the peer and the token.
        on_session: serves a session; the session is closed when this returns.
        limits: the most that a frame of a client may hold, by its hello, once it was admitted.
        heartbeat: how a lost client is noticed.
        hello_timeout: seconds for a handshake, and again for a hello.
        revoked: whether the certificate of this serial number is revoked; asked at each session, and by ``recheck``.
        max_sessions: sessions at once.
        max_each: streams at once of one certificate, by its name: sessions, those that wait and those that part.
        max_waiting: streams that have not been greeted yet, at once.
        max_connections: connections at once, those in their handshake included; None: as many as there can be.
    """

    def __init__(
        self,
        bind: str,
        credentials: Credentials | None,
        admit: Admit,
        on_session: OnSession,
        *,
        limits: Callable[[dict[str, Any]], Limits] = lambda hello: Limits(),
        heartbeat: Heartbeat | None = None,
        hello_timeout: float = 20.0,
        revoked: Callable[[int], bool] = lambda serial: False,
        max_sessions: Callable[[], int] = lambda: 256,
        max_each: Callable[[str], int] = lambda name: EACH,
        max_waiting: int = 128,
        max_connections: int | None = None,
    ) -> None:
        self.bind, self.credentials, self.admit, self.on_session = bind, credentials, admit, on_session
        self.limits, self.heartbeat = limits, heartbeat or Heartbeat()
        self.hello_timeout, self.revoked = hello_timeout, revoked
        self.max_sessions, self.max_connections = max_sessions, max_connections
        self.room = Room(max_each, max_waiting, lambda: max_sessions() + max_waiting)
        self.sessions: dict[tuple[str, ...], Session] = {}
        self.refusals: Counter[str] = Counter()  # of those who were turned away, by their peer's name
        self.reasons: Counter[str] = Counter()  # the same by a word for the reason, and who may come again ("later")
        self._serials: dict[Session, int | None] = {}
        self._logged: dict[tuple[str, str], float] = {}  # when, by name and reason
        self._ending: set[asyncio.Future[None]] = set()
        self._stopping = False
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listen; the port.

        Raises:
            NetworkError: the address cannot be had, or plain text would leave this machine.
        """
        host, port = split_address(self.bind)
        if self.credentials is None and not is_loopback(host):
            raise NetworkError(
                f"Without keys, {self.bind} would let anybody read and join. Bind to 127.0.0.1, or make keys with "
                "'cutlayer keys' and give them with --keys."
            )
        # No limit of gRPC's on all streams together: whoever used it up would lock all others out.
        server = grpc.aio.server(options=self._options())
        handler = grpc.stream_stream_rpc_method_handler(self._handle)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        try:
            if self.credentials is None:
                found = server.add_insecure_port(self.bind)
            else:
                own = self.credentials
                secret = grpc.ssl_server_credentials([(own.key, own.certificate)], own.ca, require_client_auth=True)
                found = server.add_secure_port(self.bind, secret)
        except RuntimeError as error:
            if not has_address(host):
                raise NetworkError(
                    f"{self.bind} cannot be listened at: this machine knows no address of '{host}'. Check the name, or "
                    "give an address of the machine's own, such as 0.0.0.0."
                ) from error
            raise NetworkError(
                f"{self.bind} cannot be listened at. Is another server using port {port}, and is the address this "
                "machine's?"
            ) from error
        self._server = server
        await server.start()
        return int(found)

    def _options(self) -> Options:
        bounded: Options = []
        if self.credentials is not None:  # without, all clients of a process share one connection
            bounded.append(("grpc.max_concurrent_streams", STREAMS))
        if self.max_connections is not None:
            bounded.append(("grpc.max_allowed_incoming_connections", self.max_connections))
        return [
            *options(Limits(), self.heartbeat),
            *bounded,
            ("grpc.so_reuseport", 0),  # two servers on one port would share its clients without a word
            ("grpc.server_handshake_timeout_ms", int(self.hello_timeout * 1000)),
            ("grpc.max_connection_idle_ms", int(max(self.hello_timeout, 1.0) * 1000)),
        ]

    async def stop(self, grace: float = FAREWELL) -> None:
        """Say goodbye to all (they may come back to the next server), and stop within ``grace`` seconds."""
        self._stopping = True
        closing = [session.close("The server is going down.") for session in self.sessions.values()]
        await asyncio.gather(*closing)
        if self._server is not None:
            await self._server.stop(grace)

    async def recheck(self) -> None:
        """End the sessions whose certificates have been revoked since they began."""
        ending = []
        for session, serial in list(self._serials.items()):
            if serial is not None and self.revoked(serial):
                self._count(session.peer, "revoked")
                LOG.warning("Ended the session of '%s': its certificate was revoked.", session.peer, extra={
                    "client": session.peer, "reason": "revoked"
                })  # fmt: skip
                ending.append(session.refuse("Your certificate has been revoked."))
        await asyncio.gather(*ending)

    def _count(self, peer: str, reason: str) -> None:
        self.refusals[peer] += 1
        self.reasons[reason] += 1

    async def _handle(self, _: Any, context: Any) -> None:
        """One stream, from its hello to its end."""

        async def nothing() -> None:
            """A server says that by returning from this handler."""

        pipe = GrpcPipe(context.read, context.write, nothing, lambda: None)
        peer = Peer()
        try:
            peer = self._peer(context)
            if peer.serial is not None and self.revoked(peer.serial):
                raise Refused("Your certificate has been revoked. Ask the operator for a new one.", reason="revoked")
        except Refused as error:
            self._turn_away(peer, context, str(error), error.reason)
            return
        if full := self.room.full(peer.name):
            self._turn_away(peer, context, full, "later")
        else:
            with self.room.stream(peer.name):
                session = await self._let_in(pipe, peer, context)
                if session is not None:
                    await self._serve(session, peer)

    def _turn_away(self, peer: Peer, context: Any, said: str, reason: str) -> None:
        """Let the stream end with words in its status: those need not be waited for, and whoever comes thousands of
        times a second fills no log."""
        later = reason == "later"
        context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED if later else grpc.StatusCode.PERMISSION_DENIED)
        context.set_details(said)
        self.reasons[reason] += 1
        if not later:
            self.refusals[peer.name] += 1
        now, key = time.monotonic(), (peer.name, reason)
        if now - self._logged.get(key, -QUIET) >= QUIET:
            self._logged[key] = now
            about = {"client": peer.name, "peer": _where(context), "reason": reason}
            LOG.warning("Turned '%s' (%s) away: %s", peer.name, _where(context), said, extra=about)

    async def _let_in(self, pipe: GrpcPipe, peer: Peer, context: Any) -> Session | None:
        """The session, once both have greeted; None: it was refused, in words."""
        try:
            return await self._greeted(pipe, peer, context)
        except (Refused, WireError) as error:
            reason = error.reason if isinstance(error, Refused) else "protocol"
            self._count(peer.name, reason)
            about = {"client": peer.name, "peer": _where(context), "reason": reason}
            LOG.warning("Refused a session of '%s' (%s): %s", peer.name, _where(context), error, extra=about)
            await self._last_word(pipe, pack(Type.REFUSED, cut(str(error))))
        except CutlayerError as error:
            self.reasons["later"] += 1
            about = {"client": peer.name, "peer": _where(context), "reason": "later"}
            LOG.info("No session with '%s' (%s): %s", peer.name, _where(context), error, extra=about)
            await self._last_word(pipe, pack_bye(str(error), done=False))
        return None

    def _peer(self, context: Any) -> Peer:
        if self.credentials is None:
            return Peer()
        found: Sequence[bytes] = context.auth_context().get("x509_pem_cert", [])
        if len(found) != 1:
            raise Refused("No certificate came with this connection.")
        return peer_of(found[0])

    async def _greeted(self, pipe: GrpcPipe, peer: Peer, context: Any) -> Session:
        """Exchange greetings."""
        if self._stopping:
            raise Disconnected("The server is going down. Try again in a while.")
        try:
            with self.room.greeting(peer.name):
                async with asyncio.timeout(self.hello_timeout):
                    data = await pipe.read()
                if data is None:
                    raise Disconnected("The stream ended without a hello.")
                hello = _hello(data)
                welcome = await self._admitted(peer, _token(context), hello)
                run = str(welcome.get("name", hello.get("run", "")))  # by its name, whatever the client calls it
                key = (peer.name, run, hello["client"], hello.get("wants", ""))
                most = self.max_sessions()
                if key not in self.sessions and len(self.sessions) >= most:
                    raise Disconnected(f"The server has its {most} sessions. Try again in a while.")
                async with asyncio.timeout(self.hello_timeout):
                    await pipe.write(_welcome(peer, welcome))
        except TimeoutError as error:
            raise Disconnected(f"No hello came within {self.hello_timeout:g} seconds.") from error
        session = Session(
            pipe, peer=peer.name, hello=hello, welcome=welcome, limits=self.limits(hello), heartbeat=self.heartbeat
        )
        before = self.sessions.get(key)
        self.sessions[key] = session
        self._serials[session] = peer.serial
        if before is not None:
            ending = asyncio.ensure_future(_replace(before, hello))  # it may be dead; the new one does not wait for it
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
        return session

    async def _admitted(self, peer: Peer, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(self.hello_timeout):
                return await self.admit(peer.name, token, hello)
        except CutlayerError:
            raise
        except Exception as error:
            LOG.exception("Admitting '%s' failed.", peer.name)
            raise Disconnected("The server could not take this client; its log says why.") from error

    async def _serve(self, session: Session, peer: Peer) -> None:
        """Let the owner serve a session until it is over for either of them."""
        serving = asyncio.ensure_future(self._served(session))
        try:
            await session.ended.wait()
            self._forget(session)
            await session.finished.wait()
            await asyncio.shield(serving)
        except asyncio.CancelledError:  # gRPC's way to say that the client is gone
            session.drop("The connection broke.")
        finally:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        for key in [key for key, held in self.sessions.items() if held is session]:
            del self.sessions[key]
        self._serials.pop(session, None)

    async def _served(self, session: Session) -> None:
        words = ""
        try:
            await self.on_session(session)
        except Refused as error:
            await session.refuse(str(error))
        except (NetworkError, WireError) as error:
            LOG.info("The session with '%s' is over: %s", session.peer, error, extra={"client": session.peer})
            words = str(error)
        except Exception:
            LOG.exception("Serving '%s' failed.", session.peer)
            words = "The server failed; its log says why."
        await session.close(words)

    async def _last_word(self, pipe: GrpcPipe, message: bytes) -> None:
        with contextlib.suppress(TimeoutError, NetworkError):  # who does not listen is not waited for long
            async with asyncio.timeout(FAREWELL):
                await pipe.write(message)
                while await pipe.read() is not None:  # see ``Session._part``
                    continue


def _where(context: Any) -> str:
    """The peer's address, such as ``ipv6:[::1]:40312``."""
    return unquote(str(context.peer()))


def _token(context: Any) -> str:
    found = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
    if len(found) != 1 or not isinstance(found[0], str) or not found[0].startswith("Bearer "):
        return ""
    return found[0].removeprefix("Bearer ")


def _hello(data: bytes) -> dict[str, Any]:
    """The first message of a client.

    Raises:
        Refused, WireError: it is no hello that this server can answer.
    """
    message = read(data)
    if message.type is not Type.HELLO:
        raise WireError(f"A {message.type.name} came before the HELLO.")
    hello = read_greeting(message)
    check_versions(hello, "This client")
    name = hello.get("client")
    if not isinstance(name, str) or not name.strip() or len(name) > NAME or not name.isprintable():
        raise Refused(f"A client needs a name of 1 to {NAME} printable characters.", reason="protocol")
    if any(not isinstance(hello.get(key, ""), str) for key in ("run", "wants")):
        raise Refused("A hello names a run, and what it wants, by text.", reason="protocol")
    return hello


def _welcome(peer: Peer, welcome: dict[str, Any]) -> bytes:
    """The answer to a hello.

    Raises:
        Disconnected: it cannot be sent, which is no fault of the client's.
    """
    try:
        return pack_greeting(Type.WELCOME, {**welcome, "versions": versions()})
    except WireError as error:
        LOG.error("Admitting '%s' failed: %s", peer.name, error, extra={"client": peer.name})
        raise Disconnected("The server could not take this client; its log says why.") from error


async def _replace(before: Session, hello: dict[str, Any]) -> None:
    """End a client's earlier session: the same process has forgotten it, another one is told to stay away."""
    if before.hello.get("instance") == hello.get("instance"):
        await before.close("The same client has come back on a new connection.")
    else:
        await before.refuse(
            "Another process has joined with this client's name and keys. Only one can; that one goes on."
        )
