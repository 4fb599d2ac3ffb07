"""What left a client: counts that never go back, a log of every frame, and both in plain words.

The counts are on the disk before the bytes go out, so whatever is killed, and whichever checkpoint is restored, they
are never less than what left. The log has names, shapes and sizes, and never a value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer.errors import CheckpointError, OutputError
from cutlayer.files import write_text
from cutlayer.wire import Header

VERSION = 1
LOG_BYTES, LOG_FILES = 16 << 20, 4  # of a file of the log, and how many are kept
WORDS = {
    "activations": "activations",
    "gradients": "gradients",
    "labels": "labels",
    "losses": "losses",
    "token_counts": "token counts",
    "sizes": "sizes of the data",
    "evaluation": "evaluation data (activations) and results",
    "head_adapter": "trained tensors of the first part",
    "tail_adapter": "trained tensors of the last part",
    "hosted": "tensors that were trained for others",
    "peers": "what is for other clients, sealed from the server",
    "gradient_norms": "norms and importance of gradients",
    "sample_numbers": "numbers of samples",
    "sketches": "sketches and histograms of the data",
    "features": "activations and labels for others' training",
    "error_texts": "words of errors",
}


@dataclass
class Counts:
    """How much left so far, over all that was joined with the same file."""

    path: Path
    bytes: int = 0  # of frames, framing included
    frames: int = 0
    steps: int = 0  # optimizer steps that were shown, repeated ones too
    micros: int = 0  # micro-batches
    repeats: int = 0  # of these, shown before
    rounds: int = 0
    evaluations: int = 0  # batches of evaluation data
    furthest: tuple[int, int] = (-1, -1)  # the last step and micro-batch that was ever shown
    trained: bool = False  # since the last round was counted
    trunk_rounds: int = 0  # the same of a trunk that is trained here for others
    trunk_trained: bool = False
    kinds: dict[str, list[int]] = field(default_factory=dict)  # by kind: frames with it, and bytes of its tensors

    @classmethod
    def load(cls, path: Path) -> Counts:
        """The counts of a file, or new ones where there is none.

        Raises:
            CheckpointError: it is damaged, so it cannot be known what left.
        """
        if not path.exists():
            return cls(path)
        try:
            read: Any = json.loads(path.read_text(encoding="utf-8"))
            version = read.pop("version")
            for name in ("trunk_rounds", "trunk_trained"):  # earlier versions did not count them
                read.setdefault(name, 0)
            kinds = {str(kind): [int(n) for n in pair] for kind, pair in read.pop("kinds").items()}
            step, micro = read.pop("furthest")
            numbers = {name: int(read.pop(name)) for name in _NUMBERS}
            counts = cls(
                path, furthest=(int(step), int(micro)), trained=bool(read.pop("trained")),
                trunk_trained=bool(read.pop("trunk_trained")), kinds=kinds, **numbers,
            )  # fmt: skip
            if read or any(number < 0 for number in numbers.values()):
                raise ValueError("unknown or negative counts")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"The counts of what left, {path}, cannot be read, so the policy's bounds cannot be kept. Restore the "
                "file from a copy, or move it away to begin counting at nothing."
            ) from error
        if version != VERSION:
            raise CheckpointError(f"The counts {path} are of version {version}; this cutlayer reads version {VERSION}.")
        return counts

    def save(self) -> None:
        """Have them on the disk when this returns.

        Raises:
            OutputError: they cannot be written; nothing may leave then.
        """
        told = {name: value for name, value in asdict(self).items() if name != "path"}
        try:
            write_text(self.path, json.dumps({"version": VERSION, **told}), mode=0o600)
        except OSError as error:
            raise OutputError(
                f"The counts of what leaves cannot be written to {self.path}: {error.strerror}. Nothing was sent."
            ) from error

    def told(self, client: str) -> str:
        """What left, in plain words, one line for each kind."""
        if not self.frames:
            return f"Nothing left this machine for '{client}'."
        repeated = f" ({self.repeats} of them again)" if self.repeats else ""
        head = (
            f"What left this machine for '{client}': {_size(self.bytes)} in {_many(self.frames, 'message')}; "
            f"{_many(self.steps, 'training step')} of {_many(self.micros, 'batch', 'batches')}{repeated}, "
            f"{_many(self.evaluations, 'evaluation batch', 'evaluation batches')}, "
            f"{_many(max(self.rounds, self.trunk_rounds), 'round')}."
        )
        lines = []
        for kind in WORDS:
            frames, size = self.kinds.get(kind, (0, 0))
            if frames:
                lines.append(f"  {WORDS[kind]}: {_many(frames, 'time')}{f', {_size(size)}' if size else ''}")
        never = ", ".join(words for kind, words in WORDS.items() if kind not in self.kinds)
        return "\n".join([head, *lines, f"  never: {never}" if never else "  never: nothing on this list"])


_NUMBERS = [one.name for one in fields(Counts) if one.type == "int"]


class Log:
    """A JSON line for each frame that left, in ``path``; full files become ``path.1``, ``path.2``, and so on.

    Args:
        path: the file.
        most: bytes at which a new one is begun.
        keep: how many full ones are kept.
    """

    def __init__(self, path: Path, *, most: int = LOG_BYTES, keep: int = LOG_FILES) -> None:
        self.path, self.most, self.keep = path, most, keep

    def write(
        self,
        asked: Header,
        header: Header,
        tensors: Sequence[Tensor],
        length: int,
        kinds: Mapping[str, int],
        again: bool,
    ) -> None:
        """Add a frame that is about to leave.

        Raises:
            OutputError: it cannot be written; the frame must not leave then.
        """
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "turn": asked.turn,
            "verb": asked.verb,
            "kind": header.kind,
            "to": header.receiver,
            "step": header.step,
            "micro": header.micro,
            "tensors": [
                [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
                for name, tensor in zip(header.names, tensors, strict=True)
            ],
            "values": sorted(header.values),
            "leaves": sorted(kinds),
            "bytes": length,
            "again": again,
        }
        try:
            if self.path.exists() and self.path.stat().st_size >= self.most:
                self._rotate()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OutputError(
                f"The log of what leaves cannot be written to {self.path}: {error.strerror}. Nothing was sent."
            ) from error

    def _rotate(self) -> None:
        for number in range(self.keep, 0, -1):
            older = self._numbered(number)
            newer = self._numbered(number - 1) if number > 1 else self.path
            if newer.exists():
                newer.replace(older)

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or one + 's'}"
