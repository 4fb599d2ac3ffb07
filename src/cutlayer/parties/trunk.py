"""The server: holds the middle blocks (two-part split: all from the cut upwards), in slots on one frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.contracts import How, Parcel
from cutlayer.errors import WireError
from cutlayer.models.segment import Segment
from cutlayer.models.slots import Slot
from cutlayer.parties._tail import TailWork, run_tail
from cutlayer.parties.memory import Watch
from cutlayer.seeds import segment_seed
from cutlayer.step import at
from cutlayer.wire import Header, Value


@dataclass
class _Open:
    """A micro-batch between its trunk forward and its trunk backward."""

    shown: Tensor  # what the client sent, a leaf
    hidden: Tensor  # the trunk's output on its graph
    last: bool
    needs_gradient: bool


class TrunkParty:
    """Verbs of the server. Each takes and gives a Parcel, and names the slot that serves it.

    Args:
        segment: the trunk; in the two-part split the segment up to and with the head.
        slots: trainable parameters by slot name.
        seed: the run's seed (for dropout).
    """

    def __init__(self, segment: Segment, slots: Mapping[str, Slot], *, seed: int) -> None:
        self.segment, self.slots, self.seed = segment, dict(slots), seed
        self.device = segment.base.device
        self._open: dict[tuple[str, int, int], _Open] = {}
        self.watch = Watch(t for s in slots.values() for t in s.params.values())

    def forward(self, parcel: Parcel, how: How, slot: str) -> Parcel:
        """Step 4 (U-shape): hidden states [B,T,H] in, hidden states [B,T,H] out."""
        header, tensors = parcel.header, parcel.tensors
        with at("trunk_forward"), torch.set_grad_enabled(how.graph), self.watch:
            shown = tensors["hidden"].to(self.device)
            needs = bool(header.value("needs_gradient"))
            shown.requires_grad_(how.graph and needs)
            hidden = self.segment.forward(
                self.slots[slot].params,
                hidden=shown,
                attention_mask=self._mask(tensors),
                position_ids=self._positions(tensors),
                seed=self._seed("trunk", header) if how.graph else None,
            )
            if how.graph:
                self._open[self._key(header)] = _Open(shown, hidden, bool(header.value("last")), needs)
        return self._parcel(header, "return_activations", "activations", "tail_step", how, {"hidden": hidden.detach()})

    def backward(self, parcel: Parcel, how: How, slot: str) -> Parcel:
        """Step 8 (U-shape): the gradient [B,T,H] of what was returned; gives that of what was shown, or none."""
        header, tensors = parcel.header, parcel.tensors
        key = self._key(header)
        held = self._open.pop(key, None)
        if held is None:
            raise WireError(f"The server has no open graph of client '{key[0]}', step {key[1]}, micro-batch {key[2]}.")
        owner = self.slots[slot]
        with at("trunk_backward"):
            if held.hidden.requires_grad:
                with self.segment.entered(owner.params):
                    torch.autograd.backward(held.hidden, tensors["hidden"].to(self.device))
            self._settle(owner, key, held.last, how)
        gradient = {"hidden": _gradient(held.shown)} if held.needs_gradient else {}
        return self._back(header, how, gradient, {})

    def tail_step(self, parcel: Parcel, how: How, slot: str) -> Parcel:
        """Step 4 of the two-part split: forward, loss and backward in one; gives the gradient [B,T,H], or none."""
        header, tensors = parcel.header, parcel.tensors
        key, owner = self._key(header), self.slots[slot]
        with at("trunk_forward"), torch.set_grad_enabled(how.graph):
            work = TailWork(
                hidden=tensors["hidden"].to(self.device),
                attention_mask=self._mask(tensors),
                position_ids=self._positions(tensors),
                labels=tensors["labels"].to(self.device, torch.int64),
                label_tokens=int(header.value("label_tokens")),
                weight=float(header.value("weight")),
                client=header.client, step=header.step, micro=header.micro,
            )  # fmt: skip
            seed = self._seed("tail", header) if how.graph else None
            loss, gradient = run_tail(
                self.segment, owner, work, seed=seed, slot_weight=how.trunk_weight, watch=self.watch
            )
            if how.graph:
                self._settle(owner, key, bool(header.value("last")), how, collected=True)
        values: dict[str, Value] = {"loss": loss}
        if not how.graph:
            told = {**values, "tokens": header.value("tokens"), "label_tokens": header.value("label_tokens")}
            return Parcel(header.but(step_name="tail_step", kind="ack", values=told, names=()))
        wanted = {"hidden": gradient} if header.value("needs_gradient") and gradient is not None else {}
        return self._back(header, how, wanted, values)

    def _settle(self, owner: Slot, key: tuple[str, int, int], last: bool, how: How, *, collected: bool = False) -> None:
        """Book the gradients of a finished micro-batch, and update at the last one."""
        if not collected:
            owner.collect(self.segment.names, key, weight=how.trunk_weight)
        owner.close(key)
        self.watch.next()
        if last:
            self.watch.finish()
            if how.update:
                owner.update()

    def abort(self, client: str) -> None:
        """Forget every open graph and gradient in waiting of a client."""
        for key in [k for k in self._open if k[0] == client]:
            del self._open[key]
        for slot in self.slots.values():
            slot.drop(client)

    @property
    def open_graphs(self) -> int:
        """How many forwards wait for their backward."""
        return len(self._open)

    def _mask(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors["mask"].to(self.device, torch.int64) if "mask" in tensors else None

    def _positions(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return tensors["positions"].to(self.device, torch.int64) if "positions" in tensors else None

    def _seed(self, segment: str, header: Header) -> int:
        return segment_seed(self.seed, segment, header.client, header.step, header.micro)

    @staticmethod
    def _key(header: Header) -> tuple[str, int, int]:
        return header.client, header.step, header.micro

    def _back(self, header: Header, how: How, tensors: Mapping[str, Tensor], values: Mapping[str, Value]) -> Parcel:
        kind = "gradient" if tensors else "no-gradient"
        return self._parcel(header, "return_gradients", kind, "head_backward", how, tensors, values)

    def _parcel(
        self, header: Header, step_name: str, kind: str, verb: str, how: How, tensors: Mapping[str, Tensor],
        values: Mapping[str, Value] | None = None,
    ) -> Parcel:  # fmt: skip
        told: dict[str, Value] = {**told_how(how), **(values or {})}
        return Parcel(
            Header(
                step_name, kind, verb, "server", header.client, header.client, header.slot, header.step, header.micro,
                header.turn, told, tuple(tensors),
            ),
            list(tensors.values()),
        )  # fmt: skip


def told_how(how: How) -> dict[str, Value]:
    """What a client is told of ``how``; the trunk's weight is not its business."""
    return {"update": how.update, "graph": how.graph, "head_weight": how.head_weight}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
