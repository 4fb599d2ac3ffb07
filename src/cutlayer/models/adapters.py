"""Adapters: PEFT injects them, this module seeds, names and saves them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from cutlayer.errors import ModelError, NonFinite
from cutlayer.models.families import Anatomy
from cutlayer.models.segment import Base, set_seed
from cutlayer.ranks import pairs
from cutlayer.seeds import derive

TASK_TYPES = {"causal": "CAUSAL_LM", "classification": "SEQ_CLS"}


def inject(model: Any, anatomy: Anatomy, config: LoraConfig, *, seed: int) -> Base:
    """Inject a PEFT adapter into a model (whole or part) and start it from ``seed`` and each layer's name.

    The start of a layer does not depend on which other layers are there, so every cut and every party begins with
    the same adapter.

    Raises:
        ModelError: no module of the model matches the targets.
    """
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        nothing = "No `target_modules` passed" in str(error) or "not found in the base model" in str(error)
        if nothing and anatomy.causal and hasattr(model, "cutlayer_anatomy"):
            return Base(model, anatomy)  # a part without an adapted layer, such as the embedding alone
        raise ModelError(f"PEFT cannot put its adapter into this model: {' '.join(str(error).split())}") from error
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer) and ("default" in module.lora_A or "default" in module.lora_embedding_A):
                set_seed(derive(seed, "adapter", name), device)
                module.reset_lora_parameters("default", True)
    return Base(model, anatomy, peft_model=peft_model)


def full(model: Any, anatomy: Anatomy) -> Base:
    """Make every weight trainable."""
    model.requires_grad_(True)
    return Base(model, anatomy)


def save_adapter(base: Base, state: Mapping[str, Tensor], folder: Path, *, base_name: str) -> None:
    """Write ``state`` (all trainable tensors of the whole model, by name) as an ordinary PEFT adapter or model.

    With PEFT: ``folder`` can be given to ``PeftModel.from_pretrained``. Full fine-tuning: to ``from_pretrained``.

    Raises:
        NonFinite: a value is NaN or infinite; nothing is written.
    """
    missing = set(base.initial) - set(state)
    assert not missing, f"no value for {sorted(missing)[:3]}"
    _refuse_not_finite(state, folder)
    state = _at_least_one(state)
    base.install(None)
    with torch.no_grad():
        held = {n: torch.nn.Parameter(state[n].to(base.device), requires_grad=True) for n in base.initial}
        base.bind(held)
    try:
        if base.peft_model is not None:
            base.peft_model.peft_config["default"].base_model_name_or_path = base_name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(_blank_card(), encoding="utf-8")  # which PEFT fills in
            with _ranks_told(base, state):
                base.peft_model.save_pretrained(folder, save_embedding_layers=False)
        else:
            _save_full(base, state, folder)
    finally:
        base.bind(base.initial)


@cache
def _blank_card() -> str:
    """The model card that PEFT begins with where there is none; it would make it from its template each time."""
    return str(ModelCard.from_template(ModelCardData()))


def save_part(base: Base, state: Mapping[str, Tensor], folder: Path, *, base_name: str) -> None:
    """Write some of the trainable tensors, by name, as a PEFT adapter (else as a model's weights) that has only these.

    The parts that several parties write have the keys of one adapter, each its own, so together they are that adapter.

    Raises:
        NonFinite: a value is NaN or infinite; nothing is written.
    """
    _refuse_not_finite(state, folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in _at_least_one(state).items()}
    if base.peft_model is None:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return
    base.install(None)  # PEFT looks for the layers of what it saves
    base.peft_model.peft_config["default"].base_model_name_or_path = base_name
    with _ranks_told(base, held):
        inner = {f"base_model.model.{name}": tensor for name, tensor in held.items()}
        base.peft_model.peft_config["default"].save_pretrained(folder)
    # A layer that is trained whole, such as a classifier's head, PEFT wants in any case, though another party has it.
    others = {
        f"base_model.model.{name}": tensor.detach()
        for name, tensor in base.initial.items()
        if ".modules_to_save." in name and name not in held
    }
    told = get_peft_model_state_dict(base.peft_model, state_dict={**inner, **others}, save_embedding_layers=False)
    not_here = {id(tensor) for tensor in others.values()}
    mine = {name: tensor for name, tensor in told.items() if id(tensor) not in not_here}
    save_file(mine, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _refuse_not_finite(state: Mapping[str, Tensor], folder: Path) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise NonFinite(
                f"The trained tensor '{name}' has values that are not finite, so nothing was saved in {folder.parent}. "
                "Lower optimizer.lr, set max_grad_norm, or use precision: float32 or bfloat16."
            )


def _at_least_one(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT has no rank 0: an adapter without any is written as zeros of rank 1."""
    empty = {name: state[name] for ab in pairs(state).items() for name in ab if not state[name].numel()}
    return {**state, **{name: t.new_zeros([size or 1 for size in t.shape]) for name, t in empty.items()}}


@contextmanager
def _ranks_told(base: Base, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, PEFT's configuration has the ranks of ``state``, each with the scaling that it was trained at."""
    config = base.peft_model.peft_config["default"]
    before = config.rank_pattern, config.alpha_pattern
    ranks, alphas = {}, {}
    for a in pairs(state):
        if len(state[a]) != len(base.initial[a]):
            path = re.split(r"\.lora_(?:embedding_)?A\.", a)[0]
            scaling = base.model.get_submodule(path).scaling["default"]
            ranks[re.escape(path)], alphas[re.escape(path)] = len(state[a]), scaling * len(state[a])
    # PEFT takes the first pattern that fits.
    config.rank_pattern, config.alpha_pattern = {**ranks, **before[0]}, {**alphas, **before[1]}
    try:
        yield
    finally:
        config.rank_pattern, config.alpha_pattern = before


def _save_full(base: Base, state: Mapping[str, Tensor], folder: Path) -> None:
    model = base.model
    config = model.config
    tied = getattr(config, "tie_word_embeddings", False)
    head = model.get_output_embeddings() if base.anatomy.causal else None
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        same = torch.equal(head.weight, model.get_input_embeddings().weight)
        config.tie_word_embeddings = same  # a two-part split trains the two copies apart
        try:
            model.save_pretrained(folder, state_dict={n: t.detach().cpu() for n, t in model.state_dict().items()})
        finally:
            config.tie_word_embeddings = True
        return
    model.save_pretrained(folder)
