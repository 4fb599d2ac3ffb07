"""A better client gets more layers: cuts follow each client's accuracy, one block at a time, within its resources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cutlayer.contracts import Planner
from cutlayer.errors import MethodError
from cutlayer.planning import Situation
from cutlayer.registry import method


@method("planner", paper="SplitFT, arXiv:2604.26388")
@dataclass
class SplitFTAdaptiveCut(Planner):
    """Adaptive cuts: a weight for each client follows its accuracy against the mean, and its cut follows the weight.

    From the paper, as secondary summaries tell it: a cut for each client that is bounded by its resources, a weight
    moved by comparing its accuracy with the clients' average by a strength gamma, a heuristic and no solver, and the
    same cut for all at the start (2 blocks of 12). Ours, as the paper's formula was not found: with a_i the accuracy on
    client i's validation shard, and d_i its relative distance from the mean over examples::

        w_i <- clip(w_i (1 + gamma d_i), w_min, w_max)                        unless |d_i| < dead_band
        l_i moves by at most one block towards l_0 w_i / mean(w)              within [l_min, l_max_i]

    l_max_i is the most blocks whose memory fits the client's (``costs.memory``) and whose work in a step, s_i l, stays
    within ``budget`` seconds. The bounds hold at the start too, so with the budget that is the median half of the
    clients cannot grow: give one where all should. Without profiles nothing bounds a client but the model.
    """

    every: int = 5  # rounds between two decisions
    cut: int = 2  # head blocks of all at the start (l_0)
    gamma: float = 0.5  # how strongly the weight follows the accuracy; 0: cuts never move
    least: int = 1  # the fewest head blocks (l_min)
    weights: tuple[float, float] = (0.25, 4.0)  # the bounds of a weight
    dead_band: float = 0.02  # relative distances below it move nothing
    budget: float | None = None  # seconds of a client's blocks in a step; null: the clients' median at the first cut
    shard: float = 0.1  # the share of its examples that a client keeps to measure its accuracy
    _weights: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be 1 or more (rounds)")
        if not 0 <= self.least <= self.cut:
            raise ValueError(f"least is {self.least} and cut {self.cut}; least must be 0 or more, and cut not below it")
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma is {self.gamma}; it must be 0 or more")
        if not 0 < self.weights[0] <= 1 <= self.weights[1]:
            raise ValueError(f"weights is {list(self.weights)}; the first must be above 0, and 1 between the two")
        if not self.dead_band >= 0:
            raise ValueError(f"dead_band is {self.dead_band}; it must be 0 or more")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget is {self.budget}; it must be above 0 (seconds)")
        if not 0 < self.shard < 1:
            raise ValueError(f"shard is {self.shard}; it must be above 0 and below 1")

    @property
    def validation(self) -> float:
        """The shard; none where no accuracy is looked at."""
        return self.shard if self.gamma else 0.0

    def bounds(self, now: Situation) -> Mapping[str, range]:
        """From ``least`` to what memory and time allow.

        Raises:
            MethodError: the model has too few blocks for ``cut``, or a client cannot hold ``least`` of them.
        """
        found = {}
        budget = self._budget(now)
        for client in now.layouts:
            most = now.most(client)
            if self.cut > most:  # and least, which is not above it
                raise MethodError(
                    f"planner 'splitft-adaptive-cut': cut is {self.cut}, but a client of this model can hold at most "
                    f"{most} blocks in its head. Lower cut (and least, which is {self.least}), or tail_blocks."
                )
            profile = now.profiles.get(client)
            fits = [cut for cut in range(self.least, most + 1) if self._fits(now, client, cut, budget)]
            if not fits:
                assert profile is not None
                room = "no limit" if profile.memory is None else f"{profile.memory / 1e9:.3g} GB"
                needed, busy = now.memory(client, self.least), self._busy(now, client, self.least)
                raise MethodError(
                    f"planner 'splitft-adaptive-cut': client '{client}' cannot hold {self.least} head blocks: that "
                    f"takes {needed / 1e9:.3g} GB and {busy:.3g} s a step, but its profile '{profile.name}' has {room} "
                    f"and the budget is {budget:.3g} s. Lower least or batch_size, or raise budget."
                )
            # Both grow with the cut, so what fits is one stretch.
            found[client] = range(self.least, max(fits) + 1)
        return found

    def start(self, now: Situation) -> Mapping[str, int]:
        """The same for all, as far as each can hold it."""
        return {client: min(self.cut, bound.stop - 1) for client, bound in self.bounds(now).items()}

    def plan(self, now: Situation) -> Mapping[str, int]:
        """Weights by accuracy, cuts by weight, one block at most."""
        cuts = {client: now.cut(client) for client in now.layouts}
        known = {client: value for client, value in now.accuracy.items() if math.isfinite(value)}
        if not self.gamma or not known:
            return cuts
        total = sum(now.examples[client] for client in known)
        mean = sum(now.examples[client] * value for client, value in known.items()) / total
        distance = {client: (value - mean) / max(mean, 1e-8) for client, value in known.items()}
        low, high = self.weights
        for client, apart in distance.items():
            if abs(apart) >= self.dead_band:
                weight = self._weights.get(client, 1.0) * (1 + self.gamma * apart)
                self._weights[client] = min(max(weight, low), high)
        middle = sum(self._weights.get(client, 1.0) for client in cuts) / len(cuts)
        bounds = self.bounds(now)
        for client, cut in cuts.items():
            if abs(distance.get(client, 0.0)) >= self.dead_band:
                target = math.floor(self.cut * self._weights[client] / middle + 0.5)
                moved = cut + min(max(target - cut, -1), 1)
                cuts[client] = min(max(moved, bounds[client].start), bounds[client].stop - 1)
        return cuts

    def state(self) -> Mapping[str, float]:
        """The weights."""
        return dict(self._weights)

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with these weights."""
        self._weights = dict(state)

    def _budget(self, now: Situation) -> float:
        """Seconds that a client's blocks may take in a step."""
        if self.budget is not None or not now.profiles:
            return math.inf if self.budget is None else self.budget
        first = {client: min(self.cut, now.most(client)) for client in now.layouts}
        times = sorted(self._busy(now, client, cut) for client, cut in first.items())
        middle = len(times) // 2
        return times[middle] if len(times) % 2 else (times[middle - 1] + times[middle]) / 2

    def _fits(self, now: Situation, client: str, cut: int, budget: float) -> bool:
        profile = now.profiles.get(client)
        if profile is None:
            return True
        memory = profile.memory is None or now.memory(client, cut) <= profile.memory
        return memory and self._busy(now, client, cut) <= budget * (1 + 1e-9)

    @staticmethod
    def _busy(now: Situation, client: str, cut: int) -> float:
        """Seconds that ``cut`` head blocks take of a client in a step, forward and backward (s_i l)."""
        full, none = now.stages(client, cut), now.stages(client, 0)
        return full.forward + full.backward - none.forward - none.backward
