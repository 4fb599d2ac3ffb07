"""The weighted mean of the clients' tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cutlayer.contracts import Aggregator, State
from cutlayer.methods.aggregator._mean import weighted_mean
from cutlayer.registry import method


@method("aggregator", paper="McMahan et al., arXiv:1602.05629")
@dataclass(frozen=True)
class FedAvg(Aggregator):
    """The mean of the clients' tensors, weighted by their examples (or label tokens)."""

    weight_by: Literal["examples", "tokens", "uniform"] = "examples"

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """Sums in float64 and in the order of the clients' names, so that equal inputs come out unchanged."""
        return weighted_mean(states, weights)
