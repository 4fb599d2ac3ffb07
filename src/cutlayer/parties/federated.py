"""The federated server: merges the clients' parts at step 11."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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
        self._initial: State = {}

    def begin(self, initial: State, trunks: Mapping[str, Collection[str]]) -> None:
        """Learn the state before the first round, and what each client has in a trunk of its own (see ``Aggregator``).

        Raises:
            MethodError: the aggregator cannot work with such trunks.
        """
        self._initial = initial
        self.aggregator.begin(trunks)

    def merge(self, states: Mapping[str, State], weights: Mapping[str, float] | None = None) -> State:
        """The merged state; ``weights`` (in any unit) replace those by size.

        Raises:
            NonFinite: a client sent a tensor that is NaN or infinite; nothing is merged.
            MethodError: the aggregator gave no state.
        """
        self.refuse_wrong(states)
        given = weights or self.sizes
        total = sum(given[client] for client in states)
        shares = {client: given[client] / total for client in states}
        merged = self.aggregator.merge({**self._initial, **self.before}, states, shares)
        if not isinstance(merged, Mapping) or not all(isinstance(tensor, Tensor) for tensor in merged.values()):
            raise MethodError(
                f"The aggregator {type(self.aggregator).__name__} gave no tensors by name but {type(merged).__name__}. "
                "Its merge must give the merged state, a mapping from names to tensors."
            )
        self.before = {**self.before, **merged}
        return merged

    @staticmethod
    def refuse_wrong(states: Mapping[str, State]) -> None:
        """Refuse what would spoil everybody's part.

        Raises:
            NonFinite: a client sent a tensor that is NaN or infinite.
        """
        for client, state in states.items():
            for name, tensor in state.items():
                if not tensor.isfinite().all():
                    raise NonFinite(
                        f"Client '{client}' sent '{name}' with values that are not finite. Nothing was merged."
                    )
