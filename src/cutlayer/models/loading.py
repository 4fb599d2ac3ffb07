"""Load a Hugging Face model, whole or only the parts that one party owns, by the ordinary ``from_pretrained``.

A part is the model's own class whose blocks of other parties were replaced by pass-throughs before the weights are
read. Of a sharded checkpoint only the shards that hold an owned tensor are opened (and, from the Hub, downloaded): the
index is filtered first, because ``from_pretrained`` opens every file that its index names.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import cached_file

from cutlayer.errors import ConfigError, ModelError
from cutlayer.models.families import Anatomy, anatomy, number_of_blocks
from cutlayer.models.making import making
from cutlayer.models.placement import MAPS, check_map, placed
from cutlayer.models.standins import Skip, stand_in
from cutlayer.seeds import derive

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Part:
    """What one party holds: blocks ``[start, stop)``, and whether the embedding and the norm and head are its own."""

    start: int
    stop: int
    bottom: bool
    top: bool
    also: range | frozenset[int] = range(0)  # other blocks: the U-shaped client's tail, and what it runs for others

    def owns(self, owner: int | str) -> bool:
        """Whether a parameter of that owner (``Anatomy.owner``) is held."""
        if isinstance(owner, int):
            return self.start <= owner < self.stop or owner in self.also
        return self.bottom if owner == "bottom" else self.top

    def with_(self, other: Part) -> Part:
        """This part and what another of the same first blocks has besides."""
        assert (self.start, self.stop, self.bottom) == (other.start, other.stop, other.bottom)
        return replace(self, top=self.top or other.top, also=frozenset({*self.also, *other.also}))


def device_named(name: str) -> str:
    """The device of a name: ``auto`` is CUDA when there is one; ``balanced`` and ``sequential`` are all GPUs.

    Raises:
        ConfigError: this machine does not have it.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name in MAPS:
        check_map(name)
        return name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError([f"device is '{name}', which this machine does not have. Use auto, cpu or cuda."]) from error
    return name


def load_config(model: str | os.PathLike[str]) -> Any:
    """The model's configuration.

    Raises:
        ModelError: no such folder or Hub model, or a model type that Transformers does not know.
    """
    _folder_must_exist(model)
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:
        raise ModelError(cannot_load(model, error)) from error


def load_tokenizer(model: str | os.PathLike[str]) -> Any:
    """The model's tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise ModelError(f"The tokenizer of '{model}' cannot be loaded: {_one_line(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what Transformers makes of no files at all
        raise ModelError(
            f"The tokenizer of '{model}' knows no word: its files (tokenizer.json, or a vocabulary) are not there. "
            "Save the model's tokenizer into the same folder."
        )
    return tokenizer


def load_model(
    model: str | os.PathLike[str],
    *,
    task: str = "causal",
    precision: str = "float32",
    attn_implementation: str | None = None,
    labels: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    part: Part | None = None,
) -> tuple[Any, Anatomy]:
    """A model in evaluation mode with every weight frozen, and its anatomy.

    ``part`` None loads all of it. ``labels`` are a classifier's classes in the order of their numbers; None takes those
    of the checkpoint. Weights that the checkpoint does not have (a new classifier) are drawn from ``seed`` and the
    tensor's name, so that every party and every cut starts from the same ones.

    Raises:
        ModelError: it cannot be found, read or cut, or lacks weights that it must have.
    """
    config = load_config(model)
    cls = class_of(model, config, task)
    number_of_blocks(config)
    options: dict[str, Any] = {"dtype": DTYPES[precision]}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    config.use_cache = False
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    causal = task == "causal"
    try:
        if part is None:
            with making():
                loaded, info = cls.from_pretrained(model, config=config, output_loading_info=True, **options)
            shape = anatomy(loaded, causal=causal)
        else:
            config = _own_config(config, part, causal)
            cut = _cut_class(cls, part, causal)
            with tempfile.TemporaryDirectory(prefix="cutlayer-") as folder:
                source = _filtered(model, cut, config, Path(folder))
                with making():
                    loaded, info = cut.from_pretrained(source, config=config, output_loading_info=True, **options)
            shape = loaded.cutlayer_anatomy
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(cannot_load(model, error)) from error
    _fill_missing(loaded, info, shape, seed, str(model), causal)
    loaded.requires_grad_(False)
    loaded.eval()
    return placed(loaded, device), shape


def class_of(model: str | os.PathLike[str], config: Any, task: str) -> Any:
    """Transformers' class for a model and a task."""
    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    if type(config) not in auto._model_mapping:
        kind = "causal language model" if task == "causal" else "sequence classifier"
        raise ModelError(f"'{model}' is of type '{config.model_type}', for which Transformers has no {kind}.")
    cls: Any = auto._model_mapping[type(config)]
    return cls[0] if isinstance(cls, tuple | list) else cls


