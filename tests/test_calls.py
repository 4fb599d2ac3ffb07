"""Requests over sessions that break: each is answered once, and however often, the reply is the same bytes."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlayer.errors import CutlayerError, DataError, Disconnected, Dismissed, Gone, Refused, RequestFailed, WireError
from cutlayer.links.net.answering import Again, answer
from cutlayer.links.net.messages import WINDOW, Type, pack_frame, read
from cutlayer.links.net.remote import Remote, on_loop
from cutlayer.links.net.session import Received, Session
from cutlayer.wire import Frame, Header, decode, encode
from network import Served, run, serving, small

SOON = Again(first=0.01, most=0.05, give_up=60.0)
Handle = Callable[[Header, list[Tensor]], tuple[Header, Sequence[Tensor]]]


class Doubler:
    """A client's work: twice the numbers, plus how often it was asked; it remembers which turns it handled."""

    def __init__(self) -> None:
        self.turns: list[int] = []
        self.live = torch.zeros(3)  # what is sent is changed by the next request
        self.before: Callable[[Header], None] = lambda header: None

    def __call__(self, header: Header, tensors: list[Tensor]) -> tuple[Header, Sequence[Tensor]]:
        self.turns.append(header.turn)
        self.before(header)
        self.live.copy_(tensors[0][:3] * 2 + len(self.turns))
        reply = Header("send_activations", "activations", sender="c", receiver="server", turn=header.turn)
        return reply.but(names=("y", "big")), [self.live, tensors[0]]


class Ends:
    """A server with one remote client, and that client, whose connections can be broken."""

    def __init__(self, served: Served, remote: Remote) -> None:
        self.served, self.remote = served, remote
        self.sessions: list[Session] = []  # of the client
        self.before_connect: Callable[[], None] = lambda: None

    async def connect(self, extras: dict[str, Any]) -> Session:
        self.before_connect()
        session = await self.served.join("c", hello=extras)
        self.sessions.append(session)
        return session

    def break_(self) -> None:
        """Cut the newest connection, as a network does."""
        self.sessions[-1].drop("cut by the test")


@asynccontextmanager
async def asking(patience: float = 60.0) -> AsyncIterator[tuple[Remote, Ends]]:
    """A server that asks one client, who has not come yet."""
    remote = Remote("c", patience=patience)
    async with serving(on=remote.serve) as served:
        yield remote, Ends(served, remote)


def over(handle: Handle, do: Callable[[Ends], Any], *, patience: float = 60.0, again: Again = SOON) -> Any:
    """Run ``do`` against a client that answers with ``handle``, then say that the run is done."""

    async def both() -> Any:
        async with asking(patience) as (remote, ends):
            client = asyncio.ensure_future(answer(ends.connect, handle, again=again, draw=random.Random(0)))
            try:
                found = await do(ends)
                await remote.attached()
                await remote.close("All done.")
                assert await client == "All done."
                await remote.heard.wait()
                return found
            finally:
                client.cancel()
                await asyncio.wait({client})

    return run(both())


def bytes_of(received: Received) -> bytes:
    header, tensors, length = received
    data = encode(header, tensors).bytes()
    assert len(data) == length
    return data


# ---------------------------------------------------------------- undisturbed


def test_requests_are_answered_in_order_with_several_in_flight() -> None:
    work = Doubler()

    async def ask(ends: Ends) -> None:
        found = await asyncio.gather(*(ends.remote.call(small(turn, 5)) for turn in range(1, 4 * WINDOW)))
        assert [header.turn for header, _, _ in found] == list(range(1, 4 * WINDOW))
        for number, (_, (y, big), _) in enumerate(found, start=1):
            assert y.tolist() == [number, 2 + number, 4 + number]
            assert big.tolist() == [0, 1, 2, 3, 4]
        assert (ends.remote.retries, ends.remote.dropped, ends.remote.reconnects) == (0, 0, 0)

    over(work, ask)
    assert work.turns == list(range(1, 4 * WINDOW))


