"""Sessions over gRPC: what crosses, who is let in, and that who misbehaves harms nobody else."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import zlib
from typing import Any

import pytest
import torch

from certificates import Authority, certificate_of
from cutlayer.errors import Disconnected, Dismissed, NetworkError, Refused, RequestFailed, WireError
from cutlayer.keys import fingerprint_of
from cutlayer.links.net.connecting import connect, versions
from cutlayer.links.net.grpc_pipe import GrpcPipe
from cutlayer.links.net.messages import (
    CHUNK,
    GREETING,
    TEXT,
    WINDOW,
    Type,
    pack,
    pack_bye,
    pack_frame,
    pack_greeting,
    pack_number,
    pack_whole,
    read,
    read_greeting,
)
from cutlayer.links.net.session import Heartbeat, Session
from cutlayer.links.net.tls import Credentials, split_address
from cutlayer.wire import DTYPES, PREFIX, Header, Incoming, Limits, encode
from network import Raw, end_of, run, serving, small

CA = Authority()
SERVER, CLIENT = CA.issue("server", "127.0.0.1"), CA.issue("clinic")


def sample(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(1)
    if dtype == torch.bool:
        return torch.rand(shape, generator=source) > 0.5
    return (torch.randn(shape, generator=source) * 50).abs().to(dtype)


# ---------------------------------------------------------------- what crosses


def test_every_dtype_and_shape_crosses_byte_for_byte() -> None:
    shapes = [(), (1,), (0,), (2, 0, 3), (2, 3, 4), (CHUNK // 8 + 3,), (1,) * 8]
    frames = []
    for turn, dtype in enumerate(DTYPES):
        tensors = [sample(dtype, *shape) for shape in shapes]
        names = tuple(str(number) for number in range(len(shapes)))
        frames.append(encode(Header("aggregate", "state", turn=turn, names=names), tensors))
    frames.append(encode(Header("send_activations", names=("x",)), [sample(torch.float32, 5, 1 << 18)]))
    frames.append(encode(Header("aggregate", "ack", values={"loss": float("nan")})))

    async def cross() -> None:
        async with serving(SERVER) as served:
            session = await served.join(own=CLIENT)
            for frame in frames:
                await session.send(frame)
                header, tensors, length = await session.receive()
                assert length == frame.length
                assert encode(header, tensors).bytes() == frame.bytes()
            assert session.sent == session.received == sum(frame.length for frame in frames)
            assert session.welcome["greets"] == "c"

    run(cross())


def test_chunks_are_full_whatever_the_borders_of_the_tensors() -> None:
    tensors = [sample(torch.uint8, size) for size in (1, CHUNK - 1, 0, 2 * CHUNK + 5, 7, CHUNK)]
    frame = encode(Header("aggregate", names=tuple("abcdef")), tensors)
    head, *chunks = (read(message) for message in pack_frame(frame))
    assert (head.type, bytes(head.data)) == (Type.FRAME_HEAD, frame.head)
    assert [len(c.data) for c in chunks] == [CHUNK] * 4 + [12]
    assert b"".join(bytes(c.data) for c in chunks) == frame.bytes()[len(frame.head) :]
    assert pack_whole(frame).messages == tuple(pack_frame(frame))


def test_incoming_is_decode_in_pieces() -> None:
    draw = random.Random(0)
    frame = encode(
        Header("aggregate", "state", names=("a", "b", "c", "d")),
        [sample(torch.bfloat16, 3, 2), sample(torch.bool, 5), torch.zeros(0, 4), sample(torch.float64, 2, 2)],
    )
    body = frame.bytes()[len(frame.head) :]
    for _ in range(50):
        incoming, at = Incoming(frame.head), 0
        while incoming.missing:
            with pytest.raises(WireError, match="too early"):
                incoming.done()
            size = draw.randint(1, 9)
            incoming.fill(body[at : at + size])
            at += size
        assert incoming.length == frame.length
        header, tensors = incoming.done()
        assert encode(header, tensors).bytes() == frame.bytes()
        assert all(t.data_ptr() % 16 == 0 for t in tensors)
        with pytest.raises(WireError, match="lacks 0 bytes, but 1 more"):
            incoming.fill(b"x")
    with pytest.raises(WireError, match=r"head announces \d+ bytes, but"):
        Incoming(frame.head + b"x")
    with pytest.raises(WireError):
        Incoming(frame.head[:-1])
    wrong = Incoming(encode(Header("aggregate", names=("x",)), [torch.zeros(2, dtype=torch.bool)]).head)
    wrong.fill(b"\1\2")
    with pytest.raises(WireError, match="truth values"):
        wrong.done()


def test_an_error_stands_for_a_reply_and_the_session_goes_on() -> None:
    async def refuses(session: Session) -> None:
        await session.receive()
        await session.error(5, "Not\x1b[31m this\none.")
        await session.send(small(6))
        await session.ended.wait()

    async def ask() -> None:
        async with serving(on=refuses) as served:
            session = await served.join()
            await session.send(small(5))
            with pytest.raises(RequestFailed, match=r"refused request 5: Not \[31m this one\.") as caught:
                await session.receive()
            assert caught.value.turn == 5
            assert (await session.receive())[0].turn == 6

    run(ask())


@pytest.mark.parametrize("done", [True, False])
def test_what_was_sent_before_the_end_arrives_before_it(done: bool) -> None:
    async def speaks(session: Session) -> None:
        for turn in range(WINDOW):
            await session.send(small(turn, 200_000))
        await session.close("Enough.", done=done)

    async def listen() -> None:
        async with serving(on=speaks) as served:
            session = await served.join()
            await session.ended.wait()
            assert [(await session.receive())[0].turn for _ in range(WINDOW)] == list(range(WINDOW))
            for _ in range(2):
                with pytest.raises(Dismissed if done else Disconnected, match=r"Enough\."):
                    await session.receive()
            with pytest.raises(Dismissed if done else Disconnected):
                await session.send(small())

    run(listen())


def test_a_client_that_leaves_is_heard() -> None:
    ends = []

    async def listens(session: Session) -> None:
        ends.append(await end_of(session))

    async def leave() -> None:
        async with serving(on=listens) as served:
            for close in (lambda s: s.close(done=True), lambda s: s.close("Later."), lambda s: s.refuse("No.")):
                session = await served.join()
                await close(session)
                await served.held(0)

    run(leave())
    assert [type(end) for end in ends] == [Dismissed, Disconnected, Refused]


def test_a_stream_that_is_cut_cancels_nobody() -> None:
    """gRPC raises ``CancelledError`` in who waits on a stream that was cut; only a task's own cancellation is one."""

    async def cut() -> None:
        raise asyncio.CancelledError

    async def wait() -> None:
        pipe = GrpcPipe(cut, lambda data: cut(), cut, lambda: None)
        for work in (pipe.read, pipe.end, lambda: pipe.write(b"")):
            with pytest.raises(Disconnected, match="was cut"):
                await work()
        pipe = GrpcPipe(asyncio.Event().wait, lambda data: cut(), cut, lambda: None)
        waiting = asyncio.ensure_future(pipe.read())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()

    run(wait())


