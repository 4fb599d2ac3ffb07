"""One frozen base for several runs: each has modules of its own, on the same weights.

What a run injects into its modules, or binds there, is not in another's. The weights are the same memory, which no run
writes to: what is trained is in slots.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch.nn import Parameter

from cutlayer.models.families import Anatomy

Loaded = tuple[Any, Anatomy]


class SharedModels:
    """Models that were loaded, by what they were loaded as, for as long as a run uses their weights."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
        self._anatomies: dict[tuple[object, ...], Anatomy] = {}

    def model(self, key: tuple[object, ...], load: Callable[[], Loaded]) -> Loaded:
        """A model on the weights of all that have this key; ``load`` reads them when nobody uses them."""
        first = self._held.get(key)
        if first is None:
            first, self._anatomies[key] = load()
            self._held[key] = first
        made = twin(first)
        object.__setattr__(made, "_cutlayer_first", first)  # not as a part of it; who uses the weights holds them
        return made, self._anatomies[key]


def twin(model: Any) -> Any:
    """A copy of a model whose parameters are others in the same memory; ties stay, and buffers are copied."""
    same = {id(p): Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, same)
