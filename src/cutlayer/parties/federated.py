"""The federated server: merges the clients' parts at step 11."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from cutlayer.contracts import SERVER, Aggregator, State, Upload
from cutlayer.errors import MethodError, NonFinite

NOUGHT = 1e-12  # a share of the current model that is only a rounding error


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

    @property
    def current(self) -> State:
        """What was last merged of each tensor, and the start of those that never were."""
        return {**self._initial, **self.before}

    def merge(self, states: Mapping[str, State], weights: Mapping[str, float] | None = None) -> State:
        """The merged state; ``weights`` (in any unit) replace those by size.

        Raises:
            NonFinite: a client sent a tensor that is NaN or infinite; nothing is merged.
            MethodError: the aggregator gave no state.
        """
        self.refuse_wrong(states)
        given = weights or self.sizes
        total = sum(given[client] for client in states)
        return self._combined(states, {client: given[client] / total for client in states})

    def absorb(self, uploads: Sequence[Upload], states: Mapping[str, State]) -> list[float]:
        """Merge uploads into the current state, by the aggregator's ``weigh``.

        Returns:
            the part that each upload now has in it; 0 was thrown away, and if all are, nothing changes.

        Raises:
            NonFinite: a client sent a tensor that is NaN or infinite; nothing is merged.
            MethodError: the aggregator gave no state, or shares that are none.
        """
        self.refuse_wrong(states)
        parts = list(self.aggregator.weigh(uploads))
        if len(parts) != len(uploads) or not all(part >= 0 for part in parts) or not sum(parts) <= 1 + NOUGHT:
            raise MethodError(
                f"The aggregator {type(self.aggregator).__name__} gives the shares {parts} to {len(uploads)} uploads. "
                "It must give one for each, none below 0, and at most 1 in all."
            )
        shares = {upload.client: part for upload, part in zip(uploads, parts, strict=True) if part > 0}
        if not shares:
            return parts
        taken = {client: states[client] for client in shares}
        rest = 1 - math.fsum(parts)
        if rest > NOUGHT:
            current = self.current
            names = {name for state in taken.values() for name in state}
            taken[SERVER], shares[SERVER] = {name: current[name] for name in names}, rest
        self._combined(taken, shares)
        return parts

    def _combined(self, states: Mapping[str, State], shares: Mapping[str, float]) -> State:
        merged = self.aggregator.merge(self.current, states, shares)
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