# ---------------------------------------------------------------- credits and heartbeats


def test_a_receiver_that_does_not_look_bounds_what_is_sent() -> None:
    """Each end takes ``WINDOW`` frames before its owner has asked; a further one is not even begun."""
    sent = []
    look = asyncio.Event()

    async def looks_later(session: Session) -> None:
        await look.wait()
        await echo_once(session)

    async def echo_once(session: Session) -> None:
        while True:
            await session.receive()

    async def push() -> None:
        async with serving(on=looks_later) as served:
            session = await served.join()

            async def send() -> None:
                for turn in range(3 * WINDOW):
                    await session.send(small(turn, 300_000))
                    sent.append(turn)

            sending = asyncio.ensure_future(send())
            while len(sent) < WINDOW:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert len(sent) == WINDOW
            look.set()
            await sending

    run(push())
    assert len(sent) == 3 * WINDOW


def test_a_peer_that_never_answers_is_dropped_and_one_that_is_idle_is_not() -> None:
    beat = Heartbeat(every=0.1, silence=1.5)

    async def idle() -> None:
        async with serving(heartbeat=beat) as served:
            raw = Raw(served.port)
            await raw.greet()
            session = await served.join(heartbeat=beat)
            frozen = next(s for s in await served.held(2) if s.hello["client"] == "raw")
            await frozen.ended.wait()
            with pytest.raises(Disconnected, match=r"not been heard for 1\.5 seconds"):
                await frozen.receive()
            assert not session.ended.is_set()
            await session.send(small(3))
            assert (await session.receive())[0].turn == 3
            await raw.close()

    run(idle())


