"""Tenants who open all the streams they can, with good certificates and revoked ones: the others train meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import cutlayer
from certificates import CA, CLIENT, SERVER
from cutlayer.errors import Disconnected, Refused
from cutlayer.identity import fingerprint
from cutlayer.issuing import Authority
from cutlayer.keys import ClientKeys, client_keys
from cutlayer.links.net import connecting
from cutlayer.links.net.connecting import connect, hello_of
from cutlayer.links.net.grpc_pipe import PATH
from cutlayer.links.net.messages import read
from cutlayer.links.net.tls import Credentials
from network import run, serving, small
from test_service import NAMES, Two


class Crowd:
    """Streams with one client's keys, over four connections."""

    def __init__(self, address: str, keys: ClientKeys) -> None:
        secret = grpc.ssl_channel_credentials(keys.ca, keys.key, keys.certificate)
        own = [("grpc.use_local_subchannel_pool", 1)]
        self.channels = [grpc.aio.secure_channel(address, secret, options=own) for _ in range(4)]
        self.told = (("authorization", f"Bearer {keys.token}"),)
        self.opened, self.ends, self.kept, self.over = 0, list[str](), list[Any](), False

    def open(self) -> Any:
        self.opened += 1
        return self.channels[self.opened % 4].stream_stream(PATH)(metadata=self.told)

    async def asks(self, hello: dict[str, Any]) -> str:
        """How the server answers a hello, whose stream is then left as it is."""
        call = self.open()
        self.kept.append(call)
        try:
            await call.write(hello_of(hello))
            return read(await call.read()).type.name
        except (grpc.RpcError, asyncio.InvalidStateError):
            return "NO ROOM"

    async def says_nothing(self) -> None:
        """Open a stream and wait for its end, over and over."""
        while not self.over:  # a cancelled task may see the end of its stream in place of that
            call = self.open()
            try:
                while await call.read() is not grpc.aio.EOF:
                    continue
                self.ends.append(str(call.code()))
            except grpc.RpcError as error:
                self.ends.append(error.code().name)
            await asyncio.sleep(1.0)

    @contextlib.asynccontextmanager
    async def silent(self, count: int) -> AsyncIterator[None]:
        """So many silent streams all the time."""
        tasks = [asyncio.ensure_future(self.says_nothing()) for _ in range(count)]
        try:
            yield
        finally:
            self.over = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()


def keys_of(own: Credentials, name: str) -> ClientKeys:
    return ClientKeys(Path(), own.ca, own.certificate, own.key, name, "", None, "t")  # type: ignore[arg-type]


@pytest.mark.parametrize("many", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_who_opens_all_the_streams_it_can_is_in_nobodys_way(many: int, tmp_path: Path) -> None:
    both = Two(tmp_path / "apart", rounds=2)
    keys = tmp_path / "keys"
    made = Authority(keys, make=True)
    made.add(hosts=["localhost"], clients=["ann", "bob", "cleo", "dan", "left-us"])
    own = {name: client_keys(keys / name) for name in ("ann", "cleo", "dan", "left-us")}
    made.revoke("left-us")
    server = both.serve(keys=keys)
    address = f"localhost:{both.port}"
    counts = ("evaluation_batches", "length", "validation_batches")
    data = {"examples": 5, "label_tokens": 50, "steps_per_epoch": 2, **dict.fromkeys(counts, 0)}

    async def crowded() -> None:
        proof = Credentials(own["ann"].ca, own["ann"].certificate, own["ann"].key)
        cleo, dan, left = (Crowd(address, own[name]) for name in ("cleo", "dan", "left-us"))
        hello = {"client": "cleo", "model": fingerprint(both.tree["model"]), "data": data, "rounds": [], "turn": 0}
        answers = await asyncio.gather(*(cleo.asks({**hello, "wants": f"w{n}"}) for n in range(many + 60)))
        assert set(answers) == {"REFUSED", "NO ROOM"}
        async with dan.silent(many), left.silent(many):
            while len(dan.ends) < many // 2 or len(left.ends) < many // 2:
                await asyncio.sleep(0.1)
            for _ in range(4):
                session = await connect(address, proof, own["ann"].token, {"client": "ann", "wants": "run"})
                await session.close("It has seen enough.")
            clients = {name: both.join(name, keys=keys) for name in NAMES["flu"]}
            await asyncio.to_thread(both.ended, clients)
        assert "PERMISSION_DENIED" in left.ends
        assert set(left.ends) <= {"PERMISSION_DENIED", "UNAVAILABLE"}, "idle connections are closed now and then"
        assert "RESOURCE_EXHAUSTED" in dan.ends
        for crowd in (cleo, dan, left):
            await crowd.close()

    asyncio.run(asyncio.wait_for(crowded(), 900))
    assert server.poll() is None
    server.kill()
    server.wait()
    assert both.said("server").count("Turned 'left-us'") < many // 2, (
        "who comes hundreds of times is not logged each time"
    )
    alone = cutlayer.train(both.alone("flu"), out=tmp_path / "flu", progress=False)
    assert both.same(alone.out, server="server/flu", names=NAMES["flu"])


