"""Each upload is mixed in at once, by a weight that falls with its delay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cutlayer.contracts import Aggregator, State, Upload, Window
from cutlayer.methods.aggregator._mean import weighted_mean
from cutlayer.methods.aggregator._staleness import StalenessWeights, buffered, check_buffer
from cutlayer.registry import method


@method(
    "aggregator",
    paper="DT-ASFL, as the survey arXiv:2604.24468 describes it",
    needs=("a framework that lets clients run on: async-sfl",),
)
@dataclass(frozen=True)
class DTASFL(Aggregator):
    """Mix in each upload as it comes, with more weight the newer the version is that it started from.

    With the delay d, in versions of the model, and a = a0 s(d)::

        theta <- (1 - a) theta + a theta_i         s(d) = (1 + d)^-p, or exp(-k d)

    The survey says no more than that weights follow a delay; formula and values are the catalogue's. With ``buffer`` m
    above 1 a client waits until m are there, and the model becomes (1 - a0) theta + a0 sum_i a_i theta_i with a_i in
    proportion to w_i s(d_i) and summing to 1: with a0 = 1, all clients and no delay that is FedAvg. LoRA's factors are
    mixed one by one, whose error in the product shrinks with a. The paper's digital twins, which predict when devices
    will be ready, are left out.

    Less weight for a slow client is less weight for its data, too.
    """

    a0: float = 0.5  # the weight of an upload without delay; of all in the buffer together
    penalty: Literal["power", "exponential"] = "power"  # s(d): (1 + d)^-rate, or exp(-rate d)
    rate: float = 0.5  # p or k; 0 weighs every upload alike
    buffer: int = 1  # uploads that are merged together
    weight_by: Literal["examples", "tokens", "uniform"] = "examples"  # w_i, within a buffer

    asynchronous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.a0 <= 1:
            raise ValueError(f"a0 is {self.a0}; it must be above 0 and at most 1")
        check_buffer(self.buffer)
        self._staleness()

    def _staleness(self) -> StalenessWeights:
        return StalenessWeights(self.penalty, self.rate)

    def window(self, expected: Mapping[str, float | None]) -> Window:
        """As soon as the buffer is full."""
        return buffered(self.buffer)

    def weigh(self, uploads: Sequence[Upload]) -> Sequence[float]:
        """a0 s(d), or of a buffer a0 a_i."""
        if self.buffer == 1:
            return [self.a0 * self._staleness().of(upload.delay) for upload in uploads]
        return [self.a0 * part for part in self._staleness().normalised(uploads)]

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """The mean by these shares."""
        return weighted_mean(states, weights)
