"""Clients weigh as much as they have been seen to contribute, not as much data as they have."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cutlayer.contracts import Aggregator, State
from cutlayer.errors import MethodError
from cutlayer.methods.aggregator._mean import weighted_mean
from cutlayer.registry import method


@method(
    "aggregator",
    paper="Chen et al., Sensors 24(1), 88, doi:10.3390/s24010088",
    needs=("a trunk of its own for each client: framework sfl-v1",),
)
@dataclass(frozen=True)
class SplitLPF(Aggregator):
    """Weights that follow each client's contribution: how far its trunk moved with the others' trunks.

    In each merge, with delta_i the change of client i's trunk since the state before the round (flattened)::

        q_i = max(0, cos(delta_i, sum_{j != i} w_j delta_j))        i itself is left out
        c_i = rho c_i + (1 - rho) q_i                               from c_i = 1
        a_i = c_i / sum_j c_j,   at least a_min / N                 S <- S + sum_i a_i delta_i

    with w_j by ``weight_by``, and N, j over the clients of the merge. The paper's weights are not known to us beyond
    its abstract (a U-shaped split, personal parts, weights optimised by contribution); estimator and numbers are the
    survey's. Its two other estimators ask for a public data set at the server, which there is none here, and are left
    out. Only the trunk is measured; what the clients hold (head, and in the U-shape the tail) is averaged by the same
    weights, where the paper keeps the tail personal.

    Two clients always get equal weights: each is measured by the other. A client whose data are honestly of another
    kind is punished like a bad one; ``a_min`` is what it keeps. Secure aggregation hides what this measures.
    """

    weight_by: Literal["examples", "tokens", "uniform"] = "examples"  # in the direction that a client is held against
    rho: float = 0.5  # how much of the contribution is kept from merge to merge
    a_min: float = 0.1  # the least weight of a client, as a part of 1/N
    kappa: float | None = None  # a_i in proportion to exp(kappa c_i / max c); null: in proportion to c_i
    contributions: dict[str, float] = field(default_factory=dict, init=False, compare=False)  # c_i
    shares: dict[str, float] = field(default_factory=dict, init=False, compare=False)  # a_i of the last merge
    _trunks: dict[str, frozenset[str]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho is {self.rho}; it must be at least 0 and below 1")
        if not 0 < self.a_min < 1:
            raise ValueError(f"a_min is {self.a_min}; it must be above 0 and below 1")
        if self.kappa is not None and not (math.isfinite(self.kappa) and self.kappa > 0):
            raise ValueError(f"kappa is {self.kappa}; it must be a finite number above 0, or null")

    def begin(self, trunks: Mapping[str, Collection[str]]) -> None:
        """Refuse clients that share a trunk, or have nothing trained in it: their changes could not be told apart."""
        without = sorted(client for client in trunks if not trunks[client])
        if without and len(trunks) > 1:
            raise MethodError(
                "aggregator 'splitlpf' measures each client by the change of its own trunk, but these clients train "
                f"none of their own: {', '.join(without)}. Take framework: sfl-v1, and leave trained blocks to the "
                "server."
            )
        self._trunks.clear()
        self._trunks.update({client: frozenset(names) for client, names in trunks.items()})

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """Measure who has a trunk in this merge, then average everything by the new weights."""
        known = [self._trunks.get(client, frozenset()).intersection(states[client]) for client in states]
        measured = sorted(frozenset(before).intersection(*known))
        if measured and len(states) > 1:
            for client, cosine in cosines(before, states, weights, measured).items():
                old = self.contributions.get(client, 1.0)
                self.contributions[client] = self.rho * old + (1 - self.rho) * max(0.0, cosine)
        self.shares.clear()
        self.shares.update(self._weights(sorted(states)))
        return weighted_mean(states, self.shares)

    def _weights(self, clients: Sequence[str]) -> dict[str, float]:
        """a_i of these clients: in proportion to c_i or a softmax of it, and none below the floor."""
        earned = {client: self.contributions.get(client, 1.0) for client in clients}
        most = max(earned.values())
        if most == 0:
            return dict.fromkeys(clients, 1 / len(clients))
        if self.kappa is not None:
            earned = {client: math.exp(self.kappa * (c / most - 1)) for client, c in earned.items()}
        floor, low = self.a_min / len(clients), set[str]()
        while True:
            free = {client: c for client, c in earned.items() if client not in low}
            scale = (1 - floor * len(low)) / sum(free.values())
            new = {client for client, c in free.items() if c * scale < floor}
            if not new:
                return {client: floor if client in low else earned[client] * scale for client in clients}
            low |= new

    def state(self) -> Mapping[str, float]:
        """The contributions."""
        return dict(self.contributions)

    def restore(self, state: Mapping[str, float]) -> None:
        """Take them."""
        self.contributions.clear()
        self.contributions.update(state)


def cosines(
    before: State, states: Mapping[str, State], weights: Mapping[str, float], names: Sequence[str]
) -> dict[str, float]:
    """The cosine of each client's change with the weighted sum of the others'; 0 where one of the two is none.

    Computed from the changes' Gram matrix [N,N] in float64, so no flattened copy of all of them is made.
    """
    clients = sorted(states)
    gram = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for name in names:
        start = before[name].double()
        changes = torch.stack([_flat(states[c][name], start) for c in clients])
        gram += (changes @ changes.T).cpu()
    found = {}
    for i, client in enumerate(clients):
        others = torch.tensor([0.0 if c == client else weights[c] for c in clients], dtype=torch.float64)
        length = float(gram[i, i] * (others @ gram @ others))
        found[client] = float(gram[i] @ others) / math.sqrt(length) if length > 0 else 0.0
    return found


def _flat(tensor: Tensor, start: Tensor) -> Tensor:
    return (tensor.double().to(start.device) - start).flatten()