def test_a_frame_that_does_not_get_on_ends_the_session_although_pings_come() -> None:
    head, *chunks = pack_frame(small(1, CHUNK))

    async def trickle() -> None:
        async with serving(heartbeat=Heartbeat(every=0.2, silence=1.0)) as served:
            raw = Raw(served.port)
            await raw.greet()
            await raw.write(head, chunks[0])
            (session,) = await served.held(1)
            while not session.ended.is_set():
                await raw.write(pack(Type.PING))
                await asyncio.sleep(0.05)
            assert "not got on" in str(await end_of(session))
            assert await served.works()
            await raw.close()

    run(trickle())


FROZEN = """
import asyncio, sys
from cutlayer.links.net.connecting import connect
async def main():
    session = await connect(sys.argv[1], None, "t", {"client": "frozen"})
    print("here", flush=True)
    await session.ended.wait()
asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_that_is_stopped_is_dropped() -> None:
    async def freeze() -> None:
        async with serving(heartbeat=Heartbeat(every=0.5, silence=3.0)) as served:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", FROZEN, served.address, stdout=subprocess.PIPE, env=os.environ
            )
            try:
                assert child.stdout is not None
                assert await child.stdout.readline() == b"here\n"
                (session,) = await served.held(1)
                await asyncio.sleep(6)
                assert not session.ended.is_set()  # heartbeats keep it
                child.send_signal(signal.SIGSTOP)
                assert "not been heard" in str(await end_of(session))
                assert await served.works()
            finally:
                child.kill()
                await child.wait()

    run(freeze())


# ---------------------------------------------------------------- who is let in


def refusal(served: Any, own: Credentials | None, error: type[NetworkError] = Refused, **more: Any) -> Any:
    async def attempt() -> str:
        with pytest.raises(error) as caught:
            await served.join(own=own, **more)
        return str(caught.value)

    return attempt()


def test_certificates_that_are_not_let_in() -> None:
    foreign = Authority("foreign")
    revoked = CA.issue("left-us")
    serial = certificate_of(revoked).serial_number
    expired, elsewhere = CA.issue("late", days=-1), foreign.issue("stranger", trusts=CA)
    tokenless: list[str] = []

    async def admit(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        tokenless.append(peer)
        if token != "right":
            raise Refused(f"The token of '{peer}' is wrong.")
        return {}

    async def knock() -> None:
        async with serving(SERVER, admit=admit, revoked=lambda s: s == serial) as served:
            good = await served.join(own=CLIENT, token="right")
            assert "has been revoked" in await refusal(served, revoked, token="right")
            assert "expired on" in await refusal(served, expired, token="right")
            assert "not of the CA" in await refusal(served, elsewhere, token="right")
            assert "another CA than the one you trust" in await refusal(
                served, foreign.issue("stranger"), token="right"
            )
            assert tokenless == ["clinic"]
            assert "token of 'clinic' is wrong" in await refusal(served, CLIENT, token="wrong")
            assert "token of 'clinic' is wrong" in await refusal(served, CLIENT, token="")
            assert tokenless == ["clinic"] * 3
            assert "answers" in await refusal(served, None, Disconnected, token="right")
            assert served.listener.refusals == {"left-us": 1, "clinic": 2}
            await good.send(small(9))
            assert (await good.receive())[0].turn == 9

    run(knock())


def test_a_client_checks_whom_it_talks_to() -> None:
    other = CA.issue("server", "127.0.0.1")

    async def check() -> None:
        for own, words in (
            (CA.issue("server", "127.0.0.1", days=-1), "has expired"),
            (CA.issue("server", "elsewhere.example"), "for another name than '127.0.0.1'"),
            (None, "does not speak TLS"),
        ):
            async with serving(own) as served:
                assert words in await refusal(served, CLIENT)
        async with serving(SERVER) as served:
            right = fingerprint_of(certificate_of(SERVER))
            for pin in (right, right.replace(":", "").lower()):
                session = await served.join(own=CLIENT, fingerprint=pin)
                await session.send(small(2))
                assert (await session.receive())[0].turn == 2
                await session.close()
            told = await refusal(served, CLIENT, fingerprint=fingerprint_of(certificate_of(other)))
            assert "has the fingerprint" in told
            assert right in told

    run(check())


def test_a_pinned_certificate_is_the_only_one_that_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers the first handshake with the pinned certificate and is another at the second gets nothing."""
    wanted = CA.issue("server", "127.0.0.1")
    found = certificate_of(wanted)
    from cutlayer.links.net import tls

    der = tls.ssl.PEM_cert_to_DER_cert(wanted.certificate.decode())
    monkeypatch.setattr(tls, "_handshake", lambda *_: der)

    async def check() -> None:
        async with serving(SERVER) as served:
            with pytest.raises(Disconnected):
                await served.join(own=CLIENT, fingerprint=fingerprint_of(found))
            assert not served.listener.sessions

    run(check())


