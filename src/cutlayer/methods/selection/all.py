"""Every client takes part in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cutlayer.registry import method


@method("selection")
@dataclass(frozen=True)
class All:
    """Every client takes part in every round."""

    def pick(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """All of ``clients``."""
        return clients
