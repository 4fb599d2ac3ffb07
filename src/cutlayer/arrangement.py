"""Who trains with whom: what a selection is told of the clients, and what it says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from cutlayer.contracts import Selection
from cutlayer.costs import leg_seconds
from cutlayer.sketches import Sketch

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Gift = Literal["groups", "hosts", "pairs", "clusters"]


@dataclass(frozen=True)
class Group:
    """Clients that train together, in order; ``host`` is the one whose device runs their trunk (None: the server)."""

    members: tuple[str, ...]
    host: str | None = None


@dataclass(frozen=True)
class Arrangement:
    """Who trains with whom, until the selection says otherwise. What is empty is left to the framework.

    ``groups``: of clients with a trunk in common, every client in one. ``clusters``: by client, the cluster that has a
    model of its own; ``pull`` of the model of all is mixed into each cluster's after a merge. ``chosen``: who takes
    part (None: everybody). ``pairs``: a data client and the one that runs its trunk. ``steps``: local steps, by client.
    ``weights``: of clients in merges, in any unit. ``noted``: what the selection must remember.
    """

    groups: tuple[Group, ...] = ()
    clusters: Mapping[str, str] = field(default_factory=dict)
    pull: float = 0.0
    chosen: tuple[str, ...] | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    steps: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    noted: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For checkpoints."""
        return asdict(self)

    def said(self) -> str:
        """In words, for whoever looks at the run; nothing where it changes in every round."""
        if self.groups:
            tops = [f" (trunk at {group.host})" if group.host else "" for group in self.groups]
            return "groups: " + "; ".join(", ".join(g.members) + top for g, top in zip(self.groups, tops, strict=True))
        if self.clusters:
            names = sorted(set(self.clusters.values()))
            found = (", ".join(c for c, cluster in self.clusters.items() if cluster == name) for name in names)
            return "clusters with a model each: " + "; ".join(found)
        return "" if self.chosen is not None else "one model for all clients"

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Arrangement:
        """What ``to_json`` gave."""
        groups = tuple(Group(tuple(g["members"]), g["host"]) for g in found["groups"])
        pairs = tuple((a, b) for a, b in found["pairs"])
        chosen = None if found["chosen"] is None else tuple(found["chosen"])
        return Arrangement(**{**found, "groups": groups, "pairs": pairs, "chosen": chosen})


@dataclass(frozen=True)
class Speed:
    """What a client's device and link take for an optimizer step of full rows, by the run's profiles.

    ``own``, ``middle``: seconds for its own blocks, and for those between if it ran them for a client. ``up``,
    ``down``: bit/s. ``rtt``: seconds. ``upload``, ``upload_middle``: seconds to send what is trained of each to the
    server. Without profiles everybody computes alike, and links take no time.
    """

    own: float = 1.0
    middle: float = 1.0
    up: float = float("inf")
    down: float = float("inf")
    rtt: float = 0.0
    upload: float = 0.0
    upload_middle: float = 0.0


@dataclass(frozen=True)
class Told:
    """What a selection knows when it arranges a round.

    ``clients``: who has steps left, in the run's order; ``everybody``: all. ``sketches`` [D] and ``sizes`` (what
    clients weigh in merges: examples, or tokens) are by client, for everybody. ``timed``: whether the run has profiles.
    ``server``: seconds of the server for the trunk's part of a step. ``step_bytes``: the hidden states of a step, one
    way. ``local_steps``: the framework's.
    """

    clients: Sequence[str]
    everybody: Sequence[str]
    sketches: Mapping[str, np.ndarray]
    sizes: Mapping[str, float]
    speeds: Mapping[str, Speed]
    timed: bool = False
    server: float = 1.0
    step_bytes: int = 0
    local_steps: int = 1
    seed: int = 0

    def link(self, client: str, other: str | None = None) -> float:
        """Seconds for a step's hidden states from a client to the server (or to ``other``), and the gradients back."""
        mine = self.speeds[client]
        theirs = Speed() if other is None else self.speeds[other]
        rtt = mine.rtt + theirs.rtt
        there = leg_seconds(self.step_bytes, min(mine.up, theirs.down), rtt)
        return there + leg_seconds(self.step_bytes, min(theirs.up, mine.down), rtt)

    def step(self, client: str) -> float:
        """Seconds of a client's step, but for the trunk's part."""
        return self.speeds[client].own + self.link(client)


@runtime_checkable
class Arranger(Selection, Protocol):
    """A selection that says who trains with whom, from what clients tell of their data (``sketch``).

    Subclass it: what has a body here is the default.
    """

    each_round: ClassVar[bool] = False  # arranges anew in every round, from the sketches that it has
    samples: ClassVar[bool] = False  # chooses who takes part, so that any framework can follow it at least in that

    @property
    @abstractmethod
    def gives(self) -> Sequence[Gift]:
        """What its arrangements say; the framework must follow all of it."""

    @property
    @abstractmethod
    def asks(self) -> Sketch:
        """What clients are to tell."""

    @property
    def renews(self) -> int | None:
        """After how many rounds clients are asked again; None: never."""
        return None

    def pick(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """All that the arrangement leaves."""
        return clients

    def share(self, clients: int) -> float:
        """The share of the rounds that a client takes part in, as far as can be said beforehand."""
        return 1.0

    def check(self, clients: Sequence[str]) -> None:
        """Refuse a run with these clients by MethodError, before anything is loaded."""
        return

    @abstractmethod
    def arrange(self, number: int, told: Told, before: Arrangement | None) -> Arrangement:
        """Who trains with whom from round ``number`` on.

        Args:
            number: the round, from 0.
            told: what is known of the clients.
            before: what it said last; None at the start.
        """


def names_hosts(config: RunConfig) -> bool:
    """Whether a run's selection says, between rounds, which client runs blocks for which."""
    selection, takes = config.build("selection"), config.build("framework").takes
    return isinstance(selection, Arranger) and bool({"hosts", "pairs"} & {*selection.gives} & {*takes})
