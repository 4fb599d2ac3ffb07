"""The header of a frame: its fields, and the way from them to bytes and back. ``wire`` is the module to import."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cutlayer.errors import WireError

STEP_NAMES = (
    "partition", "head_forward", "send_activations", "trunk_forward", "return_activations", "tail_step",
    "send_gradients", "trunk_backward", "return_gradients", "head_backward", "aggregate",
)  # fmt: skip

KINDS = ("control", "activations", "gradient", "no-gradient", "state", "ack", "sketch")

DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip

MAGIC = b"CUTL"
VERSION = 1
PREFIX = struct.Struct("<4sBBBBIQI")
Value = bool | int | float | str


@dataclass(frozen=True)
class Limits:
    """The most that a receiver accepts, checked before allocation."""

    header_bytes: int = 4 << 20
    body_bytes: int = 16 << 30
    tensors: int = 65_536
    dimensions: int = 8


@dataclass(frozen=True)
class Header:
    """What a frame says besides its tensors.

    ``step_name`` is one of the eleven names, ``kind`` one of ``KINDS``, ``verb`` what the receiver is asked to do
    (empty in a reply). ``step`` and ``micro`` are the client's optimizer step and micro-batch; ``turn`` numbers the
    requests of one client, so that a repeated request is known. ``names`` are the tensors' names in order.
    """

    step_name: str
    kind: str = "control"
    verb: str = ""
    sender: str = ""
    receiver: str = ""
    client: str = ""
    slot: str = ""
    step: int = 0
    micro: int = 0
    turn: int = 0
    values: Mapping[str, Value] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def but(self, **changes: Any) -> Header:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def value(self, name: str) -> Value:
        """A value that must be there.

        Raises:
            WireError: it is not.
        """
        if name not in self.values:
            raise WireError(f"A '{self.kind}' frame from {self.sender or 'nobody'} lacks the value '{name}'.")
        return self.values[name]


def pack(header: Header, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> bytes:
    """Prefix and header as bytes.

    Raises:
        WireError: a value does not fit its field.
    """
    try:
        text = _fields(header, shapes, dtypes)
        body = sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
        prefix = PREFIX.pack(
            MAGIC, VERSION, STEP_NAMES.index(header.step_name), KINDS.index(header.kind), 0, len(text), body, 0
        )
    except struct.error as error:
        raise WireError(f"A '{header.kind}' frame holds a value that does not fit its field: {error}.") from error
    return prefix[:-4] + struct.pack("<I", _checksum(prefix, text)) + text


def _checksum(prefix: bytes | memoryview, text: bytes | memoryview) -> int:
    """CRC-32 of the prefix (but its own four bytes) and the header."""
    return zlib.crc32(text, zlib.crc32(prefix[: PREFIX.size - 4]))


def _fields(header: Header, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> bytes:
    out = [_pack_text(t) for t in (header.verb, header.sender, header.receiver, header.client, header.slot)]
    out.append(struct.pack("<III", header.step, header.micro, header.turn))
    out.append(struct.pack("<H", len(header.values)))
    for name, value in header.values.items():
        out.append(_pack_text(name))
        if isinstance(value, bool):
            out.append(struct.pack("<c?", b"b", value))
        elif isinstance(value, int):
            out.append(struct.pack("<cq", b"i", value))
        elif isinstance(value, float):
            out.append(struct.pack("<cd", b"f", value))
        else:
            out.append(b"s" + _pack_text(value))
    out.append(struct.pack("<I", len(shapes)))
    for name, shape, dtype in zip(header.names, shapes, dtypes, strict=True):
        if dtype not in DTYPES:
            raise WireError(f"The tensor '{name}' is of type {dtype}, which no frame carries.")
        out.append(_pack_text(name))
        out.append(struct.pack(f"<BB{len(shape)}Q", DTYPES.index(dtype), len(shape), *shape))
    return b"".join(out)


def _pack_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<H", len(raw)) + raw


class _Reader:
    """Reads a header; running past its end is a WireError."""

    def __init__(self, view: memoryview) -> None:
        self.view, self.at = view, 0

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if self.at + size > len(self.view):
            raise WireError("A frame's header ends too early.")
        found = struct.unpack_from(form, self.view, self.at)
        self.at += size
        return found

    def text(self) -> str:
        (size,) = self.take("<H")
        (raw,) = self.take(f"<{size}s")
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise WireError("A frame's header holds text that is not UTF-8.") from error

    def value(self) -> Value:
        (tag,) = self.take("<c")
        if tag == b"s":
            return self.text()
        form = {b"b": "<?", b"i": "<q", b"f": "<d"}.get(tag)
        if form is None:
            raise WireError(f"A frame's header holds a value of unknown type {tag!r}.")
        value: Value = self.take(form)[0]
        return value


def read(
    view: memoryview, limits: Limits, body: int | None
) -> tuple[Header, list[tuple[int, ...]], list[torch.dtype], int]:
    """Header, shapes, dtypes and where the body starts; ``body`` is its length where it lies elsewhere.

    Raises:
        WireError: anything is wrong with the bytes.
    """
    if len(view) < PREFIX.size:
        raise WireError(f"A frame has {len(view)} bytes; its prefix alone has {PREFIX.size}.")
    magic, version, step, kind, flags, size, body_size, crc = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise WireError("These bytes are no cutlayer frame (wrong magic).")
    if version != VERSION:
        raise WireError(
            f"A frame is of version {version}, this cutlayer speaks version {VERSION}. Use one version at both ends."
        )
    if step >= len(STEP_NAMES) or kind >= len(KINDS) or flags:
        raise WireError(f"A frame names step {step}, kind {kind} and flags {flags}, which do not exist.")
    if size > limits.header_bytes or body_size > limits.body_bytes:
        raise WireError(
            f"A frame announces {size} header and {body_size} body bytes; "
            f"at most {limits.header_bytes} and {limits.body_bytes} are accepted."
        )
    start = PREFIX.size + size
    there = len(view) - start if body is None else body
    if len(view) < start or there != body_size:
        raise WireError(f"A frame announces {size} + {body_size} bytes, but {max(len(view) - PREFIX.size, 0)} came.")
    text = view[PREFIX.size : start]
    if _checksum(view, text) != crc:
        raise WireError("A frame's header is damaged (wrong checksum).")
    reader = _Reader(text)
    verb, sender, receiver, client, slot = (reader.text() for _ in range(5))
    step_number, micro, turn = reader.take("<III")
    values: dict[str, Value] = {}
    for _ in range(reader.take("<H")[0]):
        name = reader.text()
        if name in values:
            raise WireError(f"A frame's header holds the value '{name}' twice.")
        values[name] = reader.value()
    names, shapes, dtypes = _tensors(reader, limits)
    total = sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
    if total != body_size or reader.at != len(text):
        raise WireError(f"A frame's tensors need {total} bytes, but its body has {body_size}.")
    header = Header(
        STEP_NAMES[step], KINDS[kind], verb, sender, receiver, client, slot, step_number, micro, turn, values,
        tuple(names),
    )  # fmt: skip
    return header, shapes, dtypes, start


def _tensors(reader: _Reader, limits: Limits) -> tuple[list[str], list[tuple[int, ...]], list[torch.dtype]]:
    (count,) = reader.take("<I")
    if count > limits.tensors:
        raise WireError(f"A frame announces {count} tensors; at most {limits.tensors} are accepted.")
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    dtypes: list[torch.dtype] = []
    for _ in range(count):
        names.append(reader.text())
        code, dims = reader.take("<BB")
        if code >= len(DTYPES) or dims > limits.dimensions:
            raise WireError(f"Tensor '{names[-1]}' has dtype code {code} and {dims} dimensions, which is not accepted.")
        shapes.append(tuple(reader.take(f"<{dims}Q")))
        dtypes.append(DTYPES[code])
        # An empty tensor needs no bytes, but PyTorch multiplies its other dimensions all the same.
        if math.prod(max(size, 1) for size in shapes[-1]) * dtypes[-1].itemsize > limits.body_bytes:
            raise WireError(f"Tensor '{names[-1]}' has the shape {shapes[-1]}, which is not accepted.")
    if len(set(names)) != count:
        raise WireError("A frame's header names a tensor twice.")
    return names, shapes, dtypes
