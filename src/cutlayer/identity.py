"""What a run is, apart from where its files lie: what must be equal for a checkpoint to be of it.

A file stands for its content: it may be moved, but not become another. The data are not here, since a checkpoint holds
a fingerprint of the examples that were made of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.config_types import Spec
from cutlayer.config_write import mapped
from cutlayer.errors import MethodError, ModelError
from cutlayer.files import write_text

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

LOG = getLogger("cutlayer.identity")
IRRELEVANT = {"record_wire", "device", "engine", "report_to", "checkpoint_every", "verify"}  # they change no number
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = (  # what of a tokenizer says which text becomes which numbers
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
LARGE = 64 << 20  # bytes: the checksum of a file from this size on is remembered
SETTLED = 2.0  # seconds: what changed so lately may change again without another time
SHA256 = re.compile(r"[0-9a-f]{64}")


def identity_of(config: RunConfig) -> dict[str, str]:
    """The settings, the content of the methods that are files, and that of the base model, each as JSON."""
    files = {key: spec.name for key, _, spec in config.methods() if _is_file(spec)}
    plain = mapped(config, lambda _, spec: Spec(name="a file", **spec.options) if _is_file(spec) else spec)
    told = plain.model_dump(mode="json", exclude={"model", *IRRELEVANT})
    own = [client["data"] for client in told["clients"] if client["data"]] if isinstance(told["clients"], list) else []
    for data in (told["data"], *own):
        data |= {key: bool(data[key]) for key in ("train", "eval") if key in data}
    try:
        contents = {key: hashlib.sha256(Path(name).read_bytes()).hexdigest() for key, name in files.items()}
    except OSError as error:
        raise MethodError(f"The method file {error.filename} cannot be read: {error.strerror}.") from error
    return {
        "settings": json.dumps(told, sort_keys=True),
        "method files": json.dumps(contents, sort_keys=True),
        "base model files": json.dumps(fingerprint(config.model), sort_keys=True),
    }


def _is_file(spec: Spec) -> bool:
    return spec.name.endswith(".py")


def fingerprint(model: str) -> dict[str, str]:
    """What a model's configuration and weights are: by file, the SHA-256 of its content, wherever it lies.

    Args:
        model: a folder, or a name on the Hub whose files are in the cache.

    Raises:
        ModelError: a file cannot be read.
    """
    folder, cached = _folder(model)
    if folder is None:
        return {"name": model}  # it is not known which files were read
    try:
        files = ["config.json", *_weights(folder)]
        return {name: _digest(folder / name, hub=cached) for name in files}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"The files of the model in {folder} cannot be read: {error}.") from error


def tokenizer_of(model: str) -> dict[str, str]:
    """The same of the files of a model's tokenizer, as far as they are there. A checkpoint does not ask for them.

    Raises:
        ModelError: a file cannot be read.
    """
    folder, cached = _folder(model)
    try:
        found = [name for name in TOKENIZER if folder is not None and (folder / name).is_file()]
        return {name: _digest(folder / name, hub=cached) for name in found} if folder is not None else {}
    except OSError as error:
        raise ModelError(f"The files of the tokenizer in {folder} cannot be read: {error}.") from error


def other_model(own: Mapping[str, str], tokenizer: Mapping[str, str], told: object, client: str) -> str:
    """In what a client's model is another than the one here, in words; empty where it is the same.

    Args:
        own: the fingerprint of the model here.
        tokenizer: that of its tokenizer; a file of it that only one end has is not compared.
        told: what the client says of both.
        client: its name.
    """
    said: Mapping[object, object] = told if isinstance(told, Mapping) else {}
    weights = {name: value for name, value in said.items() if name in own or name not in TOKENIZER}
    if weights != own:
        return f"The model is another here: its files ({', '.join(own)}) have other checksums than those of '{client}'."
    if other := [name for name, value in tokenizer.items() if said.get(name, value) != value]:
        have = "have other checksums" if len(other) > 1 else "has another checksum"
        return (
            f"The tokenizer is another here, so that text would become other tokens: {', '.join(other)} {have} than "
            f"with '{client}'."
        )
    return ""


def _folder(model: str) -> tuple[Path | None, bool]:
    """Where the files are, if it is known, and whether that is in the Hub's cache."""
    if Path(model).is_dir():
        return Path(model), False
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return (Path(found).parent if isinstance(found, str) else None), True


def _weights(folder: Path) -> list[str]:
    """The files that Transformers reads the weights of."""
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        return []
    shards = set(json.loads((folder / first).read_text())["weight_map"].values()) if first.endswith(".json") else set()
    return [first, *sorted(name for name in shards if (folder / name).is_file())]


def _digest(path: Path, *, hub: bool) -> str:
    """The SHA-256 of a file.

    In the Hub's cache a large file is a link to one that has it for a name. A small one has a name that git gave it.
    """
    file = path.resolve()
    if hub and path.is_symlink() and SHA256.fullmatch(file.name):
        return file.name
    found = file.stat()
    if found.st_size < LARGE:
        return _read(file)
    return _remembered(str(file), (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1024)
def _remembered(path: str, state: tuple[int, ...]) -> str:
    """The SHA-256 of a large file whose size, times and number are these: read once, then known to later processes."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cutlayer" / "checksums"
    note = folder / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
    try:
        said = json.loads(note.read_text())
        if said["file"] == [path, *state] and SHA256.fullmatch(said["sha256"]):
            return str(said["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        LOG.debug("nothing usable is known of %s", path)
    LOG.info("reading %s for its checksum (%.1f GB)", path, state[0] / 1e9)
    begun = time.time()
    digest = _read(Path(path))
    if begun - max(state[1:3]) / 1e9 > SETTLED:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps({"file": [path, *state], "sha256": digest}))
        except OSError as error:
            LOG.info("the checksum of %s cannot be remembered in %s: %s", path, folder, error.strerror or error)
    return digest
