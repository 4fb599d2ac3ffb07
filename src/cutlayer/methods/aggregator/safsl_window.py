"""Merges at the end of time windows: who is done by then is averaged, by how long it has been away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from cutlayer.contracts import Aggregator, State, Upload, Window
from cutlayer.methods.aggregator._mean import weighted_mean
from cutlayer.registry import method


@method(
    "aggregator",
    paper="SAFSL, IEEE TWC 24(6), 2025, as the survey arXiv:2604.24468 describes it",
    needs=("a framework that lets clients run on: async-sfl",),
)
@dataclass(frozen=True)
class SAFSLWindow(Aggregator):
    """Merge at the end of each window of time whoever is done; the others train on, and count in a later one.

    Of the clients S that are done at the end of a window, with their data n_i and the windows I_i >= 1 since each took
    part last::

        a_i = n_i I_i / sum_S n_j I_j         theta <- (1 - b) theta + b sum_S a_i theta_i         b = sum_S n_j / n

    so that a client that is done in every window does not dominate. A window in which nobody is done is longer: until
    the first is. Only members of S take the new model.

    A window is as long as it takes until a part ``done`` of the clients is expected to be done, each being as fast as
    at its last upload; before there is one, until half of them are (the median). ``done: 1`` waits for all, which is
    synchronous FedAvg. Or all windows are ``length`` seconds of the virtual clock. The published lengths are a
    planner's. I_i counts from the model that a client started from: after rounds without it (``participation``, a late
    start) it is that of its return.
    """

    done: float = 0.5  # the part of the clients that should be done at a window's end
    length: float | None = None  # in place of it: seconds of every window
    step: Literal["data", "full"] = "data"  # b: the part of all data that is in the window, or 1
    weight_by: Literal["examples", "tokens", "uniform"] = "examples"  # n_i

    asynchronous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.done <= 1:
            raise ValueError(f"done is {self.done}; it must be above 0 and at most 1")
        if self.length is not None and not (self.length > 0 and math.isfinite(self.length)):
            raise ValueError(f"length is {self.length}; it must be a finite number of seconds above 0, or null")

    def window(self, expected: Mapping[str, float | None]) -> Window:
        """Its length, and at least one upload; by number of uploads where nothing is known of the time."""
        if self.length is not None:
            return Window(seconds=self.length)
        times = sorted(seconds for seconds in expected.values() if seconds is not None)
        if self.done == 1 or len(times) < len(expected):
            return Window(uploads=math.ceil(len(expected) * (1 if self.done == 1 else 0.5)))
        return Window(seconds=times[math.ceil(len(times) * self.done - 1e-9) - 1] if times else 0.0)

    def weigh(self, uploads: Sequence[Upload]) -> Sequence[float]:
        """b a_i; the interval is one more than the delay, as each window makes one version."""
        raw = [upload.weight * (upload.delay + 1) for upload in uploads]
        b = min(1.0, math.fsum(upload.weight for upload in uploads)) if self.step == "data" else 1.0
        return [b * one / math.fsum(raw) for one in raw]

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """The mean by these shares."""
        return weighted_mean(states, weights)
