"""Who breaks the protocol ends his own session and no other's; random bytes give only errors of the wire."""

from __future__ import annotations

import asyncio
import random
import resource
import socket
import struct
import zlib

import pytest
import torch

from certificates import CA, CLIENT, SERVER, certificate_of
from cutlayer.errors import Disconnected, Refused, WireError
from cutlayer.links.net.messages import (
    CHUNK,
    TEXT,
    WINDOW,
    Type,
    pack,
    pack_bye,
    pack_frame,
    pack_greeting,
    pack_number,
    read,
    read_greeting,
)
from cutlayer.links.net.session import Session
from cutlayer.wire import PREFIX, Header, Incoming, Limits, encode
from network import Raw, end_of, run, serving, small

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
        async with serving(on=looks_at_nothing, limits=lambda hello: Limits(body_bytes=20 << 20)) as served:
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
        async with serving(max_waiting=3, max_sessions=lambda: 2, hello_timeout=30.0) as served:
            silent = [Raw(served.port) for _ in range(3)]
            while served.listener.room.waiting.total() < 3:
                await asyncio.sleep(0.01)
            with pytest.raises(Disconnected, match=r"busy|room"):
                await served.join()
            for raw in silent:
                await raw.close()
            while served.listener.room.waiting.total():
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
            served.listener.room.waiting["clinic"] = 128
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
