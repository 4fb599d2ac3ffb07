"""One frozen base for several runs: each has modules of its own, on the same weights.

What a run injects into its modules, or binds there, is not in another's. The weights are the same memory, which no run
writes to: what is trained is in slots.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch.nn import Parameter

from cutlayer.models.families import Anatomy

Loaded = tuple[Any, Anatomy]


class SharedModels:
    """Models that were loaded, by what they were loaded as."""

    def __init__(self) -> None:
        self._held: dict[tuple[object, ...], Loaded] = {}

    def model(self, key: tuple[object, ...], load: Callable[[], Loaded]) -> Loaded:
        """A model on the weights of all that have this key; ``load`` reads them when they are first asked for."""
        if key not in self._held:
            self._held[key] = load()
        model, anatomy = self._held[key]
        return twin(model), anatomy


def twin(model: Any) -> Any:
    """A copy of a model whose parameters are others in the same memory; ties stay, and buffers are copied."""
    same = {id(p): Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, same)