def test_addresses_that_cannot_be() -> None:
    for text in ("localhost", "http://x:1", ":80", "host:", "host:70000", "::1:80", "host:-1", "host:8x"):
        with pytest.raises(NetworkError, match="is no address"):
            split_address(text)
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("a.example:443") == ("a.example", 443)

    async def nowhere() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            for own in (None, CLIENT):
                with pytest.raises(Disconnected, match=r"Nobody listens|No cutlayer server answers"):
                    await connect(f"127.0.0.1:{port}", own, "t", {"client": "c"}, patience=20)
            with pytest.raises(NetworkError, match="cannot be listened at"):
                async with serving(bind=f"127.0.0.1:{port}"):
                    pass
        with pytest.raises(NetworkError, match="anybody read and join"):
            async with serving(bind="0.0.0.0:0"):
                pass
        with pytest.raises(Refused, match="plain text stays on this machine"):
            await connect("server.example.org:443", None, "t", {"client": "c"})
        with pytest.raises(NetworkError, match="The token holds"):
            await connect("127.0.0.1:1", None, "t\n", {"client": "c"})

    run(nowhere())


def test_greetings_that_are_refused() -> None:
    good = {"client": "c", "versions": versions()}
    old = {**versions(), "wire": 0}
    wrong: list[tuple[bytes, str]] = [
        (pack_greeting(Type.HELLO, {"client": "c"}), "speaks protocol unknown"),
        (pack_greeting(Type.HELLO, {**good, "versions": old}), "wire 0"),
        (pack_greeting(Type.HELLO, {**good, "versions": [1]}), "Install one version"),
        (pack_greeting(Type.HELLO, {"versions": versions()}), "needs a name"),
        (pack_greeting(Type.HELLO, {**good, "client": 3}), "needs a name"),
        (pack_greeting(Type.HELLO, {**good, "client": "x" * 999}), "needs a name"),
        (pack_greeting(Type.HELLO, {**good, "client": "a\nb"}), "needs a name"),
        (pack_greeting(Type.WELCOME, good), "came before the HELLO"),
        (pack(Type.PING), "came before the HELLO"),
        (pack(Type.HELLO, b"[" * 5000), "no sound JSON"),
        (pack(Type.HELLO, b"[]"), "no JSON object"),
        (pack(Type.HELLO, b'{"a": NaN}'), "no sound JSON"),
        (pack(Type.HELLO, b'{"a": 1, "a": 2}'), "twice"),
        (pack(Type.HELLO, b'{"a": ' + b"9" * 9000 + b"}"), "no sound JSON"),
        (pack(Type.HELLO, b"\xff\xfe\x00"), "no sound JSON"),
        (pack(Type.HELLO, b" " * (GREETING + 1)), "is not accepted"),
        (b"", "has 0 bytes"),
        (b"GET / HTTP/1.1", "announces"),
    ]

    async def greet() -> None:
        async with serving() as served:
            for message, words in wrong:
                raw = Raw(served.port)
                await raw.write(message)
                kind, told = await raw.last_words()
                assert (kind, words in told) == (Type.REFUSED, True), (message[:40], told)
                await raw.close()
            assert served.listener.refusals.total() == len(wrong)
            assert await served.works()

    run(greet())


