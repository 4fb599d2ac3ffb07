"""A server hands a client its part of the model, over a session of its own: the client asks for each piece.

A request is a frame with the number of an entry of the listing and a place in it; ``LISTING`` asks for the listing.
The answer is one frame with at most ``PIECE`` bytes. So a broken transfer goes on where it was, a slow client holds
four pieces of the server's memory, and the pieces of one client go out between the frames of all others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

import torch

from cutlayer.errors import ModelError, Refused, RequestFailed, WireError
from cutlayer.links.net.messages import WINDOW
from cutlayer.links.net.session import Session
from cutlayer.models.pieces import LISTING_BYTES
from cutlayer.values import SERVER
from cutlayer.wire import Header, Limits, encode

VERB, LISTING = "hand", -1
LIMITS = Limits(header_bytes=64 << 10, body_bytes=LISTING_BYTES, tensors=1, dimensions=1)  # of what a client takes
Read = Callable[[int, int], bytes | bytearray]


async def hand(session: Session, read: Read, listing: bytes) -> None:
    """Answer a client's requests for pieces until the session is over.

    Args:
        session: with the client.
        read: gives the bytes of an entry from a place on; it runs in a thread, and raises ModelError.
        listing: what there is, as bytes.

    Raises:
        NetworkError, WireError: the session is over.
    """
    while True:
        header, tensors, _ = await session.receive()
        if header.verb != VERB or tensors:
            raise Refused("This session is for handing the model. Both ends need the same version of cutlayer.")
        number, start = header.value("entry"), header.value("start")
        if type(number) is not int or type(start) is not int:
            raise Refused("A request for a piece of the model says neither which nor from where.")
        try:
            data = bytearray(listing) if number == LISTING else await asyncio.to_thread(read, number, start)
        except ModelError as error:
            await session.error(header.turn, str(error))
            continue
        reply = Header("partition", "state", sender=SERVER, receiver=header.sender, client=header.sender)
        piece = torch.frombuffer(data, dtype=torch.uint8)
        await session.send(encode(reply.but(turn=header.turn, names=("bytes",)), [piece]))


async def listing_of(session: Session, client: str) -> memoryview:
    """The listing that the server hands.

    Raises:
        Refused: the server has none.
        NetworkError, WireError: the session is over, or the answer is none.
    """
    await _ask(session, client, 1, LISTING, 0)
    return await _answer(session, 1, None)


async def pieces(
    session: Session, client: str, wanted: Iterable[tuple[int, int, int]]
) -> AsyncIterator[tuple[int, memoryview]]:
    """Ask for pieces, a few ahead of the one that is waited for; each with the number of its entry.

    Args:
        session: with the server.
        client: who asks.
        wanted: of each piece the entry, where it begins, and its length in bytes.

    Raises:
        Refused: the server has no such piece.
        NetworkError, WireError: the session is over, or an answer is not what was asked for.
    """
    asked: deque[tuple[int, int, int]] = deque()
    for turn, (number, start, size) in enumerate(wanted, 2):
        await _ask(session, client, turn, number, start)
        asked.append((turn, number, size))
        if len(asked) == WINDOW:
            turn, number, size = asked.popleft()
            yield number, await _answer(session, turn, size)
    for turn, number, size in asked:
        yield number, await _answer(session, turn, size)


async def _ask(session: Session, client: str, turn: int, number: int, start: int) -> None:
    values = {"entry": number, "start": start}
    await session.send(encode(Header("partition", "control", VERB, client, SERVER, client, turn=turn, values=values)))


async def _answer(session: Session, turn: int, size: int | None) -> memoryview:
    """The bytes that were asked for; ``size`` None: any number of them."""
    try:
        reply, tensors, _ = await session.receive()
    except RequestFailed as error:
        raise Refused(f"The server cannot hand its model: {error.text}") from error
    if reply.turn != turn or len(tensors) != 1 or tensors[0].dtype != torch.uint8 or tensors[0].dim() != 1:
        raise WireError("The server's answer is not the piece of the model that was asked for.")
    if size is not None and len(tensors[0]) != size:
        raise WireError(f"A piece of the model has {len(tensors[0])} bytes; {size} were asked for.")
    return memoryview(tensors[0].numpy().data)
