"""Groups of clients whose hashed features are alike; the server sees a few bits of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cutlayer.arrangement import Arrangement, Arranger, Gift, Group, Told
from cutlayer.errors import MethodError
from cutlayer.methods.selection._clustering import agglomerated, members
from cutlayer.registry import method
from cutlayer.sketches import Sketch, hash_similarity


@method("selection", paper="Liu et al., https://doi.org/10.1145/3725221, after the survey, arXiv:2604.24468")
@dataclass(frozen=True)
class GSFLHashGrouping(Arranger):
    """Clients with similar features are grouped by hashes of these; within a group the quickest trains first.

    Each client runs the head as it is at the start on ``rows`` of its texts, pools what comes out and subtracts the
    same of a text that all clients have, without which the features of a language model are nearly parallel and all
    clients look alike. That text is the run's evaluation data. Without any it is random tokens, drawn from the seed,
    which helps little on real texts: then give ``groups``, as the threshold finds one group. It tells the signs of
    ``bits`` random projections of that, made with a seed that the clients share and the server does not know; each bit
    may be turned with probability ``flip``. The server estimates cosines from the bits, and groups by average linkage:
    ``groups`` groups, or as many as have a mean distance (1 - cosine) of at most ``threshold``. No labels are needed,
    so it works for free text.

    From the abstract and the survey: light grouping of similar devices by cosine similarity of hashed features, and
    scheduling within a group. Ours: this hash, flips, linkage and threshold, and that a group above ``size`` is cut
    into parts of similar speed. The bits are an obfuscation, not encryption: equal data give equal bits, and who knows
    the clients' seed gets the direction of the feature back approximately.

    Takes framework ``gsfl`` with ``groups: selection``.
    """

    bits: int = 256  # of a client's hash, all that it tells; a multiple of 8
    flip: float = 0.0  # probability with which each bit is turned, at the client
    rows: int = 64  # of a client's texts that its feature is made from
    groups: int | None = None  # how many; null: as the threshold says
    threshold: float = 0.3  # mean distance, 1 - cosine, within a group
    size: int | None = None  # clients of a group at most
    refresh: int | None = None  # rounds between two hashes, of the head as it then is; null: one at the start

    def __post_init__(self) -> None:
        Sketch("hash", rows=self.rows, bits=self.bits, flip=self.flip)
        for name in ("groups", "size", "refresh"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 < self.threshold <= 2:
            raise ValueError(f"threshold is {self.threshold}; it must be above 0 and at most 2")

    @property
    def gives(self) -> Sequence[Gift]:
        """Groups."""
        return ("groups",)

    @property
    def asks(self) -> Sketch:
        """A hash."""
        return Sketch("hash", rows=self.rows, bits=self.bits, flip=self.flip)

    @property
    def renews(self) -> int | None:
        """As the option says."""
        return self.refresh

    def check(self, clients: Sequence[str]) -> None:
        """Refuse more groups than clients."""
        if self.groups is not None and self.groups > len(clients):
            raise MethodError(
                f"gsfl-hash-grouping: {self.groups} groups for {len(clients)} clients leave a group without clients. "
                "Take fewer."
            )

    def arrange(self, number: int, told: Told, before: Arrangement | None) -> Arrangement:
        """The groups, each in the order of its members' step times."""
        clients = told.everybody
        hashes = [told.sketches[client] for client in clients]
        distances = np.array([[1 - hash_similarity(a, b, flip=self.flip) for b in hashes] for a in hashes])
        np.fill_diagonal(distances, 0.0)
        labels = agglomerated(distances, count=self.groups, threshold=self.threshold)
        groups = []
        for group in members(clients, labels):
            group.sort(key=lambda client: (told.step(client), clients.index(client)))
            parts = math.ceil(len(group) / (self.size or len(group)))
            cuts = [len(group) * part // parts for part in range(parts + 1)]
            groups += [Group(tuple(group[a:b])) for a, b in pairwise(cuts)]
        return Arrangement(groups=tuple(groups))
