"""What surrounds the blocks of a Hugging Face model: which modules belong below the first block, which above the last.

A segment is the model's own class with the parts it does not own replaced. Where they sit is found by walking the
model (everything registered before the block list is below it, everything after it above); the few families that
register otherwise are in ``ODD``. Families in ``EXACT`` were seen to compute exactly what the uncut model computes;
any other is compared with the uncut model at the start of a run, and refused if it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cutlayer.errors import ModelError

EXACT = frozenset({
    "gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "bert", "roberta", "distilbert",
})  # fmt: skip

ENCODERS = frozenset({"bert", "roberta", "distilbert"})

# Transformers makes the mask of these without position_ids, so packed examples would see each other: the segment hands
# them the mask that the other families make for themselves.
MASKED_BY_US = frozenset({"opt"})

# Families whose model takes the first of a block's results.
TUPLES = frozenset({"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt"})


@dataclass(frozen=True)
class Odd:
    """How a family deviates from the walk: modules (paths within the base model) that are below or above the blocks."""

    below: Mapping[str, str] = field(default_factory=dict)  # path -> stand-in where the segment has no embedding
    above: Mapping[str, str] = field(default_factory=dict)  # path -> stand-in where the segment has no head


# Stand-ins: "zero" for a learned position that is added again to inputs_embeds, "embeds" for an embedding module that
# is called with inputs_embeds, "identity" for what passes its input on, "none" where the model tests for None.
ODD: Mapping[str, Odd] = {
    # OPT registers its projections and its final norm before the layers, and skips them where they are None.
    "opt": Odd(
        below={"decoder.embed_positions": "zero", "decoder.project_in": "none"},
        above={"decoder.final_layer_norm": "none", "decoder.project_out": "none"},
    ),
}


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model are; all paths are from the whole model (``model.layers``).

    ``below`` and ``above`` map a module's path to the stand-in that a segment without it gets. ``head`` lists the
    modules outside the base model (LM head, classifier), which only the full class calls.
    """

    blocks: str
    num_blocks: int
    below: Mapping[str, str]
    above: Mapping[str, str]
    embedding: str
    causal: bool
    exact: bool
    tuples: bool

    def owner(self, name: str) -> int | str:
        """Whose a parameter is: a block's number, ``"bottom"`` or ``"top"``."""
        if name.startswith(self.blocks + "."):
            return int(name[len(self.blocks) + 1 :].split(".", 1)[0])
        if _inside(name, self.embedding) or any(_inside(name, path) for path in self.below):
            return "bottom"
        return "top"


def _inside(name: str, path: str) -> bool:
    return name == path or name.startswith(path + ".")


def number_of_blocks(config: Any) -> int:
    """How many blocks a model has by its configuration."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise ModelError(
            f"A model of type '{config.model_type}' does not say how many blocks it has (num_hidden_layers). "
            "cutlayer cuts decoder-only language models and encoder classifiers."
        )
    return count


def anatomy(model: Any, *, causal: bool) -> Anatomy:
    """Find the parts of ``model`` (a ``PreTrainedModel`` with a head).

    Raises:
        ModelError: it has no single list of blocks, or is not of a kind that can be cut.
    """
    config = model.config
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"'{kind}' is an encoder-decoder. cutlayer cuts decoder-only models and encoder classifiers.")
    if causal and kind in ENCODERS and not getattr(config, "is_decoder", False):
        raise ModelError(
            f"'{kind}' is an encoder: each position sees its own label, so it cannot learn to predict text. "
            "Use data.format: classification with it."
        )
    count = number_of_blocks(config)
    base = model.base_model
    if base is model:
        raise ModelError(f"'{kind}' has no base model below its head, so it cannot be cut without copying its code.")
    lists = [
        name for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    lists = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise ModelError(f"'{kind}' should have one list of {count} blocks; found: {found}. This family cannot be cut.")
    prefix = model.base_model_prefix
    embedding = _path_of(base, model.get_input_embeddings())
    below, above = _walk(base, lists[0], embedding)
    odd = ODD.get(kind)
    if odd:
        moved = {**odd.below, **odd.above}
        below = {p: k for p, k in below.items() if p not in moved} | _present(base, odd.below)
        above = {p: k for p, k in above.items() if p not in moved} | _present(base, odd.above)
    return Anatomy(
        blocks=f"{prefix}.{lists[0]}",
        num_blocks=count,
        below={f"{prefix}.{p}": k for p, k in below.items()},
        above={f"{prefix}.{p}": k for p, k in above.items()},
        embedding=f"{prefix}.{embedding}",
        causal=causal,
        # A decoder's classifier finds a row's last token in its input_ids, which the part with the head never sees.
        exact=kind in EXACT and causal != (kind in ENCODERS),
        tuples=kind in TUPLES,
    )


def _present(base: nn.Module, paths: Mapping[str, str]) -> dict[str, str]:
    """The modules of ``paths`` that this model has (a projection of OPT may be None)."""
    modules = dict(base.named_modules())
    return {path: kind for path, kind in paths.items() if path in modules}


def _path_of(base: nn.Module, wanted: nn.Module) -> str:
    for name, module in base.named_modules():
        if module is wanted:
            return str(name)
    raise ModelError(f"The input embedding of {type(base).__name__} is not inside its base model; it cannot be cut.")


def _walk(base: nn.Module, blocks: str, embedding: str) -> tuple[dict[str, str], dict[str, str]]:
    """Children before and after the way down to the block list, with their stand-ins."""
    below: dict[str, str] = {}
    above: dict[str, str] = {}
    module, path = base, ""
    for part in blocks.split("."):
        passed = False
        for name, child in module.named_children():
            full = f"{path}{name}"
            if name == part:
                passed = True
            elif full == embedding or "rotary" in name or "rope" in name:
                continue  # the embedding is not called with inputs_embeds; every segment needs its own rotary angles
            elif not passed:
                below[full] = _stand_in_below(full, child, embedding)
            elif not isinstance(child, nn.Dropout):  # an embedding dropout that is registered after the blocks
                above[full] = "identity"
            else:
                below[full] = "identity"
        path = f"{path}{part}."
        module = module.get_submodule(part)
    return below, above


def _stand_in_below(path: str, child: nn.Module, embedding: str) -> str:
    if embedding.startswith(path + "."):
        return "embeds"  # BERT: the module that holds all embeddings is called with inputs_embeds
    return "zero" if isinstance(child, nn.Embedding) else "identity"
