"""Frames: the bytes that cross between parties, the count of them, and the recorder.

A frame is a fixed prefix, a small typed header, and the raw bytes of its tensors, contiguous at its end::

    prefix  4s magic "CUTL" | u8 version | u8 step name | u8 kind | u8 flags | u32 header bytes | u64 body bytes
            | u32 CRC-32 of the header
    header  verb, sender, receiver, client, slot (strings) | u32 step | u32 micro | u32 turn
            | values: name -> bool, int (i64), float (f64) or string | tensors: name, dtype, shape

All numbers are little-endian and of fixed width, so the length of a frame never depends on the numbers in it, and no
timing is ever inside one. There is no pickle and no ``eval``; every length is checked against ``Limits`` and against
the bytes that are there before anything is allocated. Bytes are counted here and nowhere else.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import WireError

STEP_NAMES = (
    "partition", "head_forward", "send_activations", "trunk_forward", "return_activations", "tail_step",
    "send_gradients", "trunk_backward", "return_gradients", "head_backward", "aggregate",
)  # fmt: skip

KINDS = ("control", "activations", "gradient", "no-gradient", "state", "ack")

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


@dataclass(frozen=True)
class Frame:
    """An encoded frame: its header's bytes and views of its tensors' bytes (nothing is copied to make one)."""

    head: bytes
    body: tuple[memoryview, ...]
    header: Header
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def length(self) -> int:
        """Bytes, framing included."""
        return len(self.head) + sum(part.nbytes for part in self.body)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes in order."""
        yield self.head
        yield from self.body

    def bytes(self) -> bytes:
        """All bytes in one piece."""
        return b"".join(self.chunks())


def encode(header: Header, tensors: Sequence[Tensor] = ()) -> Frame:
    """Make a frame. ``header.names`` must name the tensors (or be empty where there are none)."""
    assert len(header.names) == len(tensors), (header.names, len(tensors))
    held = [t.detach().to("cpu").contiguous() for t in tensors]
    shapes = tuple(tuple(t.shape) for t in held)
    dtypes = tuple(t.dtype for t in held)
    text = _pack_header(header, shapes, dtypes)
    body = tuple(_view(t) for t in held)
    prefix = PREFIX.pack(
        MAGIC, VERSION, STEP_NAMES.index(header.step_name), KINDS.index(header.kind), 0, len(text),
        sum(part.nbytes for part in body), zlib.crc32(text),
    )  # fmt: skip
    return Frame(prefix + text, body, header, shapes, dtypes)


def frame_length(header: Header, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
    """The length in bytes that a frame with such tensors would have; nothing is allocated."""
    text = _pack_header(header, shapes, dtypes)
    return PREFIX.size + len(text) + sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))


def decode(data: Frame | bytes | bytearray | memoryview, limits: Limits | None = None) -> tuple[Header, list[Tensor]]:
    """Read a frame. Each tensor is copied once into memory of its own, so sender and receiver share nothing.

    Raises:
        WireError: it is truncated, malformed, damaged, of another version, or larger than ``limits``.
    """
    limits = limits or Limits()
    if isinstance(data, Frame):
        header, shapes, dtypes, _ = _read_head(memoryview(data.head), limits, sum(p.nbytes for p in data.body))
        return header, [_tensor(p, s, d) for p, s, d in zip(data.body, shapes, dtypes, strict=True)]
    view = memoryview(data).cast("B")
    header, shapes, dtypes, start = _read_head(view, limits, None)
    tensors = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = math.prod(shape) * dtype.itemsize
        tensors.append(_tensor(view[start : start + size], shape, dtype))
        start += size
    return header, tensors


