"""Memory for what lives as long as a client: its parameters and optimizer state, kept out of the general heap.

A step allocates and frees many tensors of some hundred KiB. If every client's few small tensors lay between them, each
would keep a hole open that the next client's step cannot use, and a further simulated client would cost several times
its adapter (measured: 2.5 MiB for an adapter with 0.06 MiB of state). So they get pages of their own.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 20  # bytes mapped at a time; a page is only taken when it is written to
ALIGN = 64  # bytes, as PyTorch's own allocator aligns: kernels may give other last bits otherwise


class Arena:
    """Hands out tensors that stay; a tensor on an accelerator is left where that device's allocator puts it."""

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._size = self._used = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of zeros."""
        count = math.prod(shape)
        if device.type != "cpu" or not count:
            return torch.zeros(tuple(shape), dtype=dtype, device=device)
        needed = math.ceil(count * dtype.itemsize / ALIGN) * ALIGN
        if self._memory is None or self._used + needed > self._size:
            self._size, self._used = max(CHUNK, math.ceil(needed / mmap.PAGESIZE) * mmap.PAGESIZE), 0
            self._memory = mmap.mmap(-1, self._size)  # fresh pages are zeros
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._used)
        self._used += needed
        return flat.view(tuple(shape))

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``."""
        return self.zeros(tensor.shape, tensor.dtype, tensor.device).copy_(tensor.detach())
