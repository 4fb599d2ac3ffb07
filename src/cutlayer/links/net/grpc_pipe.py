"""Streams of gRPC as pipes of messages, and the options of channels and servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from cutlayer.errors import Disconnected, Refused
from cutlayer.links.net.messages import most_bytes, shown
from cutlayer.links.net.session import Heartbeat
from cutlayer.wire import Limits

SERVICE, METHOD = "cutlayer.Sessions", "Open"
PATH = f"/{SERVICE}/{METHOD}"
Options = list[tuple[str, Any]]
T = TypeVar("T")


class GrpcPipe:
    """One gRPC stream."""

    def __init__(
        self, read: Callable[[], Awaitable[Any]], write: Callable[[bytes], Awaitable[None]],
        finish: Callable[[], Awaitable[Any]], cut: Callable[[], Any],
    ) -> None:  # fmt: skip
        self._read, self._write, self._finish, self._cut = read, write, finish, cut

    async def read(self) -> bytes | None:
        """The next message; None at the end of the stream."""
        found = await _of_grpc(self._read())
        return None if found is grpc.aio.EOF else bytes(found)

    async def write(self, data: bytes) -> None:
        """Write a message; returns when the transport has taken it."""
        await _of_grpc(self._write(data))

    async def end(self) -> None:
        """Say that no more will be written."""
        await _of_grpc(self._finish())

    def cut(self) -> None:
        """End the stream at once."""
        self._cut()


async def _of_grpc(work: Awaitable[T]) -> T:
    """Await a call of gRPC's, whose errors are ``Disconnected`` to a session.

    To gRPC a stream that was cut is a ``CancelledError`` for whoever waits on it. Only the cancellation of the task
    that waits may look like one, or a connection that breaks would end its owner without a word.
    """
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Disconnected("The connection was cut.") from None
    except Exception as error:
        raise lost(error) from error


def lost(error: Exception) -> Disconnected | Refused:
    """What an error of gRPC's means to a session."""
    if not isinstance(error, grpc.RpcError):  # a stream that has ended already is a usage error to gRPC
        return Disconnected("The connection is closed.")
    code, details = error.code(), error.details()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Refused("What listens there speaks gRPC, but is no cutlayer server.")
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return Refused(shown(details or "The server has turned this client away."))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Disconnected(f"The other end has no room ({details}).")
    return Disconnected(f"The connection broke ({code.name}: {details}).")


def options(limits: Limits, heartbeat: Heartbeat) -> Options:
    """What both ends set: the longest message, and gRPC's own keepalive below our heartbeats."""
    return [
        ("grpc.max_receive_message_length", most_bytes(limits)),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", int(max(heartbeat.every, 10.0) * 1000)),
        ("grpc.keepalive_timeout_ms", int(heartbeat.silence * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    ]
