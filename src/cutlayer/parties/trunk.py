"""The server, and whoever else runs blocks for others: slots on one frozen base."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.contracts import How, Parcel
from cutlayer.errors import WireError
from cutlayer.models.segment import Seed, Segment
from cutlayer.models.slots import Slot
from cutlayer.parties._tail import TailWork, run_tail
from cutlayer.parties.memory import Watch
from cutlayer.seeds import derive, segment_seed
from cutlayer.step import at
from cutlayer.wire import Header, Value
from cutlayer.zeroth import Probe, estimate, slope, two_points

Key = tuple[str, int, int]  # client, step, micro-batch
Worked = Parcel | Awaitable[Parcel]  # what a verb gives: of a party that is in other processes, what is to come


@dataclass
class _Open:
    """A micro-batch between its trunk forward and its trunk backward."""

    shown: Tensor  # what came, a leaf
    hidden: Tensor  # the output on its graph
    last: bool
    needs_gradient: bool


@dataclass(frozen=True)
class Place:
    """Where in a party a client's step is worked on: the blocks, and the slot with their trained parameters.

    ``before`` and ``after`` are the parties that the route comes from and goes to; None is the client itself.
    """

    segment: Segment
    slot: str
    before: str | None = None
    after: str | None = None


class Trunk(Protocol):
    """A party that runs blocks for others, as the driver sees it: here, or elsewhere (``links/stages.py``)."""

    name: str
    slots: dict[str, Slot]
    seed: int
    watch: Watch

    def forward(self, parcel: Parcel, how: How, place: Place) -> Worked:
        """Step 4 of any stop but the last."""
        ...

    def backward(self, parcel: Parcel, how: How, place: Place) -> Worked:
        """Step 8."""
        ...

    def tail_step(self, parcel: Parcel, how: How, place: Place) -> Worked:
        """Step 4 of the two-part split."""
        ...

    def improve(self, parcel: Parcel, place: Place, probe: Probe, *, turn: int, rate: float, last: bool) -> Worked:
        """Step 4 without backpropagation."""
        ...

    def judge(self, parcel: Parcel, place: Place, probe: Probe) -> Worked:
        """Step 4 for the client, without backpropagation."""
        ...

    def abort(self, client: str) -> None:
        """Forget every open graph and gradient in waiting of a client."""
        ...

    @property
    def open_graphs(self) -> int:
        """How many forwards wait for their backward."""
        ...


class TrunkParty:
    """Verbs of a party that runs blocks for others. Each takes and gives a Parcel, at a Place.

    Args:
        name: the party's name; the server's is ``server``.
        slots: trainable parameters by slot name.
        seed: the run's seed (for dropout).
    """

    def __init__(self, name: str, slots: Mapping[str, Slot], *, seed: int) -> None:
        self.name, self.slots, self.seed = name, dict(slots), seed
        self._open: dict[tuple[Key, Segment], _Open] = {}
        self.watch = Watch(t for s in slots.values() for t in s.params.values())

    def forward(self, parcel: Parcel, how: How, place: Place) -> Parcel:
        """Step 4 (U-shape, or any stop but the last): hidden states [B,T,H] in, hidden states [B,T,H] out."""
        header, tensors = parcel.header, parcel.tensors
        segment = place.segment
        device = segment.base.device
        with at("trunk_forward"), torch.set_grad_enabled(how.graph), self.watch:
            shown = tensors["hidden"].to(device)
            needs = bool(header.value("needs_gradient"))
            shown.requires_grad_(how.graph and needs)
            hidden = segment.forward(
                self.slots[place.slot].params,
                hidden=shown,
                attention_mask=_mask(tensors, device),
                position_ids=_positions(tensors, device),
                seed=self._seed(segment, header) if how.graph else None,
            )
            if how.graph:
                key = (self._key(header), segment)
                self._open[key] = _Open(shown, hidden, bool(header.value("last")), needs)
        out = {"hidden": hidden.detach()}
        if place.after is None:
            return self._parcel(header, "return_activations", "activations", "tail_step", how, out)
        # The next stop needs what this one was told of the batch.
        values = {**header.values, "needs_gradient": hidden.requires_grad}
        on = header.but(sender=self.name, receiver=place.after, values=values, names=tuple({**tensors, **out}))
        return Parcel(on, list({**tensors, **out}.values()))

    def backward(self, parcel: Parcel, how: How, place: Place) -> Parcel:
        """Step 8: the gradient [B,T,H] of what went out; gives that of what came in, or none."""
        header, tensors = parcel.header, parcel.tensors
        key = self._key(header)
        held = self._open.pop((key, place.segment), None)
        if held is None:
            raise WireError(
                f"'{self.name}' has no open graph of client '{key[0]}', step {key[1]}, micro-batch {key[2]}."
            )
        owner, given = self.slots[place.slot], tensors.get("hidden")
        if held.hidden.requires_grad and (given is None or given.shape != held.hidden.shape):
            came = "nothing" if given is None else f"a gradient of {list(given.shape)}"
            raise WireError(
                f"'{self.name}' was given {came} for what went out as {list(held.hidden.shape)}, of client '{key[0]}', "
                f"step {key[1]}, micro-batch {key[2]}."
            )
        with at("trunk_backward"):
            if held.hidden.requires_grad:
                with place.segment.entered(owner.params):
                    torch.autograd.backward(held.hidden, tensors["hidden"].to(held.hidden.device))
            owner.collect(place.segment.names, key, weight=how.trunk_weight)
            self._settle(owner, key, held.last, how)
        gradient = {"hidden": _gradient(held.shown)} if held.needs_gradient else {}
        told = {name: header.value(name) for name in ("loss",) if name in header.values}
        return self._back(header, how, place, gradient, told, last=held.last)

    def tail_step(self, parcel: Parcel, how: How, place: Place) -> Parcel:
        """Step 4 of the two-part split: forward, loss and backward in one; gives the gradient [B,T,H], or none.

        With ``masses`` beside the labels (see ``TailWork``) it gives ``row_losses`` [B] too.
        """
        header, tensors = parcel.header, parcel.tensors
        key, owner, segment = self._key(header), self.slots[place.slot], place.segment
        device, last = segment.base.device, bool(header.value("last"))
        with at("trunk_forward"), torch.set_grad_enabled(how.graph):
            work = TailWork(
                hidden=tensors["hidden"].to(device),
                attention_mask=_mask(tensors, device),
                position_ids=_positions(tensors, device),
                labels=tensors["labels"].to(device, torch.int64),
                label_tokens=int(header.value("label_tokens")),
                weight=float(header.value("weight")),
                client=header.client, step=header.step, micro=header.micro,
                masses=tensors["masses"].to(device) if "masses" in tensors else None,
                wanted=bool(header.value("needs_gradient")),
            )  # fmt: skip
            seed = self._seed(segment, header) if how.graph else None
            done = run_tail(segment, owner, work, seed=seed, slot_weight=how.trunk_weight, watch=self.watch)
            if how.graph:
                self._settle(owner, key, last, how)
        values: dict[str, Value] = {"loss": done.loss}
        if not how.graph:
            told = {**values, "correct": done.correct}
            told |= {name: header.value(name) for name in ("tokens", "label_tokens")}
            return Parcel(header.but(step_name="tail_step", kind="ack", values=told, names=()))
        wanted = {"hidden": done.gradient} if done.gradient is not None else {}
        wanted |= {"row_losses": done.rows} if done.rows is not None else {}
        return self._back(header, how, place, wanted, values, last=last)

    def improve(self, parcel: Parcel, place: Place, probe: Probe, *, turn: int, rate: float, last: bool) -> Parcel:
        """Step 4 without backpropagation: update the slot by an estimate from forward passes over ``hidden`` [B,T,H].

        Gives the mean of the losses at its points.

        Args:
            parcel: what the client sent.
            place: the blocks and the slot.
            probe: how to look around.
            turn: which update on this batch.
            rate: multiplies the learning rate.
            last: of this batch. Only then the slot's version grows: schedules count steps of the client.
        """
        key, owner = self._key(parcel.header), self.slots[place.slot]
        with at("trunk_forward"):
            params = {name: owner.params[name] for name in place.segment.names}
            seeds = [derive(self.seed, "direction", *key, turn, number) for number in range(probe.directions)]
            points = [two_points(params, seed, probe, lambda: self._loss(parcel, "hidden", place)) for seed in seeds]
            owner.add(estimate(params, seeds, [slope(pair, probe) for pair in points]), key=key)
            version = owner.version
            owner.update(rate=rate)
            owner.version = version + last
        loss = sum(sum(pair) / 2 for pair in points) / len(points)
        return Parcel(parcel.header.but(step_name="trunk_forward", kind="ack", values={"loss": loss}, names=()))

    def judge(self, parcel: Parcel, place: Place, probe: Probe) -> Parcel:
        """Step 4 for the client: the ``slopes`` [directions] of the loss along the directions that its head took."""
        header = parcel.header
        with at("trunk_forward"):
            slopes = [
                slope((self._loss(parcel, f"plus.{n}", place), self._loss(parcel, f"minus.{n}", place)), probe)
                for n in range(probe.directions)
            ]
        told = {"slopes": torch.tensor(slopes, dtype=torch.float32)}
        back = Header(
            "return_gradients", "gradient", "probed", self.name, header.client, header.client, header.slot, header.step,
            header.micro, header.turn, {"graph": True}, tuple(told),
        )  # fmt: skip
        return Parcel(back, list(told.values()))

    def _loss(self, parcel: Parcel, name: str, place: Place) -> float:
        """The loss of a batch whose hidden states are called ``name``, without a graph and without dropout."""
        header, tensors = parcel.header, parcel.tensors
        segment, owner = place.segment, self.slots[place.slot]
        device = segment.base.device
        work = TailWork(
            hidden=tensors[name].to(device),
            attention_mask=_mask(tensors, device),
            position_ids=_positions(tensors, device),
            labels=tensors["labels"].to(device, torch.int64),
            label_tokens=int(header.value("label_tokens")),
            weight=float(header.value("weight")),
            client=header.client, step=header.step, micro=header.micro,
        )  # fmt: skip
        with torch.no_grad():
            return run_tail(segment, owner, work, seed=None, slot_weight=1.0, watch=self.watch).loss

    def _settle(self, owner: Slot, key: Key, last: bool, how: How) -> None:
        """Fold a finished micro-batch into the one before it, and update at the last one."""
        owner.close(key)
        self.watch.next()
        if last:
            self.watch.finish()
            if how.trunk_update:
                owner.update()

    def abort(self, client: str) -> None:
        """Forget every open graph and gradient in waiting of a client."""
        for key in [k for k in self._open if k[0][0] == client]:
            del self._open[key]
        for slot in self.slots.values():
            slot.drop(client)

    @property
    def open_graphs(self) -> int:
        """How many forwards wait for their backward."""
        return len(self._open)

    def _seed(self, segment: Segment, header: Header) -> Seed:
        return segment_seed(self.seed, segment.name, header.client, header.step, header.micro)

    @staticmethod
    def _key(header: Header) -> Key:
        return header.client, header.step, header.micro

    def _back(
        self, header: Header, how: How, place: Place, tensors: Mapping[str, Tensor], values: Mapping[str, Value], *,
        last: bool,
    ) -> Parcel:  # fmt: skip
        kind = "gradient" if tensors else "no-gradient"
        if place.before is None:
            return self._parcel(header, "return_gradients", kind, "head_backward", how, tensors, values)
        told = {**values, "last": last}
        return self._parcel(header, "return_gradients", kind, "", how, tensors, told, to=place.before)

    def _parcel(
        self, header: Header, step_name: str, kind: str, verb: str, how: How, tensors: Mapping[str, Tensor],
        values: Mapping[str, Value] | None = None, *, to: str | None = None,
    ) -> Parcel:  # fmt: skip
        told: dict[str, Value] = {**told_how(how), **(values or {})}
        return Parcel(
            Header(
                step_name, kind, verb, self.name, to or header.client, header.client, header.slot, header.step,
                header.micro, header.turn, told, tuple(tensors),
            ),
            list(tensors.values()),
        )  # fmt: skip


def told_how(how: How) -> dict[str, Value]:
    """What a client is told of ``how``; the trunk's part is not its business."""
    return {"update": how.head_update, "graph": how.graph, "head_weight": how.head_weight}


def _mask(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    return tensors["mask"].to(device, torch.int64) if "mask" in tensors else None


def _positions(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    return tensors["positions"].to(device, torch.int64) if "positions" in tensors else None


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
