"""A listener and what connects to it, for the tests of the network: echoes, and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import grpc
import torch

from cutlayer.errors import NetworkError, RequestFailed, WireError
from cutlayer.links.net.connecting import connect, versions
from cutlayer.links.net.grpc_pipe import PATH
from cutlayer.links.net.listener import Listener
from cutlayer.links.net.messages import Type, pack_greeting, read
from cutlayer.links.net.session import Session
from cutlayer.links.net.tls import Credentials
from cutlayer.wire import Frame, Header, encode

T = TypeVar("T")
LONG = 120.0  # seconds after which a test that hangs fails


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine; one that hangs fails."""

    async def bounded() -> T:
        return await asyncio.wait_for(work, LONG)

    return asyncio.run(bounded())


async def admit_all(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
    return {"greets": hello["client"]}


async def echo(session: Session) -> None:
    while True:
        header, tensors, _ = await session.receive()
        await session.send(encode(header, tensors))


def small(turn: int = 1, size: int = 3, **fields: Any) -> Frame:
    header = Header("send_activations", "activations", "ask", "server", "c", "c", turn=turn, names=("x",))
    return encode(header.but(**fields), [torch.arange(float(size))])


class Served:
    """A listener that runs, and how to reach it."""

    def __init__(self, listener: Listener, port: int) -> None:
        self.listener, self.port = listener, port
        self.address = f"127.0.0.1:{port}"

    async def join(self, name: str = "c", own: Credentials | None = None, **more: Any) -> Session:
        hello = {"client": name, **more.pop("hello", {})}
        return await connect(self.address, own, more.pop("token", "t"), hello, **more)

    async def held(self, count: int) -> list[Session]:
        """The server's sessions, once there are so many; a client may have its welcome a moment earlier."""
        while len(self.listener.sessions) != count:
            await asyncio.sleep(0.01)
        return list(self.listener.sessions.values())

    async def works(self, own: Credentials | None = None) -> bool:
        """Whether a well-behaved client is served."""
        session = await self.join("well-behaved", own)
        await session.send(small(7))
        header, (x,), _ = await session.receive()
        await session.close(done=True)
        return header.turn == 7 and x.tolist() == [0, 1, 2]


@contextlib.asynccontextmanager
async def serving(own: Credentials | None = None, **more: Any) -> AsyncIterator[Served]:
    listener = Listener(
        more.pop("bind", "127.0.0.1:0"), own, more.pop("admit", admit_all), more.pop("on", echo), **more
    )
    served = Served(listener, await listener.start())
    try:
        yield served
    finally:
        await listener.stop(0.0)


class Raw:
    """A client that writes what bytes it likes."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)])
        self.call = self.channel.stream_stream(PATH)(metadata=(("authorization", "Bearer t"),))

    async def greet(self, name: str = "raw", **more: Any) -> None:
        hello = {"client": name, "versions": versions(), **more}
        await self.call.write(pack_greeting(Type.HELLO, hello))
        assert read(await self.call.read()).type is Type.WELCOME

    async def write(self, *messages: bytes) -> None:
        for message in messages:
            try:
                await self.call.write(message)
            except (asyncio.InvalidStateError, grpc.RpcError):
                return  # the server has had enough

    async def last_words(self) -> tuple[Type | None, str]:
        """What the server ends the session with; the client then ends the stream."""
        try:
            while (data := await self.call.read()) is not grpc.aio.EOF:
                message = read(data)
                if message.type in (Type.REFUSED, Type.BYE):
                    self.call.cancel()
                    return message.type, message.text
        except grpc.RpcError as error:
            return None, str(error.code())
        return None, "nothing"

    async def close(self) -> None:
        self.call.cancel()
        await self.channel.close()


async def end_of(session: Session) -> NetworkError | WireError:
    """What a session ends with, whatever comes before."""
    while True:
        try:
            with contextlib.suppress(RequestFailed):
                await session.receive()
        except (NetworkError, WireError) as error:
            return error