def test_the_driver_may_run_on_another_loop() -> None:
    work = Doubler()

    async def ask(ends: Ends) -> None:
        network = asyncio.get_running_loop()

        async def drive() -> list[int]:
            return [(await on_loop(network, ends.remote.call(small(turn))))[0].turn for turn in (1, 2, 3)]

        assert await asyncio.to_thread(asyncio.run, drive()) == [1, 2, 3]

    over(work, ask)


def test_a_tensor_may_change_once_its_call_waits() -> None:
    async def ask(ends: Ends) -> list[float]:
        x = torch.ones(3)
        call = asyncio.ensure_future(ends.remote.call(encode(Header("aggregate", turn=1, names=("x",)), [x])))
        await asyncio.sleep(0)
        x.fill_(100.0)
        return (await call)[1][1].tolist()

    assert over(Doubler(), ask) == [1, 1, 1]


# ---------------------------------------------------------------- connections that break


def test_a_connection_that_breaks_while_a_request_is_worked_on() -> None:
    """Before the reply: the work goes on, is not done again, and its reply goes out on the next connection."""
    work, begun, go_on = Doubler(), threading.Event(), threading.Event()

    def before(header: Header) -> None:
        begun.set()
        assert go_on.wait(60)

    async def ask(ends: Ends) -> None:
        work.before = before
        call = asyncio.ensure_future(ends.remote.call(small(1)))
        await asyncio.to_thread(begun.wait)
        ends.break_()
        while len(ends.sessions) < 2 or ends.remote.retries < 1:
            await asyncio.sleep(0.01)
        go_on.set()
        assert (await call)[1][0].tolist() == [1, 3, 5]
        assert (ends.remote.retries, ends.remote.reconnects) == (1, 1)
        assert ends.remote.seconds_away > 0

    over(work, ask)
    assert work.turns == [1]


def test_a_connection_that_breaks_in_the_middle_of_either_frame() -> None:
    """The client is cut off after each of the messages that a request and its reply are made of."""
    size = 700_000  # three chunks
    whole = len(list(pack_frame(small(1, size))))
    assert whole == 4
    replies: list[bytes] = []

    def cut_after(session: Session, messages: int) -> None:
        """Break the connection when this end has written so many messages of frames."""
        write, left = session._pipe.write, [messages]

        async def counted(data: bytes) -> None:
            if read(data).type in (Type.FRAME_HEAD, Type.CHUNK):
                if not left[0]:
                    session._pipe.cut()
                    raise Disconnected("cut by the test")
                left[0] -= 1
            await write(data)

        session._pipe.write = counted  # type: ignore[method-assign]

    for who in ("server", "client"):
        for after in range(whole):
            work = Doubler()

            async def ask(ends: Ends, who: str = who, after: int = after) -> None:
                session = await ends.remote.attached()
                while not ends.sessions:
                    await asyncio.sleep(0.01)
                cut_after(session if who == "server" else ends.sessions[0], after)
                replies.append(bytes_of(await ends.remote.call(small(1, size))))
                assert (ends.remote.retries, ends.remote.reconnects) == (1, 1)

            over(work, ask)
            assert work.turns == [1]
    assert len(replies) == 2 * whole
    assert len(set(replies)) == 1


def test_a_reply_that_was_lost_is_sent_again_byte_for_byte() -> None:
    """After the reply: the client had sent it, nobody got it, and the tensor it was made of has changed since."""
    work = Doubler()

    async def ask(ends: Ends) -> None:
        remote = ends.remote
        first = bytes_of(await remote.call(small(1)))
        second = bytes_of(await remote.call(small(2)))
        session = await remote.attached()
        for _ in range(2):  # as a server does that did not get the replies: the same frames on a new session
            ends.break_()
            await session.ended.wait()
            while remote.session is None or remote.session is session:
                await asyncio.sleep(0.01)
            session = await remote.attached()
            for task in remote._tasks:  # this test reads the replies itself
                task.cancel()
            for frame, before in ((small(1), first), (small(2), second)):
                await session.send(frame)
                assert bytes_of(await session.receive()) == before
        remote.attach(session)

    over(work, ask)
    assert work.turns == [1, 2]


