"""The client: keeps its text, the first blocks (and, in the U-shape, the last ones with the labels and the loss)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlayer.contracts import Batch
from cutlayer.data.batches import Batches
from cutlayer.errors import WireError
from cutlayer.models.segment import Segment
from cutlayer.models.slots import Slot
from cutlayer.parties._tail import TailWork
from cutlayer.parties.by_example import ByExample
from cutlayer.parties.defending import Defending, Passing
from cutlayer.parties.helping import chosen, histogram, wanted
from cutlayer.parties.holder import Answer, Holder
from cutlayer.parties.tails import client_tail
from cutlayer.seeds import derive, segment_seed
from cutlayer.sketches import Teller
from cutlayer.wire import Header, Value
from cutlayer.zeroth import Probe, estimate, two_points


@dataclass
class _Open:
    """A micro-batch between its head forward and its head backward."""

    batch: Batch
    hidden: Tensor | None  # what was shown, on its graph; None where nothing below it is trained
    weight: float
    last: bool
    loss: float = 0.0
    raw: Tensor | None = None  # the same before any defense, where there is one


class ClientParty(Holder):
    """Answers verbs, each a method ``on_<verb>`` from a header and tensors to a header and tensors.

    Args:
        name: the client's name.
        head: the segment with the embedding.
        tail: the segment with the norm, the head and the loss; None in the two-part split.
        slot: the trainable parameters of both.
        batches: the training schedule.
        evaluation: the evaluation batches, made anew at each call.
        validation: those of its own that it keeps from training; they are numbered after the evaluation's.
        sizes: what it tells the server of its data: ``examples`` and ``label_tokens``.
        seed: the run's seed (for dropout).
        teller: makes the sketch of its data that it agreed to tell; None: it tells none.
        frozen: the head's parameters where it is not trained; they are not the slot's.
        secret: of this client alone; None: one that follows from the run's seed, as of a simulated client.
        defending: its defenses; None: it has none.
    """

    def __init__(
        self,
        name: str,
        *,
        head: Segment,
        tail: Segment | None,
        slot: Slot,
        batches: Batches,
        evaluation: Sequence[Callable[[], Batch]] = (),
        validation: Sequence[Callable[[], Batch]] = (),
        sizes: Mapping[str, int],
        seed: int,
        teller: Teller | None = None,
        frozen: Mapping[str, Parameter] | None = None,
        secret: bytes | None = None,
        defending: Defending | None = None,
    ) -> None:
        super().__init__(name, head=head, tail=tail, slot=slot, secret=secret or secret_of(seed, name))
        self.defending = defending
        if defending is not None:
            defending.defended(batches)
        self.frozen_head = frozen is not None
        self.params = {**(frozen or {}), **slot.params}
        self.batches, self.evaluation, self.validation = batches, evaluation, validation
        self.sizes, self.seed, self.teller = sizes, seed, teller
        self.examples = ByExample(slot, defending) if defending is not None and defending.by_example else None
        self._open: dict[tuple[int, int, bool], _Open] = {}
        self._drawn: tuple[int, list[Batch]] | None = None
        self._tells_step_tokens = self._cached = False

    def handle(self, header: Header, tensors: Sequence[Tensor]) -> Answer:
        """Answer a request.

        Raises:
            WireError: there is no such verb, or it is out of order.
        """
        verb = getattr(self, f"on_{header.verb}", None)
        if verb is None:
            raise WireError(f"Client '{self.name}' was asked for '{header.verb}', which is no verb of a client.")
        answer: Answer = verb(header, dict(zip(header.names, tensors, strict=True)))
        return answer

    def on_set_up(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 1: the server tells the cut and the length of the run, the client its sizes."""
        own = self.names("own")
        self._cached = bool(header.values.get("cache", False))
        self._tells_step_tokens = bool(header.values.get("tell_step_tokens", False))
        values: dict[str, Value] = {
            **self.sizes,
            "steps_per_epoch": self.batches.steps_per_epoch,
            "evaluation_batches": len(self.evaluation),
            "trainable": sum(t.numel() for n, t in self.slot.get().items() if n in own),
        }
        return self._reply(header, "partition", "ack", values)

    def on_sketch(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 1: the sketch that it agreed to tell; which one is in the client's own copy of the run."""
        if self.teller is None:
            raise WireError(f"Client '{self.name}' was asked for a sketch of its data, and has agreed to none.")
        return self._reply(header, "partition", "sketch", {}, {"sketch": self.teller.tell(self._look)})

    def _look(self, batch: Batch) -> Tensor:
        """What the head makes of a batch: hidden states [B,T,H], without a graph."""
        with torch.no_grad():
            return self._run_head(self.slot.params, batch)

    def _run_head(self, params: Mapping[str, Parameter], batch: Batch, seed: int | None = None) -> Tensor:
        hidden: Tensor = self.head.forward(
            params,
            input_ids=batch.input_ids.to(self.device),
            attention_mask=_to(batch.attention_mask, self.device),
            position_ids=_to(batch.position_ids, self.device),
            seed=seed,
        )
        return hidden

    def on_head_forward(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 2: draw the micro-batch, run the head, show the hidden states [B,T,H] (two-part: and the labels)."""
        training = bool(header.value("graph"))
        if training:
            batch, weight, last = self._draw(header.step, header.micro)
        else:
            batch, weight, last = [*self.evaluation, *self.validation][header.step](), 1.0, True
        if training and self._cached and header.step >= self.batches.steps_per_epoch:  # the server has them all
            self._open[_place(header)] = _Open(batch, None, weight, last)
            return self._told_samples(header, batch, weight, last)
        raw = hidden = self._head(header, batch, training and not self.frozen_head)
        if self.defending is not None:
            hidden = self.defending.shown(raw, self._passing(header, training, batch, weight))
        kept = hidden if training and hidden.requires_grad else None
        if training or self.tail is not None:
            self._open[_place(header)] = _Open(batch, kept, weight, last, raw=raw if self.defending else None)
        shown = self._shown(batch, hidden, labels=self.tail is None)
        if training and self._cached:
            shown["samples"] = self._samples(header)
        values: dict[str, Value] = {"last": last, "needs_gradient": kept is not None}
        if self.tail is None:  # the server computes the loss
            values |= {"weight": weight, "label_tokens": batch.label_tokens, "tokens": batch.tokens}
            if training and self._tells_step_tokens:
                values["step_tokens"] = self._step_tokens(header.step)
        return self._reply(header, "send_activations", "activations", values, shown)

    def _head(self, header: Header, batch: Batch, training: bool) -> Tensor:
        """The head's output [B,T,H]: with dropout and a graph, or without."""
        seed = segment_seed(self.seed, "head", self.name, header.step, header.micro) if training else None
        with torch.set_grad_enabled(training), self.watch:
            if self.examples is None or seed is None:
                return self._run_head(self.params, batch, seed)
            own = seed  # of the first row; no two rows have the same dropout
            return self.examples.head(
                self._key(header),
                batch,
                lambda one, row: self._run_head(self.params, one, derive(own, row) if row else own),
            )

    def _key(self, header: Header) -> tuple[str, int, int]:
        return self.name, header.step, header.micro

    def _passing(self, header: Header, training: bool, batch: Batch, weight: float) -> Passing:
        records = self.batches.rows(header.step)[header.micro] if training else [header.step]
        return Passing(header.step, header.micro, training, batch, weight, records)

    def _samples(self, header: Header) -> Tensor:
        """The numbers [B] of a micro-batch's samples among the client's."""
        return torch.tensor(self.batches.rows(header.step)[header.micro], dtype=torch.int64)

    def _told_samples(self, header: Header, batch: Batch, weight: float, last: bool) -> Answer:
        """Steps 2 and 3 where the server remembers all that would be shown."""
        values: dict[str, Value] = {"last": last, "needs_gradient": False}
        if self.tail is None:
            values |= {"weight": weight, "label_tokens": batch.label_tokens, "tokens": batch.tokens}
        if self.tail is None and self._tells_step_tokens:
            values["step_tokens"] = self._step_tokens(header.step)
        return self._reply(header, "send_activations", "activations", values, {"samples": self._samples(header)})

    def on_histogram(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 1: how many examples of each category the client has (see ``parties/helping.py``)."""
        counts: dict[str, Value] = {**histogram(self.batches.examples)}
        return self._reply(header, "partition", "ack", counts)

    def on_features(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 2 for others: hidden states [R,T,H] and labels of examples of the wanted categories; no graph is kept.

        The request has the head's trained tensors that they are to be made with, and how many of each category.
        """
        rows, given = chosen(self.batches, wanted(header), int(header.value("number")))
        told: dict[str, Value] = {**given}
        if not rows:
            return self._reply(header, "send_activations", "ack", told)
        params = {name: Parameter(tensor.to(self.device)) for name, tensor in tensors.items()}
        batch = self.batches.collate(rows)
        with torch.no_grad():
            hidden = self._run_head(params, batch)
        return self._reply(header, "send_activations", "activations", told, self._shown(batch, hidden, labels=True))

    def on_tail_step(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 6: tail forward, loss and backward; show the gradient [B,T,H] of what came."""
        assert self.tail is not None, "a two-part client holds no tail"
        training = bool(header.value("graph"))
        held = self._held(header)
        batch, came = held.batch, tensors["hidden"]
        if came.dim() != 3 or came.shape[:2] != batch.input_ids.shape:
            raise WireError(
                f"Client '{self.name}' was given {list(came.shape)} for a batch of {list(batch.input_ids.shape)}, at "
                f"step {header.step}."
            )
        work = TailWork(
            hidden=came.to(self.device),
            attention_mask=_to(batch.attention_mask, self.device),
            position_ids=_to(batch.position_ids, self.device),
            labels=batch.labels.to(self.device),
            label_tokens=batch.label_tokens,
            weight=held.weight,
            client=self.name, step=header.step, micro=header.micro,
        )  # fmt: skip
        seed = segment_seed(self.seed, "tail", self.name, header.step, header.micro) if training else None
        weight = float(header.value("head_weight")) if training else 1.0
        passing = self._passing(header, training, batch, held.weight)
        with torch.set_grad_enabled(training):
            if self.examples is not None and seed is not None:
                done = self.examples.tail(self.tail, work, passing, seed=seed, watch=self.watch)
            else:
                done = client_tail(
                    self.tail, self.slot, work, passing, self.defending, seed=seed, slot_weight=weight, watch=self.watch
                )
        held.loss = done.loss
        if done.gradient is None:
            del self._open[_place(header)]
            return self._reply(header, "tail_step", "ack", {**self._told(held), "correct": done.correct})
        values: dict[str, Value] = {"last": held.last}
        if self._tells_step_tokens:
            values["step_tokens"] = self._step_tokens(header.step)
        gradient = done.gradient
        if self.defending is not None:
            self.defending.collect((self.name, header.step, header.micro), weight=weight)
            gradient = self.defending.shown_gradient(gradient, passing)
        return self._reply(header, "send_gradients", "gradient", values, {"hidden": gradient})

    def on_head_backward(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 10: backward through the head, and the optimizer step of the client's part if it is the last."""
        held = self._held(header)
        del self._open[_place(header)]
        key, weight = self._key(header), float(header.value("head_weight"))
        if self.tail is None:
            held.loss = float(header.value("loss"))
        if header.kind == "gradient":
            if held.hidden is None:
                raise WireError(f"Client '{self.name}' got a gradient that it has no use for, at step {header.step}.")
            roots, grads = [held.hidden], [tensors["hidden"].to(self.device)]
            with self.head.entered(self.slot.params):
                if self.defending is not None and held.raw is not None:
                    passing = self._passing(header, True, held.batch, held.weight)
                    penalty = self.defending.penalty(held.raw, passing, grads[0])
                    if penalty is not None and penalty.requires_grad:
                        roots, grads = [*roots, penalty], [*grads, torch.ones_like(penalty)]
                torch.autograd.backward(roots, grads)
                if self.examples is not None:
                    self.examples.head_backward(key, self.head.names)
            self.slot.collect(self.head.names, key, weight=weight)
            if self.defending is not None:
                self.defending.collect(key, weight=weight)
        if self.examples is not None:
            to_sum = held.batch.label_tokens / held.weight if held.batch.label_tokens else 1.0
            tokens = self._step_tokens(header.step)
            self.examples.close(key, to_sum=to_sum, tokens=tokens, last=held.last, weight=weight)
        for slot in self.slots.values():
            slot.close(key)
        self.watch.next()
        if held.last:
            self._drawn = None
            self.watch.finish()
        if held.last and header.value("update"):
            for slot in self.slots.values():
                slot.update()
        return self._reply(header, "head_backward", "ack", self._told(held))

    def on_probe(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 2 without backpropagation: the head as it is, and at two points of each direction (``zeroth.py``).

        Shows hidden states [B,T,H] ``hidden``, ``plus.0``, ``minus.0``, ... and the labels.
        """
        assert self.tail is None, "the loss is the server's"
        batch, weight, last = self._draw(header.step, header.micro)
        self._open[_place(header)] = _Open(batch, None, weight, last)
        probe = Probe(int(header.value("directions")), float(header.value("mu")), copy=bool(header.value("copy")))
        shown = self._shown(batch, self._head(header, batch, training=False), labels=True)
        for number, seed in enumerate(self._directions(header, probe.directions)):
            points = two_points(self._own(), seed, probe, lambda: self._head(header, batch, training=False))
            shown[f"plus.{number}"], shown[f"minus.{number}"] = points
        values: dict[str, Value] = {
            "last": last, "weight": weight, "label_tokens": batch.label_tokens, "tokens": batch.tokens
        }  # fmt: skip
        return self._reply(header, "send_activations", "activations", values, shown)

    def on_probed(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 10 without backpropagation: the ``slopes`` [directions] of the loss; update by them."""
        self._held(header)
        del self._open[_place(header)]
        slopes = tensors["slopes"].tolist()
        key, seeds = (self.name, header.step, header.micro), self._directions(header, len(slopes))
        self.slot.add(estimate(self._own(), seeds, slopes), key=key)
        self.slot.update()
        self._drawn = None
        return self._reply(header, "head_backward", "ack", {})

    def _own(self) -> dict[str, Parameter]:
        """The head's trained parameters."""
        return {name: self.slot.params[name] for name in self.head.names}

    def _directions(self, header: Header, count: int) -> list[int]:
        """The seeds of a step's directions, which nobody else knows."""
        return [derive(self.secret.hex(), "direction", header.step, header.micro, number) for number in range(count)]

    def abort(self) -> None:
        """Forget every open micro-batch and gradient in waiting."""
        super().abort()
        self._open.clear()
        if self.examples is not None:
            self.examples.abort()

    def _draw(self, step: int, micro: int) -> tuple[Batch, float, bool]:
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = (step, self.batches.step(step))
        drawn = self._drawn[1]
        if micro >= len(drawn):
            raise WireError(
                f"Client '{self.name}' has {len(drawn)} micro-batches in step {step}; number {micro} was asked for."
            )
        total = self._step_tokens(step)
        weight = drawn[micro].label_tokens / total if total and len(drawn) > 1 else 1.0
        return drawn[micro], weight, micro == len(drawn) - 1

    def _step_tokens(self, step: int) -> int:
        """The label tokens of an optimizer step that was drawn."""
        assert self._drawn is not None
        assert self._drawn[0] == step
        return sum(batch.label_tokens for batch in self._drawn[1])

    def _held(self, header: Header) -> _Open:
        held = self._open.get(_place(header))
        if held is None:
            raise WireError(
                f"Client '{self.name}' was asked for '{header.verb}' of step {header.step}, micro-batch "
                f"{header.micro}, which it did not begin."
            )
        return held

    @staticmethod
    def _shown(batch: Batch, hidden: Tensor, *, labels: bool) -> dict[str, Tensor]:
        """What leaves of a batch: hidden states, what tells its real tokens, and labels where the server needs them."""
        shown: dict[str, Tensor] = {"hidden": hidden}
        if batch.attention_mask is not None:
            shown["mask"] = batch.attention_mask.bool()
        if batch.position_ids is not None:
            shown["positions"] = batch.position_ids.to(torch.int32)
        if labels:
            shown["labels"] = batch.labels.to(torch.int32)
        return shown

    @staticmethod
    def _told(held: _Open) -> dict[str, Value]:
        batch = held.batch
        return {"loss": held.loss, "tokens": batch.tokens, "label_tokens": batch.label_tokens, "last": held.last}


def secret_of(seed: int, name: str) -> bytes:
    """The secret of a simulated client, which follows from the run's seed so that runs repeat; a real one draws it."""
    return str(derive(seed, "secret", name)).encode()


def _place(header: Header) -> tuple[int, int, bool]:
    """Where a micro-batch or an evaluation batch is kept while it is open; the two are never taken for each other."""
    training = header.verb not in ("head_forward", "tail_step") or bool(header.value("graph"))
    return header.step, header.micro, training


def _to(tensor: Tensor | None, device: Any) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
