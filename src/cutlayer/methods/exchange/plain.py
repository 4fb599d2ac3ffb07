"""Every micro-batch crosses the wire forward and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cutlayer.contracts import End, Exchange, Hop, How, StepResult, Tail
from cutlayer.registry import method


@method("exchange")
@dataclass(frozen=True)
class Plain(Exchange):
    """Every micro-batch crosses the wire forward and back."""

    async def step(
        self, inner: Any, client: End, middle: Sequence[Hop], tail: Tail, *, step: int, micro: int, how: How
    ) -> StepResult:
        """The step as it is."""
        result: StepResult = await inner(client, middle, tail, step=step, micro=micro, how=how)
        return result
