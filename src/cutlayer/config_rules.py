"""What the rules of a run are made with: each is a small function that yields one sentence for each mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

Rule = Callable[["RunConfig"], Iterator[str]]
RULES: list[tuple[tuple[str, ...], Rule]] = []


def rule(*keys: str) -> Callable[[Rule], Rule]:
    """A rule over these dotted keys; it is left out when the value of one of them is known to be wrong anyway."""

    def add(rule: Rule) -> Rule:
        RULES.append((keys, rule))
        return rule

    return add


def listed(names: Sequence[str]) -> str:
    """``clients 'a' and 'b' have``, at most three by name."""
    shown = [f"'{name}'" for name in names[:3]] + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
    if len(shown) == 1:
        return f"client {shown[0]} has"
    return f"clients {', '.join(shown[:-1])} and {shown[-1]} have"
