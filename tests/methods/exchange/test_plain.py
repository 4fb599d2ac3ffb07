"""Every micro-batch is the step as it is."""

import asyncio
from typing import Any

from cutlayer.contracts import How
from cutlayer.registry import create


def test_the_step_is_called_once_with_what_was_given() -> None:
    calls: list[Any] = []

    async def inner(*args: Any, **options: Any) -> str:
        calls.append((args, options))
        return "result"

    how = How(head_update=False)
    step = create("exchange", "plain").step(inner, "client", ["hop"], "tail", step=3, micro=1, how=how)
    assert asyncio.run(step) == "result"
    assert calls == [(("client", ["hop"], "tail"), {"step": 3, "micro": 1, "how": how})]
