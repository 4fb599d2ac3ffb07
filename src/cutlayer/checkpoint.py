"""Checkpoints: what a run needs to go on from the end of a round, and nothing that can run code.

A checkpoint is a folder ``round-000012`` with one safetensors file a party and ``checkpoint.json``, which holds the
counters and the SHA-256 of each file and of itself. It is written beside its place and renamed into it, so a checkpoint
is there whole or not at all, whenever the process dies.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cutlayer.errors import CheckpointError, OutputError
from cutlayer.files import move, write_text

__all__ = ["load", "move", "newest", "save", "write_text"]

VERSION = 1
KEEP = 2
MANIFEST = "checkpoint.json"
SEAL = "checksum"  # of the manifest itself
NAME = re.compile(r"round-(\d{6,})")


def save(
    folder: Path, number: int, states: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, Any], *,
    spared: Collection[int] | None = None,
) -> Path:  # fmt: skip
    """Write the checkpoint after round ``number`` and remove all but the newest ``KEEP``.

    Args:
        folder: the run's ``checkpoints`` folder.
        number: how many rounds are done.
        states: tensors by name, by party.
        counters: whatever JSON can hold.
        spared: rounds whose checkpoints stay beside this one, in place of the newest.

    Raises:
        OutputError: the disk is full or the folder cannot be written; older checkpoints are untouched.
    """
    final = folder / f"round-{number:06d}"
    draft = folder / f".draft-{number:06d}"
    try:
        for left in folder.glob(".draft-*"):
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
        digests = {}
        for party, state in states.items():
            file = f"{party}.safetensors"
            save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, draft / file
            )
            digests[file] = _digest(draft / file)
        manifest = {"version": VERSION, "round": number, "files": digests, **counters}
        write_text(draft / MANIFEST, json.dumps({**manifest, SEAL: _seal(manifest)}, indent=1))
        move(draft, final)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError) or "os error" in str(error):  # safetensors' own error is no OSError
            said = getattr(error, "strerror", None) or error
            raise OutputError(f"The checkpoint after round {number} cannot be written to {folder}: {said}.") from error
        raise
    found = rounds(folder)
    for old in found[:-KEEP] if spared is None else set(found) - {number, *spared}:
        shutil.rmtree(folder / f"round-{old:06d}", ignore_errors=True)
    return final


def _found(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(m.group(1)) for p in folder.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir()]


def rounds(folder: Path) -> list[int]:
    """The rounds of the checkpoints in a run's ``checkpoints`` folder, in order."""
    return sorted(_found(folder))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a run's ``checkpoints`` folder, or None."""
    numbers = _found(folder)
    return folder / f"round-{max(numbers):06d}" if numbers else None


def load(path: Path, *, expect: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read a checkpoint and prove that it is whole and of this run.

    Args:
        path: its folder.
        expect: counters that must be equal (what the run is, what its data are).

    Raises:
        CheckpointError: a file is missing, damaged, or of another run.
    """
    remedy = f"Delete the folder {path} to go on from the checkpoint before it."
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("not a mapping")
        files, version = dict(manifest["files"]), manifest["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {MANIFEST} is missing or damaged. {remedy}"
        ) from error
    if version != VERSION:
        raise CheckpointError(f"The checkpoint {path} is of version {version}; this cutlayer reads version {VERSION}.")
    if manifest.pop(SEAL, None) != _seal(manifest):
        raise CheckpointError(f"The checkpoint {path} is damaged: {MANIFEST} has a wrong checksum. {remedy}")
    differences = [_difference(key, manifest.get(key), value) for key, value in expect.items()]
    if any(differences):
        raise CheckpointError(
            f"The checkpoint {path} belongs to another run: its {', its '.join(filter(None, differences))}. Resume "
            "with the same model, data, methods and settings, or start a new run with another --out."
        )
    states = {}
    for file, digest in files.items():
        if not (path / file).is_file() or _digest(path / file) != digest:
            raise CheckpointError(
                f"The checkpoint {path} is damaged: {file} is missing or has a wrong checksum. {remedy}"
            )
        states[file.removesuffix(".safetensors")] = load_file(path / file)
    return manifest, states


def _seal(manifest: Mapping[str, Any]) -> str:
    """The checksum of a manifest, whatever its layout."""
    plain = json.loads(json.dumps(manifest))  # as it will be read back: keys are text, tuples are lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _difference(key: str, saved: Any, wanted: str) -> str:
    """What differs, by name where both are mappings as JSON; nothing if they are equal."""
    if saved == wanted:
        return ""
    try:
        ours, theirs = json.loads(saved), json.loads(wanted)
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    except (TypeError, ValueError, AttributeError):
        names = []
    return f"{key} differ ({', '.join(names)})" if names else f"{key} differ"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
