"""Each client runs as many blocks as it can in the time that the slowest needs: equal step times, the least server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cutlayer.contracts import Planner
from cutlayer.errors import MethodError
from cutlayer.planning import Situation, Stages, queue_step
from cutlayer.registry import method

STARTS = 8  # plans that the search for a queueing server begins from


@method("planner", paper="Memory-Efficient Split Federated Learning for LLM Fine-Tuning, arXiv:2506.02940")
@dataclass
class CapabilityCut(Planner):
    """Cuts by each client's memory and speed, so that nobody is waited for.

    The paper is known from the survey's damaged text and its Table 3: a cut for each client from its computing
    capacity, balanced training times, the same payload at every cut. Ours is the rest: among the cuts that fit a
    client's memory, and for the smallest step time tau at which every client has one, each takes the largest
    (``goal: server``, which unloads the server) or the smallest (``goal: client``, which saves the client's energy)
    whose step is within tau. With a server that works for one client at a time the clients' times depend on each other;
    single-block moves, judged by the whole step (``costs.queue_step``), then follow. A new plan scales each client's
    predicted times by what it was measured to need, smoothed by ``decay``, moves cuts by one block at most, and only
    where the step becomes shorter by more than ``hysteresis``.
    """

    every: int = 10  # rounds between two plans; 0: the first one holds
    least: int = 1  # the fewest head blocks, a floor for privacy
    goal: Literal["server", "client"] = "server"  # of several good plans, the one that unloads this side
    serves: Literal["auto", "queue", "parallel"] = "auto"  # the server; auto: parallel if it has a worker a client
    decay: float = 0.8  # of the smoothed measured times
    hysteresis: float = 0.05  # the least gain of a move, as a share of the step's time
    _slower: dict[str, float] = field(default_factory=dict, init=False)  # measured / predicted time, by client

    def __post_init__(self) -> None:
        if self.every < 0 or self.least < 0:
            raise ValueError(f"every is {self.every} and least {self.least}; both must be 0 or more")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must be at least 0 and below 1")
        if not 0 <= self.hysteresis < 1:
            raise ValueError(f"hysteresis is {self.hysteresis}; it must be at least 0 and below 1")

    def bounds(self, now: Situation) -> Mapping[str, range]:
        """From ``least`` to what the client's memory holds.

        Raises:
            MethodError: there are no profiles, or a client cannot hold ``least`` blocks.
        """
        if not now.profiles:
            raise MethodError(
                "planner 'capability-cut' divides the blocks by what clients can do, but the run has no profiles. Set "
                "profile for all, or one for each client."
            )
        found = {}
        for client, profile in now.profiles.items():
            fits = [
                cut for cut in range(self.least, now.most(client) + 1)
                if profile.memory is None or now.memory(client, cut) <= profile.memory
            ]  # fmt: skip
            if not fits:
                raise MethodError(
                    f"planner 'capability-cut': client '{client}' cannot hold {self.least} head blocks: its profile "
                    f"'{profile.name}' has {(profile.memory or 0) / 1e9:.3g} GB, they take "
                    f"{now.memory(client, self.least) / 1e9:.3g} GB, and the model leaves a client at most "
                    f"{now.most(client)}. Lower least, batch_size or data.max_length."
                )
            found[client] = range(self.least, max(fits) + 1)
        return found

    def start(self, now: Situation) -> Mapping[str, int]:
        """The plan of all cuts at once."""
        return self._best(now)

    def plan(self, now: Situation) -> Mapping[str, int]:
        """Towards the best plan for the times that were measured, one block a client at most."""
        for client, seconds in now.measured.items():
            one = now.stages(client, now.cut(client))
            found = seconds / (one.forward + one.up + one.down + one.backward)
            self._slower[client] = self.decay * self._slower.get(client, 1.0) + (1 - self.decay) * found
        before = {client: now.cut(client) for client in now.layouts}
        wanted = self._best(now)
        after = {c: cut + min(max(wanted[c] - cut, -1), 1) for c, cut in before.items()}
        old, new = self._step(now, before), self._step(now, after)
        return after if new < (1 - self.hysteresis) * old else before

    def state(self) -> Mapping[str, float]:
        """The smoothed times, as multiples of the predicted."""
        return dict(self._slower)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with these."""
        self._slower = dict(state)

    def _best(self, now: Situation) -> dict[str, int]:
        bounds = self.bounds(now)
        times = {c: {cut: self._alone(now, c, cut) for cut in bound} for c, bound in bounds.items()}
        fastest = max(min(of.values()) for of in times.values())
        taus = sorted({time for of in times.values() for time in of.values() if time >= fastest})
        found = (self._within(times, tau) for tau in taus)
        plans = (plan for plan in found if self._holds(now, plan))
        cuts = next(plans, None)
        if cuts is None:
            raise MethodError(
                "planner 'capability-cut': no balanced plan fits the server's memory. Give the server's profile more "
                "memory_gb, lower batch_size, or take goal: server, which leaves it the fewest blocks."
            )
        if self._parallel(now):
            return cuts
        # Single-block moves can get stuck, so they begin from several plans: the best of those by threshold.
        starts = sorted([cuts, *plans], key=lambda plan: self._step(now, plan))[:STARTS]
        return min((self._improved(now, plan, bounds) for plan in starts), key=lambda plan: self._step(now, plan))

    def _within(self, times: Mapping[str, Mapping[int, float]], tau: float) -> dict[str, int]:
        pick = max if self.goal == "server" else min
        return {client: pick(cut for cut, time in of.items() if time <= tau) for client, of in times.items()}

    def _holds(self, now: Situation, cuts: Mapping[str, int]) -> bool:
        server = now.costs.server
        return server is None or server.memory is None or now.server_memory(cuts) <= server.memory

    def _improved(self, now: Situation, cuts: dict[str, int], bounds: Mapping[str, range]) -> dict[str, int]:
        """Move single blocks while the step of a queueing server becomes shorter."""
        best = self._step(now, cuts)
        while True:
            tries = [{**cuts, c: cuts[c] + by} for c in cuts for by in (1, -1) if cuts[c] + by in bounds[c]]
            found = [(self._step(now, one), number) for number, one in enumerate(tries) if self._holds(now, one)]
            if not found or min(found)[0] >= best * (1 - 1e-12):
                return cuts
            best, number = min(found)
            cuts = tries[number]

    def _parallel(self, now: Situation) -> bool:
        server = now.costs.server
        return self.serves == "parallel" or (
            self.serves == "auto" and server is not None and server.workers >= len(now.layouts)
        )

    def _stages(self, now: Situation, client: str, cut: int) -> Stages:
        one, slower = now.stages(client, cut), self._slower.get(client, 1.0)
        return Stages(one.forward * slower, one.up * slower, one.server, one.down * slower, one.backward * slower)

    def _alone(self, now: Situation, client: str, cut: int) -> float:
        """A client's step: with its share of a parallel server, or without a queueing one's (row, step 2)."""
        one = self._stages(now, client, cut)
        return one.release + one.delivery + (one.server if self._parallel(now) else 0.0)

    def _step(self, now: Situation, cuts: Mapping[str, int]) -> float:
        """Seconds of a step of all clients."""
        if self._parallel(now):
            return max(self._alone(now, client, cut) for client, cut in cuts.items())
        stages = [self._stages(now, client, cut) for client, cut in cuts.items()]
        return queue_step(sorted(stages, key=lambda one: one.release))  # served as they come
