"""What a client does with its parameters: update, hand out, take, give up. The step itself is in ``client.py``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlayer.errors import WireError
from cutlayer.models.importance import UNKNOWN
from cutlayer.models.segment import Base, Segment
from cutlayer.models.slots import PRIVATE, Slot, parameter_of
from cutlayer.parties.defending import Defending
from cutlayer.parties.marking import Marker
from cutlayer.parties.memory import Watch
from cutlayer.ranks import pairs, refit
from cutlayer.wire import Header, Value

Answer = tuple[Header, list[Tensor]]


class Holder:
    """The verbs of a client that are about the parameters in its slot.

    Args:
        name: the client's name.
        head: the segment with the embedding.
        tail: the segment with the norm, the head and the loss; None in the two-part split.
        slot: the trainable parameters of both, and of what it runs for others.
        secret: of this client alone; its marks and the directions in which it looks around are made from it.
    """

    evaluation: Sequence[Any] = ()  # the evaluation batches that it has
    validation: Sequence[Any] = ()  # those that it keeps from training, numbered after these
    defending: Defending | None = None  # its defenses
    most: int | None = None  # the most head blocks that it can have; None: any number
    trunk: Slot | None = None  # of a client elsewhere: stands for what it trains for its group beside its own part

    def __init__(self, name: str, *, head: Segment, tail: Segment | None, slot: Slot, secret: bytes) -> None:
        self.name, self.head, self.tail, self.slot = name, head, tail, slot
        self.device = head.base.device
        self.secret, self.marker = secret, Marker(secret)
        self.params: Mapping[str, Parameter] = slot.params
        self.watch = Watch(slot.params.values())

    @property
    def slots(self) -> dict[str, Slot]:
        """What it trains: the ``client``'s part, and beside it what its ``defense``s learn, if they do."""
        aside = self.defending.aside if self.defending is not None else None
        return {"client": self.slot} if aside is None else {"client": self.slot, "defense": aside}

    def stands_on(self, base: Base) -> None:
        """Have the frozen weights from another base, which has more blocks; what is trained stays as it is."""
        self.head, self.device = base.segment("head", self.head.blocks, bottom=True), base.device
        if self.tail is not None:
            self.tail = base.segment("tail", self.tail.blocks, top=True)

    def abort(self) -> None:
        """Forget every gradient in waiting."""
        for slot in self.slots.values():
            slot.drop(self.name)

    def names(self, part: str) -> set[str]:
        """The trained tensors of the client's ``own`` part of its model, ``hosted`` ones for others, or ``all``.

        What is private is in none of them: no verb gives it out or takes it.
        """
        everything = {name for name in self.slot.params if not name.startswith(PRIVATE)}
        own = everything & {*self.head.names, *(self.tail.names if self.tail else [])}
        return {"own": own, "hosted": everything - own, "all": everything}[part]

    def on_grad_norm(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """The squared norm of the client's gradient in waiting."""
        return self._reply(header, "head_backward", "ack", {"squared_norm": self.slot.squared_norm()})

    def on_update(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """The optimizer step of the client's part, with its gradient scaled."""
        for slot in self.slots.values():
            slot.update(scale=float(header.value("scale")))
        return self._reply(header, "head_backward", "ack", {})

    def on_move(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 1 again: from now on the head has this many blocks, and its adapters the ``ranks`` given, if any.

        What leaves with the blocks that the server takes over (parameters and optimizer state) is the answer.
        """
        before, cut = self.names("own"), int(header.value("head_blocks"))
        if cut < 0 or (self.most is not None and cut > self.most):
            raise WireError(f"Client '{self.name}' was given {cut} head blocks, but it has loaded {self.most}.")
        self.head = self.head.base.segment("head", range(cut), bottom=True)
        if self.defending is not None:
            self.defending.moved(self.head)
        leaving = before - self.names("own")
        state = {n: t.clone() for n, t in self.slot.get(optimizer=True).items() if parameter_of(n) in leaving}
        self.slot.forget(leaving)
        if "ranks" in tensors:
            held = {n: t for n, t in self.slot.get().items() if n in self.names("own")}
            fitted = refit(held, self._ranks(pairs(held), tensors["ranks"]))
            self.slot.reshape({n: t for n, t in fitted.items() if t.shape != held[n].shape})
        return self._reply(header, "partition", "state", {}, state)

    def _ranks(self, names: Collection[str], told: Tensor) -> dict[str, int]:
        """The rank of each factor A among these, as it was told."""
        found, most = told.tolist(), {a: len(self.head.base.initial[a]) for a in names}
        if told.dim() != 1 or len(found) != len(names) or told.is_floating_point():
            raise WireError(f"Client '{self.name}' has {len(names)} adapters, but was told other ranks than so many.")
        ranks = dict(zip(names, found, strict=True))
        if wrong := [a for a, rank in ranks.items() if not 0 <= rank <= most[a]]:
            raise WireError(f"Client '{self.name}' was told rank {ranks[wrong[0]]} for '{wrong[0]}'.")
        return ranks

    def on_importance(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 1 again: one number for each adapted matrix of its own part, how much it matters; -1: unknown."""
        own, scores = self.names("own"), self.slot.importance.scores if self.slot.importance else {}
        found = [scores.get(a, UNKNOWN) for a in pairs(own)]
        return self._reply(header, "partition", "state", {}, {"importance": torch.tensor(found, dtype=torch.float64)})

    def on_get_state(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 11: the client's trainable tensors (``part``: see ``names``), with the optimizer's state where asked."""
        wanted = self.names(str(header.value("part")))
        state = self.slot.get(optimizer=bool(header.value("optimizer")))
        state = {name: tensor for name, tensor in state.items() if parameter_of(name) in wanted}
        return self._reply(header, "aggregate", "state", {"version": self.slot.version}, state)

    def on_set_state(self, header: Header, tensors: Mapping[str, Tensor]) -> Answer:
        """Step 11: take merged or handed-over tensors. ``version`` below 0 keeps the count of updates."""
        version = int(header.value("version"))
        if not self.slot.idle:
            raise WireError(f"Client '{self.name}' was given tensors while gradients of its own wait for their update.")
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