def test_an_admission_that_fails_is_not_the_clients_affair(caplog: pytest.LogCaptureFixture) -> None:
    async def admit(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        if hello["client"] == "early":
            raise Disconnected("The run has not begun.")
        raise RuntimeError("secret detail")

    async def knock() -> None:
        async with serving(admit=admit) as served:
            with pytest.raises(Disconnected, match=r"^The run has not begun\.$"):
                await served.join("early")
            with pytest.raises(Disconnected, match="its log says why") as caught:
                await served.join()
            assert "secret" not in str(caught.value)

    run(knock())
    assert "secret detail" in caplog.text


# ---------------------------------------------------------------- who misbehaves

HEAD, *REST = pack_frame(small(1, CHUNK))


def forged(old: bytes, new: bytes) -> bytes:
    """The head of a frame with a float32 tensor [3] named x, with other bytes and a right checksum."""
    head = encode(Header("aggregate", names=("x",)), [torch.zeros(3)]).head
    assert head.count(old) == 1
    head = head.replace(old, new)
    start, fields = head[: PREFIX.size - 4], head[PREFIX.size :]
    return pack(Type.FRAME_HEAD, start + struct.pack("<I", zlib.crc32(start + fields)) + fields)


SIZE, NAME = struct.pack("<Q", 3), b"\1\0x\0"
MISDEEDS: dict[str, tuple[list[bytes], str]] = {
    "an unknown type": ([b"\x63\0\0\0\0"], "type 99, which does not exist"),
    "type 0": ([b"\0" * 5], "type 0"),
    "a length too large": ([struct.pack("<BI", Type.CHUNK, 9) + b"12345678"], "announces 9 bytes, but 8"),
    "a length too small": ([struct.pack("<BI", Type.CHUNK, 7) + b"12345678"], "announces 7 bytes, but 8"),
    "a length that was negative": ([struct.pack("<Bi", Type.CHUNK, -1) + b"x"], "announces 4294967295"),
    "half a beginning": ([b"\5\0"], "has 2 bytes"),
    "a second hello": ([pack_greeting(Type.HELLO, {})], "after the greetings"),
    "a chunk without a head": ([pack(Type.CHUNK, b"x")], "belongs to no frame"),
    "an empty chunk": ([HEAD, pack(Type.CHUNK)], "not accepted"),
    "a chunk too long": ([HEAD, pack(Type.CHUNK, b"x" * (CHUNK + 1))], "not accepted"),
    "a chunk that is not full": ([HEAD, pack(Type.CHUNK, b"x")], "neither full nor the last"),
    "a chunk too many": ([HEAD, *REST, REST[0]], "belongs to no frame"),
    "a head within a frame": ([HEAD, HEAD], "before the one before it has ended"),
    "a head cut short": ([pack(Type.FRAME_HEAD, small().head[:-3])], "bytes"),
    "a head with a tail": ([pack(Type.FRAME_HEAD, small().head + b"x")], "bytes"),
    "a head that is none": ([pack(Type.FRAME_HEAD, b"\x80\x04pickle" * 9)], "no cutlayer frame"),
    "a dtype that is none": ([forged(NAME, b"\1\0x\x0b")], "dtype code 11"),
    "a type of another size": ([forged(NAME, b"\1\0x\1")], "need 24 bytes, but its body has 12"),
    "a size beyond all": ([forged(SIZE, struct.pack("<Q", 2**63))], "which is not accepted"),
    "a size below zero": ([forged(SIZE, struct.pack("<q", -3))], "which is not accepted"),
    "another size": ([forged(SIZE, struct.pack("<Q", 4))], "need 16 bytes, but its body has 12"),
    "a checksum that is wrong": ([pack(Type.FRAME_HEAD, small().head[:-1] + b"x")], "damaged"),
    "larger than allowed": ([next(pack_frame(small(1, 6 * CHUNK)))], "are accepted"),
    "more frames than agreed": ([m for _ in range(WINDOW + 2) for m in pack_frame(small())], "not yet agreed"),
    "more errors than agreed": ([pack_number(Type.ERROR, 1, "x")] * (WINDOW + 2), "not yet agreed"),
    "credit of nothing": ([pack_number(Type.CREDIT, 0)], "CREDIT of 0"),
    "credit without end": ([pack_number(Type.CREDIT, 2**32 - 1)], "CREDIT of 4294967295"),
    "a ping that carries": ([pack(Type.PING, b"x")], "PING of 1 bytes"),
    "a bye of neither kind": ([pack(Type.BYE, b"\7")], "neither"),
}


def test_what_breaks_the_protocol_ends_that_session_and_no_other() -> None:
    ends: list[Exception] = []

    async def looks_at_nothing(session: Session) -> None:
        if session.hello["client"] != "raw":
            header, tensors, _ = await session.receive()
            await session.send(encode(header, tensors))
        else:
            await session.ended.wait()
            ends.append(await end_of(session))

    async def misbehave() -> None:
        async with serving(on=looks_at_nothing, limits=Limits(body_bytes=20 << 20)) as served:
            for number, (name, (messages, words)) in enumerate(MISDEEDS.items()):
                raw = Raw(served.port)
                await raw.greet()
                await raw.write(*messages)
                kind, told = await raw.last_words()
                assert (kind, words in told) == (Type.REFUSED, True), (name, told)
                while len(ends) <= number:
                    await asyncio.sleep(0.01)
                assert type(ends[-1]) is WireError, name
                assert words in str(ends[-1])
                await raw.close()
            raw = Raw(served.port)  # a message that gRPC itself refuses
            await raw.greet()
            await raw.write(pack(Type.CHUNK, bytes(40 << 20)))
            assert (await raw.last_words())[0] is not Type.WELCOME
            await raw.close()
            assert await served.works()
            await served.held(0)

    run(misbehave())
    assert len(ends) == len(MISDEEDS) + 1


def test_a_server_that_misbehaves_ends_the_clients_session() -> None:
    async def lies(session: Session) -> None:
        await session._write(pack(Type.CHUNK, b"x"))
        await session.ended.wait()

    async def listen() -> None:
        async with serving(on=lies) as served:
            session = await served.join()
            with pytest.raises(WireError, match="belongs to no frame"):
                await session.receive()

    run(listen())


def test_half_a_frame_and_half_open_connections_do_not_block_others() -> None:
    head, *chunks = pack_frame(small(1, 3 * CHUNK))

    async def loiter() -> None:
        async with serving(SERVER, hello_timeout=1.5) as served:
            sockets = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(20)]
            for number, open_socket in enumerate(sockets):
                open_socket.sendall(b"\x16\x03\x01"[: number % 4])  # the beginning of a handshake, or nothing
            assert await served.works(CLIENT)
            loop = asyncio.get_running_loop()
            for open_socket in sockets:  # the server closes them
                open_socket.setblocking(False)
                while True:
                    try:
                        if not await asyncio.wait_for(loop.sock_recv(open_socket, 1000), 60):
                            break
                    except ConnectionResetError:
                        break
                open_socket.close()
        async with serving(hello_timeout=1.0) as served:
            silent, half, gone = (Raw(served.port) for _ in range(3))
            await half.greet("half")
            await half.write(head, chunks[0])
            await gone.greet("gone")
            await gone.write(head, chunks[0], chunks[1][:-1])
            gone.call.cancel()  # in the middle of a frame
            assert await served.works()
            kind, words = await silent.last_words()
            assert (kind, "No hello came" in words) == (Type.BYE, True)
            for raw in (silent, half, gone):
                await raw.close()

    run(loiter())


