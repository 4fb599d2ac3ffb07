"""READ FIRST: the step. The survey's pipeline has eleven steps; one function names those of a training step, for every
route.

     1 partition            cut the model, place the parts, inject the adapters   (once, before the first step)
     2 head_forward         client
     3 send_activations     client -> server
     4 trunk_forward        server          (two-part: forward, loss and backward in one)
     5 return_activations   server -> client      U-shape only
     6 tail_step            client                U-shape only: tail forward, loss, tail backward
     7 send_gradients       client -> server      U-shape only
     8 trunk_backward       server                U-shape only
     9 return_gradients     server -> client
    10 head_backward        client
    11 aggregate            federated server      (once a round)

The question is never "two-part or U-shaped?" but who holds the tail. Two-part: the server does, and ``middle`` is
empty. U-shape: the client does, with one hop between.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from cutlayer.contracts import End, Hop, How, StepResult, Tail
from cutlayer.wire import STEP_NAMES

__all__ = ["STEP_NAMES", "Tally", "at", "split_evaluate", "split_step", "tallied"]


async def split_step(
    client: End, middle: Sequence[Hop], tail: Tail, *, step: int, micro: int = 0, how: How | None = None
) -> StepResult:
    """One micro-batch of one client through the cut model, forward and back.

    Args:
        client: draws the batch and holds the head.
        middle: the hops between head and tail, in order.
        tail: who holds the tail, the labels and the loss.
        step: the client's optimizer step, from 0.
        micro: the micro-batch within it, from 0.
        how: whether to update at the last micro-batch, and the weights.
    """
    how = how or How()
    parcel = await client.head_forward(step=step, micro=micro, how=how)  # 2 head_forward    3 send_activations
    for hop in middle:
        parcel = await hop.forward(parcel, how)  # 4 trunk_forward   5 return_activations
    parcel = await tail.tail_step(parcel, how)  # 6 tail_step       7 send_gradients
    for hop in reversed(middle):
        parcel = await hop.backward(parcel, how)  # 8 trunk_backward  9 return_gradients
    return await client.head_backward(parcel, how)  # 10 head_backward


async def split_evaluate(client: End, middle: Sequence[Hop], tail: Tail, *, batch: int) -> StepResult:
    """Steps 2 to 6 on one evaluation batch: no graph, no update."""
    how = How(head_update=False, trunk_update=False, graph=False)
    parcel = await client.head_forward(step=batch, micro=0, how=how)
    for hop in middle:
        parcel = await hop.forward(parcel, how)
    header = (await tail.tail_step(parcel, how)).header
    loss, tokens = header.value("loss"), header.value("tokens")
    return StepResult(
        client.name, batch, float(loss), int(tokens), int(header.value("label_tokens")), True,
        correct=int(header.value("correct")),
    )  # fmt: skip


@dataclass
class Tally:
    """What one client-step cost: measured seconds and (with a profile) virtual seconds by step name, and bytes."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    virtual: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes_up: int = 0
    bytes_down: int = 0
    own: float = 0.0  # virtual seconds of the client's own work and links
    bytes_between: int = 0  # between parties neither of which is the client


_tally: ContextVar[Tally | None] = ContextVar("cutlayer_tally", default=None)


@contextmanager
def tallied() -> Iterator[Tally]:
    """Collect into a new Tally whatever happens inside, in this task."""
    tally = Tally()
    token = _tally.set(tally)
    try:
        yield tally
    finally:
        _tally.reset(token)


def current_tally() -> Tally | None:
    """The Tally of the client-step that is being made, if any."""
    return _tally.get()


@contextmanager
def at(name: str) -> Iterator[None]:
    """Time a part of the step under its name, and add the name to any error."""
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        where = f"in step {STEP_NAMES.index(name) + 1} {name}"
        if where not in getattr(error, "__notes__", ()):
            error.add_note(where)
        raise
    finally:
        tally = _tally.get()
        if tally is not None:
            tally.seconds[name] += time.perf_counter() - start
