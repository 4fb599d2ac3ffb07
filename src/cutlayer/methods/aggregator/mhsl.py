"""Nothing is merged: each client keeps its own part for ever, and step 11 sends not a byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from cutlayer.contracts import Aggregator, State
from cutlayer.registry import method


@method("aggregator", paper="MHSL, as the survey arXiv:2604.24468 describes it")
@dataclass(frozen=True)
class MHSL(Aggregator):
    """Merge nothing: clients keep their heads, and only the trunk is common.

    The published method is this with the trunk served in random order (framework ``sfl-v2``). Each client is evaluated
    with its own part, and has an adapter of its own. A framework that averages trunks cannot use it.
    """

    exchanges: ClassVar[bool] = False

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """Nothing."""
        return {}
