"""Which layers of a model an adapter's targets and rank patterns mean, and what is wrong with them.

PEFT takes what fits and drops the rest in silence; here each name must mean a layer.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
ADAPTABLE = (*LINEAR, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
WHOLE = ("classifier", "score", "pre_classifier")  # of a classifier: these are trained whole beside the adapter


def named(key: str) -> Callable[[str], bool]:
    """Whether a layer is meant by an entry of a list of targets: by its name, or by the end of its path."""
    return lambda name: name == key or name.endswith(f".{key}")


def patterned(key: str) -> Callable[[str], bool]:
    """Whether a layer is meant by a key of a rank pattern."""
    return lambda name: re.match(rf"(.*\.)?({key})$", name) is not None


def target_problems(
    model: Any, targets: str | Sequence[str], rank: int, rank_pattern: Mapping[str, int], *, task: str
) -> Iterator[str]:
    """What is wrong with an adapter's options on this model (its weights are not looked at).

    Args:
        model: the whole model.
        targets: ``all-linear``, a regular expression for whole paths, or the ends of paths.
        rank: of all layers that no pattern names.
        rank_pattern: the end of a path, as a regular expression -> its rank.
        task: ``causal`` or ``classification``.
    """
    modules = {name: module for name, module in model.named_modules() if name and not _whole(name, task)}
    known = [name for name, module in modules.items() if isinstance(module, ADAPTABLE)]
    chosen: list[str] = []
    if targets == "all-linear":
        output = model.get_output_embeddings()
        chosen = [n for n in known if isinstance(modules[n], LINEAR) and modules[n] is not output]
    else:
        entries = [(targets, whole_path(targets))] if isinstance(targets, str) else [(t, named(t)) for t in targets]
        for entry, means in entries:
            found = [name for name in modules if means(name)]
            unfit = [name for name in found if name not in known]
            if unfit:
                inner = [name for name in known if name.startswith(f"{unfit[0]}.")]
                has = f" Layers in it: {', '.join(_ends(inner))}." if inner else ""
                kind = type(modules[unfit[0]]).__name__
                yield f"targets has '{entry}', which means '{unfit[0]}', a {kind}; PEFT adapts single layers only.{has}"
            elif not found:
                yield f"targets has '{entry}', which no layer of this model is.{_hint(entry, known, targets)}"
            chosen += [name for name in found if name in known]
    if chosen:
        yield from _rank_problems(modules, chosen, rank, rank_pattern)


def whole_path(pattern: str) -> Callable[[str], bool]:
    """Whether a layer is meant by targets that are one pattern."""
    return lambda name: re.fullmatch(pattern, name) is not None


def _whole(name: str, task: str) -> bool:
    return task == "classification" and any(part in WHOLE for part in name.split("."))


def _rank_problems(
    modules: Mapping[str, nn.Module], chosen: Sequence[str], rank: int, rank_pattern: Mapping[str, int]
) -> Iterator[str]:
    rest = list(dict.fromkeys(chosen))
    ranks = []
    for key, own in rank_pattern.items():
        means = patterned(key)
        if not any(means(name) for name in chosen):
            yield f"rank_pattern has '{key}', which no adapted layer is.{_hint(key, chosen, rank_pattern)}"
        ranks.append((f"rank_pattern gives '{key}' the rank {own}", own, [name for name in rest if means(name)]))
        rest = [name for name in rest if not means(name)]
    for said, own, layers in [(f"rank is {rank}", rank, rest), *ranks]:
        most = max((_rank_of(modules[name]) for name in layers), default=math.inf)
        if own > most:
            yield f"{said}, but no layer that gets it can have a rank above {most}. Take at most that."


def _rank_of(layer: nn.Module) -> float:
    """The rank that a layer's matrix can have; of what is no matrix, any."""
    weight = getattr(layer, "weight", None)
    return min(weight.shape) if weight is not None and weight.dim() == 2 else math.inf


def _ends(names: Sequence[str], parts: int = 1) -> list[str]:
    """The last ``parts`` parts of the names, each once, sorted."""
    return sorted({".".join(name.split(".")[-parts:]) for name in names})


def _hint(entry: str, known: Sequence[str], given: object) -> str:
    """The nearest names, and which there are."""
    if isinstance(given, str) and any(map(named(entry), known)):
        return f" A text is a regular expression for the whole path; for the end of it write the list [{entry}]."
    near = difflib.get_close_matches(entry, _ends(known, entry.count(".") + 1), n=2, cutoff=0.6)
    meant = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return f"{meant} Layers: {', '.join(_ends(known))}."
