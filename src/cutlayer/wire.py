"""Frames: the bytes that cross between parties, the count of them, and the recorder.

A frame is a fixed prefix, a small typed header, and the raw bytes of its tensors, contiguous at its end::

    prefix  4s magic "CUTL" | u8 version | u8 step name | u8 kind | u8 flags | u32 header bytes | u64 body bytes
            | u32 CRC-32 of all that stands before it and of the header
    header  verb, sender, receiver, client, slot (strings) | u32 step | u32 micro | u32 turn
            | values: name -> bool, int (i64), float (f64) or string | tensors: name, dtype, shape

All numbers are little-endian and of fixed width, so the length of a frame never depends on the numbers in it, and no
timing is ever inside one. There is no pickle and no ``eval``; every length is checked against ``Limits`` and against
the bytes that are there before anything is allocated. Bytes are counted here and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from cutlayer._header import DTYPES, KINDS, MAGIC, PREFIX, STEP_NAMES, VERSION, Header, Limits, Value, pack, read
from cutlayer.errors import WireError

__all__ = [
    "DTYPES", "KINDS", "MAGIC", "PREFIX", "SEALED", "SEAL_BYTES", "STEP_NAMES", "VERSION", "Frame", "Header",
    "Incoming", "Limits", "Meter", "Value", "decode", "encode", "frame_length", "keep_lines", "read_frames",
]  # fmt: skip


SEALED, SEAL_BYTES = "sealed", 36  # the one tensor of a sealed frame (``sealing.py``), and what sealing adds to it


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

    @property
    def counted(self) -> int:
        """Bytes of what a party sends another, framing included: of a sealed frame, those of the one inside it."""
        return self.shapes[0][0] - SEAL_BYTES if self.header.names == (SEALED,) else self.length

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
    return Frame(pack(header, shapes, dtypes), tuple(_view(t) for t in held), header, shapes, dtypes)


def frame_length(header: Header, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
    """The length in bytes that a frame with such tensors would have; nothing is allocated."""
    return len(pack(header, shapes, dtypes)) + sum(
        math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True)
    )


def decode(data: Frame | bytes | bytearray | memoryview, limits: Limits | None = None) -> tuple[Header, list[Tensor]]:
    """Read a frame. Each tensor is copied once into memory of its own, so sender and receiver share nothing.

    Raises:
        WireError: it is truncated, malformed, damaged, of another version, or larger than ``limits``.
    """
    limits = limits or Limits()
    if isinstance(data, Frame):
        header, shapes, dtypes, _ = read(memoryview(data.head), limits, sum(p.nbytes for p in data.body))
        return header, [_tensor(p, s, d) for p, s, d in zip(data.body, shapes, dtypes, strict=True)]
    view = memoryview(data).cast("B")
    header, shapes, dtypes, start = read(view, limits, None)
    tensors = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = math.prod(shape) * dtype.itemsize
        tensors.append(_tensor(view[start : start + size], shape, dtype))
        start += size
    return header, tensors


class Incoming:
    """A frame under way: its tensors are allocated from the head, and filled as the bytes of the body come.

    Each byte is copied once. Memory is asked for when the head is accepted; the system gives it as it is filled.

    Args:
        head: the bytes before the body, whole.
        limits: the most that is accepted.

    Raises:
        WireError: the head is truncated, malformed, damaged, of another version, or announces more than ``limits``.
    """

    def __init__(self, head: bytes | memoryview, limits: Limits | None = None) -> None:
        view = memoryview(head).cast("B")
        announced = int(PREFIX.unpack_from(view)[6]) if len(view) >= PREFIX.size else 0
        self.header, shapes, dtypes, start = read(view, limits or Limits(), announced)
        if start != len(view):
            raise WireError(f"A frame's head announces {start} bytes, but {len(view)} came.")
        self.length = start + announced  # bytes of the whole frame
        self.missing = announced  # bytes of the body that have not come
        try:
            self._tensors = [torch.empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)]
        except RuntimeError as error:
            raise WireError(f"There is no memory for a frame of {announced} bytes.") from error
        self._rooms = [_view(tensor) for tensor in self._tensors if tensor.numel()]
        self._at = 0  # bytes that the first room already holds

    def fill(self, data: bytes | memoryview) -> None:
        """Take the next bytes of the body.

        Raises:
            WireError: they are more than the head announced.
        """
        view = memoryview(data).cast("B")
        if len(view) > self.missing:
            raise WireError(f"A frame's body lacks {self.missing} bytes, but {len(view)} more came.")
        self.missing -= len(view)
        while len(view):
            room = self._rooms[0]
            size = min(len(room) - self._at, len(view))
            room[self._at : self._at + size] = view[:size]
            view, self._at = view[size:], self._at + size
            if self._at == len(room):
                del self._rooms[0]
                self._at = 0

    def done(self) -> tuple[Header, list[Tensor]]:
        """The frame, as ``decode`` gives it.

        Raises:
            WireError: the body is not whole, or holds what its types cannot.
        """
        if self.missing:
            raise WireError(f"A frame of {self.length} bytes ends {self.missing} bytes too early.")
        for tensor in self._tensors:
            if tensor.dtype == torch.bool and tensor.numel():
                _check_truth(tensor.reshape(-1).view(torch.uint8).numpy())
        return self.header, self._tensors


def _view(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _tensor(part: memoryview, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The one copy, into memory that PyTorch aligned: kernels may give other last bits on memory that is not."""
    out = torch.empty(tuple(shape), dtype=dtype)
    if part.nbytes:
        raw = np.frombuffer(part, dtype=np.uint8)
        if dtype == torch.bool:
            _check_truth(raw)
        np.copyto(out.reshape(-1).view(torch.uint8).numpy(), raw)
    return out


