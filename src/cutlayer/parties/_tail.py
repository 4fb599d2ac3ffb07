"""The tail's work, the same for whoever holds it: forward, loss, backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cutlayer.errors import NonFinite
from cutlayer.models.segment import Params, Seed, Segment
from cutlayer.models.slots import Key
from cutlayer.parties.memory import Watch
from cutlayer.values import IGNORE


class Held(Protocol):
    """A slot, or what stands for one: the tail's parameters, and where their gradients go."""

    @property
    def params(self) -> Params:
        """By name."""

    def collect(self, names: Iterable[str], key: Key, *, weight: float = 1.0) -> None:
        """Take the gradients that a backward left at these."""


@dataclass(frozen=True)
class TailWork:
    """What the tail needs for one micro-batch.

    ``hidden`` [B,T,H]; ``labels`` [B,T] or [B]; ``weight`` is this micro-batch's share of the step's label tokens, so
    that the gradients of a step add up to those of the mean over all of them. ``masses``, where given, makes the loss
    the sum of -mass * log p(label), and both have one more dimension, of the alternatives: [B,T,K] or [B,K]. Where the
    gradient of ``hidden`` is not ``wanted``, it is not made.
    """

    hidden: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor
    label_tokens: int
    weight: float
    client: str
    step: int
    micro: int
    masses: Tensor | None = None
    wanted: bool = True


@dataclass(frozen=True)
class TailResult:
    """The loss (times ``weight``); of a training step the gradient of ``hidden`` [B,T,H], of an evaluation the hits.

    ``rows`` is, with ``masses``, the loss of each row [B]. ``correct`` counts the label tokens (of a classifier: the
    rows) whose most probable value is the right one.
    """

    loss: float
    gradient: Tensor | None = None
    rows: Tensor | None = None
    correct: int = 0


def run_tail(
    segment: Segment, slot: Held, work: TailWork, *, seed: Seed | None, slot_weight: float, watch: Watch,
    instead: Callable[[Tensor, Tensor], Tensor | None] | None = None,
    entering: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None,
) -> TailResult:  # fmt: skip
    """Forward, loss and (unless ``seed`` is None, which is evaluation) backward.

    The gradients of the tail's own parameters are added to ``slot``, times ``slot_weight``. ``instead`` gives of logits
    and labels the gradient of the summed loss at the logits that is to be backpropagated in place of its own, if any.
    ``entering`` gives of ``hidden`` what the segment gets in its place, and what is backpropagated beside the loss.

    Raises:
        NonFinite: the loss is NaN or infinite.
    """
    training = seed is not None
    hidden = work.hidden.requires_grad_(training and work.wanted)
    came, beside = (hidden, None) if entering is None else entering(hidden)
    with watch:
        output = segment.forward(
            slot.params, hidden=came, attention_mask=work.attention_mask, position_ids=work.position_ids,
            labels=work.labels if work.masses is None else None, seed=seed,
        )  # fmt: skip
    rows = None if work.masses is None else soft_losses(output.logits, work.labels, work.masses)
    # Without a single label the mean is 0/0; such a batch (all prompt, cut off) teaches nothing.
    own: Any = output.loss if work.label_tokens else output.logits.float().sum() * 0.0
    loss = own if rows is None else rows.sum()
    if work.weight != 1.0:
        loss = loss * work.weight
    value = float(loss.item())
    if not math.isfinite(value):
        raise NonFinite(
            f"The loss of client '{work.client}' is {value} at step {work.step}. Nothing was updated with it. "
            "Lower optimizer.lr, set max_grad_norm, or use precision: float32 or bfloat16."
        )
    if not training:
        return TailResult(value, correct=hits(output.logits, work.labels) if work.masses is None else 0)
    with segment.entered(slot.params):
        if beside is not None and beside.requires_grad:
            torch.autograd.backward([beside], retain_graph=True)
        if loss.requires_grad:  # else nothing is trained here, and nobody below wants a gradient
            other = None if instead is None else instead(output.logits.detach(), work.labels)
            if other is None:
                loss.backward()
            else:
                output.logits.backward(other.to(output.logits) * (work.weight / max(1, work.label_tokens)))
    slot.collect(segment.names, (work.client, work.step, work.micro), weight=slot_weight)
    return TailResult(value, hidden.grad, None if rows is None else rows.detach())


def hits(logits: Tensor, labels: Tensor) -> int:
    """How many labels are the most probable value: of causal ``logits`` [B,T,V] shifted by one, or of rows [B,C]."""
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    right = logits.argmax(dim=-1) == labels
    return int(torch.sum(right & (labels != IGNORE)))


def soft_losses(logits: Tensor, labels: Tensor, masses: Tensor) -> Tensor:
    """The loss of each row [B]: the sum of -mass * log p(label) over positions and alternatives.

    As in the models' own loss the position before predicts a label: logits [B,T,V] with ``labels`` and ``masses``
    [B,T,K]. For a classifier: [B,V] with [B,K].
    """
    if logits.dim() == 3:
        logits, labels, masses = logits[:, :-1], labels[:, 1:], masses[:, 1:]
    found = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0))
    return -(found * masses).flatten(1).sum(1)
