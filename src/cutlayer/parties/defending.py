"""A client's defenses at work: where in its step they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlayer.data.batches import Batches
from cutlayer.defense import Defense, Ground, Leg, Sends, Shown
from cutlayer.errors import MethodError
from cutlayer.models.segment import Segment
from cutlayer.models.slots import Key, Slot
from cutlayer.noise import Noise
from cutlayer.parties.releases import Releases
from cutlayer.seeds import derive
from cutlayer.values import IGNORE, Batch, Example


@dataclass(frozen=True)
class Passing:
    """What is about to pass: a micro-batch of a step (of an evaluation: the batch's number), and its share of the
    step's loss."""

    step: int
    micro: int
    training: bool
    batch: Batch
    weight: float = 1.0
    records: Sequence[int] = ()  # which of the client's examples are in it (of evaluation data: which batch)
    part: int = 0  # of the micro-batch, where it is taken in parts


class Defending:
    """The defenses of a client, in their order.

    Args:
        defenses: made from the run's options.
        ground: what is public, as they are told.
        secret: the client's own; all noise comes from it.
        names: of the defenses, for words.
        grounds: what is public where the head is another.
    """

    def __init__(
        self, defenses: Sequence[Defense], ground: Ground, secret: bytes, names: Sequence[str],
        grounds: Callable[[Segment], Ground],
    ) -> None:  # fmt: skip
        self.defenses, self.secret, self.names, self._grounds = list(defenses), secret, list(names), grounds
        self.releases: Releases | None = None  # counts what leaves, where a process may be killed
        self._fit()
        self._prepare(ground)
        self.aside = self._learning()

    def _fit(self) -> None:
        """Refuse defenses that are in each other's way.

        Raises:
            MethodError: two of them say what the tail that is seen learns, or one takes examples one by one and another
                all of them together.
        """
        single = [name for name, defense in zip(self.names, self.defenses, strict=True) if defense.by_example]
        joint = [
            name
            for name, defense in zip(self.names, self.defenses, strict=True)
            if defense.two_tails or defense.learning or type(defense).penalty is not Defense.penalty
        ]
        if single and (len(single) > 1 or joint):
            raise MethodError(
                f"The defense '{single[0]}' takes the gradient of each example by itself, which "
                f"'{[*single[1:], *joint][0]}' cannot be on with. Keep one."
            )
        saying = [
            name
            for name, defense in zip(self.names, self.defenses, strict=True)
            if defense.two_tails or type(defense).coefficients is not Defense.coefficients
        ]
        if len(saying) > 1 and self.two_tails:
            raise MethodError(
                f"The defenses {' and '.join(repr(name) for name in saying)} each say what the tail learns. Keep one."
            )

    def moved(self, head: Segment) -> None:
        """The cut is another from now on."""
        self._prepare(self._grounds(head))

    def _prepare(self, ground: Ground) -> None:
        self.ground = ground
        for defense in self.defenses:
            defense.prepare(ground)

    def _learning(self) -> Slot | None:
        """A slot of what the defenses train; None: they train nothing."""
        params: dict[str, Parameter] = {}
        rates: dict[int, float] = {}
        for number, defense in enumerate(self.defenses):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(self.ground.seed, "defense", number))
                learned = defense.learns(self.ground)
            if learned is not None:
                for name, parameter in learned.module.named_parameters():
                    params[f"{number}.{name}"] = parameter
                    rates[id(parameter)] = learned.lr

        def make(own: list[Parameter]) -> torch.optim.Optimizer:
            return torch.optim.AdamW([{"params": [one], "lr": rates[id(one)]} for one in own])

        return Slot("defense", params, make) if params else None

    def collect(self, key: Key, *, weight: float) -> None:
        """Take the gradients that a backward left at what the defenses train."""
        if self.aside is not None:
            self.aside.collect(self.aside.params, key, weight=weight)

    def example(self, example: Example, *where: object, epoch: int = 0) -> Example:
        """An example as it is to be trained with; ``where`` says which one it is of the client's.

        Raises:
            MethodError: a defense changed its length, or where it has labels.
        """
        for number, defense in enumerate(self.defenses):
            turn = epoch if defense.fresh else 0
            changed = defense.example(
                example, Noise(self.secret, "example", number, *where, turn, covers=_covers(example))
            )
            if _form(changed) != _form(example):
                raise MethodError(f"The defense '{self.names[number]}' changed where an example has tokens or labels.")
            example = changed
        return example

    def defended(self, batches: Batches) -> None:
        """Have a client's schedule give examples as they are to be trained with."""
        for defense in self.defenses:
            defense.know(batches.examples)
        batches.change = lambda example, row, epoch: self.example(example, "train", row, epoch=epoch)

    def evaluated(
        self, parts: Sequence[Sequence[Example]], collate: Callable[[Sequence[Example]], Batch], *, what: str
    ) -> list[Callable[[], Batch]]:
        """What makes the batches of evaluation examples as they are to be shown.

        Their inputs are changed as those of training are. Their labels are changed only where they are sent: what a
        client evaluates with at home is the truth.
        """
        return [partial(self._evaluated, part, collate, (what, number)) for number, part in enumerate(parts)]

    def _evaluated(
        self, part: Sequence[Example], collate: Callable[[Sequence[Example]], Batch], which: tuple[object, ...]
    ) -> Batch:
        shown = [self.example(example, *which, row) for row, example in enumerate(part)]
        if not self.ground.labels_sent:
            shown = [replace(s, labels=t.labels, label=t.label) for s, t in zip(shown, part, strict=True)]
        return collate(shown)

    def shown(self, hidden: Tensor, passing: Passing) -> Tensor:
        """Step 3: the head's output [B,T,H] as it leaves, on the graph."""
        return self._protected(hidden, "send_activations", passing)

    def shown_gradient(self, gradient: Tensor, passing: Passing) -> Tensor:
        """Step 7: the gradient [B,T,H] as it leaves."""
        return self._protected(gradient, "send_gradients", passing)

    def penalty(self, hidden: Tensor, passing: Passing, gradient: Tensor) -> Tensor | None:
        """Step 10: the sum of all that is added to the loss at the head's output [B,T,H]; None: nothing.

        ``gradient`` is what came back for what was shown of it; the defenses see it as if this were the whole step.
        """
        whole = gradient if passing.weight in (0.0, 1.0) else gradient / passing.weight
        return self._penalty(hidden, "send_activations", passing, whole)

    def _penalty(self, hidden: Tensor, leg: Leg, passing: Passing, gradient: Tensor | None = None) -> Tensor | None:
        found: Tensor | None = None
        for number, defense in enumerate(self.defenses):
            one = defense.penalty(hidden, replace(self._about(leg, passing, number), gradient=gradient))
            if one is not None:
                found = one if found is None else found + one
        return found if found is None or passing.weight == 1.0 else found * passing.weight

    def entering(self, passing: Passing) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """Step 6: gives, of what came [B,T,H], what the tail gets, and what is added to the loss, if anything is."""

        def given(hidden: Tensor) -> tuple[Tensor, Tensor | None]:
            penalty = self._penalty(hidden, "send_gradients", passing) if passing.training else None
            for number, defense in enumerate(self.defenses):
                hidden = self._same(
                    hidden, defense.received(hidden, self._about("send_gradients", passing, number)), number
                )
            return hidden, penalty

        return given

    def coefficients(self, passing: Passing) -> Callable[[Tensor, Tensor], Tensor | None] | None:
        """Step 6: what gives, of logits and labels, what is backpropagated in place of the loss's own gradient."""
        if not passing.training:
            return None

        def given(logits: Tensor, labels: Tensor) -> Tensor | None:
            for number, defense in enumerate(self.defenses):
                found = defense.coefficients(logits, labels, self._about("send_gradients", passing, number))
                if found is not None:
                    return found
            return None

        return given

    @property
    def two_tails(self) -> bool:
        """Whether the tail that is seen is not the one that predicts."""
        return any(defense.two_tails for defense in self.defenses)

    def learned(self, labels: Tensor, passing: Passing) -> Tensor:
        """Step 6: what the tail that is seen learns, of the first defense that has two."""
        number = next(number for number, defense in enumerate(self.defenses) if defense.two_tails)
        found = self.defenses[number].learned(labels, self._about("send_gradients", passing, number))
        if found is None or found.shape[:-1] != labels.shape:
            raise MethodError(
                f"The defense '{self.names[number]}' has two tails, but nothing for one of them to learn."
            )
        return found

    @property
    def by_example(self) -> bool:
        """Whether what the client trains is updated by gradients of single examples."""
        return any(defense.by_example for defense in self.defenses)

    def shares(self, norms: Tensor) -> Tensor:
        """Step 10: what each example's gradient counts, by its norm [B]."""
        (defense,) = (defense for defense in self.defenses if defense.by_example)
        return defense.shares(norms)

    def stirred(self, total: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """Step 10: the sum of a step's gradients, as it is to be used."""
        ((number, defense),) = ((n, defense) for n, defense in enumerate(self.defenses) if defense.by_example)
        return defense.stirred(total, self._noise(number, "sum", step, covers=list(total.values())))

    def told(self, sends: Sends) -> list[dict[str, Any]]:
        """What each defense has spent when a record left so often, as ``summary.json`` has it."""
        spent = [defense.spent(self.ground, sends) for defense in self.defenses]
        return [{"defense": n, **(one.told() if one else {})} for n, one in zip(self.names, spent, strict=True)]

    def _protected(self, tensor: Tensor, leg: Leg, passing: Passing) -> Tensor:
        for number, defense in enumerate(self.defenses):
            with torch.set_grad_enabled(passing.training):  # no graph of what it has learned
                changed = defense.protect(tensor, self._about(leg, passing, number))
            tensor = self._same(tensor, changed, number)
        if self.releases is not None:
            self.releases.add(leg, passing.training, passing.records, tensor)
        return tensor

    def _same(self, before: Tensor, after: Tensor, number: int) -> Tensor:
        """What a defense has made, which must be of the form that it was given."""
        if after.shape != before.shape or after.dtype != before.dtype:
            raise MethodError(
                f"The defense '{self.names[number]}' made {list(after.shape)} ({after.dtype}) of "
                f"{list(before.shape)} ({before.dtype})."
            )
        return after

    def _about(self, leg: Leg, passing: Passing, number: int) -> Shown:
        tokens = passing.batch.label_tokens
        part = [passing.part] if passing.part else []
        noise = partial(self._noise, number, leg, passing.training, passing.step, passing.micro, *part)
        whose = partial(self._noise_of, number, passing)
        to_sum, updates = tokens / passing.weight if tokens else 1.0, self.aside.version if self.aside else 0
        return Shown(leg, passing.batch, passing.training, to_sum, noise, whose, updates)

    def _noise_of(self, number: int, passing: Passing, row: int) -> Noise:
        """That of a row's record, which other text in the same place does not have."""
        batch, ids = passing.batch, passing.batch.input_ids[row]
        real = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask[row]
        labels = batch.labels[row].reshape(-1)
        covers = [ids[real.bool()], labels[real.bool()] if len(labels) == len(ids) else labels]
        which = passing.records[row] if passing.records else row
        return self._noise(number, "record", passing.training, which, covers=covers)

    def _noise(self, *purpose: object, covers: Sequence[Tensor] = ()) -> Noise:
        return Noise(self.secret, *purpose, covers=covers)


def _covers(example: Example) -> list[Tensor]:
    """What noise on an example hides: another text in the same row, of changed data, gets other noise."""
    told = example.labels if example.labels is not None else [] if example.label is None else [example.label]
    return [torch.tensor(numbers, dtype=torch.int64) for numbers in (example.input_ids, told)]


def _form(example: Example) -> tuple[object, ...]:
    """What of an example a defense may not change."""
    labels = None if example.labels is None else tuple(label == IGNORE for label in example.labels)
    return len(example.input_ids), labels, example.label is None, example.position_ids
