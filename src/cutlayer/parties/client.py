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
from cutlayer.models.slots import Slot, parameter_of
from cutlayer.parties._tail import TailWork, run_tail
from cutlayer.parties.helping import chosen, histogram, wanted
from cutlayer.parties.marking import Marker
from cutlayer.parties.memory import Watch
from cutlayer.seeds import derive, segment_seed
from cutlayer.step import at
from cutlayer.wire import Header, Value

Answer = tuple[Header, list[Tensor]]


@dataclass
class _Open:
    """A micro-batch between its head forward and its head backward."""

    batch: Batch
    hidden: Tensor | None  # the head's output on its graph; None where nothing below it is trained
    weight: float
    last: bool
    loss: float = 0.0


class ClientParty:
    """Answers verbs, each a method ``on_<verb>`` from a header and tensors to a header and tensors.

    Args:
        name: the client's name.
        head: the segment with the embedding.
        tail: the segment with the norm, the head and the loss; None in the two-part split.
        slot: the trainable parameters of both.
        batches: the training schedule.
        evaluation: the evaluation batches, made anew at each call.
        sizes: what it tells the server of its data: ``examples`` and ``label_tokens``.
        seed: the run's seed (for dropout).
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
        sizes: Mapping[str, int],
        seed: int,
    ) -> None:
        self.name = name
        self.head, self.tail, self.slot = head, tail, slot
        self.batches, self.evaluation, self.sizes, self.seed = batches, evaluation, sizes, seed
        self.device = head.base.device
        self._open: dict[tuple[int, int], _Open] = {}
        self._drawn: tuple[int, list[Batch]] | None = None
        self.watch = Watch(slot.params.values())
        self.marker = Marker(secret_of(seed, name))

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

    def names(self, part: str) -> set[str]:
        """The trained tensors of the client's ``own`` part of its model, ``hosted`` ones for others, or ``all``."""
        own, everything = {*self.head.names, *(self.tail.names if self.tail else [])}, set(self.slot.params)
        return {"own": own, "hosted": everything - own, "all": everything}[part]

    def on_set_up(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 1: the server tells the cut and the length of the run, the client its sizes."""
        values: dict[str, Value] = {
            **self.sizes,
            "steps_per_epoch": self.batches.steps_per_epoch,
            "evaluation_batches": len(self.evaluation),
            "trainable": sum(t.numel() for t in self.slot.get().values()),
        }
        return self._reply(header, "partition", "ack", values)

    def on_head_forward(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 2: draw the micro-batch, run the head, show the hidden states [B,T,H] (two-part: and the labels)."""
        training = bool(header.value("graph"))
        if training:
            batch, weight, last = self._draw(header.step, header.micro)
            seed = segment_seed(self.seed, "head", self.name, header.step, header.micro)
        else:
            batch, weight, last, seed = self.evaluation[header.step](), 1.0, True, None
        with torch.set_grad_enabled(training), self.watch:
            hidden = self.head.forward(
                self.slot.params,
                input_ids=batch.input_ids.to(self.device),
                attention_mask=_to(batch.attention_mask, self.device),
                position_ids=_to(batch.position_ids, self.device),
                seed=seed,
            )
        kept = hidden if training and hidden.requires_grad else None
        if training or self.tail is not None:
            self._open[header.step, header.micro] = _Open(batch, kept, weight, last)
        shown = self._shown(batch, hidden, labels=self.tail is None)
        values: dict[str, Value] = {"last": last, "needs_gradient": kept is not None}
        if self.tail is None:  # the server computes the loss
            values |= {"weight": weight, "label_tokens": batch.label_tokens, "tokens": batch.tokens}
        return self._reply(header, "send_activations", "activations", values, shown)

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
            hidden = self.head.forward(
                params,
                input_ids=batch.input_ids.to(self.device),
                attention_mask=_to(batch.attention_mask, self.device),
                position_ids=_to(batch.position_ids, self.device),
            )
        return self._reply(header, "send_activations", "activations", told, self._shown(batch, hidden, labels=True))

    def on_tail_step(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 6: tail forward, loss and backward; show the gradient [B,T,H] of what came."""
        assert self.tail is not None, "a two-part client holds no tail"
        training = bool(header.value("graph"))
        held = self._held(header)
        batch = held.batch
        work = TailWork(
            hidden=tensors["hidden"].to(self.device),
            attention_mask=_to(batch.attention_mask, self.device),
            position_ids=_to(batch.position_ids, self.device),
            labels=batch.labels.to(self.device),
            label_tokens=batch.label_tokens,
            weight=held.weight,
            client=self.name, step=header.step, micro=header.micro,
        )  # fmt: skip
        seed = segment_seed(self.seed, "tail", self.name, header.step, header.micro) if training else None
        weight = float(header.value("head_weight")) if training else 1.0
        with torch.set_grad_enabled(training):
            held.loss, gradient = run_tail(self.tail, self.slot, work, seed=seed, slot_weight=weight, watch=self.watch)
        if gradient is None:
            del self._open[header.step, header.micro]
            return self._reply(header, "tail_step", "ack", self._told(held))
        values: dict[str, Value] = {"last": held.last}
        return self._reply(header, "send_gradients", "gradient", values, {"hidden": gradient})

    def on_head_backward(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 10: backward through the head, and the optimizer step of the client's part if it is the last."""
        held = self._held(header)
        del self._open[header.step, header.micro]
        key = (self.name, header.step, header.micro)
        if self.tail is None:
            held.loss = float(header.value("loss"))
        if header.kind == "gradient":
            if held.hidden is None:
                raise WireError(f"Client '{self.name}' got a gradient that it has no use for, at step {header.step}.")
            with self.head.entered(self.slot.params):
                torch.autograd.backward(held.hidden, tensors["hidden"].to(self.device))
            self.slot.collect(self.head.names, key, weight=float(header.value("head_weight")))
        self.slot.close(key)
        self.watch.next()
        if held.last:
            self._drawn = None
            self.watch.finish()
        if held.last and header.value("update"):
            self.slot.update()
        return self._reply(header, "head_backward", "ack", self._told(held))

    def on_grad_norm(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """The squared norm of the client's gradient in waiting."""
        return self._reply(header, "head_backward", "ack", {"squared_norm": self.slot.squared_norm()})

    def on_update(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """The optimizer step of the client's part, with its gradient scaled."""
        self.slot.update(scale=float(header.value("scale")))
        return self._reply(header, "head_backward", "ack", {})

    def on_get_state(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 11: the client's trainable tensors (``part``: see ``names``), with the optimizer's state where asked."""
        wanted = self.names(str(header.value("part")))
        state = self.slot.get(optimizer=bool(header.value("optimizer")))
        state = {name: tensor for name, tensor in state.items() if parameter_of(name) in wanted}
        return self._reply(header, "aggregate", "state", {"version": self.slot.version}, state)

    def on_set_state(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 11: take merged or handed-over tensors. ``version`` below 0 keeps the count of updates."""
        version = int(header.value("version"))
        if header.value("reset"):
            self.slot.reset_optimizer()
        self.slot.put({n: t.to(self.device) for n, t in tensors.items()}, version=None if version < 0 else version)
        return self._reply(header, "aggregate", "ack", {})

    def on_begin_stage(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 11: from now on, mark what is trained for others (see ``parties/marking.py``)."""
        self.marker.begin(header, self.slot, self._hosted())
        return self._reply(header, "aggregate", "ack", {})

    def on_end_stage(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 11: the end of a marked stage: what proves it, and the weights that it is proven with."""
        names = self._hosted()
        told = self.marker.end(header, self.slot, names)
        return self._reply(header, "aggregate", "state", told, {n: self.slot.params[n].detach() for n in names})

    def _hosted(self) -> list[str]:
        hosted = self.names("hosted")
        return [name for name in self.slot.get() if name in hosted]

    def abort(self) -> None:
        """Forget every open micro-batch and gradient in waiting."""
        self._open.clear()
        self.slot.drop(self.name)

    def _draw(self, step: int, micro: int) -> tuple[Batch, float, bool]:
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = (step, self.batches.step(step))
        drawn = self._drawn[1]
        if micro >= len(drawn):
            raise WireError(
                f"Client '{self.name}' has {len(drawn)} micro-batches in step {step}; number {micro} was asked for."
            )
        total = sum(batch.label_tokens for batch in drawn)
        weight = drawn[micro].label_tokens / total if total and len(drawn) > 1 else 1.0
        return drawn[micro], weight, micro == len(drawn) - 1

    def _held(self, header: Header) -> _Open:
        held = self._open.get((header.step, header.micro))
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

    def _reply(
        self,
        to: Header,
        step_name: str,
        kind: str,
        values: Mapping[str, Value],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Answer:
        tensors = tensors or {}
        header = Header(
            step_name,
            kind,
            "",
            self.name,
            "server",
            self.name,
            to.slot,
            to.step,
            to.micro,
            to.turn,
            values,
            tuple(tensors),
        )
        return header, list(tensors.values())


VERB_STEPS = {
    "set_up": "partition",
    "histogram": "partition",
    "head_forward": "head_forward",
    "features": "head_forward",
    "tail_step": "tail_step",
    "head_backward": "head_backward",
    "grad_norm": "head_backward",
    "update": "head_backward",
    "begin_stage": "aggregate",
    "end_stage": "aggregate",
    "get_state": "aggregate",
    "set_state": "aggregate",
}
"""The step in which a verb's work is done."""


def secret_of(seed: int, name: str) -> bytes:
    """The secret of a simulated client, which follows from the run's seed so that runs repeat; a real one draws it."""
    return str(derive(seed, "secret", name)).encode()


def answer(party: ClientParty, header: Header, tensors: Sequence[Tensor]) -> Answer:
    """``party.handle``, timed and named as its step."""
    with at(VERB_STEPS.get(header.verb, header.step_name)):
        return party.handle(header, tensors)


def _to(tensor: Tensor | None, device: Any) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