def test_those_who_wait_are_bounded() -> None:
    async def crowd() -> None:
        async with serving(max_waiting=3, max_sessions=2, hello_timeout=30.0) as served:
            silent = [Raw(served.port) for _ in range(3)]
            while served.listener._waiting.total() < 3:
                await asyncio.sleep(0.01)
            with pytest.raises(Disconnected, match=r"busy|room"):
                await served.join()
            for raw in silent:
                await raw.close()
            while served.listener._waiting.total():
                await asyncio.sleep(0.01)
            sessions = [await served.join(name) for name in "ab"]
            await served.held(2)
            with pytest.raises(Disconnected, match="has its 2 sessions"):
                await served.join("c")
            again = await served.join("a", hello={"instance": 2})  # takes the place of the first
            await again.send(small(4))
            assert (await again.receive())[0].turn == 4
            assert isinstance(await end_of(sessions[0]), Refused)

    run(crowd())


def test_one_certificate_cannot_fill_the_waiting_room() -> None:
    async def crowd() -> None:
        async with serving(SERVER) as served:
            served.listener._waiting["clinic"] = 64
            with pytest.raises(Disconnected, match="busy"):
                await served.join(own=CLIENT)
            assert await served.works(CA.issue("bank"))

    run(crowd())


def test_a_client_that_is_back_replaces_itself() -> None:
    async def back() -> None:
        async with serving() as served:
            first = await served.join("c", hello={"instance": "one", "run": "r"})
            await served.held(1)
            second = await served.join("c", hello={"instance": "one", "run": "r"})
            other_run = await served.join("c", hello={"instance": "two", "run": "q"})
            with pytest.raises(Disconnected, match="come back on a new connection"):
                await first.receive()
            third = await served.join("c", hello={"instance": "two", "run": "r"})
            with pytest.raises(Refused, match="Another process"):
                await second.receive()
            for session in (third, other_run):
                await session.send(small(8))
                assert (await session.receive())[0].turn == 8
            await served.held(2)

    run(back())


