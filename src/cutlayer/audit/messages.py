"""The messages of a run as an adversary read them: frames put together to exchanges, one a micro-batch.

Shapes: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.contracts import SERVER
from cutlayer.errors import WireError
from cutlayer.wire import Header, Value

STEPS = ("send_activations", "return_activations", "send_gradients", "return_gradients")
Key = tuple[str, int, int]  # a client, its optimizer step, and the micro-batch


@dataclass(frozen=True)
class Exchange:
    """What crossed the wire in one training micro-batch, as far as the adversary reads it.

    ``tensors`` and ``values`` are by step name; the tensors' names are those of the frames: ``hidden`` [B,T,H],
    ``mask`` [B,T], ``positions`` [B,T], and ``labels`` where the client sends them.
    """

    client: str
    step: int
    micro: int
    tensors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    values: Mapping[str, Mapping[str, Value]] = field(repr=False)

    @property
    def key(self) -> Key:
        """Which micro-batch it is."""
        return self.client, self.step, self.micro

    def hidden(self, step_name: str) -> Tensor:
        """The hidden states, or the gradient, [B,T,H] of a step, in float32.

        Raises:
            WireError: none crossed, or the adversary does not read that step.
        """
        found = self.tensors.get(step_name, {}).get("hidden")
        if found is None:
            raise WireError(f"{self.client}, step {self.step}: no tensor of {step_name} was read.")
        return found.float()

    @property
    def about(self) -> Mapping[str, Tensor]:
        """What came with the activations: ``mask`` and ``positions``."""
        return self.tensors.get("send_activations", {})

    def shuffled(self, generator: torch.Generator) -> Exchange:
        """The same with the positions of each row's real tokens in another order: a control that leaves no order.

        What crossed for a position stays together, so that only its place is lost.
        """
        shape = next(t["hidden"].shape for t in self.tensors.values() if "hidden" in t)
        real = self.about["mask"].bool() if "mask" in self.about else torch.ones(shape[:2], dtype=torch.bool)
        order = torch.arange(shape[1]).repeat(shape[0], 1)
        for row in range(shape[0]):
            places = real[row].nonzero().flatten()
            order[row, places] = places[torch.randperm(len(places), generator=generator)]
        moved = {
            step: {n: t.gather(1, order[..., None].expand_as(t)) if n == "hidden" else t for n, t in found.items()}
            for step, found in self.tensors.items()
        }
        return replace(self, tensors=moved)


def exchanges(
    frames: Iterable[tuple[Any, Header, list[Tensor]]], *, reads: Collection[str], party: str = SERVER
) -> Iterator[Exchange]:
    """The training micro-batches in frames, as a party has them that reads some steps.

    Args:
        frames: as ``wire.read_frames`` gives them.
        reads: names of steps; messages of others are left out.
        party: only frames between it and the client whose batch they are of. What it gets from another party on the
            way is not what the client showed.
    """
    training: dict[tuple[str, int], bool] = {}  # by client and turn, as the request says
    open_: dict[Key, tuple[dict[str, Mapping[str, Tensor]], dict[str, Mapping[str, Value]]]] = {}
    for _, header, tensors in frames:
        if {header.sender, header.receiver} != {party, header.client}:
            continue
        if header.verb:
            training[header.client, header.turn] = bool(header.values.get("graph", header.verb == "probe"))
        if header.step_name not in STEPS or not training.get((header.client, header.turn), False) or not tensors:
            continue
        key = (header.client, header.step, header.micro)
        if header.step_name == STEPS[0] and key in open_:
            yield Exchange(*key, *open_.pop(key))  # the same batch again, in another epoch or after a loss
        if header.step_name in reads:
            found, values = open_.setdefault(key, ({}, {}))
            found[header.step_name] = dict(zip(header.names, tensors, strict=True))
            values[header.step_name] = dict(header.values)
        if header.step_name == STEPS[3] and key in open_:
            yield Exchange(*key, *open_.pop(key))
    for key, parts in open_.items():  # where nothing below the cut is trained, no gradient returns
        yield Exchange(*key, *parts)
