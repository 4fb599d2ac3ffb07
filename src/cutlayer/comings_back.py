"""Clients that die and are started again, over and over: how often all others go back to the newest checkpoint for one.

A client that comes back in time as a new process loses nothing, as all go back together: ``COMINGS_BACK`` times. After
that, until it has finished a round, it is lost to the round in which it fails like any other, and sits the rest of it
out, so that the others need not repeat their steps without end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

COMINGS_BACK = 2


@dataclass
class Again:
    """Those processes of a client for which all went back, the round that it must finish to be trusted again, and the
    one that it sits out (-1: none)."""

    number: int
    processes: list[object] = field(default_factory=list)
    sits_out: int = -1


class ComingsBack:
    """Who of a run's clients made all go back, and has finished no round since."""

    def __init__(self) -> None:
        self._again: dict[str, Again] = {}

    def too_often(self, name: str, process: object, number: int) -> bool:
        """All would go back in round ``number`` because of this process: whether they have done so often enough."""
        again = self._again.setdefault(name, Again(number))
        again.number = max(again.number, number)
        if process not in again.processes:
            again.processes.append(process)
        if len(again.processes) <= COMINGS_BACK:
            return False
        again.sits_out = again.number
        return True

    def sits_out(self, name: str, number: int) -> bool:
        """Whether a client is not asked any more in round ``number``."""
        return name in self._again and number <= self._again[name].sits_out

    def play(self, names: Collection[str] | None = None) -> None:
        """These (all) need not sit out: nobody can go on without them."""
        for name, again in self._again.items():
            if names is None or name in names:
                again.sits_out = -1

    def begins(self, number: int, away: Mapping[str, int]) -> None:
        """A round begins: who has finished one since, and is not away, is trusted again."""
        for name, again in list(self._again.items()):
            if name in away:
                again.number = max(again.number, number)
            elif number > again.number:
                del self._again[name]