def _view(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _tensor(part: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The one copy, into memory that PyTorch aligned: kernels may give other last bits on memory that is not."""
    out = torch.empty(tuple(shape), dtype=dtype)
    if part.nbytes:
        np.copyto(out.reshape(-1).view(torch.uint8).numpy(), np.frombuffer(part, dtype=np.uint8))
    return out


def _pack_header(header: Header, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> bytes:
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


def _read_head(
    view: memoryview, limits: Limits, body: int | None
) -> tuple[Header, list[tuple[int, ...]], list[torch.dtype], int]:
    """Header, shapes, dtypes and where the body starts; ``body`` is its length where it lies elsewhere."""
    if len(view) < PREFIX.size:
        raise WireError(f"A frame has {len(view)} bytes; its prefix alone has {PREFIX.size}.")
    magic, version, step, kind, _flags, size, body_size, crc = PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise WireError("These bytes are no cutlayer frame (wrong magic).")
    if version != VERSION:
        raise WireError(
            f"A frame is of version {version}, this cutlayer speaks version {VERSION}. Use one version at both ends."
        )
    if step >= len(STEP_NAMES) or kind >= len(KINDS):
        raise WireError(f"A frame names step {step} and kind {kind}, which do not exist.")
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
    if zlib.crc32(text) != crc:
        raise WireError("A frame's header is damaged (wrong checksum).")
    reader = _Reader(text)
    verb, sender, receiver, client, slot = (reader.text() for _ in range(5))
    step_number, micro, turn = reader.take("<III")
    values = {}
    for _ in range(reader.take("<H")[0]):
        name = reader.text()
        values[name] = reader.value()
    (count,) = reader.take("<I")
    if count > limits.tensors:
        raise WireError(f"A frame announces {count} tensors; at most {limits.tensors} are accepted.")
    names, shapes, dtypes = [], [], []
    for _ in range(count):
        names.append(reader.text())
        code, dims = reader.take("<BB")
        if code >= len(DTYPES) or dims > limits.dimensions:
            raise WireError(f"Tensor '{names[-1]}' has dtype code {code} and {dims} dimensions, which is not accepted.")
        shapes.append(tuple(reader.take(f"<{dims}Q")))
        dtypes.append(DTYPES[code])
    total = sum(math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True))
    if total != body_size or reader.at != len(text):
        raise WireError(f"A frame's tensors need {total} bytes, but its body has {body_size}.")
    header = Header(
        STEP_NAMES[step],
        KINDS[kind],
        verb,
        sender,
        receiver,
        client,
        slot,
        step_number,
        micro,
        turn,
        values,
        tuple(names),
    )
    return header, shapes, dtypes, start


class Meter:
    """Counts what crosses, by step name, and records it where asked.

    ``up`` are bytes to the server, ``down`` bytes from it. ``record`` is a folder that gets ``frames.bin`` (the bytes)
    and ``frames.jsonl`` (a line a frame).
    """

    def __init__(self, record: Path | None = None) -> None:
        self.by_step: Counter[str] = Counter()
        self.up = self.down = self.frames = self.offset = 0
        self.folder = record
        self._index: IO[str] | None = None
        self._bin: IO[bytes] | None = None
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)

    def count(self, frame: Frame) -> None:
        """Count (and record) one frame that is being sent."""
        header, length = frame.header, frame.length
        self.by_step[header.step_name] += length
        self.up += length if header.receiver == "server" else 0
        self.down += length if header.sender == "server" else 0
        if self.folder is not None:
            self._write(frame)
        self.frames += 1
        self.offset += length

    def _write(self, frame: Frame) -> None:
        assert self.folder is not None
        if self._bin is None or self._index is None:
            self._bin = (self.folder / "frames.bin").open("ab")
            self._index = (self.folder / "frames.jsonl").open("a", encoding="utf-8")
        for chunk in frame.chunks():
            self._bin.write(chunk)
        header = frame.header
        line = {
            "number": self.frames, "step": header.step, "step_name": header.step_name, "sender": header.sender,
            "receiver": header.receiver, "kind": header.kind, "shapes": [list(s) for s in frame.shapes],
            "dtypes": [str(d).removeprefix("torch.") for d in frame.dtypes], "offset": self.offset,
            "length": frame.length,
        }  # fmt: skip
        self._index.write(json.dumps(line) + "\n")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "by_step": dict(self.by_step),
            "up": self.up,
            "down": self.down,
            "frames": self.frames,
            "offset": self.offset,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go back to ``state`` (None: to the start), and cut the record back to it."""
        state = state or {"by_step": {}, "up": 0, "down": 0, "frames": 0, "offset": 0}
        self.by_step = Counter(state["by_step"])
        self.up, self.down, self.frames, self.offset = (int(state[k]) for k in ("up", "down", "frames", "offset"))
        if self.folder is not None:
            self.close()
            _truncate(self.folder / "frames.bin", self.offset)
            keep_lines(self.folder / "frames.jsonl", self.frames)

    def flush(self) -> None:
        """Write out what is buffered."""
        for file in (self._bin, self._index):
            if file is not None:
                file.flush()

    def close(self) -> None:
        """Close the record."""
        for file in (self._bin, self._index):
            if file is not None:
                file.close()
        self._bin = self._index = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _truncate(path: Path, size: int) -> None:
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)


def keep_lines(path: Path, count: int) -> None:
    """Cut a text file back to its first ``count`` lines."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        for _ in range(count):
            if not file.readline():
                break
        file.truncate(file.tell())


def read_frames(folder: str | Path) -> Iterator[tuple[dict[str, Any], Header, list[Tensor]]]:
    """Read back what ``record_wire`` wrote: for each frame its line of the index, its header and its tensors.

    Raises:
        WireError: the folder has no record, or it is damaged.
    """
    folder = Path(folder)
    if not (folder / "frames.jsonl").is_file() or not (folder / "frames.bin").is_file():
        raise WireError(f"'{folder}' holds no recorded frames (frames.jsonl and frames.bin).")
    with (folder / "frames.jsonl").open(encoding="utf-8") as index, (folder / "frames.bin").open("rb") as data:
        for text in index:
            line = json.loads(text)
            data.seek(line["offset"])
            raw = data.read(line["length"])
            header, tensors = decode(raw)
            yield line, header, tensors
