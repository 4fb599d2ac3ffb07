"""Clusters of clients with similar data, and a model for each cluster where they differ enough."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from cutlayer.arrangement import Arrangement, Arranger, Gift, Told
from cutlayer.errors import MethodError
from cutlayer.methods.selection._clustering import by_silhouette, k_means, members, units
from cutlayer.registry import method
from cutlayer.sketches import Sketch


@method("selection", paper="CSFL, 2024, after the survey, arXiv:2604.24468")
@dataclass(frozen=True)
class CSFL(Arranger):
    """Clients in clusters of similar data; one model for all, or one for each cluster where clusters differ enough.

    k-means on the clients' sketches (at length 1, so that distance is the cosine's), with ``clusters`` clusters or the
    number in 2 .. sqrt(N) that the silhouette prefers. D is 1 less the mean cosine between the means of two clusters.
    Below ``threshold`` all clients train one model: framework ``sfl-v1`` or ``sfl-v2`` as it is. Above it heads and
    trunks are averaged within each cluster only, and the run ends with as many models. A mode is left only when D has
    passed the threshold by ``band``. A new cluster, and one model for all again, begin with the mean of the models so
    far, weighted by data.

    After the survey: clustering by label distributions, and the choice between one model and one for each cluster.
    Ours: threshold, band and ``pull_below``, which mixes 1 - D / pull_below of the mean over all into each cluster's
    model after every merge. Similar clients together; ``parallelsfl`` aims at the opposite.

    Each client tells the server the sketch that ``sketch`` names, once or every ``refresh`` rounds.
    """

    sketch: Literal["labels", "lengths", "tokens", "features", "hash"]  # what each client tells of its data
    clusters: int | None = None  # how many; null: as the silhouette says
    threshold: float = 0.3  # unlikeness of clusters from which each has a model of its own
    band: float = 0.05  # how far past the threshold it must go to change that
    pull_below: float | None = None  # unlikeness below which clusters' models are drawn to their mean
    refresh: int | None = None  # rounds between two sketches; null: one at the start
    noise: float = 0.0  # scale of Laplace noise on each number of a sketch

    def __post_init__(self) -> None:
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters is {self.clusters}; it must be 1 or more")
        if not (self.threshold > 0 and 0 <= self.band < self.threshold):
            raise ValueError(f"threshold is {self.threshold} and band {self.band}; they must be 0 <= band < threshold")
        if self.pull_below is not None and not (math.isfinite(self.pull_below) and self.pull_below > 0):
            raise ValueError(f"pull_below is {self.pull_below}; it must be above 0")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}; it must be 1 or more")
        if self.refresh is not None and self.asks.sees_head:
            raise ValueError(
                f"refresh is given with sketch {self.sketch}: clusters train heads of their own, whose features cannot "
                "be compared"
            )

    @property
    def gives(self) -> Sequence[Gift]:
        """Clusters with models of their own."""
        return ("clusters",)

    @property
    def asks(self) -> Sketch:
        """As the option says."""
        return Sketch(self.sketch, noise=self.noise)

    @property
    def renews(self) -> int | None:
        """As the option says."""
        return self.refresh

    def check(self, clients: Sequence[str]) -> None:
        """Refuse more clusters than clients."""
        if self.clusters is not None and self.clusters > len(clients):
            raise MethodError(
                f"csfl: {self.clusters} clusters for {len(clients)} clients leave some without clients. Take fewer."
            )

    def arrange(self, number: int, told: Told, before: Arrangement | None) -> Arrangement:
        """The clusters, if they differ enough."""
        vectors = np.stack([told.sketches[client] for client in told.everybody])
        found = self.clustered(vectors, told.everybody, told.seed)
        unlike = unlikeness([np.mean([told.sketches[c] for c in group], axis=0) for group in found])
        was = None if before is None else bool(before.noted["apart"])
        edge = self.threshold + {None: 0.0, False: self.band, True: -self.band}[was]
        apart = unlike >= edge and len(found) > 1
        noted = {"unlikeness": unlike, "apart": float(apart)}
        if not apart:
            return Arrangement(noted=noted)
        pull = 0.0 if self.pull_below is None else max(0.0, 1 - unlike / self.pull_below)
        return Arrangement(clusters=named(found, before.clusters if before else {}), pull=pull, noted=noted)

    def clustered(self, vectors: np.ndarray, clients: Sequence[str], seed: int) -> list[list[str]]:
        """The clients of each cluster, by their sketches [N,D]."""
        points = units(vectors)
        if len(points) == 1:
            return [list(clients)]
        if self.clusters is not None:
            return members(clients, k_means(points, self.clusters, seed))
        counts = range(2, max(2, math.isqrt(len(points))) + 1)
        return members(clients, by_silhouette(points, counts, seed))


def unlikeness(means: Sequence[np.ndarray]) -> float:
    """1 less the mean cosine between two clusters' means; 0 of a single cluster."""
    points = units(np.stack(means))
    cosines = [float(a @ b) for a, b in combinations(points, 2)]
    return 1 - float(np.mean(cosines)) if cosines else 0.0


def named(clusters: Sequence[Sequence[str]], before: Mapping[str, str]) -> dict[str, str]:
    """By client, its cluster's name: that of the former one with which it shares most clients, where there is one."""
    from scipy.optimize import linear_sum_assignment

    old = sorted(set(before.values()))
    shared = np.array([[sum(before.get(c) == name for c in group) for name in old] for group in clusters])
    names: dict[int, str] = {}
    if old:
        for row, column in zip(*linear_sum_assignment(-shared), strict=True):
            if shared[row, column]:
                names[int(row)] = old[column]
    free = (f"cluster-{n}" for n in range(len(clusters) + len(old)) if f"cluster-{n}" not in old)
    for number in range(len(clusters)):
        if number not in names:
            names[number] = next(free)
    return {client: names[number] for number, group in enumerate(clusters) for client in group}