def _check_truth(raw: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    if raw.max() > 1:
        raise WireError("A frame's tensor of truth values holds other bytes than 0 and 1.")


class Meter:
    """Counts what crosses, by step name, and records it where asked.

    ``up`` are bytes to the server, ``down`` bytes from it; ``by_pair`` has those between others too. ``repeated`` are
    those tensors' bytes that a broadcast would not have sent again (frames with the value ``again``). ``record`` is a
    folder that gets ``frames.bin`` (the bytes; of a sealed frame as it came) and ``frames.jsonl`` (a line a frame).
    """

    def __init__(self, record: Path | None = None) -> None:
        self.by_step: Counter[str] = Counter()
        self.by_pair: Counter[tuple[str, str]] = Counter()  # by sender and receiver
        self.up = self.down = self.frames = self.offset = self.repeated = 0
        self.folder = record
        self._index: IO[str] | None = None
        self._bin: IO[bytes] | None = None
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)

    def count(self, frame: Frame) -> None:
        """Count (and record) one frame that is being sent."""
        header, length = frame.header, frame.counted
        self.by_step[header.step_name] += length
        self.by_pair[header.sender, header.receiver] += length
        self.up += length if header.receiver == "server" else 0
        self.down += length if header.sender == "server" else 0
        self.repeated += length - len(frame.head) if header.values.get("again") else 0
        if self.folder is not None:
            self._write(frame)
        self.frames += 1
        self.offset += frame.length

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
            "by_pair": [[*pair, count] for pair, count in self.by_pair.items()],
            "up": self.up,
            "down": self.down,
            "frames": self.frames,
            "offset": self.offset,
            "repeated": self.repeated,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go back to ``state`` (None: to the start), and cut the record back to it."""
        state = state or {"by_step": {}, "by_pair": [], "up": 0, "down": 0, "frames": 0, "offset": 0}
        self.repeated = int(state.get("repeated", 0))
        self.by_step = Counter(state["by_step"])
        self.by_pair = Counter({(sender, receiver): count for sender, receiver, count in state["by_pair"]})
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
    size = (folder / "frames.bin").stat().st_size
    with (folder / "frames.jsonl").open(encoding="utf-8") as index, (folder / "frames.bin").open("rb") as data:
        for number, text in enumerate(index, start=1):
            try:
                line = json.loads(text)
                offset, length = int(line["offset"]), int(line["length"])
            except (ValueError, KeyError, TypeError) as error:
                raise WireError(f"Line {number} of {folder / 'frames.jsonl'} is damaged.") from error
            if offset < 0 or length < 0 or offset + length > size:
                raise WireError(f"Line {number} of {folder / 'frames.jsonl'} points past the end of frames.bin.")
            data.seek(offset)
            header, tensors = decode(data.read(length))
            yield line, header, tensors
