"""Uploads that come late count less, and beyond a limit not at all."""

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
    paper="SFL-LEO, arXiv:2504.13479, as the survey arXiv:2604.24468 describes it",
    needs=("a framework that lets clients run on: async-sfl",),
)
@dataclass(frozen=True)
class SFLLEO(Aggregator):
    """Weigh an upload by its client's data and a penalty for its delay, and throw it away beyond a limit.

    For clients that are connected now and then (satellites): with the delay d, in versions of the model, and the
    client's share w of all data, theta <- (1 - a) theta + a theta_i with a = w exp(-k d), or w / (1 + k d); a = 0 for
    d > d_max. Whoever was thrown away takes the current model like everybody else. With ``buffer`` m above 1 a client
    waits until m are there, and their a_i are scaled to sum to 1 and replace the model: without penalty and limit that
    is the plain mean.

    Penalty and limit are the survey's account of the paper, the numbers the catalogue's. The paper's clients train on
    with a local loss while they are offline: that is an ``exchange``, not this. A client that loses the connection in
    the middle of its local steps makes the rest of them when it is back, and uploads then (framework ``async-sfl``). A
    gradient is never late here: a client waits for that of its step.
    """

    penalty: Literal["exponential", "inverse"] = "exponential"  # exp(-rate d), or 1 / (1 + rate d)
    rate: float = 0.3  # k
    d_max: int | None = 8  # the last delay that counts, in versions; null: all do
    buffer: int = 1  # uploads that are merged together
    weight_by: Literal["examples", "tokens", "uniform"] = "examples"  # w_i

    asynchronous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.d_max is not None and self.d_max < 0:
            raise ValueError(f"d_max is {self.d_max}; it must be 0 or more, or null")
        check_buffer(self.buffer)
        self._staleness()

    def _staleness(self) -> StalenessWeights:
        return StalenessWeights(self.penalty, self.rate, self.d_max)

    def window(self, expected: Mapping[str, float | None]) -> Window:
        """As soon as the buffer is full."""
        return buffered(self.buffer)

    def weigh(self, uploads: Sequence[Upload]) -> Sequence[float]:
        """w s(d), or of a buffer that scaled to sum to 1."""
        if self.buffer == 1:
            return [upload.weight * self._staleness().of(upload.delay) for upload in uploads]
        return self._staleness().normalised(uploads)

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """The mean by these shares."""
        return weighted_mean(states, weights)