def test_what_one_certificate_may_have_open_is_counted_with_its_last_words() -> None:
    async def crowd() -> None:
        async def refuses(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
            if hello["client"] == "unwanted":
                raise Refused("Not you.")
            return {}

        async with serving(SERVER, admit=refuses, max_each=lambda name: 3) as served:
            clinic = Crowd(served.address, keys_of(CLIENT, "clinic"))
            for _ in range(2):
                assert await clinic.asks({"client": "unwanted"}) == "REFUSED"
            session = await served.join("clinic", CLIENT)
            with pytest.raises(Disconnected, match="3 streams are open with this certificate"):
                await served.join("clinic", CLIENT, hello={"run": "other"})
            assert await served.works(CA.issue("bank"))
            await session.send(small(5))
            assert (await session.receive())[0].turn == 5
            await clinic.close()
            while served.listener.room.open["clinic"] > 1:
                await asyncio.sleep(0.01)
            await (await served.join("clinic", CLIENT, hello={"run": "other"})).close()

    run(crowd())


def test_who_was_revoked_hears_why_however_early_the_stream_ends() -> None:
    """The server ends it before it has read a hello; gRPC at times loses the words then."""

    async def again() -> None:
        async with serving(SERVER, revoked=lambda serial: True) as served:

            async def says() -> str:
                with pytest.raises(Refused) as refused:
                    await served.join("clinic", CLIENT, hello={"of": "x" * 15_000})
                return str(refused.value)

            for _ in range(5):
                said = await asyncio.gather(*(says() for _ in range(8)))
                assert {text.split(".")[0] for text in said} == {"Your certificate has been revoked"}

    run(again())


@pytest.mark.parametrize(
    ("code", "times", "comes"), [("INTERNAL", 2, True), ("INTERNAL", 3, False), ("ABORTED", 1, False)]
)
def test_words_that_grpc_lost_are_asked_for_again(
    code: str, times: int, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a stream that the server has ended it says INTERNAL at times, in place of the server's status."""
    real, left = connecting._opened_and_greeted, times
    nothing = grpc.aio.Metadata()
    broken = grpc.aio.AioRpcError(grpc.StatusCode[code], nothing, nothing, details="Internal error from Core")

    async def loses(*args: Any, **more: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise Disconnected("The connection broke.") from broken
        return await real(*args, **more)

    monkeypatch.setattr(connecting, "_opened_and_greeted", loses)

    async def tries() -> None:
        async with serving() as served:
            if comes:
                await (await served.join()).close()
            else:
                with pytest.raises(Disconnected):
                    await served.join()

    run(tries())
    assert left == 0


def test_a_run_has_one_name_and_a_client_one_session_in_it() -> None:
    """Whatever a hello calls the run that the server knows."""

    async def named(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        return {"name": "flu"}

    async def again() -> None:
        async with serving(admit=named) as served:
            for called in ({}, {"run": ""}, {"run": "flu"}):
                await served.join("ann", hello={"instance": 1, **called})
            await served.held(1)
            for wrong in ({"run": 0}, {"run": {}}, {"wants": ["run"]}):
                with pytest.raises(Refused, match="by text"):
                    await served.join("ann", hello=wrong)

    run(again())


def test_those_who_fill_the_waiting_room_lock_nobody_out() -> None:
    async def crowd() -> None:
        async with serving(SERVER, max_waiting=2) as served:
            silent = [Crowd(served.address, keys_of(CA.issue(name), name)) for name in ("a", "b")]
            calls = [one.open() for one in silent]
            while served.listener.room.waiting.total() < 2:
                await asyncio.sleep(0.01)
            assert await served.works(CLIENT)
            for one, call in zip(silent, calls, strict=True):
                call.cancel()
                await one.close()

    run(crowd())


def test_half_open_connections_take_up_no_more_than_there_is() -> None:
    """Those that are too many are closed at once; sessions go on, and when there is room, others come."""

    async def crowd() -> None:
        async with serving(SERVER, max_connections=10, hello_timeout=60.0) as served:
            session = await served.join("clinic", CLIENT)
            half = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(30)]
            loop, closed = asyncio.get_running_loop(), 0
            for one in half:
                one.setblocking(False)

            async def is_closed(one: socket.socket) -> None:
                nonlocal closed
                with contextlib.suppress(ConnectionResetError):
                    assert not await loop.sock_recv(one, 1)
                closed += 1

            watching = [asyncio.ensure_future(is_closed(one)) for one in half]
            while closed < 20:
                await asyncio.sleep(0.01)
            await session.send(small(5))
            assert (await session.receive())[0].turn == 5
            with pytest.raises(Disconnected):
                await served.join("bank", CA.issue("bank"))
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            for one in half:
                one.close()
            while True:
                try:
                    await served.join("bank", CA.issue("bank"))
                    break
                except Disconnected:
                    await asyncio.sleep(0.05)

    run(crowd())
