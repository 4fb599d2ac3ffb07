"""What a server hands a client of a model: some small files and the client's own tensors, each with its checksum.

A ``Listing`` says what there is; a client judges it before it writes a byte. A ``Source`` reads it from the server's
checkpoint, ``PIECE`` bytes at a time. A client's tensors come to be one safetensors file, whose bytes follow from the
listing alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from cutlayer.errors import ModelError, WireError
from cutlayer.models.loading import INDEX, Part, own_tensors

PIECE = 1 << 20  # bytes of one answer
WEIGHTS = "model.safetensors"
FILES = (  # that may be handed, beside tensors: none of them is code (a chat template runs in Jinja's sandbox)
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
FILE_BYTES = 128 << 20  # of one of them, at most
LISTING_BYTES = 24 << 20
TENSORS, NAME, DIMENSIONS = 65_536, 256, 8  # at most, of a listing; characters of a name; of a tensor
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_DIGEST, _TENSOR = re.compile(r"[0-9a-f]{64}"), re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")

# Keys of JSON files by which Transformers would run or read something else than what was handed.
FOREIGN = frozenset({
    "auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "transformers_weights", "quantization_config", "gguf_file", "init_inputs",
})  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One thing that is handed: a file, or a tensor (then with a type and a shape); ``checksum`` is its SHA-256."""

    name: str
    size: int  # bytes
    checksum: str
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Listing:
    """All that is handed for one part, files first."""

    items: tuple[Item, ...]

    @property
    def files(self) -> tuple[Item, ...]:
        """The files."""
        return tuple(item for item in self.items if not item.dtype)

    @property
    def tensors(self) -> tuple[Item, ...]:
        """The tensors."""
        return tuple(item for item in self.items if item.dtype)

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(item.size for item in self.items)

    @property
    def checksum(self) -> str:
        """SHA-256 of what is said here (so of every byte and every name), whatever its order."""
        ordered = sorted(self.items, key=lambda item: (item.dtype != "", item.name))
        return hashlib.sha256(Listing(tuple(ordered)).to_json()).hexdigest()

    def to_json(self) -> bytes:
        """As it is sent."""
        files = [[item.name, item.size, item.checksum] for item in self.files]
        tensors = [[item.name, item.dtype, list(item.shape), item.checksum] for item in self.tensors]
        return json.dumps({"files": files, "tensors": tensors}, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> Listing:
        """What another party sent.

        Raises:
            WireError: it is malformed, or lists what no model is made of.
        """
        try:
            found = json.loads(data)
            files, tensors = found["files"], found["tensors"]
            items = [Item(name, size, checksum) for name, size, checksum in files]
            for name, dtype, shape, checksum in tensors:
                items.append(Item(name, _size(dtype, shape), checksum, dtype, tuple(shape)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError("The server's listing of its model is malformed.") from error
        for problem in _problems(items):
            raise WireError(f"The server's listing of its model is not accepted: {problem}.")
        return Listing(tuple(items))

    def safetensors(self) -> tuple[bytes, dict[Item, int]]:
        """The beginning of the safetensors file of all tensors, and where each tensor begins in that file."""
        told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for item in sorted(self.tensors, key=lambda item: (-BYTES[item.dtype], item.name)):  # so all are aligned
            places[item] = end
            told[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": [end, end + item.size]}
            end += item.size
        text = json.dumps(told, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        head = len(text).to_bytes(8, "little") + text
        return head, {item: len(head) + start for item, start in places.items()}


def _size(dtype: object, shape: object) -> int:
    """Bytes of a tensor; -1 where there is no such."""
    if not isinstance(dtype, str) or dtype not in BYTES or not isinstance(shape, list) or len(shape) > DIMENSIONS:
        return -1
    if any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        return -1
    return math.prod(shape) * BYTES[dtype]


def _problems(items: list[Item]) -> Iterator[str]:
    if len(items) > TENSORS:
        yield f"it has {len(items)} entries"
    seen = set()
    for item in items:
        said = repr(item.name)[:NAME]
        if not isinstance(item.name, str) or not isinstance(item.checksum, str) or not _DIGEST.fullmatch(item.checksum):
            yield f"{said} has no name or no SHA-256"
        elif type(item.size) is not int or not 0 <= item.size < 2**60:
            yield f"{said} has no sound size, type or shape"
        elif not item.dtype and item.name not in FILES:
            yield f"{said} is no file that may be handed"
        elif not item.dtype and item.size > FILE_BYTES:
            yield f"{said} has {item.size} bytes; at most {FILE_BYTES} are taken"
        elif item.dtype and (len(item.name) > NAME or not _TENSOR.fullmatch(item.name)):
            yield f"{said} is no name of a tensor"
        elif (item.name, bool(item.dtype)) in seen:
            yield f"{said} is there twice"
        seen.add((item.name, bool(item.dtype)))
    if ("config.json", False) not in seen:
        yield "it has no config.json"


def foreign(data: bytes) -> str | None:
    """A key in a JSON file that would make Transformers run or read something else; None if there is none.

    Raises:
        ValueError: it is no JSON.
    """
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.extend(key for key, value in pairs if key in FOREIGN and value is not None)
        return {}

    try:
        json.loads(data, object_pairs_hook=look)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found[0] if found else None


@dataclass(frozen=True)
class Source:
    """What a server hands, and where it reads it: of each item the file and the place where it begins."""

    listing: Listing
    places: tuple[tuple[Path, int], ...]

    def read(self, number: int, start: int) -> bytearray:
        """At most ``PIECE`` bytes of item ``number``, from its byte ``start`` on.

        Raises:
            ModelError: there is no such, or the file is not what it was.
        """
        if not 0 <= number < len(self.places) or not 0 <= start < max(self.listing.items[number].size, 1):
            raise ModelError(f"There is nothing at byte {start} of entry {number}.")
        (path, begin), item = self.places[number], self.listing.items[number]
        data = bytearray(min(PIECE, item.size - start))
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(begin + start)
                count = file.readinto(data)
        except OSError as error:
            raise ModelError(f"'{item.name}' cannot be read at the server.") from error
        if count != len(data):
            raise ModelError(f"'{item.name}' is shorter than it was when the server began.")
        return data


def source_of(model: str | os.PathLike[str], part: Part) -> Source:
    """What to hand of a model for a part; every byte of it is read for its checksum.

    Raises:
        ModelError: the model has no safetensors files, or cannot be read.
    """
    is_own, _ = own_tensors(model, part)
    items, places = [], []
    try:
        for name in FILES:
            found = cached_file(
                model, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
            )
            if found is not None:
                path = Path(found)
                items.append(Item(name, path.stat().st_size, _sha256(path, 0, path.stat().st_size)))
                places.append((path, 0))
        for path in _shards(model, is_own):
            head, start = _header(path)
            for name, told in head.items():
                if name != "__metadata__" and is_own(name):
                    begin, end = told["data_offsets"]
                    checksum = _sha256(path, start + begin, end - begin)
                    items.append(Item(name, end - begin, checksum, told["dtype"], tuple(told["shape"])))
                    places.append((path, start + begin))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The files of the model '{model}' cannot be read: {error}.") from error
    if not any(item.dtype for item in items):
        raise ModelError(f"'{model}' has no safetensors files, so the server can hand nothing of it.")
    return Source(Listing.from_json(Listing(tuple(items)).to_json()), tuple(places))


def _shards(model: str | os.PathLike[str], is_own: Any) -> list[Path]:
    """The safetensors files with a part's tensors."""
    index = cached_file(model, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is None:
        found = cached_file(model, WEIGHTS, _raise_exceptions_for_missing_entries=False)
        return [Path(found)] if found is not None else []
    names: Mapping[str, str] = json.loads(Path(index).read_text())["weight_map"]
    return [Path(cached_file(model, file)) for file in sorted({file for key, file in names.items() if is_own(key)})]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LISTING_BYTES * 4:
            raise ValueError(f"{path.name} has a header of {length} bytes")
        return dict(json.loads(file.read(length))), 8 + length


def _sha256(path: Path, start: int, size: int) -> str:
    if path.stat().st_size < start + size:
        raise ValueError(f"{path.name} ends too early")
    return str(hashed(path, start, size).hexdigest())


def hashed(path: Path, start: int, size: int) -> Any:
    """The SHA-256 of ``size`` bytes of a file (of fewer, where it ends before), which more may be added to."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while size and (data := file.read(min(PIECE, size))):
            digest.update(data)
            size -= len(data)
    return digest