def test_many_breaks_at_random_change_nothing() -> None:
    draw, work = random.Random(5), Doubler()

    async def ask(ends: Ends) -> None:
        await ends.remote.attached()
        stop = asyncio.Event()

        async def trouble() -> None:
            for _ in range(60):  # not for ever: a slow machine may need longer than that for one connection
                if stop.is_set():
                    return
                await asyncio.sleep(draw.uniform(0.0, 0.06))
                (ends.break_ if draw.random() < 0.5 else lambda: [s.drop("cut") for s in held()])()

        def held() -> list[Session]:
            return list(ends.served.listener.sessions.values())

        troubling = asyncio.ensure_future(trouble())
        found = await asyncio.gather(*(ends.remote.call(small(turn, 60_000)) for turn in range(1, 41)))
        stop.set()
        await troubling
        for number, (_, (y, big), _) in enumerate(found, start=1):
            assert y.tolist() == [number, 2 + number, 4 + number]
            assert torch.equal(big, torch.arange(60_000.0))

    over(work, ask)
    assert work.turns == list(range(1, 41))


# ---------------------------------------------------------------- clients that are gone


def test_patience_ends() -> None:
    async def ask(ends: Ends) -> None:
        remote = ends.remote
        assert (await remote.call(small(1)))[0].turn == 1
        block = asyncio.Event()
        ends.before_connect = lambda: (_ for _ in ()).throw(Disconnected("no way")) if not block.is_set() else None
        ends.break_()
        while remote.session is not None:
            await asyncio.sleep(0.01)
        for turn in (2, 3):  # the second is not waited for again
            with pytest.raises(Gone, match=r"'c' is gone: it has been away for 0\.3 seconds") as caught:
                await remote.call(small(turn))
            assert caught.value.client == "c"
        block.set()
        await remote.attached()
        assert (await remote.call(small(4)))[0].turn == 4

    over(Doubler(), ask, patience=0.3)


def test_a_client_that_never_came() -> None:
    async def ask() -> None:
        with pytest.raises(Gone, match=r"away for 0\.05"):
            await Remote("c", patience=0.05).call(small(1))

    run(ask())


def test_a_client_that_was_started_again_does_not_hold_what_it_was_asked() -> None:
    work, begun, go_on = Doubler(), threading.Event(), threading.Event()

    def before(header: Header) -> None:
        begun.set()
        assert go_on.wait(60)

    async def ask() -> None:
        work.before = before
        async with asking() as (remote, ends):
            clients = [asyncio.ensure_future(answer(ends.connect, work, again=SOON))]
            call = asyncio.ensure_future(remote.call(small(1)))
            await asyncio.to_thread(begun.wait)
            clients.append(asyncio.ensure_future(answer(ends.connect, Doubler(), again=SOON)))
            with pytest.raises(Gone, match="started again"):
                await call
            go_on.set()
            with pytest.raises(Refused, match="Another process"):
                await clients[0]
            remote.renew()
            assert (await remote.call(small(2)))[0].turn == 2
            await remote.close()
            assert await clients[1] == "The run is done."

    run(ask())


def test_a_client_that_was_started_again_between_two_requests_is_not_asked_until_it_is_taken_back() -> None:
    async def ask() -> None:
        async with asking() as (remote, ends):
            first = asyncio.ensure_future(answer(ends.connect, Doubler(), again=SOON))
            await remote.call(small(1))
            first.cancel()  # nothing is in flight to it
            await asyncio.wait({first})
            work = Doubler()
            second = asyncio.ensure_future(answer(ends.connect, work, again=SOON))
            while remote.reconnects == 0 or remote.session is None:
                await asyncio.sleep(0.01)
            assert remote.stale
            for turn in (2, 3):
                with pytest.raises(Gone, match="started again"):
                    await remote.call(small(turn))
            assert work.turns == []
            remote.renew()
            assert (await remote.call(small(4)))[0].turn == 4
            await remote.close()
            assert await second == "The run is done."

    run(ask())


