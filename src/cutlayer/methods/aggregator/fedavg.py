"""The weighted mean of the clients' tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from cutlayer.contracts import State
from cutlayer.registry import method


@method("aggregator", paper="McMahan et al., arXiv:1602.05629")
@dataclass(frozen=True)
class FedAvg:
    """The mean of the clients' tensors, weighted by their examples (or label tokens)."""

    weight_by: Literal["examples", "tokens", "uniform"] = "examples"

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> Mapping[str, State]:
        """Sums in float64 and in the order of the clients' names, so that equal inputs come out unchanged."""
        merged: dict[str, torch.Tensor] = {}
        for name in sorted({name for state in states.values() for name in state}):
            holders = [client for client in sorted(states) if name in states[client]]
            share = sum(weights[client] for client in holders)
            first = states[holders[0]][name]
            total = torch.zeros_like(first, dtype=torch.float64)
            for client in holders:
                total += states[client][name].double() * (weights[client] / share)
            merged[name] = total.to(first.dtype)
        return {client: {name: merged[name] for name in state} for client, state in states.items()}
