"""A stretch of the trunk's blocks in one process, on one frozen base: what a trunk's actor of ``engine: ray`` holds.

It has the slots that were dealt to it, of all parties that run blocks for others. It is asked by frames and answers by
frames (``links/stages.py``), and trusts who asks: both are one owner's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cutlayer.build import load_base
from cutlayer.config import load_config
from cutlayer.contracts import How, Parcel
from cutlayer.crew import refuse_other_versions
from cutlayer.links.ray import Bytes, Failed, in_words, replied
from cutlayer.models.arena import Arena
from cutlayer.models.loading import Part, device_named
from cutlayer.models.segment import Base, Seed, Segment
from cutlayer.models.slots import Slot, new_params
from cutlayer.parties.holder import Answer
from cutlayer.parties.trunk import Place, TrunkParty
from cutlayer.schedule import make_optimizer
from cutlayer.wire import Header
from cutlayer.zeroth import Probe

GENERATORS = ("generator", "generator.device")  # their states, with what one stage hands to the next
ROWS = "row_losses"  # of the top stage, past which the gradient goes on


class Stretch:
    """A stage of the trunk, with some of its slots.

    Args:
        run: the run's YAML, with absolute paths.
        task: JSON: the blocks from ``start`` to before ``stop``, whether the ``top`` is here, the names of what the
            ``slots`` train here, by party and slot, the ``labels``, and the ``versions`` of packages at the driver.
    """

    def __init__(self, run: str, task: str) -> None:
        self._run, self._task = run, json.loads(task)
        self._parties: dict[str, _Party] = {}
        self._failed: Failed | Exception | None = None

    def open(self) -> Failed | None:
        """Load these blocks, and no others."""
        return in_words(self._open)

    def _open(self) -> None:
        task = self._task
        refuse_other_versions(task["versions"])
        config = load_config(self._run)
        part = Part(task["start"], task["stop"], bottom=False, top=task["top"])
        self.base = load_base(config, labels=task["labels"], device=device_named(config.device), part=part)
        make, arena = make_optimizer(config), Arena()
        for party, slots in task["slots"].items():
            made = {
                of: Slot(of, new_params(self.base.initial, names, arena), make, arena=arena)
                for of, names in slots.items()
            }
            self._parties[party] = _Party(party, made, seed=config.seed)

    def answer(self, request: Bytes | Failed, told: str) -> Bytes | Failed:
        """The reply to a frame; once something has failed here or before, that it has.

        Nobody may be waiting for the request that fails, so whoever comes next must hear of it.
        """
        if isinstance(request, Failed):
            return request
        if isinstance(self._failed, Exception):
            raise self._failed
        if self._failed is None:
            try:
                reply = replied(request, None, self._worked(json.loads(told)))
            except Exception as error:
                self._failed = error
                raise
            if not isinstance(reply, Failed):
                return reply
            self._failed = reply
        return self._failed

    def _worked(self, task: Mapping[str, Any]) -> Callable[[Header, list[Tensor]], Answer]:
        """The work of a request, for ``replied``."""
        party = self._parties[task["party"]]
        work = _WORK[task["verb"]]

        def handle(header: Header, tensors: list[Tensor]) -> Answer:
            return work(party, task, header, dict(zip(header.names, tensors, strict=True)), self.base)

        return handle


class _Party(TrunkParty):
    """A stage of a party: of what is drawn at random it goes on where the stage before has ended."""

    drawn: Seed | None = None

    def _seed(self, segment: Segment, header: Header) -> Seed:
        return super()._seed(segment, header) if self.drawn is None else self.drawn


def _step(party: _Party, task: Mapping[str, Any], header: Header, tensors: dict[str, Tensor], base: Base) -> Answer:
    """A verb of a step, at the blocks that are here."""
    party.drawn = tuple(tensors.pop(name) for name in GENERATORS if name in tensors) or None
    segment = base.segment(task["segment"], range(*task["blocks"]), top=task["top"])
    place = Place(segment, task["slot"], before=task["before"], after=task["after"])
    parcel = Parcel(header.but(names=tuple(tensors)), list(tensors.values()))
    how, verb = How(**task["how"]), task["verb"]
    slot, factor = party.slots[task["slot"]], float(task["factor"])
    slot.retime(lambda _: factor)  # the driver counts the updates
    if verb == "improve":
        told = {name: task[name] for name in ("turn", "rate", "last")}
        return _opened(party.improve(parcel, place, Probe(**task["probe"]), **told))
    if verb == "judge":
        return _opened(party.judge(parcel, place, Probe(**task["probe"])))
    if verb == "backward":
        header, shown = _opened(party.backward(parcel, how, place))
        if ROWS in tensors:
            header = header.but(kind="gradient", names=(*header.names, ROWS))
            shown = [*shown, tensors[ROWS]]
        return header, shown
    if verb == "tail_step":
        return _opened(party.tail_step(parcel, how, place))
    if not (task["goes_on"] and how.graph):
        return _opened(party.forward(parcel, how, place))
    with segment.left() as states:
        header, shown = _opened(party.forward(parcel, how, place))
    return header.but(names=(*header.names, *GENERATORS[: len(states)])), [*shown, *states]


def _put(party: _Party, task: Mapping[str, Any], header: Header, tensors: dict[str, Tensor], base: Base) -> Answer:
    slot = party.slots[task["slot"]]
    if task["reset"]:
        slot.reset_optimizer()
    slot.put(tensors, resize=True)
    return _ack()


def _get(party: _Party, task: Mapping[str, Any], header: Header, tensors: dict[str, Tensor], base: Base) -> Answer:
    """The parameters of a slot, or the moments; and the bytes of activations that the party has held here."""
    state = party.slots[task["slot"]].get(optimizer=task["moments"])
    chosen = {n: t for n, t in state.items() if n.startswith("optimizer/") == task["moments"]}
    values = {"saved": party.watch.saved}
    return Header("partition", "state", "", values=values, names=tuple(chosen)), list(chosen.values())


def _update(party: _Party, task: Mapping[str, Any], header: Header, tensors: dict[str, Tensor], base: Base) -> Answer:
    slot, factor = party.slots[task["slot"]], float(task["factor"])
    slot.retime(lambda _: factor)
    slot.update(**{name: task[name] for name in ("scale", "weights", "rate", "by_tensor")})
    return _ack()


def _norms(party: _Party, task: Mapping[str, Any], header: Header, tensors: dict[str, Tensor], base: Base) -> Answer:
    found = party.slots[task["slot"]].norms(task["weights"], by_tensor=task["by_tensor"])
    keys = list(dict.fromkeys(key for key, _ in found))
    first = torch.tensor([keys.index(key) for key, _ in found], dtype=torch.int64)
    norms = torch.tensor([norm for _, norm in found], dtype=torch.float64)
    return Header("partition", "state", "", values={"keys": json.dumps(keys)}, names=("first", "norms")), [first, norms]


def _abort(party: _Party, task: Mapping[str, Any], header: Header, tensors: dict[str, Tensor], base: Base) -> Answer:
    party.abort(task["client"])
    return _ack()


def _ack() -> Answer:
    return Header("partition", "ack"), []


def _opened(parcel: Parcel) -> Answer:
    header, tensors = parcel.open()
    return header, list(tensors)


_WORK = {
    **dict.fromkeys(("forward", "backward", "tail_step", "improve", "judge"), _step),
    "put": _put, "get": _get, "update": _update, "norms": _norms, "abort": _abort,
}  # fmt: skip