def test_a_client_that_leaves_for_good() -> None:
    async def ask() -> None:
        async with asking() as (remote, ends):
            session = await ends.served.join("c")
            call = asyncio.ensure_future(remote.call(small(1)))
            await session.receive()
            await session.refuse("My policy forbids it.")
            with pytest.raises(Gone, match="My policy forbids it"):
                await call
            with pytest.raises(Gone):
                await remote.call(small(2))

    run(ask())


def test_a_client_gives_up_in_the_end() -> None:
    async def never(extras: dict[str, Any]) -> Session:
        assert extras["turn"] == 0
        tries.append(extras["instance"])
        raise Disconnected("Nobody listens.")

    tries: list[str] = []
    with pytest.raises(Disconnected, match="Nobody listens"):
        run(answer(never, Doubler(), again=Again(first=0.01, most=0.02, give_up=0.2)))
    assert len(tries) > 2
    assert len(set(tries)) == 1


def test_a_client_that_is_refused_does_not_try_again() -> None:
    async def refuse(extras: dict[str, Any]) -> Session:
        tries.append(1)
        raise Refused("The token is wrong.")

    tries: list[int] = []
    with pytest.raises(Refused, match="token"):
        run(answer(refuse, Doubler(), again=SOON))
    assert tries == [1]


# ---------------------------------------------------------------- replies that are none


def test_a_refused_request_is_remembered_and_the_client_goes_on() -> None:
    work = Doubler()

    def before(header: Header) -> None:
        if header.turn == 2:
            raise DataError("Rule 3 forbids this.")

    async def ask(ends: Ends) -> None:
        work.before = before
        await ends.remote.call(small(1))
        with pytest.raises(RequestFailed, match=r"Client 'c' refused request 2: Rule 3 forbids this\.") as caught:
            await ends.remote.call(small(2))
        assert (caught.value.turn, caught.value.text) == (2, "Rule 3 forbids this.")
        session = await ends.remote.attached()
        for task in ends.remote._tasks:
            task.cancel()
        await session.send(small(2))
        with pytest.raises(RequestFailed, match="Rule 3"):
            await session.receive()
        await session.send(small(2, verb="other"))
        with pytest.raises(RequestFailed, match="Turn 2 was another request before"):
            await session.receive()
        for turn in range(3, 4 + WINDOW):
            await session.send(small(turn))
            await session.receive()
        await session.send(small(2))
        with pytest.raises(RequestFailed, match="Turn 2 is over; this client was last asked for turn 7"):
            await session.receive()
        ends.remote.attach(session)

    over(work, ask)
    assert work.turns == [1, 2, *range(3, 4 + WINDOW)]


@pytest.mark.parametrize("connected", [True, False])
def test_an_error_of_ours_ends_the_client_and_stays_there(connected: bool) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fails(header: Header, tensors: list[Tensor]) -> tuple[Header, Sequence[Tensor]]:
        begun.set()
        assert go_on.wait(60)
        raise KeyError("private text")

    async def ask() -> None:
        async with asking(60.0 if connected else 0.1) as (remote, ends):
            client = asyncio.ensure_future(answer(ends.connect, fails, again=Again(first=30.0)))
            call = asyncio.ensure_future(remote.call(small(1)))
            await asyncio.to_thread(begun.wait)
            if not connected:
                ends.break_()
            go_on.set()
            with pytest.raises(RequestFailed if connected else Gone) as caught:
                await call
            assert "private" not in str(caught.value)
            with pytest.raises(KeyError, match="private text"):
                await client

    run(ask())


def test_replies_that_nobody_waits_for_are_dropped_and_counted() -> None:
    async def ask() -> None:
        async with asking() as (remote, ends):
            session = await ends.served.join("c")
            call = asyncio.ensure_future(remote.call(small(1)))
            cancelled = asyncio.ensure_future(remote.call(small(2)))
            for _ in range(2):
                await session.receive()
            cancelled.cancel()
            await asyncio.wait({cancelled})
            await session.send(small(2, sender="c"))  # late
            await session.send(small(1, sender="c"))
            assert (await call)[0].turn == 1
            await session.send(small(1, sender="c"))  # a duplicate
            await session.error(1, "a duplicate too")
            again = asyncio.ensure_future(remote.call(small(3)))
            await session.receive()
            await session.send(small(3, sender="c"))
            assert (await again)[0].turn == 3
            assert remote.dropped == 3

    run(ask())


