"""Marks in trained weights, chained from stage to stage, and the proof of who trained what, in which order.

A trainer that works for others hides bits in the weights that it trains: from a key it derives some of the weights,
a matrix of signs, and the bits that the signs of their products shall have. The key of a stage follows from the
trainer's secret and the digest that all stages before it left, so a mark cannot be made before its turn. At the end of
a stage the digest goes on over the hash of the weights and a commitment to the bits. ``verify`` takes a run's folder of
checkpoints, digests and revealed keys, and says stage by stage whether it holds.

A mark is in the weights as they were trained: check it again after adapters are merged into the base, or quantised.
Later stages may overwrite an earlier mark, so each is looked for in its own checkpoint.

Source: Deng et al., arXiv:2603.08421, for the chain; key, projection and loss are standard constructions (HMAC; Uchida
et al., arXiv:1701.04082) put in the place of formulas that we have not seen.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cutlayer.checkpoint import write_text
from cutlayer.errors import CheckpointError

MOST_ERRORS = 0.05  # the largest part of wrong bits in a stage's own checkpoint
STAGES = "stages.jsonl"


@dataclass(frozen=True)
class Pattern:
    """What a key stands for: places [d] in the flattened weights, signs [b,d] of -1 and 1, and bits [b] of 0 and 1."""

    places: Tensor
    signs: Tensor
    bits: Tensor


def key_of(secret: bytes, digest: str, nonce: str, number: int) -> bytes:
    """A trainer's key for stage ``number``, after the stages that left ``digest``."""
    return hmac.new(secret, f"{digest}|{nonce}|{number}".encode(), hashlib.sha256).digest()


def pattern_of(key: bytes, *, weights: int, used: int, bits: int) -> Pattern:
    """The pattern of a key over ``used`` of ``weights`` flattened weights (all, where there are no more)."""
    used = min(used, weights)
    drawn = np.frombuffer(hashlib.shake_256(key + b"places").digest(32 * used), dtype="<u8") % weights
    places = dict.fromkeys(drawn.tolist())  # the first distinct ones; where those are too few, the next in order
    for place in range(weights):
        if len(places) >= used:
            break
        places.setdefault(place)
    stream = hashlib.shake_256(key + b"signs").digest((bits * (used + 1) + 7) // 8)
    flips = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[: bits * (used + 1)].astype(np.float32)
    return Pattern(
        torch.tensor(list(places)[:used]),
        torch.from_numpy(flips[: bits * used].reshape(bits, used) * 2 - 1),
        torch.from_numpy(flips[bits * used :].copy()),
    )


def flattened(state: Mapping[str, Tensor]) -> Tensor:
    """All weights in one row, in float32 and in the order of their names."""
    return torch.cat([state[name].detach().float().flatten() for name in sorted(state)])


def loss_of(theta: Tensor, pattern: Pattern) -> Tensor:
    """The mean binary cross-entropy of the bits that ``theta`` [d], the weights at the pattern's places, has."""
    logits = pattern.signs.to(theta) @ theta
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, pattern.bits.to(theta))


def error_rate(state: Mapping[str, Tensor], pattern: Pattern) -> float:
    """The part of the bits that are wrong in these weights: 0 where the mark is, about a half where it is not."""
    row = flattened(state).cpu()
    if int(pattern.places.max()) >= len(row):
        return 1.0  # other weights than the mark was made for
    found = (pattern.signs @ row[pattern.places]) > 0
    return float((found != pattern.bits.bool()).float().mean())


def hash_of(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of weights: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def commitment(key: bytes, pattern: Pattern) -> str:
    """A commitment to a key and its bits."""
    return hashlib.sha256(b"mark" + key + bytes(pattern.bits.to(torch.uint8).tolist())).hexdigest()


def chained(digest: str, weights: str, committed: str) -> str:
    """The digest after one more stage."""
    return hashlib.sha256(f"{digest}|{weights}|{committed}".encode()).hexdigest()


def genesis(nonce: str) -> str:
    """The digest before the first stage."""
    return hashlib.sha256(f"cutlayer watermark {nonce}".encode()).hexdigest()


def record(folder: Path, known: int, about: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Add a stage to a run's folder, after the ``known`` first; later ones there are from before a resume."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STAGES
    lines = path.read_text(encoding="utf-8").splitlines()[:known] if path.exists() else []
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in state.items()}, folder / _file(about))
    write_text(path, "".join(f"{line}\n" for line in [*lines, json.dumps(about)]))


def _file(about: Mapping[str, Any]) -> str:
    return f"stage-{about['stage']:06d}-{about['trainer']}.safetensors"


@dataclass(frozen=True)
class Verdict:
    """What was found of one trainer's stage: ``wrong`` says in words what does not hold; empty if all does."""

    stage: int
    trainer: str
    error_rate: float
    wrong: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return not self.wrong


def verify(folder: str | Path, *, secrets: Mapping[str, bytes] | None = None) -> list[Verdict]:
    """Prove the stages of a run from what it recorded.

    Args:
        folder: the folder ``watermark`` in a run's output folder.
        secrets: by trainer, once they are revealed: then keys are proven to follow from them.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    try:
        lines = [json.loads(line) for line in (folder / STAGES).read_text(encoding="utf-8").splitlines()]
        return _verdicts(folder, lines, secrets or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The stages in {folder} cannot be read: {error}. Keep the folder as the run wrote it."
        ) from error


def _verdicts(folder: Path, lines: Sequence[Mapping[str, Any]], secrets: Mapping[str, bytes]) -> list[Verdict]:
    found: list[Verdict] = []
    start = digest = genesis(lines[0]["nonce"]) if lines else ""
    number = 1
    for line in lines:
        wrong = []
        if line["stage"] != number:  # the next one begins where all trainers of this one have ended
            wrong += [] if line["stage"] == number + 1 else [f"stage {line['stage']} comes after stage {number}"]
            number, start = line["stage"], digest
        state = load_file(folder / _file(line))
        key = bytes.fromhex(line["key"])
        pattern = pattern_of(key, weights=len(flattened(state)), used=line["used"], bits=line["bits"])
        rate = error_rate(state, pattern)
        secret = secrets.get(line["trainer"])
        if secret is not None and key != key_of(secret, start, line["nonce"], number):
            wrong.append("the key does not follow from the secret and the stages before")
        if commitment(key, pattern) != line["commitment"]:
            wrong.append("the key is not the one that was committed to")
        if hash_of(state) != line["weights"]:
            wrong.append("the checkpoint is not the one that was committed to")
        if chained(digest, line["weights"], line["commitment"]) != line["digest"]:
            wrong.append("the digest does not follow from the stage before")
        if rate > MOST_ERRORS:
            wrong.append(f"{rate:.0%} of the bits are wrong")
        found.append(Verdict(line["stage"], line["trainer"], rate, wrong))
        digest = line["digest"]
    return found