def test_a_certificate_revoked_later_ends_its_session() -> None:
    revoked: set[int] = set()

    async def revoke() -> None:
        async with serving(SERVER, revoked=revoked.__contains__) as served:
            session, other = await served.join(own=CLIENT), await served.join(own=CA.issue("bank"))
            await served.held(2)
            revoked.add(certificate_of(CLIENT).serial_number)
            await served.listener.recheck()
            with pytest.raises(Refused, match="revoked"):
                await session.receive()
            await other.send(small(1))
            assert (await other.receive())[0].turn == 1

    run(revoke())


def test_a_server_that_stops_says_so() -> None:
    async def stop() -> None:
        async with serving() as served:
            session = await served.join()
            await served.held(1)
            await served.listener.stop(2.0)
            with pytest.raises(Disconnected, match="going down"):
                await session.receive()

    run(stop())


def test_64_sessions_at_once() -> None:
    async def many() -> None:
        async with serving(SERVER) as served:
            sessions = await asyncio.gather(*(served.join(f"c{n}", CA.issue(f"c{n}")) for n in range(64)))
            await served.held(64)

            async def talk(number: int, session: Session) -> None:
                for turn in range(5):
                    await session.send(small(turn, number + 1))
                    header, (x,), _ = await session.receive()
                    assert (header.turn, len(x)) == (turn, number + 1)

            await asyncio.gather(*(talk(n, s) for n, s in enumerate(sessions)))

    run(many())


# ---------------------------------------------------------------- random bytes

MANY, FEW = 1_000_000, 6_000


