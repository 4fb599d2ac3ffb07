"""Clusters whose mix of data is close to that of all, each around a strong client that runs their trunk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cutlayer.arrangement import Arrangement, Arranger, Gift, Group, Told
from cutlayer.methods.selection._workers import Builder, Limits, Worker
from cutlayer.registry import method
from cutlayer.sketches import Sketch


@method("selection", paper="Liao et al., arXiv:2410.01256")
@dataclass(frozen=True)
class ParallelSFL(Arranger):
    """Clusters of unlike clients, each with a strong member that runs the trunk; faster clusters make more steps.

    Sets of similar clients are made by k-means; each cluster begins with the best linked client of the largest set, and
    takes, from each set's slowest, the one that brings its mix of data closest to that of all (KL), while its top can
    bear it. Swaps between clusters then lower the sum of U = ``waits`` * (part of a step that is waited) +
    (1 - ``waits``) * KL. The fastest cluster makes the framework's ``local_steps`` in a round, the others as many as
    end by then, and clusters are averaged by members times steps.

    After a public implementation that cites the paper's equations. What a top can bear: ``need_mbps`` of its downlink
    for each other member, and no more members than it can serve while the slowest works; speeds are those of the run's
    profiles. Without profiles, and with the tops at the server, these do not apply. Ours: ``size`` (without it a run
    without limits has one cluster), that a top's own data count too, that times of links are those to the server, and
    that a leftover joins where the mix gets best.

    Takes framework ``gsfl`` with ``groups: selection`` and, as published, ``intra: psl``. With ``place_top: worker``
    hidden states (and, in the two-part split, labels) are shown to the TOP WORKER: it is the curious party, and the
    server sees models only (and an evaluation before the first round). Each client tells the server the sketch that
    ``sketch`` names, once.
    """

    sketch: Literal["labels", "lengths", "tokens"]  # what each client tells of its data
    place_top: Literal["worker", "server"] = "worker"  # where a cluster's trunk runs
    waits: float = 0.5  # lambda, the weight of waiting against that of the mix
    size: int | None = 5  # clients of a cluster at most; null: as the limits say
    need_mbps: float | None = None  # of the top worker's downlink, for each other member; null: no limit
    noise: float = 0.0  # scale of Laplace noise on each number of a sketch

    def __post_init__(self) -> None:
        Sketch(self.sketch, noise=self.noise)
        if not 0 <= self.waits <= 1:
            raise ValueError(f"waits is {self.waits}; it must be at least 0 and at most 1")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}; it must be 1 or more")
        if self.need_mbps is not None and not self.need_mbps > 0:
            raise ValueError(f"need_mbps is {self.need_mbps}; it must be above 0")

    @property
    def gives(self) -> Sequence[Gift]:
        """Groups, and whose device runs their trunk."""
        return ("groups", "hosts") if self.place_top == "worker" else ("groups",)

    @property
    def asks(self) -> Sketch:
        """As the option says."""
        return Sketch(self.sketch, noise=self.noise)

    def builder(self, told: Told) -> Builder:
        """What builds the clusters, from what is known of the clients."""
        workers = {
            client: Worker(told.step(client), speed.middle, speed.down, speed.upload, speed.upload_middle)
            for client, speed in ((client, told.speeds[client]) for client in told.everybody)
        }
        at_worker = self.place_top == "worker"
        bounded = at_worker and told.timed
        need = self.need_mbps * 1e6 if bounded and self.need_mbps is not None else None
        limits = Limits(size=self.size, need=need, throughput=bounded)
        sketches = {client: told.sketches[client] for client in told.everybody}
        return Builder(workers, sketches, self.waits, limits, None if at_worker else told.server)

    def arrange(self, number: int, told: Told, before: Arrangement | None) -> Arrangement:
        """The clusters with their tops and steps."""
        builder = self.builder(told)
        clusters = builder.tuned(builder.grown(told.seed))
        steps = builder.steps(clusters, told.local_steps)
        host = self.place_top == "worker"
        each = {c: count for cluster, count in zip(clusters, steps, strict=True) for c in cluster.clients}
        return Arrangement(
            groups=tuple(Group(tuple(c.clients), c.top if host else None) for c in clusters),
            steps=each,
            weights={client: float(count) for client, count in each.items()},
        )
