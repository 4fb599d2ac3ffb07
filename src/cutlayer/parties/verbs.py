"""The verbs that a client is asked by, and the step in which the work of each is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from cutlayer.step import at
from cutlayer.wire import Header

Answer = tuple[Header, list[Tensor]]


class Asked(Protocol):
    """Who answers verbs."""

    def handle(self, header: Header, tensors: Sequence[Tensor]) -> Answer:
        """Answer a request."""


VERB_STEPS = {
    "set_up": "partition",
    "sketch": "partition",
    "histogram": "partition",
    "head_forward": "head_forward",
    "features": "head_forward",
    "tail_step": "tail_step",
    "head_backward": "head_backward",
    "host_forward": "trunk_forward",
    "host_backward": "trunk_backward",
    "host_tail_step": "trunk_forward",
    "host_get": "aggregate",
    "host_put": "aggregate",
    "host_update": "trunk_backward",
    "host_norm": "trunk_backward",
    "probe": "head_forward",
    "probed": "head_backward",
    "grad_norm": "head_backward",
    "update": "head_backward",
    "move": "partition",
    "importance": "partition",
    "begin_stage": "aggregate",
    "end_stage": "aggregate",
    "get_state": "aggregate",
    "set_state": "aggregate",
}
"""The step in which a verb's work is done."""


def answer(party: Asked, header: Header, tensors: Sequence[Tensor]) -> Answer:
    """``party.handle``, timed and named as its step."""
    with at(VERB_STEPS.get(header.verb, header.step_name)):
        return party.handle(header, tensors)
