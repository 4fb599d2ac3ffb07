"""The messages on a stream: one type byte, the length of the rest in four, and the rest.

A gRPC stream keeps messages apart by itself; the length is there so that a damaged or foreign one is noticed::

    u8 type | u32 bytes that follow
    HELLO, WELCOME      a JSON object            client, server: the first message each
    REFUSED             text                     do not come back
    BYE                 u8 done | text           the session ends; done: the run is over, else come back
    FRAME_HEAD          the head of a frame      as ``wire`` makes it
    CHUNK               the next bytes of its body: ``CHUNK`` of them, or all that are left
    ERROR               u32 turn | text          stands for a reply: the request was refused
    CREDIT              u32 count                the sender of this takes so many frames (or errors) more
    PING, PONG          nothing                  are you there; I am

Everything is little-endian. Text is UTF-8, at most ``TEXT`` bytes, and shown without control characters.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn

from cutlayer.errors import WireError
from cutlayer.wire import Frame, Limits

PROTOCOL = 1  # changes with anything in this module
CHUNK = 1 << 20  # bytes of a body in one message; a slow link must carry one well within the silence allowed
GREETING = 16 << 10  # bytes of a HELLO, which comes from anybody
WELCOME = CHUNK  # of a WELCOME, which tells a run with all its clients: some 9000 with their profiles
TEXT = 4 << 10
WINDOW = 4  # frames that a receiver takes before it has looked at them, and requests in flight to one client
MOST_CREDIT = 1 << 16
_START = struct.Struct("<BI")
_NUMBER = struct.Struct("<I")


class Type(IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    BYE = 4
    FRAME_HEAD = 5
    CHUNK = 6
    ERROR = 7
    CREDIT = 8
    PING = 9
    PONG = 10


@dataclass(frozen=True)
class Message:
    """A message that was read: its type, and what of the rest that type has."""

    type: Type
    data: memoryview
    number: int = 0  # BYE: whether the run is done; ERROR: the turn; CREDIT: the count

    @property
    def text(self) -> str:
        """The text of a REFUSED, BYE or ERROR, fit to be shown."""
        return shown(str(self.data, "utf-8", "replace"))


@dataclass(frozen=True)
class Packed:
    """A frame as the messages that carry it: the copy that gRPC needs anyway, which can be sent again."""

    messages: tuple[bytes, ...]
    turn: int
    length: int  # bytes of the frame


def most_bytes(limits: Limits) -> int:
    """The longest message that a receiver with these limits takes."""
    return _START.size + max(CHUNK, limits.header_bytes + 64, GREETING)


def shown(text: str) -> str:
    """Text of another party on one line, without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:TEXT]


def pack(kind: Type, data: bytes = b"") -> bytes:
    """A message."""
    return _START.pack(kind, len(data)) + data


def pack_number(kind: Type, number: int, text: str = "") -> bytes:
    """An ERROR or CREDIT."""
    return pack(kind, _NUMBER.pack(number) + cut(text))


def pack_bye(text: str, *, done: bool) -> bytes:
    """A BYE."""
    return pack(Type.BYE, bytes([done]) + cut(text))


def cut(text: str) -> bytes:
    """Text as the bytes of a message."""
    return text.encode("utf-8", "replace")[:TEXT]


def pack_greeting(kind: Type, values: Mapping[str, Any]) -> bytes:
    """A HELLO or WELCOME.

    Raises:
        WireError: the values are too many bytes.
    """
    data = json.dumps(values, allow_nan=False).encode()
    most = WELCOME if kind is Type.WELCOME else GREETING
    if len(data) > most:
        raise WireError(f"A {kind.name} of {len(data)} bytes is longer than the {most} that are accepted.")
    return pack(kind, data)


def pack_frame(frame: Frame) -> Iterator[bytes]:
    """The messages of a frame, made one by one: all chunks but the last are full, whatever the tensors' borders."""
    yield pack(Type.FRAME_HEAD, frame.head)
    left = sum(part.nbytes for part in frame.body)
    parts: list[memoryview] = []
    room = min(CHUNK, left)
    for part in frame.body:
        start = 0
        while start < part.nbytes:
            parts.append(part[start : start + room])
            start += parts[-1].nbytes
            room -= parts[-1].nbytes
            if not room:
                size = min(CHUNK, left)
                yield b"".join([_START.pack(Type.CHUNK, size), *parts])
                parts, left = [], left - size
                room = min(CHUNK, left)


def pack_whole(frame: Frame) -> Packed:
    """All messages of a frame; its tensors may change afterwards."""
    return Packed(tuple(pack_frame(frame)), frame.header.turn, frame.length)


def read(data: bytes) -> Message:
    """Read a message.

    Raises:
        WireError: its type does not exist, or its length is not what it says or its type has.
    """
    if len(data) < _START.size:
        raise WireError(f"A message has {len(data)} bytes; its beginning alone has {_START.size}.")
    code, size = _START.unpack_from(data)
    rest = memoryview(data)[_START.size :]
    if size != len(rest):
        raise WireError(f"A message announces {size} bytes, but {len(rest)} came.")
    try:
        kind = Type(code)
    except ValueError as error:
        raise WireError(f"A message is of type {code}, which does not exist.") from error
    least, most = _SIZES.get(kind, (0, len(rest)))
    if not least <= len(rest) <= most:
        raise WireError(f"A {kind.name} of {len(rest)} bytes is not accepted.")
    if kind is Type.BYE:
        if rest[0] > 1:
            raise WireError("A BYE says neither that the run is done nor that it is not.")
        return Message(kind, rest[1:], rest[0])
    if kind in (Type.ERROR, Type.CREDIT):
        return Message(kind, rest[_NUMBER.size :], _NUMBER.unpack_from(rest)[0])
    return Message(kind, rest)


_SIZES = {  # bytes, least and most; the rest of FRAME_HEAD is checked under the receiver's limits
    Type.HELLO: (2, GREETING),
    Type.WELCOME: (2, WELCOME),
    Type.REFUSED: (0, TEXT),
    Type.BYE: (1, 1 + TEXT),
    Type.CHUNK: (1, CHUNK),
    Type.ERROR: (4, 4 + TEXT),
    Type.CREDIT: (4, 4),
    Type.PING: (0, 0),
    Type.PONG: (0, 0),
}


def read_greeting(message: Message) -> dict[str, Any]:
    """The values of a HELLO or WELCOME.

    Raises:
        WireError: they are no JSON object.
    """
    try:
        values = json.loads(bytes(message.data), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise WireError(f"A {message.type.name} holds no sound JSON: {shown(str(error))}.") from error
    if not isinstance(values, dict):
        raise WireError(f"A {message.type.name} holds no JSON object.")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")
