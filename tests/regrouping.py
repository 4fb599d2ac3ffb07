"""Groups with a trunk at a member that change between rounds, as a test says: in whichever process this is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.arrangement import Arrangement, Group
from cutlayer.registry import create

Plan = Mapping[int, Sequence[str]]  # by the round from which it holds: groups of clients, each with its host first


def regroup(plan: Plan) -> None:
    """From now on selection ``parallelsfl`` groups clients by the plan."""
    selection: Any = type(create("selection", "parallelsfl", {"sketch": "tokens"}))
    selection.arrange = lambda self, number, told, before: planned(plan, number)
    selection.each_round = True


def planned(plan: Plan, number: int) -> Arrangement:
    """What holds in a round. In the run's order the host need not be the first."""
    groups = [names.split() for names in plan[max(first for first in plan if first <= number)]]
    return Arrangement(
        tuple(Group(tuple(sorted(names)), names[0]) for names in groups),
        weights={name: 1.0 + len(names) for names in groups for name in names},
    )
