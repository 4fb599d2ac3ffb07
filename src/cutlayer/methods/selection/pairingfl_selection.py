"""Each round's data clients by what each adds to the mix, fairly often, matched with helpers of fitting speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from cutlayer.arrangement import Arrangement, Arranger, Gift, Told
from cutlayer.errors import MethodError
from cutlayer.methods.selection._clustering import units
from cutlayer.methods.selection._matching import greedy, least_maximum, least_sum
from cutlayer.methods.selection._mixes import divergence
from cutlayer.registry import method
from cutlayer.sketches import Sketch


@method("selection", paper="IEEE/ACM Transactions on Networking, 2025, after the survey, arXiv:2604.24468")
@dataclass(frozen=True)
class PairingFLSelection(Arranger):
    """Data clients that add most to a round's mix of data, nobody left out for long; the rest help, well matched.

    ``count`` clients are taken one by one, each time the one with the largest gain of F(A) = cover(A) - ``nu`` *
    KL(mix of A || mix of all): cover sums, over all clients, the largest cosine with one of A, and a mix is weighted by
    data. Of those that have taken part more than ``slack`` times oftener than expected nobody is taken, and those that
    are more than ``slack`` behind come first. Who is not taken helps: each data client gets a helper, so that the
    slowest pair is as quick as can be.

    After the survey: the largest marginal gain under a fairness rule, and pairs. Set function, costs and matching are
    ours. Framework ``pairingfl`` with ``pairs: selection`` follows all of it; any other takes whom it chooses, and
    leaves the pairs. Each client tells the server the sketch that ``sketch`` names, once.
    """

    sketch: Literal["labels", "lengths", "tokens"]  # what each client tells of its data
    count: int | None = None  # data clients of a round; null: half of the clients
    slack: float = 1.0  # rounds by which a client may be ahead of or behind its share
    nu: float | None = None  # weight of the mix; null: the number of clients, 0: coverage only
    matching: Literal["bottleneck", "hungarian", "greedy"] = "bottleneck"  # least maximum, least sum, slowest first
    cost: Literal["step", "gap"] = "step"  # of a pair: the time of its step, or how unequal the two devices are
    steps: Literal["equal", "by-time"] = "equal"  # by-time: a pair makes local_steps * (quickest pair's time / its own)
    noise: float = 0.0  # scale of Laplace noise on each number of a sketch

    each_round: ClassVar[bool] = True
    samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Sketch(self.sketch, noise=self.noise)
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is {self.count}; it must be 1 or more")
        if not self.slack >= 0:
            raise ValueError(f"slack is {self.slack}; it must be 0 or more")
        if self.nu is not None and not self.nu >= 0:
            raise ValueError(f"nu is {self.nu}; it must be 0 or more")

    @property
    def gives(self) -> Sequence[Gift]:
        """Pairs, and whom it chooses."""
        return ("pairs",)

    @property
    def asks(self) -> Sketch:
        """As the option says."""
        return Sketch(self.sketch, noise=self.noise)

    def taken(self, clients: int) -> int:
        """How many data clients a round has."""
        return self.count or max(1, clients // 2)

    def share(self, clients: int) -> float:
        """The fairness rule keeps everybody near it."""
        return self.taken(clients) / clients

    def check(self, clients: Sequence[str]) -> None:
        """Refuse more data clients than clients."""
        if self.taken(len(clients)) > len(clients):
            raise MethodError(f"pairingfl-selection: count is {self.count}, but there are {len(clients)} clients.")

    def arrange(self, number: int, told: Told, before: Arrangement | None) -> Arrangement:
        """Whom this round takes, and who helps whom."""
        names = list(told.everybody)
        count = dict.fromkeys(names, 0) | ({k: int(v) for k, v in before.noted.items()} if before else {})
        chosen = self.chosen(number, told, count)
        noted = {name: float(times + (name in chosen)) for name, times in count.items()}
        helpers = [name for name in names if name not in chosen]
        if len(helpers) < len(chosen):
            return Arrangement(chosen=tuple(chosen), noted=noted)
        pairs = self.matched(told, chosen, helpers)
        steps, weights = self._steps(told, pairs)
        return Arrangement(chosen=tuple(chosen), pairs=pairs, steps=steps, weights=weights, noted=noted)

    def chosen(self, number: int, told: Told, count: dict[str, int]) -> list[str]:
        """The data clients, in the run's order; ``count`` is how often each has been one."""
        expected = number * self.taken(len(told.everybody)) / len(told.everybody)
        gain = Gain(told, len(told.everybody) if self.nu is None else self.nu)
        taken: list[str] = []
        for _ in range(min(self.taken(len(told.everybody)), len(told.clients))):
            left = [client for client in told.clients if client not in taken]
            behind = [client for client in left if count[client] < expected - self.slack]
            fair = behind or [client for client in left if count[client] <= expected + self.slack]
            fewest = min(count[client] for client in left)
            able = fair or [client for client in left if count[client] == fewest]
            taken.append(max(able, key=lambda client: gain.of([*taken, client])))
        return [client for client in told.everybody if client in taken]

    def pair_cost(self, told: Told, data: str, helper: str) -> float:
        """The seconds of a pair's step; or the gap between the two devices' times for the whole model."""
        a, u = told.speeds[data], told.speeds[helper]
        if self.cost == "gap":
            return abs((a.own + a.middle) - (u.own + u.middle))
        return max(a.own, u.middle) + told.link(data, helper)

    def matched(self, told: Told, chosen: Sequence[str], helpers: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """A helper for each data client."""
        cost = np.array([[self.pair_cost(told, data, helper) for helper in helpers] for data in chosen])
        if self.matching == "greedy":
            found = greedy(cost, np.array([told.speeds[data].own for data in chosen]))
        else:
            found = least_maximum(cost) if self.matching == "bottleneck" else least_sum(cost)
        return tuple((data, helpers[helper]) for data, helper in zip(chosen, found, strict=True))

    def _steps(self, told: Told, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, int], dict[str, float]]:
        """Local steps and weights of data clients, where pairs make unequal numbers."""
        if self.steps == "equal":
            return {}, {}
        alone = PairingFLSelection(self.sketch, cost="step")
        times = {data: alone.pair_cost(told, data, helper) for data, helper in pairs}
        quickest = min(times.values())
        steps = {data: max(1, int(told.local_steps * quickest / time + 1e-9)) for data, time in times.items()}
        return steps, {data: told.sizes[data] * count for data, count in steps.items()}


class Gain:
    """F of a set of clients: what they cover of all, less how far their mix is from that of all."""

    def __init__(self, told: Told, nu: float) -> None:
        self.names, self.nu = list(told.everybody), nu
        self.mixes = np.stack([told.sketches[name] for name in self.names])
        self.sizes = np.array([told.sizes[name] for name in self.names])
        self.cosines = units(self.mixes) @ units(self.mixes).T
        self.whole = self.sizes @ self.mixes / self.sizes.sum()

    def cover(self, clients: Sequence[str]) -> float:
        """The sum over all clients of the largest cosine with one of these."""
        return float(self.cosines[[self.names.index(client) for client in clients]].max(axis=0).sum())

    def of(self, clients: Sequence[str]) -> float:
        """F; of a single client its coverage."""
        if len(clients) == 1 or not self.nu:
            return self.cover(clients)
        rows = [self.names.index(client) for client in clients]
        mix = self.sizes[rows] @ self.mixes[rows] / self.sizes[rows].sum()
        return self.cover(clients) - self.nu * divergence(mix, self.whole)