def damaged(draw: random.Random, data: bytes, *, head: bool) -> bytes:
    """Bytes changed, cut out and put in; a head often with a right checksum around it."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(out) or 1), draw.randrange(4)
        if kind == 0 and out:
            out[at] = draw.randrange(256)
        elif kind == 1:
            del out[at : at + draw.randint(1, 8)]
        elif kind == 2:
            out[at:at] = draw.randbytes(draw.randint(1, 8))
        else:
            out[at : at + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 2**40)))
    if head and len(out) >= PREFIX.size and draw.random() < 0.8:
        out[:5] = b"CUTL\1"
        out[8:12] = struct.pack("<I", len(out) - PREFIX.size)
        out[20:24] = struct.pack("<I", zlib.crc32(out[:20] + out[24:]))
    return bytes(out)


def fuzz(cases: int) -> tuple[int, int]:
    """How many frames and how many messages were read, of so many cases each; only WireErrors come out."""
    draw, limits = random.Random(2), Limits(header_bytes=4096, body_bytes=1 << 16, tensors=64)
    names = ("a", "b", "c")
    whole = encode(
        Header("aggregate", "state", "ask", "server", "c", values={"n": 1, "x": 0.5, "y": True, "z": "s"}, names=names),
        [torch.zeros(2, 3), torch.ones(4, dtype=torch.bool), torch.zeros(0, 5)],
    )
    samples = [
        *pack_frame(whole), pack_greeting(Type.HELLO, {"client": "c", "versions": {"wire": 1}, "list": [1, None]}),
        pack_number(Type.ERROR, 7, "żle"), pack_number(Type.CREDIT, 3), pack_bye("end", done=True), pack(Type.PING),
    ]  # fmt: skip
    frames = messages = 0
    for _ in range(cases):
        try:
            incoming = Incoming(damaged(draw, whole.head, head=True), limits)
            assert incoming.missing <= limits.body_bytes
            size = incoming.missing if draw.random() < 0.8 else draw.randrange(64)
            body = draw.randbytes(size) if draw.random() < 0.5 else bytes(size)  # truth values are rarely sound
            while body:
                size = draw.randint(1, len(body))
                incoming.fill(body[:size])
                body = body[size:]
            _, tensors = incoming.done()
            assert sum(t.nbytes for t in tensors) <= limits.body_bytes
            frames += 1
        except WireError:
            pass
        try:
            sound = damaged(draw, draw.choice(samples), head=False)
            if draw.random() < 0.7:
                sound = sound[:1] + struct.pack("<I", max(len(sound) - 5, 0)) + sound[5:]
            message = read(sound)
            assert len(message.text) <= max(TEXT, len(sound))
            if message.type in (Type.HELLO, Type.WELCOME):
                read_greeting(message)
            messages += 1
        except WireError:
            pass
    return frames, messages


def test_random_damage_gives_only_errors_of_the_wire() -> None:
    frames, messages = fuzz(FEW)
    assert frames > FEW // 100  # the damage is not always fatal, or the checks of a frame would not be reached
    assert FEW // 10 < messages < FEW


@pytest.mark.slow
def test_a_million_damaged_frames_and_messages() -> None:
    fuzz(10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frames, messages = fuzz(MANY)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
    print(f"{frames} frames and {messages} messages of {MANY} each were read")
    assert frames > MANY // 100


def test_random_messages_end_a_session_with_words_and_nothing_else() -> None:
    draw = random.Random(3)
    samples = [*pack_frame(small(1, 50)), pack(Type.PING), pack(Type.PONG), pack_number(Type.ERROR, 1, "x")]

    async def throw() -> None:
        async with serving() as served:
            for _ in range(40):
                raw = Raw(served.port)
                await raw.greet()
                for _ in range(10):
                    await raw.write(damaged(draw, draw.choice(samples), head=False) or b"x")
                kind, words = await raw.last_words()
                assert kind is Type.REFUSED, words
                assert "protocol" in words
                await raw.close()
            assert await served.works()

    run(throw())
