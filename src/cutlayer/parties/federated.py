"""The federated server: merges the clients' parts at step 11."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from cutlayer.contracts import SERVER, Aggregator, State, Upload
from cutlayer.errors import MethodError, NonFinite
from cutlayer.models.slots import parameter_of

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
        self.apart: dict[str, State] = {}  # by cluster with a model of its own: what it merged last
        self._initial: State = {}
        self.share = 1.0  # of the aggregator's change that a merge takes

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

    def last(self, cluster: str = "") -> State:
        """What was last merged, of all or of a cluster with a model of its own."""
        return self.apart.get(cluster, self.before)

    def merge(
        self, states: Mapping[str, State], weights: Mapping[str, float] | None = None, cluster: str = ""
    ) -> State:
        """The merged state; ``weights`` (in any unit) replace those by size. ``cluster`` has a model of its own.

        Raises:
            NonFinite: a client sent a tensor that is NaN or infinite; nothing is merged.
            MethodError: the aggregator gave no state.
        """
        self.refuse_wrong(states)
        given = weights or self.sizes
        total = sum(given[client] for client in states)
        return self._combined(states, {client: given[client] / total for client in states}, cluster)

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

    def _combined(self, states: Mapping[str, State], shares: Mapping[str, float], cluster: str = "") -> State:
        before = self.last(cluster)
        merged = self.aggregator.merge({**self._initial, **before}, states, shares)
        if not isinstance(merged, Mapping) or not all(isinstance(tensor, Tensor) for tensor in merged.values()):
            raise MethodError(
                f"The aggregator {type(self.aggregator).__name__} gave no tensors by name but {type(merged).__name__}. "
                "Its merge must give the merged state, a mapping from names to tensors."
            )
        if self.share != 1:
            merged = self._partly({**self._initial, **before}, merged)
        if cluster:
            self.apart[cluster] = {**before, **merged}
        else:
            self.before = {**before, **merged}
        return merged

    def _partly(self, before: State, merged: State) -> State:
        """``before`` with ``share`` of the way to ``merged``; an optimizer's moments are taken as they are.

        Raises:
            MethodError: the aggregator has changed a shape (rank).
        """
        found = dict(merged)
        for name, tensor in merged.items():
            if name != parameter_of(name):
                continue
            if before[name].shape != tensor.shape:
                raise MethodError(
                    f"A merge is to take {self.share:g} of the way, but the aggregator "
                    f"{type(self.aggregator).__name__} gives '{name}' another shape. Take aggregator: fedavg."
                )
            found[name] = _mixed(before[name], [(tensor, 1.0)], self.share)
        return found

    def rejoin(self, clusters: Mapping[str, str]) -> None:
        """One model of all again: what the clusters merged last, weighted by their clients' sizes; it is ``before``.

        ``clusters`` is by client. A cluster that has merged nothing counts with what all had before. The rule is the
        aggregator's; one that weighs clients by what it knows of them knows nothing of clusters, and weighs them alike.
        """
        if not self.apart:
            return  # all still have what they had
        sizes = self._cluster_sizes(clusters)
        states = {cluster: {**self._initial, **self.last(cluster)} for cluster in sizes}
        self.merge(states, sizes)
        self.apart = {}

    def pulled(self, clusters: Mapping[str, str], merged: Collection[str], pull: float) -> dict[str, State]:
        """The states of the clusters that have just ``merged``, each with ``pull`` of the mean over all mixed in.

        Raises:
            MethodError: the aggregator gives clusters tensors of unequal shapes (ranks).
        """
        sizes = self._cluster_sizes(clusters)
        total, states = sum(sizes.values()), {c: {**self._initial, **self.last(c)} for c in sizes}
        found: dict[str, State] = {}
        for name, tensor in ((n, t) for c in merged for n, t in self.apart[c].items()):
            if any(name in state and state[name].shape != tensor.shape for state in states.values()):
                raise MethodError(
                    f"Clusters cannot be drawn to their mean: the aggregator {type(self.aggregator).__name__} gives "
                    f"'{name}' unequal shapes in different clusters. Leave that out, or take aggregator: fedavg."
                )
        for cluster in merged:
            found[cluster] = {
                name: _mixed(own, [(states[c].get(name, own), sizes[c] / total) for c in sizes], pull)
                for name, own in self.apart[cluster].items()
            }
        self.apart |= found
        return found

    def _cluster_sizes(self, clusters: Mapping[str, str]) -> dict[str, float]:
        sizes: dict[str, float] = {}
        for client in sorted(clusters):
            sizes[clusters[client]] = sizes.get(clusters[client], 0.0) + self.sizes[client]
        return sizes

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


def _mixed(own: Tensor, others: Sequence[tuple[Tensor, float]], pull: float) -> Tensor:
    """``own`` with ``pull`` of the weighted mean of ``others`` mixed in, summed in float64."""
    mean = sum((tensor.double() * share for tensor, share in others), torch.zeros_like(own, dtype=torch.float64))
    return ((1 - pull) * own.double() + pull * mean).to(own.dtype)
