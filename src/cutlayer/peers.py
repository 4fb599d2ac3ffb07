"""A client's dealings with the other clients of a run: it opens what they sealed for it, judges it, works, and seals.

All of it comes and goes over the server, which is another organisation's program and reads none of it. What the server
says in such a request is where the batch is on its route, and how the step is to be made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cutlayer._judging import BatchChecks, Bounds
from cutlayer.agreed import AgreedSecret
from cutlayer.apart import hosts
from cutlayer.arrangement import names_hosts
from cutlayer.assembly import neighbours
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, Layout
from cutlayer.errors import PolicyRefused, WireError
from cutlayer.frames import limits_of
from cutlayer.hosting import ASKED, Hosted, Hosting, hosted_stops, stops_of
from cutlayer.identity import identity_of
from cutlayer.judging import bounds_of
from cutlayer.leading import Lead
from cutlayer.leaving import BEGINNINGS, HOST_VERBS
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.models.segment import Base
from cutlayer.models.slots import Slot
from cutlayer.policy import Policy
from cutlayer.presence import Routes
from cutlayer.sealing import About, Seals, is_sealed
from cutlayer.wire import SEAL_BYTES, SEALED, Header, frame_length

TOLD = ("graph", "update", "head_weight")  # what the server says of how a client's own step is made
MOST = 3.4e38  # of a loss, as ``judging`` has it

Request = tuple[Header, list[Tensor]]


class Peers:
    """One client's dealings with the others.

    Args:
        config: the run.
        name: the client.
        secret: that the clients have agreed on.
        layouts: by client.
        routes: by client.
        out: the client's folder.
    """

    def __init__(
        self, config: RunConfig, name: str, secret: AgreedSecret, layouts: Mapping[str, Layout], routes: Routes,
        out: Path,
    ) -> None:  # fmt: skip
        self.config, self.name, self.layouts = config, name, layouts
        self.others = frozenset(config.client_names) - {name}
        self.led = names_hosts(config)  # a selection says who runs blocks for whom; until then it is as in ``routes``
        self._at_first = hosted_stops(name, layouts, routes), neighbours(config, routes[name])
        run = hashlib.sha256(identity_of(config)["settings"].encode()).hexdigest()
        self.seals = Seals(secret, run, out / "sealed.json")
        self._limits = limits_of(config, load_model_config(config.model))
        self._place(*self._at_first)

    @property
    def may_host(self) -> bool:
        """Whether this client runs blocks for others in the run, or may come to."""
        return self.led or bool(self.stops)

    def _place(self, stops: Sequence[Hosted], ends: tuple[str, str]) -> None:
        """Run these for others; ``ends`` get what this client shows, and its gradients."""
        self.stops, self.ends = stops, ends
        self._by = {(stop.owner, stop.number): stop for stop in stops}
        self._own: dict[tuple[str, int, int], Request] = {}  # by leg, step and micro-batch: what does not leave

    def begin(self, base: Base, slot: Slot) -> None:
        """Nothing is under way, and a selection has said nothing yet."""
        self._place(*self._at_first)
        self.hosting = Hosting(self.config, self.name, slot, self.layouts)
        self.hosting.follow(self.stops, base)
        self._bounds = {name: bounds_of(self.config, base, name) for name in self.config.client_names}

    def told(self, header: Header, *, may: bool) -> Lead:
        """What the server says of who runs blocks for whom; ``may``: the owner allows it.

        Raises:
            PolicyRefused: the run has no selection that says it, or the owner does not allow it.
            WireError: it cannot be.
        """
        if not self.led:
            raise PolicyRefused("told", "the server tells who runs blocks for whom, which nothing in this run changes.")
        if not may:
            raise PolicyRefused("may_leave.peers", "the server tells which clients run blocks for each other.")
        return Lead.read(header, self.config.client_names)

    def follow(self, lead: Lead, base: Base) -> None:
        """Be where the server says; ``base`` has the blocks of ``stops_of``."""
        stops = stops_of(lead, self.name, self.layouts)
        self.hosting.follow(stops, base, lead)
        self._place(stops, (lead.to, lead.to))

    def abort(self) -> None:
        """Forget what is under way of batches that are run here."""
        for owner in (*self.others, self.name):
            self.hosting.party.abort(owner)
        self._own.clear()

    def opened(self, header: Header, tensors: list[Tensor]) -> Request:
        """A request as it is without a seal. One that must be sealed, is; and what was in it is sound.

        Raises:
            WireError: it is not.
        """
        if header.verb in HOST_VERBS:
            return self._for_another(header, tensors)
        first, last = self.ends
        if self.led and first == SERVER and header.verb in BEGINNINGS and header.values.get("graph"):
            raise PolicyRefused("told", "training began before the server said which client runs whose blocks.")
        sender = {"tail_step": last, "head_backward": first}.get(header.verb, SERVER)
        if sender not in self.others and sender != self.name:
            return header, tensors
        graph = header.values.get("graph")
        leg = "backward" if header.verb == "head_backward" else "forward" if graph else "evaluation"
        found, inside = self._open(header, tensors, sender, self.name, leg)
        judge = _Sound(sender, self._bounds[self.name], str(found.verb))
        judge.all_finite(found, inside)
        if header.verb == "head_backward" and self.layouts[self.name].tail_at_client is False:
            judge.loss(found)
        told = {name: value for name, value in header.values.items() if name in TOLD}
        return found.but(verb=header.verb, turn=header.turn, values={**found.values, **told}), inside

    def _for_another(self, header: Header, tensors: list[Tensor]) -> Request:
        """A request to run blocks for another client."""
        owner, number = header.values.get("owner"), header.values.get("stop")
        stop = self._by.get((str(owner), int(number))) if isinstance(number, int) else None
        if stop is None or (stop.top != (header.verb == "host_tail_step") and header.verb != "host_backward"):
            raise WireError(f"'{header.verb}' for '{owner}' was asked for, which is no work of '{self.name}'.")
        if sorted(header.values) != sorted(ASKED):
            raise WireError(f"'{header.verb}' does not say how the step is to be made, and that alone.")
        forward = header.verb != "host_backward"
        sender = (stop.before if forward else stop.after) or stop.owner
        leg = "backward" if not forward else "forward" if header.values["graph"] else "evaluation"
        found, inside = self._open(header, tensors, sender, stop.owner, leg)
        judge = _Sound(sender, self._bounds[stop.owner], leg)
        judge.all_finite(found, inside)
        if forward:
            judge.shown(found, inside, labels=not self.layouts[stop.owner].tail_at_client)
        else:
            judge.gradient(found, inside)
        values = {name: value for name, value in found.values.items() if name not in ASKED}
        return found.but(verb=header.verb, turn=header.turn, values={**values, **header.values}), inside

    def _open(self, header: Header, tensors: list[Tensor], sender: str, owner: str, leg: str) -> Request:
        if sender == self.name:
            kept = self._own.pop((leg, header.step, header.micro), None)
            if kept is None or tensors:
                raise WireError(f"'{header.verb}' of step {header.step} is about what is not here, or was used before.")
            return kept
        if not is_sealed(header):
            raise WireError(
                f"'{header.verb}' brings what '{sender}' must have sealed, and it is not. Both ends need the same "
                "version of cutlayer; if they have it, the server misbehaves."
            )
        about = About(sender, self.name, owner, leg, header.step, header.micro)
        return self.seals.open(tensors[0], about, self._limits)

    def answer(self, header: Header, tensors: Sequence[Tensor]) -> Request:
        """Do work for another client."""
        return self.hosting.answer(header, tensors)

    def sealed(self, asked: Header, header: Header, tensors: Sequence[Tensor]) -> Request:
        """An answer as it leaves: sealed, where it is for another client.

        Raises:
            OutputError: the numbers of what was sealed and opened cannot be written; nothing may leave.
            WireError: it is too large.
        """
        out, shown = self._outside(header, asked.turn), list(tensors)
        training = bool(asked.values.get("graph"))
        backward = asked.verb in ("tail_step", "host_tail_step", "host_backward")
        leg = "backward" if backward else "forward" if training else "evaluation"
        if header.receiver == self.name:  # its own blocks come next: the server is told that it goes on, no more
            self._own[leg, header.step, header.micro] = header, [tensor.detach().clone() for tensor in tensors]
            shown = []
        if header.receiver in self.others:
            about = About(self.name, header.receiver, header.client, leg, header.step, header.micro)
            shown = [self.seals.seal(header, tensors, about)]
        if header.receiver in self.others or asked.sender in self.others:
            self.seals.save()
        return out, shown

    def _outside(self, header: Header, turn: int) -> Header:
        """An answer's header as the server sees it."""
        if header.receiver == self.name:
            return header.but(verb="", client=self.name, turn=turn, values={}, names=())
        if header.receiver not in self.others:
            return header.but(client=self.name, turn=turn)
        return header.but(verb="", client=self.name, turn=turn, values={}, names=(SEALED,))

    def length(self, header: Header, tensors: Sequence[Tensor]) -> int:
        """The bytes of an answer as it leaves."""
        if header.receiver == self.name:
            return frame_length(self._outside(header, 0), [], [])
        length = frame_length(header, [t.shape for t in tensors], [t.dtype for t in tensors])
        if header.receiver not in self.others:
            return length
        return frame_length(self._outside(header, 0), [(length + SEAL_BYTES,)], [torch.uint8])


