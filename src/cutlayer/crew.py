"""Several clients of a run in one process, on one frozen base: what an actor of ``engine: ray`` holds.

It is asked by frames and answers by frames; nothing else of a client enters or leaves it. It trusts who asks: both are
one owner's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from safetensors.numpy import load, save
from torch import Tensor

from cutlayer.assembly import own_names
from cutlayer.build import Data, collating, layouts_of, load_base, open_model
from cutlayer.clients import client_party, private_names
from cutlayer.config import load_config
from cutlayer.contracts import SERVER, Example, Layout
from cutlayer.errors import CutlayerError
from cutlayer.links.ray import HOUSEKEEPING, Bytes, Failed, in_words, replied
from cutlayer.models.arena import Arena
from cutlayer.models.loading import Part, device_named
from cutlayer.models.placement import MAPS
from cutlayer.models.segment import Base
from cutlayer.models.slots import Slot, new_params
from cutlayer.parties.client import ClientParty
from cutlayer.parties.holder import Answer
from cutlayer.parties.verbs import answer
from cutlayer.planning import at_cut
from cutlayer.schedule import learning_rate, make_optimizer
from cutlayer.wire import Header

FIELDS = ("input_ids", "labels", "position_ids")  # of an example, each a sequence or None
PACKAGES = ("cutlayer", "torch", "transformers", "peft")  # of one version in all processes of a run


class Crew:
    """Clients in one process.

    Args:
        run: the run's YAML, with absolute paths.
        task: JSON: ``clients``, their ``cuts`` (head blocks) and the ``highest`` ones, the ``labels``, the ``pad_id``,
            and the ``versions`` of packages at the driver.
        rows: the examples of the clients, as ``packed`` made them.
    """

    def __init__(self, run: str, task: str, rows: bytes) -> None:
        self._run, self._task, self._rows = run, json.loads(task), rows
        self._parties: dict[str, ClientParty] = {}
        self._arena = Arena()

    def open(self) -> Failed | None:
        """Load the blocks of these clients, and no others."""
        return in_words(self._open)

    def _open(self) -> None:
        task = self._task
        refuse_other_versions(task["versions"])
        config = self.config = load_config(self._run)
        groups = unpacked(self._rows)
        self._rows = b""
        self.kept = {name: groups.get(f"kept/{name}", []) for name in task["clients"]}
        self.data = Data(
            {name: groups[f"train/{name}"] for name in task["clients"]}, groups.get("evaluation", []),
            collating(config, task["pad_id"]), task["labels"], "", task["pad_id"],
        )  # fmt: skip
        _, blocks = open_model(config)
        given = layouts_of(config, blocks)
        self.layouts = {name: at_cut(given[name], task["cuts"][name]) for name in task["clients"]}
        device = "auto" if config.device in MAPS else config.device  # the trunk alone is spread
        part = _part([at_cut(layout, task["highest"][name]) for name, layout in self.layouts.items()])
        self.base: Base = load_base(config, labels=task["labels"], device=device_named(device), part=part)

    def answer(self, request: Bytes, to: str) -> Bytes | Failed:
        """The reply to a frame, for the party ``to``."""
        return replied(request, to, self._handle)

    def _handle(self, header: Header, tensors: list[Tensor]) -> Answer:
        if header.verb in HOUSEKEEPING:
            told: Answer = getattr(self, f"_{header.verb}")(header, dict(zip(header.names, tensors, strict=True)))
            return told
        return answer(self._parties[header.client], header, tensors)

    def _begin(self, header: Header, state: Mapping[str, Tensor]) -> Answer:
        """Be as the driver says: its cut, its slot, and how many updates its part will have in the run."""
        name, config, base = header.client, self.config, self.base
        layout = at_cut(self.layouts[name], int(header.value("head_blocks")))
        highest = base.segment("head", range(self._task["highest"][name]), bottom=True)
        head = base.segment("head", layout.head, bottom=True)
        tail = base.segment("tail", layout.tail, top=True) if layout.tail_at_client else None
        names, frozen = own_names(config, head, tail, highest)
        slot = Slot(
            name, new_params(base.initial, [*names, *private_names(config, tail)], self._arena), make_optimizer(config),
            learning_rate(config, int(header.value("updates"))), self._arena,
        )  # fmt: skip
        slot.put(state, version=int(header.value("version")), resize=True)
        data = replace(self.data, train={name: self.data.train[name]})
        self._parties[name] = client_party(
            config, base, data, self.kept, name, head=head, tail=tail, slot=slot, frozen=frozen
        )
        return _ack(header)

    def _keep(self, header: Header, _: Mapping[str, Tensor]) -> Answer:
        """What the driver's checkpoint needs of a client, and the bytes of activations that it has held."""
        party = self._parties[header.client]
        state = party.slot.get(optimizer=True)
        values = {"version": party.slot.version, "saved": party.watch.saved}
        told = Header("partition", "state", "", party.name, SERVER, party.name, values=values, names=tuple(state))
        return told, list(state.values())

    def _abort(self, header: Header, _: Mapping[str, Tensor]) -> Answer:
        """Forget what is under way of a client."""
        self._parties[header.client].abort()
        return _ack(header)


