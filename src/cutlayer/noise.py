"""A client's private randomness: numbers that nobody can make again without its secret.

The run's seed is known to the server, so noise that follows from it could be taken off again. And PyTorch's generators
start from 32 bits, which can be tried out. So what protects data comes from a ChaCha20 key stream whose key is made of
the client's secret, of what the noise is for, and of the very numbers that it covers: the same message gets the same
noise when it is made again (after a crash it is not a new release), and any other message gets other noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import special
from torch import Tensor


class Noise:
    """A stream of random numbers.

    Args:
        secret: the client's.
        purpose: what it is for; streams for different purposes are independent.
        covers: the tensors that it is to hide; in the key.
    """

    def __init__(self, secret: bytes, *purpose: object, covers: Sequence[Tensor] = ()) -> None:
        digest = hashlib.blake2b(
            "\x1f".join(str(part) for part in purpose).encode(), key=hashlib.blake2b(secret).digest(), digest_size=32
        )
        for tensor in covers:
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(bytes_of(tensor))
        self.key = digest.digest()
        self._stream = Cipher(ChaCha20(self.key, bytes(16)), mode=None).encryptor()

    def uniform(self, *shape: int) -> np.ndarray:
        """Float64 numbers strictly between 0 and 1."""
        count = int(np.prod(shape))
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8") >> np.uint64(11)
        return ((bits + 0.5) / 2.0**53).reshape(shape)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers of a tensor's shape, in float32, where it is."""
        count = like.numel()
        half = -(-count // 2)
        radius = np.sqrt(-2 * np.log(self.uniform(half)))  # the method of Box and Muller
        angle = 2 * np.pi * self.uniform(half)
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return _like(both, like)

    def laplace(self, like: Tensor) -> Tensor:
        """Laplace numbers of scale 1 of a tensor's shape, in float32, where it is."""
        centred = self.uniform(like.numel()) - 0.5
        return _like(-np.sign(centred) * np.log1p(-2 * np.abs(centred)), like)

    def gamma(self, shape: float, count: int) -> np.ndarray:
        """Gamma numbers [count] of this shape and scale 1."""
        found: np.ndarray = special.gammaincinv(shape, self.uniform(count))
        return found

    def choice(self, weights: Tensor) -> Tensor:
        """For each row of weights [N,K] >= 0 a column [N], as often as its share says."""
        sums = weights.double().cumsum(-1)
        at = torch.from_numpy(self.uniform(len(weights))).to(sums.device)[:, None] * sums[:, -1:]
        return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=weights.shape[1] - 1)


def _like(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32).reshape(tuple(like.shape))).to(like.device)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers as bytes, where it can be without a copy."""
    plain: Any = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(plain)
