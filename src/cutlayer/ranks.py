"""LoRA factors of another rank: A [r, d_in] and B [d_out, r], whose product is the update (PEFT's layout).

Shared by all that changes or reconciles ranks: moved cuts, the aggregator ``lora-products``, rank planners.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from cutlayer.seeds import derive

FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def pairs(names: Collection[str]) -> dict[str, str]:
    """The names of the factors A, each with that of its B, in sorted order."""
    found = {}
    for name in sorted(names):
        for a, b in FACTORS:
            other = name.replace(f".{a}.", f".{b}.")
            if other != name and other in names and not name.startswith("optimizer/"):
                found[name] = other
    return found


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product by singular values, largest first, shared equally between the two.

    From the QR factors of both, so that no matrix [d_out, d_in] is ever made.

    Args:
        up: [d_out, R].
        down: [R, d_in]; R may be larger than both sizes.

    Returns:
        U S^1/2 [d_out, k] and S^1/2 V^T [k, d_in], for the k singular values that are not numerically zero (or 1; or
        0, where R is 0).
    """
    if not up.shape[1]:
        return up, down  # rank 0
    left, upper = torch.linalg.qr(up)  # [d_out, m], [m, R]
    right, lower = torch.linalg.qr(down.T)  # [d_in, n], [n, R]
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    nought = float(s[0]) * max(up.shape[0], down.shape[1]) * torch.finfo(s.dtype).eps
    kept = max(1, int((s > nought).sum()))
    root = s[:kept].sqrt()
    return left @ u[:, :kept] * root, root[:, None] * (vh[:kept] @ right.T)


def product_norm(up: Tensor, down: Tensor) -> float:
    """The Frobenius norm of up @ down, from the Gram matrices of the thin factors."""
    up, down = up.double(), down.double()
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def fresh_rows(name: str, rank: int, down: Tensor) -> Tensor:
    """The rows [rank - len(down), d_in] that a factor A grows by: Kaiming-uniform, as PEFT begins, from the name."""
    d_in = down.shape[1]
    draw = torch.Generator().manual_seed(derive("lora-products", name))
    rows = (torch.rand(rank, d_in, generator=draw) * 2 - 1) / math.sqrt(d_in)
    return rows[len(down) :].to(down)


def widened(tensor: Tensor, dim: int, size: int) -> Tensor:
    """A matrix with zeros appended along ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def refit(state: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """The same adapters at other ranks.

    A lower rank keeps the largest singular directions of the product (LoRA's own directions are not ordered). A higher
    one appends fresh rows to A and zero columns to B, which leaves the product as it is. An adapter that has learnt
    nothing yet (B = 0) keeps the first rows of A, as every rank begins with the same ones.

    Args:
        state: tensors by name; what is no factor of ``ranks`` stays.
        ranks: by the name of a factor A.
    """
    fitted = dict(state)
    for a, b in pairs(state).items():
        rank, down, up = ranks.get(a, len(state[a])), state[a], state[b]
        if rank == len(down):
            continue
        if rank < len(down):
            if up.any():
                new_up, new_down = balanced(up.double(), down.double())
                up, down = new_up[:, :rank].to(up), new_down[:rank].to(down)
            else:
                up, down = up[:, :rank], down[:rank]
        if rank > len(down):
            down = torch.cat([down, fresh_rows(a, rank, down)])
            up = widened(up, 1, rank)
        fitted |= {a: down.contiguous(), b: up.contiguous()}
    return fitted