def _ack(header: Header) -> Answer:
    return Header("partition", "ack", "", header.client, SERVER, header.client), []


def _part(layouts: Sequence[Layout]) -> Part:
    """What clients with these layouts hold together."""
    first = layouts[0]
    also = min((layout.tail for layout in layouts), key=lambda tail: tail.start) if first.tail_at_client else range(0)
    return Part(0, max(len(layout.head) for layout in layouts), bottom=True, top=first.tail_at_client, also=also)


def versions() -> dict[str, str]:
    """The versions of what makes a run's numbers."""
    return {name: version(name) for name in PACKAGES}


def refuse_other_versions(wanted: Mapping[str, str]) -> None:
    """Refuse to work with packages of other versions than the driver's.

    Raises:
        CutlayerError: some are.
    """
    here = versions()
    if wrong := [f"{name} {here[name]} and not {want}" for name, want in wanted.items() if here[name] != want]:
        raise CutlayerError(f"An actor has {', '.join(wrong)}. All nodes of a run need the same versions.")


def packed(groups: Mapping[str, Sequence[Example]]) -> bytes:
    """Examples by group, as safetensors."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for group, rows in groups.items():
        for field in FIELDS:
            values = [getattr(row, field) for row in rows]
            arrays[f"{field}/sizes/{group}"] = _whole([-1 if value is None else len(value) for value in values])
            arrays[f"{field}/{group}"] = _whole([number for value in values for number in value or ()])
        arrays[f"label/{group}"] = _whole([-1 if row.label is None else row.label for row in rows])
    return save(arrays)


def unpacked(data: bytes) -> dict[str, list[Example]]:
    """Examples by group, as they were before ``packed``."""
    arrays = load(data)
    groups = [name.removeprefix("label/") for name in arrays if name.startswith("label/")]
    return {group: _rows(arrays, group) for group in groups}


def _rows(arrays: Mapping[str, np.ndarray[Any, Any]], group: str) -> list[Example]:
    fields: dict[str, list[list[int] | None]] = {}
    for field in FIELDS:
        sizes, values = arrays[f"{field}/sizes/{group}"], arrays[f"{field}/{group}"].tolist()
        ends = np.cumsum(np.maximum(sizes, 0)).tolist()
        fields[field] = [
            None if size < 0 else values[end - size : end] for size, end in zip(sizes.tolist(), ends, strict=True)
        ]
    labels = [None if label < 0 else label for label in arrays[f"label/{group}"].tolist()]
    return [
        Example(ids or [], targets, label, positions)
        for ids, targets, label, positions in zip(
            fields["input_ids"], fields["labels"], labels, fields["position_ids"], strict=True
        )
    ]


def _whole(numbers: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.array(numbers, dtype=np.int64)