def _fill_missing(loaded: Any, info: Mapping[str, Any], shape: Anatomy, seed: int, model: str, causal: bool) -> None:
    """Draw what a fresh classification head lacks; anything else that is missing is an error."""
    missing = sorted(info["missing_keys"])
    wrong = info.get("mismatched_keys") or []
    if (causal and missing) or any(shape.owner(name) != "top" for name in missing):
        raise ModelError(f"The checkpoint of '{model}' lacks {len(missing)} tensors, for instance '{missing[0]}'.")
    if wrong:
        raise ModelError(f"The checkpoint of '{model}' has tensors of another shape: {_one_line(wrong)[:300]}")
    std = getattr(loaded.config, "initializer_range", 0.02)
    named = dict(loaded.named_parameters())
    with torch.no_grad():
        for name in missing:
            if named[name].dim() < 2:
                named[name].zero_()
            else:
                source = torch.Generator().manual_seed(derive(seed, "new", name))
                named[name].copy_(torch.randn(named[name].shape, generator=source) * std)


def _own_config(config: Any, part: Part, causal: bool) -> Any:
    """The configuration under which a part is loaded."""
    if config.tie_word_embeddings and causal and not (part.bottom and part.top):
        config = copy.deepcopy(config)
        config.tie_word_embeddings = part.top  # the head alone still reads the embedding's tensor
    return config


def _cut_class(cls: Any, part: Part, causal: bool) -> Any:
    """A subclass of the model's class that drops what ``part`` does not own, before any weight is read."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        self.cutlayer_anatomy = anatomy(self, causal=causal)
        _drop(self, self.cutlayer_anatomy, part)

    body: dict[str, Any] = {
        "__init__": init,
        "_keys_to_ignore_on_load_unexpected": [".*"],
        "__module__": cls.__module__,
    }
    if causal and not part.top:
        body["_tied_weights_keys"] = {}
    return type(cls.__name__, (cls,), body)


def _drop(model: Any, shape: Anatomy, part: Part) -> None:
    blocks = model.get_submodule(shape.blocks)
    for i in range(shape.num_blocks):
        if not part.owns(i):
            blocks[i] = Skip(blocks[i], as_tuple=shape.tuples)
    replace = {} if part.bottom else dict(shape.below)
    if not part.bottom and not (part.top and model.config.tie_word_embeddings):
        replace[shape.embedding] = "embeds"
    if not part.top:
        replace |= shape.above
        outside = [n for n, _ in model.named_children() if n != shape.blocks.split(".")[0]]
        replace |= dict.fromkeys(outside, "identity")
    for path, kind in replace.items():
        if any(path.startswith(other + ".") for other in replace):
            continue  # went with the module around it
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = stand_in(kind)


def _filtered(model: str | os.PathLike[str], cut: Any, config: Any, folder: Path) -> str | os.PathLike[str]:
    """A folder whose index names only the shards with owned tensors; ``model`` itself where it is not sharded."""
    found = cached_file(model, INDEX, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return model
    owned, whole = _on_meta(cut, config)
    known = set(whole.state_dict())
    index = json.loads(Path(found).read_text())
    names = {key: _model_name(key, whole, known) for key in index["weight_map"]}
    keep = {key: file for key, file in index["weight_map"].items() if names[key] in owned or names[key] not in known}
    for file in sorted(set(keep.values())):
        (folder / file).symlink_to(Path(cached_file(model, file)).resolve())
    (folder / INDEX).write_text(json.dumps({"metadata": index.get("metadata", {}), "weight_map": keep}))
    config.save_pretrained(folder)
    return folder


def _on_meta(cut: Any, config: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of a part, and the whole model; both without memory."""
    with making(), torch.device("meta"):
        return cut(copy.deepcopy(config)).state_dict(), cut.__mro__[1](copy.deepcopy(config))


def own_tensors(model: str | os.PathLike[str], part: Part) -> tuple[Callable[[str], bool], int]:
    """Whether a tensor of a causal model's checkpoint, by its name there, is a part's; how many numbers these have.

    Only the model's configuration is read.

    Raises:
        ModelError: it cannot be read, or the model cannot be cut.
    """
    config = load_config(model)
    cls = class_of(model, config, "causal")
    number_of_blocks(config)
    owned, whole = _on_meta(_cut_class(cls, part, True), _own_config(config, part, True))
    known = set(whole.state_dict())
    return lambda key: _model_name(key, whole, known) in owned, sum(t.numel() for t in owned.values())


def _model_name(key: str, model: Any, known: set[str]) -> str:
    """What the model calls the tensor ``key`` of a checkpoint: some lack the base model's prefix, some are renamed."""
    for name in (key, f"{model.base_model_prefix}.{key}"):
        if name in known:
            return name
    for change in get_model_conversion_mapping(model):
        key, _ = change.rename_source_key(key)
    return key if key in known else f"{model.base_model_prefix}.{key}"


def _folder_must_exist(model: str | os.PathLike[str]) -> None:
    text = str(model)
    looks_like_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/")
    if looks_like_path and not Path(text).expanduser().is_dir():
        raise ModelError(
            f"The model folder '{text}' does not exist. Give a folder made by save_pretrained, or a Hub name."
        )


def cannot_load(model: str | os.PathLike[str], error: Exception) -> str:
    """What to tell a user whose model Transformers did not load."""
    return (
        f"The model '{model}' cannot be loaded: {_one_line(error)} "
        "It must be a folder made by save_pretrained, or a name on the Hugging Face Hub."
    )


def _one_line(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else text[:400] + " ..."
