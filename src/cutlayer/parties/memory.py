"""Memory by party, counted from the tensors that exist, since one process cannot ask the system for it by party.

What a party holds at its peak is its share of the frozen base, its trainable parameters, their gradients and optimizer
state, and the activations that its open graph keeps for the backward pass. The first three are read off the tensors;
the last is counted while the first training step runs, by a hook on every tensor that autograd saves. Temporary
buffers inside an operation are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class Watch:
    """Counts the bytes that autograd saves inside ``with watch:``, at the first use in training only."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.saved = 0
        self.done = False
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._seen: dict[int, int] = {}
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> Watch:
        if not self.done and torch.is_grad_enabled():
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
            self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hooks is not None:
            self._hooks.__exit__()
            self._hooks = None
            self.saved = max(self.saved, sum(self._seen.values()))

    def next(self) -> None:
        """A micro-batch is over, and its graph gone."""
        self._seen.clear()

    def finish(self) -> None:
        """The first step is over: count no more."""
        if self.saved:
            self.done = True
            self._seen.clear()
            self._known.clear()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of ``tensors``, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
