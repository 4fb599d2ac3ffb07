"""A model as numbers: how many parameters each part has, and what a token is multiplied with; no weights needed.

Which parameters belong below, to and above the blocks is ``models.families.anatomy``'s answer, as for the real cut.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cutlayer.errors import ModelError
from cutlayer.models.families import anatomy
from cutlayer.models.making import making


@dataclass(frozen=True)
class BlockShape:
    """One transformer block.

    ``params`` counts all weights. ``active`` counts those that a token is multiplied with: matrices, and of a mixture
    of experts only the share that is chosen; biases and norms cost next to nothing. ``maps`` lists its linear maps as
    (path in the block, inputs, outputs).
    """

    params: int
    active: int
    maps: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class ModelShape:
    """A model as numbers. ``params_head`` is what the holder of the head reads: final norm and LM head (or classifier).

    ``shared`` of them are the embedding's as well (tied weights); ``params`` counts those once. ``active_head`` are the
    weights that a token is multiplied with; ``head_per_row`` marks a classifier that reads one position of a row only.
    """

    blocks: tuple[BlockShape, ...]
    hidden: int
    vocab: int
    heads: int
    head_dim: int
    params_embedding: int
    params_head: int
    active_head: int
    outputs: int  # numbers that the head gives: vocabulary or labels
    shared: int = 0
    head_per_row: bool = False

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def tied(self) -> bool:
        """Whether the LM head reads the embedding's matrix."""
        return self.shared > 0

    @property
    def params(self) -> int:
        """All parameters of the model, each counted once."""
        return self.params_embedding + sum(block.params for block in self.blocks) + self.params_head - self.shared


def shape_of(config: Any, *, task: Literal["causal", "classification"] = "causal") -> ModelShape:
    """The shape of the model that a Transformers ``config`` describes; no weight is loaded or allocated.

    Raises:
        ModelError: Transformers has no such model for the task, or it cannot be cut.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # slow to import

    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    try:
        with making(), torch.device("meta"):
            model = auto.from_config(copy.deepcopy(config), dtype=torch.get_default_dtype())
    except ValueError as error:
        raise ModelError(f"'{config.model_type}' cannot be built for the task '{task}': {error}") from error
    config, parts = model.config, anatomy(model, causal=task == "causal")
    owned: dict[int | str, list[torch.Tensor]] = {"bottom": [], "top": []}
    for name, weight in model.named_parameters():  # a tied weight comes once, as the embedding's
        owned.setdefault(parts.owner(name), []).append(weight)
    below, above = owned["bottom"], owned["top"]
    lm_head = model.get_output_embeddings()
    tied = lm_head is not None and lm_head.weight is model.get_input_embeddings().weight
    if tied:
        above.append(lm_head.weight)
    return ModelShape(
        blocks=tuple(_block_shape(block, config) for block in model.get_submodule(parts.blocks)),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        params_embedding=sum(w.numel() for w in below),
        params_head=sum(w.numel() for w in above),
        active_head=sum(w.numel() for w in above if w.dim() >= 2),
        outputs=config.vocab_size if task == "causal" else config.num_labels,
        shared=lm_head.weight.numel() if tied else 0,
        head_per_row=task == "classification" and not hasattr(model, "score"),  # decoders score every position
    )


def _block_shape(block: torch.nn.Module, config: Any) -> BlockShape:
    from transformers.pytorch_utils import Conv1D

    active = 0.0
    for weight in block.parameters():
        if weight.dim() == 2:
            active += weight.numel()
        elif weight.dim() == 3:  # experts x in x out
            active += weight.numel() * getattr(config, "num_experts_per_tok", len(weight)) / len(weight)
    maps = []
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            maps.append((name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            maps.append((name, *module.weight.shape))
    return BlockShape(params=sum(w.numel() for w in block.parameters()), active=round(active), maps=tuple(maps))
