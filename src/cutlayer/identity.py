"""What a run is, apart from where its files lie: what must be equal for a checkpoint to be of it.

A file stands for its content: it may be moved, but not become another. The data are not here, since a checkpoint holds
a fingerprint of the examples that were made of them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.config_types import Spec
from cutlayer.config_write import mapped
from cutlayer.errors import MethodError, ModelError

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

IRRELEVANT = {"record_wire", "device", "engine", "report_to", "checkpoint_every", "verify"}  # they change no number
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WHOLE = 256 << 20  # bytes: a file up to this size is read whole
SAMPLES, SAMPLE = 1024, 4096  # of a larger one so many pieces are read, evenly spread, of so many bytes


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
    """What a model's configuration and weights are: by file, its checksum (of a large one, of its size and samples).

    Args:
        model: a folder, or a name on the Hub whose files are in the cache.

    Raises:
        ModelError: a file cannot be read.
    """
    folder = Path(model)
    cached = not folder.is_dir()
    if cached:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "config.json")
        if not isinstance(found, str):
            return {"name": model}  # it is not known which files were read
        folder = Path(found).parent
    try:
        files = ["config.json", *_weights(folder)]
        # In the Hub's cache a file is a link to one that has its checksum for a name; its commit may change without it.
        links = cached and (folder / "config.json").is_symlink()
        return {name: (folder / name).resolve().name if links else _digest(folder / name) for name in files}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"The files of the model in {folder} cannot be read: {error}.") from error


def _weights(folder: Path) -> list[str]:
    """The files that Transformers reads the weights of."""
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        return []
    shards = set(json.loads((folder / first).read_text())["weight_map"].values()) if first.endswith(".json") else set()
    return [first, *sorted(name for name in shards if (folder / name).is_file())]


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(SAMPLES):
            file.seek(number * (size - SAMPLE) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return f"{digest.hexdigest()} of samples"
