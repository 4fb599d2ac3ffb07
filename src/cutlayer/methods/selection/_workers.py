"""ParallelSFL's clusters of unlike workers: how they are built, and how many steps each makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from cutlayer.methods.selection._clustering import k_means, members
from cutlayer.methods.selection._mixes import divergence, mean_mix

PASSES = 10  # of swaps at most; they end when none helps


@dataclass(frozen=True)
class Worker:
    """A client: seconds of a step at its bottom with its link, of a hosted top; bit/s in; seconds of uploads."""

    bottom: float
    top: float
    ingress: float = math.inf
    upload: float = 0.0
    upload_top: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What a top worker can bear: ``need`` bit/s of its link for each other member, and whether its speed counts."""

    size: int | None = None
    need: float | None = None
    throughput: bool = False


@dataclass
class Cluster:
    """Clients around a top worker, the first of them."""

    clients: list[str]

    @property
    def top(self) -> str:
        """Who hosts the top."""
        return self.clients[0]


@dataclass(frozen=True)
class Builder:
    """Builds the clusters.

    Args:
        workers: by client.
        sketches: by client, its mix of data [D].
        waits: the weight of waiting in a cluster's utility; the rest is that of its mix.
        limits: of a cluster.
        server: seconds of the server for a client's trunk, where the tops are there.
    """

    workers: Mapping[str, Worker]
    sketches: Mapping[str, np.ndarray]
    waits: float
    limits: Limits
    server: float | None = None
    whole: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", mean_mix(self.sketches, list(self.workers)))

    def mix(self, clients: Sequence[str]) -> float:
        """How far the clients' mix is from that of all."""
        return divergence(mean_mix(self.sketches, clients), self.whole)

    def times(self, clients: Sequence[str]) -> list[float]:
        """Seconds of each member's step; the first of them hosts the top."""
        top = self.workers[clients[0]].top if self.server is None else self.server
        return [self.workers[client].bottom + top for client in clients]

    def waiting(self, clients: Sequence[str]) -> float:
        """The mean part of a step in which a member waits for the slowest."""
        times = self.times(clients)
        return sum(max(times) - time for time in times) / (len(times) * max(times))

    def utility(self, clients: Sequence[str]) -> float:
        """U_c = waits * W_c + (1 - waits) * KL_c; lower is better."""
        return self.waits * self.waiting(clients) + (1 - self.waits) * self.mix(clients)

    def bearable(self, clients: Sequence[str]) -> bool:
        """Whether a cluster keeps the limits."""
        top, limits = self.workers[clients[0]], self.limits
        if limits.size is not None and len(clients) > limits.size:
            return False
        if limits.need is not None and len(clients) - 1 > top.ingress // limits.need:
            return False
        slowest = max(self.workers[client].bottom for client in clients)
        return not limits.throughput or len(clients) * top.top <= slowest

    def grown(self, seed: int) -> list[Cluster]:
        """Step 1 and 2: sets of similar workers, and clusters that take from each what mixes best."""
        names = list(self.workers)
        points = np.stack([self.sketches[client] for client in names])
        sets = members(names, k_means(points, max(1, len(names) // 5), seed))
        clusters: list[Cluster] = []
        while any(sets):
            largest = max(sets, key=len)
            top = max(largest, key=lambda client: self.workers[client].ingress)
            largest.remove(top)
            cluster = Cluster([top])
            while candidates := self._candidates(cluster, sets):
                best = min(candidates, key=lambda client: self.mix([*cluster.clients, client]))
                next(group for group in sets if best in group).remove(best)
                cluster.clients.append(best)
            clusters.append(cluster)
        return self._joined(clusters)

    def _candidates(self, cluster: Cluster, sets: Sequence[Sequence[str]]) -> list[str]:
        slowest = [max(group, key=lambda client: self.workers[client].bottom) for group in sets if group]
        return [client for client in slowest if self.bearable([*cluster.clients, client])]

    def _joined(self, clusters: list[Cluster]) -> list[Cluster]:
        """Leftovers: a top that found nobody joins the cluster that it mixes best with, where one can bear it."""
        alone = [cluster for cluster in clusters if len(cluster.clients) == 1]
        kept = [cluster for cluster in clusters if len(cluster.clients) > 1]
        for cluster in alone if kept else []:
            able = [other for other in kept if self._may_join(other, cluster.top)]
            if not able:
                kept.append(cluster)
                continue
            best = min(able, key=lambda other: self.mix([*other.clients, cluster.top]))
            best.clients.append(cluster.top)
        return kept or alone

    def _may_join(self, cluster: Cluster, client: str) -> bool:
        """Whether what a top worker can bear allows one more; a leftover may exceed the size."""
        beyond = Builder(
            self.workers, self.sketches, self.waits, Limits(None, self.limits.need, self.limits.throughput), self.server
        )
        return len(cluster.clients) > 1 and beyond.bearable([*cluster.clients, client])

    def tuned(self, clusters: list[Cluster]) -> list[Cluster]:
        """Step 3: swaps between two clusters that lower the sum of their utilities and keep the limits."""
        for _ in range(PASSES):
            helped = [self._swapped(a, b) for a, b in combinations(clusters, 2)]
            if not any(helped):
                break
        return clusters

    def _swapped(self, a: Cluster, b: Cluster) -> bool:
        """Make every swap of members (not of tops) that helps; whether there was one."""
        helped = False
        for i in range(1, len(a.clients)):
            for j in range(1, len(b.clients)):
                left = [*a.clients[:i], b.clients[j], *a.clients[i + 1 :]]
                right = [*b.clients[:j], a.clients[i], *b.clients[j + 1 :]]
                before = self.utility(a.clients) + self.utility(b.clients)
                sized = self._bear_swap(a, left) and self._bear_swap(b, right)
                if sized and self.utility(left) + self.utility(right) < before - 1e-12:
                    a.clients, b.clients = left, right
                    helped = True
        return helped

    def _bear_swap(self, old: Cluster, new: Sequence[str]) -> bool:
        """A swap leaves sizes as they are, so only a limit that was kept must still be."""
        return self.bearable(new) or not self.bearable(old.clients)

    def steps(self, clusters: Sequence[Cluster], most: int) -> list[int]:
        """Local steps of each cluster, so that all end together: the fastest makes ``most``."""
        slowest = [max(self.times(cluster.clients)) for cluster in clusters]
        sent = [self._sent(cluster) for cluster in clusters]
        fast = min(range(len(clusters)), key=lambda number: slowest[number])
        budget = most * slowest[fast] + sent[fast]
        return [max(1, min(most, int((budget - s) / t + 1e-9))) for t, s in zip(slowest, sent, strict=True)]

    def _sent(self, cluster: Cluster) -> float:
        """Seconds until the cluster's models are at the server."""
        bottoms = max(self.workers[client].upload for client in cluster.clients)
        top = self.workers[cluster.top]
        return bottoms if self.server is not None else max(bottoms, top.upload + top.upload_top)
