"""Step 6 at the client: one tail, or two, of which only the first is seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from cutlayer.models.segment import Segment
from cutlayer.models.slots import PRIVATE, Key, Slot
from cutlayer.parties._tail import TailResult, TailWork, run_tail
from cutlayer.parties.defending import Defending, Passing
from cutlayer.parties.memory import Watch
from cutlayer.values import IGNORE


class SecondTail:
    """What a client's slot has under private names, as if it were a slot of the tail: it learns the truth."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.params = {name.removeprefix(PRIVATE): p for name, p in slot.params.items() if name.startswith(PRIVATE)}

    def collect(self, names: Iterable[str], key: Key, *, weight: float = 1.0) -> None:
        """Take the gradients of these, as the slot takes those of the first tail."""
        self._slot.collect([PRIVATE + name for name in names], key, weight=weight)


def predicting(slot: Slot) -> dict[str, Tensor]:
    """The tensors of a client's second tail by the names of the first, in whose place they predict; nothing: one tail
    does both."""
    return {name: parameter.detach() for name, parameter in SecondTail(slot).params.items()}


def client_tail(
    segment: Segment, slot: Slot, work: TailWork, passing: Passing, defending: Defending | None, *, seed: int | None,
    slot_weight: float, watch: Watch,
) -> TailResult:  # fmt: skip
    """Forward, loss and (unless ``seed`` is None, which is evaluation) backward, as the client's defenses want it.

    The loss is that of the tail which is seen; of an evaluation, that of the one which predicts.
    """
    if defending is None:
        return run_tail(segment, slot, work, seed=seed, slot_weight=slot_weight, watch=watch)
    entering = defending.entering(passing)
    if not defending.two_tails:
        return run_tail(
            segment, slot, work, seed=seed, slot_weight=slot_weight, watch=watch, entering=entering,
            instead=defending.coefficients(passing),
        )  # fmt: skip

    def unlearned(hidden: Tensor) -> tuple[Tensor, None]:
        """What the second tail gets; what a defense learns at its entrance, learns nothing of it."""
        with torch.no_grad():
            return entering(hidden)[0].detach(), None

    true = replace(work, hidden=work.hidden.detach(), wanted=False)
    second = SecondTail(slot)
    done = run_tail(segment, second, true, seed=seed, slot_weight=slot_weight, watch=watch, entering=unlearned)
    if seed is None:
        return done
    labels = defending.learned(work.labels, passing)
    counted = (work.labels != IGNORE)[..., None].expand_as(labels)
    masses = counted.to(torch.float32) / (labels.shape[-1] * max(1, work.label_tokens))
    seen = replace(work, labels=labels, masses=masses)
    return run_tail(segment, slot, seen, seed=seed, slot_weight=slot_weight, watch=watch, entering=entering)
