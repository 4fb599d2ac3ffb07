"""The server works in the order in which requests come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cutlayer.registry import method


@method("scheduler")
@dataclass(frozen=True)
class Fifo:
    """The server works in the order in which requests come."""

    def wrap(self, stop: Any, client: str) -> Any:
        """The stop as it is: its party serves first-in first-out."""
        return stop