def peers_of(
    config: RunConfig, name: str, agreed: AgreedSecret | None, layouts: Mapping[str, Layout], routes: Routes, out: Path,
    policy: Policy,
) -> Peers | None:  # fmt: skip
    """A client's dealings with the others, where some run blocks for others, or may come to.

    Raises:
        PolicyRefused: the owner does not allow them.
    """
    if next(hosts(routes), None) is None and not names_hosts(config):
        return None
    assert agreed is not None
    peers = Peers(config, name, agreed, layouts, routes, out)
    if not policy.may_leave.peers:
        theirs = dict.fromkeys(stop.owner for stop in peers.stops)
        shown = {*peers.ends} & peers.others
        does = [f"runs blocks for {', '.join(theirs)}"] if theirs else []
        does += [f"shows what it sends to {', '.join(sorted(shown))}"] if shown else []
        if peers.led:
            does = ["may run blocks for any other client, and show what it sends to any, as a selection says"]
        raise PolicyRefused(
            "may_leave.peers",
            f"in this run '{name}' {' and '.join(does) or 'is a client among such'}, sealed from the server. "
            "Allow it by may_leave: {peers: true} in your policy (--policy), or do not join this run.",
        )
    return peers


class _Sound(BatchChecks):
    """Judges what another client sealed, before anything is computed with it. Each check raises WireError."""

    def __init__(self, sender: str, bounds: Bounds, what: str) -> None:
        super().__init__(sender, bounds)
        self._verb = what

    def all_finite(self, header: Header, tensors: Sequence[Tensor]) -> None:
        """No number is infinite, or none."""
        self._all_finite(header.values, dict(zip(header.names, tensors, strict=True)))

    def shown(self, header: Header, tensors: Sequence[Tensor], *, labels: bool) -> None:
        """A batch on its way up, with the labels in the two-part split."""
        found, values = dict(zip(header.names, tensors, strict=True)), header.values
        counts = ["weight", "tokens", "label_tokens"] if labels else []
        needed = ["hidden", *(["labels"] if labels else [])]
        self._only(
            values, found, ["last", "needs_gradient", *counts], needed, ["mask", "positions"],
            values_spare=["step_tokens"],
        )  # fmt: skip
        for name in ("last", "needs_gradient"):
            self._flag(values, name)
        rows, length = self._batch(found, found["hidden"])
        if labels:
            self._counts(values, rows, length, found["labels"])

    def gradient(self, header: Header, tensors: Sequence[Tensor]) -> None:
        """A gradient on its way down, or word that there is none."""
        found = dict(zip(header.names, tensors, strict=True))
        needed = ["hidden"] if header.kind == "gradient" else []
        self._only(header.values, found, (), needed, values_spare=["last", "loss", "step_tokens", *TOLD])
        if found:
            self._batch(found, found["hidden"])
        if "loss" in header.values:
            self.loss(header)

    def loss(self, header: Header) -> None:
        """The loss of a step, from who computes it."""
        self._number({"loss": header.value("loss")}, "loss", -MOST, MOST)

    def _heard(self, came: str) -> str:
        return f"Client '{self.name}' sealed {came} for this one ({self._verb})"
