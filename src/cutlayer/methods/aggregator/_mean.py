"""The weighted mean of tensors by name, which several aggregators give for all or for a part of a state."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from cutlayer.contracts import State
from cutlayer.errors import MethodError


def holders_of(name: str, states: Mapping[str, State]) -> list[str]:
    """The clients whose copies have this tensor, in the order of their names."""
    return [client for client in sorted(states) if name in states[client]]


def shares_of(holders: Collection[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of some of the clients, scaled to sum to 1."""
    total = sum(weights[client] for client in holders)
    return {client: weights[client] / total for client in holders}


def weighted_mean(
    states: Mapping[str, State], weights: Mapping[str, float], names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """The mean of each tensor over those that hold it.

    Sums in float64 and in the order of the clients' names, so that equal inputs come out unchanged.

    Args:
        states: name -> tensor, by client.
        weights: by client; those of a tensor's holders are scaled to sum to 1.
        names: which tensors; by default all.

    Raises:
        MethodError: shapes differ.
    """
    merged: dict[str, Tensor] = {}
    for name in sorted({name for state in states.values() for name in state} if names is None else names):
        shares = shares_of(holders_of(name, states), weights)
        first = states[next(iter(shares))][name]
        if all(states[client][name] is first for client in shares):  # one trunk serves them all
            merged[name] = first.clone()
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for client, share in shares.items():
            if states[client][name].shape != first.shape:
                raise MethodError(
                    f"'{name}' has the shape {list(first.shape)} of client '{next(iter(shares))}', but "
                    f"{list(states[client][name].shape)} of '{client}'; a mean needs equal ranks. Unequal ranks are "
                    "merged by aggregator: lora-products."
                )
            total += states[client][name].double() * share
        merged[name] = total.to(first.dtype)
    return merged
