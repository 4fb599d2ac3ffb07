"""Sessions over gRPC: what crosses, byte for byte, and that one end never waits for the other for ever."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from certificates import CLIENT, SERVER
from cutlayer.errors import Disconnected, Dismissed, Refused, RequestFailed, WireError
from cutlayer.links.net.grpc_pipe import GrpcPipe
from cutlayer.links.net.messages import (
    CHUNK,
    WINDOW,
    Type,
    pack,
    pack_frame,
    pack_whole,
    read,
)
from cutlayer.links.net.session import Heartbeat, Session
from cutlayer.wire import DTYPES, Header, Incoming, encode
from network import Raw, end_of, run, serving, small


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
