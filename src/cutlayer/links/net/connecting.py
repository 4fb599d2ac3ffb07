"""The client's end: open a session with a server, or say in words why not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from cutlayer.errors import Disconnected, Dismissed, NetworkError, Refused, WireError
from cutlayer.links.net.grpc_pipe import PATH, GrpcPipe, options
from cutlayer.links.net.messages import PROTOCOL, Message, Type, pack_greeting, read, read_greeting, shown
from cutlayer.links.net.session import Heartbeat, Session
from cutlayer.links.net.tls import Credentials, is_loopback, pinned, split_address, why
from cutlayer.wire import VERSION, Limits

PATIENCE = 30.0  # seconds for the connection and the server's welcome
TRIES = 3  # to hear why a server ended a stream before it was greeted


def versions() -> dict[str, Any]:
    """What both ends tell each other of what they speak; ``protocol`` and ``wire`` must be equal."""
    from cutlayer import __version__

    return {"protocol": PROTOCOL, "wire": VERSION, "cutlayer": __version__}


def hello_of(told: Mapping[str, Any]) -> bytes:
    """A hello as it is sent."""
    return pack_greeting(Type.HELLO, {**told, "versions": versions()})


def check_versions(told: Mapping[str, Any], who: str) -> None:
    """Compare what another party speaks with what we do.

    Raises:
        Refused: it is not the same.
    """
    own, theirs = versions(), told.get("versions")
    theirs = theirs if isinstance(theirs, dict) else {}
    if any(theirs.get(name) != own[name] for name in ("protocol", "wire")):
        spoken = ", ".join(f"{name} {theirs.get(name, 'unknown')}" for name in own)
        ours = ", ".join(f"{name} {own[name]}" for name in own)
        raise Refused(
            f"{who} speaks {spoken}; the other end speaks {ours}. Install one version of cutlayer at both ends.",
            reason="version",
        )


async def connect(
    address: str,
    credentials: Credentials | None,
    token: str,
    hello: Mapping[str, Any],
    *,
    limits: Limits | None = None,
    heartbeat: Heartbeat | None = None,
    fingerprint: str = "",
    patience: float = PATIENCE,
    leaving: Callable[[], None] = lambda: None,
) -> Session:
    """Open a session.

    Args:
        address: ``HOST:PORT``; the host must be a name in the server's certificate.
        credentials: this party's; None for plain text, which only goes to this machine itself.
        token: what the operator gave this client.
        hello: what the server is told; ``client``, the client's name, must be in it. Versions are added.
        limits: the most that a frame from the server may hold.
        heartbeat: how a lost server is noticed.
        fingerprint: SHA-256 of the server's certificate, where it must be this one (see ``tls.pinned``).
        patience: seconds for the connection, and again for the welcome.
        leaving: is told when the hello is about to leave, once there is a connection; what it raises keeps it here.

    Raises:
        Refused: the server turned this client away, or is not the one it should be.
        Disconnected: no connection; trying again may help.
        NetworkError: the address or the token cannot be used at all.
    """
    limits, heartbeat = limits or Limits(), heartbeat or Heartbeat()
    host, _ = split_address(address)
    if not (token.isascii() and token.isprintable()) or token != token.strip():
        raise NetworkError("The token holds characters that no token has. Copy it again, without line ends.")
    settings = options(limits, heartbeat)
    if is_loopback(host):
        settings.append(("grpc.enable_http_proxy", 0))
    secret: grpc.ChannelCredentials | None = None
    if credentials is not None:
        root = await pinned(address, credentials, fingerprint, patience) if fingerprint else credentials.ca
        secret = grpc.ssl_channel_credentials(root, credentials.key, credentials.certificate)
    elif not is_loopback(host) or fingerprint:
        raise Refused(f"Without keys, nothing is sent to {address}: plain text stays on this machine. Use --keys.")
    for left in reversed(range(TRIES)):
        channel = (
            grpc.aio.insecure_channel(address, options=settings)
            if secret is None
            else grpc.aio.secure_channel(address, secret, options=settings)
        )
        try:
            pipe, welcome = await _opened_and_greeted(
                channel, token, hello, address, credentials, patience=patience, leaving=leaving
            )
        except Disconnected as error:
            if not left or not _lost_words(error):
                raise
        else:
            server = host if credentials is not None else ""
            return Session(pipe, peer=server, hello=dict(hello), welcome=welcome, limits=limits, heartbeat=heartbeat)
    raise AssertionError("the last try returns or raises")


def _lost_words(error: Disconnected) -> bool:
    """Whether gRPC lost what the server said: of a stream that it ended before the hello was written whole, there is
    now and then no status."""
    cause = error.__cause__
    return isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.INTERNAL


async def _opened_and_greeted(
    channel: grpc.aio.Channel, token: str, hello: Mapping[str, Any], address: str, credentials: Credentials | None, *,
    patience: float, leaving: Callable[[], None],
) -> tuple[GrpcPipe, dict[str, Any]]:  # fmt: skip
    """A stream and the server's welcome on it."""
    call = channel.stream_stream(PATH)(metadata=(("authorization", f"Bearer {token}"),))

    def cut() -> None:
        call.cancel()
        closing = asyncio.ensure_future(channel.close())
        _CLOSING.add(closing)
        closing.add_done_callback(_CLOSING.discard)

    pipe = GrpcPipe(call.read, call.write, call.done_writing, cut)
    try:
        opened = await _opened(channel, address, patience)
        if opened:
            leaving()
        welcome = await _greet(pipe, hello if opened else None, address, credentials, patience)
    except BaseException:
        cut()
        raise
    return pipe, welcome


