"""What several clients do as one: a place where they meet, and what each of them weighs in a joint step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from cutlayer.clock import Clock
from cutlayer.contracts import StepResult

if TYPE_CHECKING:
    from cutlayer.driver import Run

T = TypeVar("T")
R = TypeVar("R")
Weighing = Literal["tokens", "examples", "uniform"]


def shares(run: Run, results: Sequence[StepResult], by: Weighing) -> dict[str, float]:
    """Each client's weight c_i in a joint step, summing to 1.

    ``tokens``: by the label tokens of this step, so that the joint loss is the mean over all of them; ``examples``: by
    the clients' data, ``uniform``: the same for all.
    """
    return portions(run, {r.client: r.label_tokens for r in results}, by)


def portions(run: Run, label_tokens: Mapping[str, float], by: Weighing) -> dict[str, float]:
    """``shares`` of clients with so many label tokens in the step."""
    measured = {
        "tokens": {client: float(count) for client, count in label_tokens.items()},
        "examples": {client: run.sizes[client]["examples"] for client in label_tokens},
        "uniform": dict.fromkeys(label_tokens, 1.0),
    }[by]
    total = sum(measured.values())
    if not total:  # not one label in the whole step: nothing is learnt, whatever the weights
        return {client: 1 / len(measured) for client in measured}
    return {client: value / total for client, value in measured.items()}


class Meeting(Generic[T, R]):
    """Where the tasks of several clients wait for each other: what they bring is worked on once, for all.

    The work is done by the task of the first member that is there, in the members' order and not in that of arrival,
    so that the same things happen in the same order in every run.

    Args:
        members: who is waited for.
        clock: names those who wait, should they wait for ever.
        name: of the place, for that message.
    """

    def __init__(self, members: Sequence[str], clock: Clock, name: str) -> None:
        self.name = name
        self._missing = list(members)  # who still comes, in order
        self._clock = clock
        self._brought: dict[str, tuple[T, asyncio.Future[Any]]] = {}

    async def bring(self, client: str, thing: T, work: Callable[[dict[str, T]], Awaitable[Mapping[str, R]]]) -> R:
        """Wait until all have brought something, or have left; then ``work`` on it, and give this client its part."""
        told: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._brought[client] = (thing, told)
        self._look()
        with self._clock.waiting(client, lambda: f"{', '.join(self._absent()) or 'the work'} at '{self.name}'"):
            given = await told
        if not isinstance(given, _Turn):
            return given  # type: ignore[no-any-return]
        others = {name: future for name, (_, future) in given.brought.items() if name != client}
        try:
            found = await work({name: thing for name, (thing, _) in given.brought.items()})
        except BaseException as error:
            for future in others.values():
                if not future.done():
                    future.set_exception(_after(error))
                    future.exception()  # its task may be gone, and then nobody asks for it
            raise
        for name, future in others.items():
            if not future.done():
                future.set_result(found[name])
        return found[client]

    def leave(self, client: str) -> None:
        """``client`` comes no more. Leaving twice is harmless."""
        if client in self._missing:
            self._missing.remove(client)
        self._brought.pop(client, None)
        self._look()

    def _absent(self) -> list[str]:
        return [name for name in self._missing if name not in self._brought]

    def _look(self) -> None:
        if not self._brought or self._absent():
            return
        ordered = {name: self._brought[name] for name in self._missing}
        self._brought = {}
        here = {name: one for name, one in ordered.items() if not one[1].done()}  # the others' tasks were cancelled
        if here:
            next(iter(here.values()))[1].set_result(_Turn(here))


class _Turn:
    """Tells a task that it is the one to do the work."""

    def __init__(self, brought: Mapping[str, tuple[Any, asyncio.Future[Any]]]) -> None:
        self.brought = brought


def _after(error: BaseException) -> Exception:
    """What those are told who waited for work that failed."""
    return error if isinstance(error, Exception) else RuntimeError(f"The joint work was broken off: {error!r}")
