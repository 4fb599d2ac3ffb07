"""From profiles to durations: how long each verb's work takes at each party on the virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from cutlayer.assembly import Parts, party_between, segments_of
from cutlayer.build import task_of, training_of
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER
from cutlayer.costs import Profile, Work, profile_from, seconds, shape_of
from cutlayer.errors import ConfigError
from cutlayer.links.local import Pace
from cutlayer.models.segment import Segment

EDGE = "edge-box+fibre"  # a party that is neither a client nor the server, where the run names no profile for it


class Paces:
    """The durations of a run's work; all of them None where the run has no profile, or time is what it takes.

    Args:
        config: the run.
        parts: its parts.
        real: whether time is what it takes, and profiles are only for who plans and who arranges.

    Raises:
        ConfigError: some clients have a profile and some have none, so that their times could not be compared.
    """

    def __init__(self, config: RunConfig, parts: Parts, *, real: bool = False) -> None:
        clients = {name: profile_from(config.profile_of(name)) for name in config.client_names}
        check_profiles(clients)
        self._timed = not real and all(profile is not None for profile in clients.values())
        self._parts = parts
        self._frozen_head = config.build("exchange").frozen_head
        self.profiles: dict[str, Profile | None] = {}
        self.access: dict[str, Profile | None] = {}  # whose links to the network are counted: all but the server's
        if not self._timed:
            return
        others = {
            name: profile_from(config.profiles.get(name, "server" if name == SERVER else EDGE))
            for name in (*parts.parties, *party_between(config))
            if name not in clients
        }
        self.profiles = {**clients, **others}
        self.access = {name: profile for name, profile in self.profiles.items() if name != SERVER}
        shape, training = shape_of(parts.base.model.config, task=task_of(config)), training_of(config)

        @lru_cache
        def work(length: int) -> Work:
            return Work(shape, length=length, training=training)

        self._work = work

    def client(self, name: str) -> Pace | None:
        """How long a client's verbs take."""
        if not self._timed:
            return None

        def flop(verb: str, length: int, graph: bool) -> float:
            # Looked up each time: a planner may have moved the cut.
            head, _, tail = segments_of(self._parts.base, self._parts.layouts[name], self._parts.routes[name])
            cost = self._work(length)
            if verb in ("head_forward", "features", "probe"):
                return cost.forward(head.blocks)
            if verb == "head_backward":
                return 0.0 if self._frozen_head else cost.backward(head.blocks, input_gradient=False)
            if verb != "tail_step" or tail is None:
                return 0.0
            back = cost.backward(tail.blocks, lm_head=True, input_gradient=True) if graph else 0.0
            return cost.forward(tail.blocks, lm_head=True) + back

        return self._pace(name, flop)

    def stop(self, party: str, segment: Segment, *, first: bool = True) -> Pace | None:
        """How long a stop's verbs take; ``first``: it comes after the client's head."""
        if not self._timed:
            return None
        below = any(self._below(n, segment) for n in self._parts.base.initial) and not (first and self._frozen_head)

        def flop(verb: str, length: int, graph: bool) -> float:
            cost, total = self._work(length), 0.0
            if verb in ("forward", "tail_step", "improve", "judge"):
                total += cost.forward(segment.blocks, lm_head=segment.top)
            if verb in ("backward", "tail_step") and graph:
                total += cost.backward(segment.blocks, lm_head=segment.top, input_gradient=below)
            return total

        return self._pace(party, flop)

    def _below(self, name: str, segment: Segment) -> bool:
        """Whether a trained tensor lies below a segment, so that somebody needs the gradient of its input."""
        owner = self._parts.base.owner(name)
        return owner == "bottom" or (isinstance(owner, int) and owner < segment.blocks.start)

    def _pace(self, party: str, flop: Callable[[str, int, bool], float]) -> Pace:
        profile = self.profiles[party]
        assert profile is not None
        return Pace(lambda verb, rows, length, graph: seconds(flop(verb, length, graph) * rows * length, profile))


def workers(profiles: Mapping[str, Profile | None], party: str) -> int:
    """How many steps a party works on at a time."""
    profile = profiles.get(party)
    return profile.workers if profile is not None else 1


def check_profiles(profiles: Mapping[str, object]) -> None:
    """Refuse clients without a profile among clients with one.

    Raises:
        ConfigError: their times could not be compared.
    """
    without = [name for name, profile in profiles.items() if profile is None]
    if without and len(without) < len(profiles):
        raise ConfigError(
            [f"client '{without[0]}' has no profile, but others have. Give it one, or set profile for all."]
        )