async def _opened(channel: grpc.aio.Channel, address: str, patience: float) -> bool:
    """Whether there is a connection; False: it could not be had.

    Raises:
        Disconnected: neither is known yet.
    """
    try:
        async with asyncio.timeout(patience):
            state = channel.get_state(try_to_connect=True)
            while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError as error:
        raise _silent(address, patience) from error
    return bool(state is grpc.ChannelConnectivity.READY)


def _silent(address: str, patience: float) -> Disconnected:
    return Disconnected(f"The server at {address} has not answered for {patience:g} seconds.")


async def _greet(
    pipe: GrpcPipe, hello: Mapping[str, Any] | None, address: str, credentials: Credentials | None, patience: float
) -> dict[str, Any]:
    """Say hello; the server's welcome. Without a hello: why there is no connection."""
    try:
        async with asyncio.timeout(patience):
            # A server that has refused already takes no hello; then what it said is to be read.
            with contextlib.suppress(Disconnected):
                if hello is not None:
                    await pipe.write(hello_of(hello))
            data = await pipe.read()
    except TimeoutError as error:
        raise _silent(address, patience) from error
    except Disconnected as error:
        cause = error.__cause__
        if isinstance(cause, grpc.RpcError) and cause.code() is grpc.StatusCode.UNAVAILABLE:
            raise await why(address, credentials, shown(cause.details() or ""), patience) from error
        raise
    if data is None:
        raise Disconnected(f"The server at {address} closed the connection without a word.")
    try:
        return _welcome(read(data), address)
    except WireError as error:
        raise Refused(f"What listens at {address} does not answer as a cutlayer server does: {error}") from error


def _welcome(message: Message, address: str) -> dict[str, Any]:
    if message.type is Type.REFUSED:
        raise Refused(message.text)
    if message.type is Type.BYE:
        raise Dismissed(message.text) if message.number else Disconnected(message.text)
    if message.type is not Type.WELCOME:
        raise WireError(f"A {message.type.name} came before the WELCOME.")
    welcome = read_greeting(message)
    check_versions(welcome, f"The server at {address}")
    return welcome


_CLOSING: set[asyncio.Future[None]] = set()  # asyncio keeps no strong hold of its tasks