def test_replies_that_are_wrong() -> None:
    async def ask() -> None:
        async with asking() as (remote, ends):
            session = await ends.served.join("c")
            call = asyncio.ensure_future(remote.call(small(1)))
            await session.receive()
            await session.send(small(1, sender="another"))
            with pytest.raises(WireError, match="in the name of 'another'"):
                await call
            call = asyncio.ensure_future(remote.call(small(2)))
            await session.receive()
            await session.send(small(99, sender="c"))
            with pytest.raises(WireError, match="answered request 99, which nobody had made"):
                await call
            with pytest.raises(Refused, match="request 99"):
                await session.receive()
            session = await ends.served.join("c")  # a reply that breaks the protocol of the stream
            call = asyncio.ensure_future(remote.call(small(3)))
            await session.receive()
            await session._write(b"junk!!")
            with pytest.raises(CutlayerError, match="announces"):
                await call

    run(ask())


def test_turns_go_on_where_the_client_is() -> None:
    """A server that was started again must not use turns that its client has answered for the one before it."""

    async def ask() -> None:
        async with asking() as (remote, ends):
            await ends.served.join("c", hello={"turn": 41, "instance": "i"})
            await remote.attached()
            assert remote.last_turn == 41
            for wrong in (-1, 2**32, "1", True, None, 1.5):
                refused = await ends.served.join("c", hello={"turn": wrong, "instance": "i"})
                with pytest.raises(Refused, match="which is no turn"):
                    await refused.receive()

    run(ask())


def test_who_comes_back_in_time_is_not_given_up_later() -> None:
    """The patience of an absence ends with it."""

    async def ask() -> None:
        async with asking(0.2) as (remote, ends):
            client = asyncio.ensure_future(answer(ends.connect, Doubler(), again=SOON))
            try:
                session = await remote.attached()
                remote.detach(session)
                remote.attach(session)
                await asyncio.sleep(0.4)
                assert (await remote.call(small(1)))[0].turn == 1
            finally:
                client.cancel()
                await asyncio.wait({client})

    run(ask())


class Asking:
    """A session of a server that asks these, and then says that the run is done; ``sent`` is what came back."""

    def __init__(self, *frames: Frame) -> None:
        self.todo, self.sent, self.errors = list(frames), list[int](), list[str]()
        self.all = asyncio.Event()
        self.expected = len(frames)

    async def receive(self) -> Received:
        if self.todo:
            frame = self.todo.pop(0)
            return *decode(frame), frame.length
        await self.all.wait()
        raise Dismissed("All done.")

    async def send(self, packed: Any) -> None:
        self.sent.append(packed.length)
        self._count()

    async def error(self, turn: int, text: str) -> None:
        self.errors.append(text)
        self._count()

    async def close(self, reason: str) -> None: ...

    def _count(self) -> None:
        if len(self.sent) + len(self.errors) == self.expected:
            self.all.set()


def test_a_reply_that_is_sent_again_is_told_before_it_leaves() -> None:
    """With its bytes; one that may leave no more is refused, and the client goes on."""
    told: list[tuple[int, int]] = []

    def resent(turn: int, length: int) -> None:
        told.append((turn, length))
        if len(told) > 1:
            raise CutlayerError("no more bytes")

    async def ask() -> None:
        session = Asking(small(1), small(1), small(1), small(2))

        async def connect(extras: dict[str, Any]) -> Any:
            return session

        assert await answer(connect, Doubler(), resent=resent) == "All done."
        first, again, other = session.sent
        assert first == again == other
        assert told == [(1, first), (1, first)]
        assert session.errors == ["no more bytes"]

    run(ask())
