"""The federated server: merges the clients' parts at step 11."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cutlayer.contracts import Aggregator, State
from cutlayer.errors import MethodError, NonFinite


class FederatedServer:
    """Holds the aggregator and what it merged last.

    Args:
        aggregator: the rule.
        sizes: by client, what its weight is proportional to (examples or label tokens).
    """

    def __init__(self, aggregator: Aggregator, sizes: Mapping[str, float]) -> None:
        self.aggregator, self.sizes = aggregator, dict(sizes)
        self.before: State = {}

    def merge(self, states: Mapping[str, State]) -> Mapping[str, State]:
        """The new state of each client.

        Raises:
            NonFinite: a client sent a tensor that is NaN or infinite; nothing is merged.
        """
        for client, state in states.items():
            for name, tensor in state.items():
                if not tensor.isfinite().all():
                    raise NonFinite(
                        f"Client '{client}' sent '{name}' with values that are not finite. Nothing was merged."
                    )
        total = sum(self.sizes[client] for client in states)
        weights = {client: self.sizes[client] / total for client in states}
        merged = self.aggregator.merge(self.before, states, weights)
        common: dict[str, Tensor] = {}
        for client in states:
            for name, tensor in merged[client].items():
                if not torch.equal(common.setdefault(name, tensor), tensor):
                    raise MethodError(
                        f"The aggregator gives the clients different values of '{name}', but this framework needs one "
                        "common state after a merge. Nothing was merged."
                    )
        self.before = common
        return merged
