"""A server's cache of old batches: what came from each client and how it was answered, trained on when it is away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from cutlayer.contracts import SERVER, How, Parcel

ASIDE = 1_000_000  # added to the micro-batch's number, so that what is trained beside a batch has a key of its own


@dataclass
class Micro:
    """A micro-batch as the server saw it.

    Tensors: ``hidden`` [B,T,H], ``mask`` and ``positions`` where there are any, and ``labels`` (two-part) or, of the
    trunk's output, ``output`` or ``gradient`` [B,T,H] (U-shape). ``values`` is what its header said besides.
    """

    tensors: dict[str, Tensor]
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class Cache:
    """The newest ``size`` optimizer steps of each client, as lists of micro-batches."""

    size: int
    entries: dict[str, list[list[Micro]]] = field(default_factory=dict)

    def keep(self, client: str, step: list[Micro]) -> None:
        """Add a client's step, in place of its oldest one if there is no room."""
        if self.size:
            self.entries[client] = [*self.entries.get(client, []), step][-self.size :]

    def forget(self, client: str) -> None:
        """Drop all of a client."""
        self.entries.pop(client, None)

    def turn(self, clients: Sequence[str], number: int) -> list[Micro]:
        """The steps of these clients, one after another: that of turn ``number``; empty if there is none."""
        steps = [step for client in clients for step in self.entries.get(client, [])]
        return steps[number % len(steps)] if steps else []

    @property
    def bytes(self) -> int:
        """What it holds."""
        tensors = (t for steps in self.entries.values() for step in steps for m in step for t in m.tensors.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for client, steps in self.entries.items():
            values[client] = [[micro.values for micro in step] for step in steps]
            for i, step in enumerate(steps):
                for j, micro in enumerate(step):
                    tensors |= {f"{client}/{i}/{j}/{name}": tensor for name, tensor in micro.tensors.items()}
        return {"values": values, **tensors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what ``state`` gave."""
        self.entries = {
            client: [
                [Micro(_under(state, f"{client}/{i}/{j}/"), dict(values)) for j, values in enumerate(step)]
                for i, step in enumerate(steps)
            ]
            for client, steps in state["values"].items()
        }


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: found[name] for name in sorted(found)}


class Cached:
    """A stop that keeps what passes it, and trains beside it on an old step of others, whose weight is ``weight``.

    The trunk's gradient is (1 - weight) times that of the client's step and weight times that of the old one; what goes
    back to the client is its own, whole.
    """

    def __init__(
        self, stop: Any, cache: Cache, client: str, beside: Sequence[Micro], weight: float, *, keeps: str
    ) -> None:
        self.stop, self.cache, self.client, self.beside, self.keeps = stop, cache, client, beside, keeps
        self.weight = weight if beside else 0.0
        self.micros: list[Micro] = []

    async def leave(self, client: str) -> None:
        """Nothing waits here."""
        await self.stop.leave(client)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """The server's tail (two-part)."""
        values = parcel.header.values
        told = {name: float(values[name]) for name in ("weight", "label_tokens")}
        self.micros.append(Micro({name: tensor.detach() for name, tensor in parcel.tensors.items()}, told))
        if values["last"]:
            for number, old in enumerate(self.beside):
                about = {"weight": old.values["weight"], "label_tokens": int(old.values["label_tokens"])}
                beside = _aside(parcel, number, old.tensors, about)
                await self.stop.tail_step(beside, self._how(how, self.weight, update=False))
            self.cache.keep(self.client, self.micros)
        out: Parcel = await self.stop.tail_step(parcel, self._how(how, 1 - self.weight))
        return out

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """The trunk's forward (U-shape)."""
        self.micros.append(Micro({name: tensor.detach() for name, tensor in parcel.tensors.items()}))
        out: Parcel = await self.stop.forward(parcel, how)
        if self.keeps == "output":
            self.micros[-1].tensors["output"] = out.tensors["hidden"].detach().cpu().clone()
        return out

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """The trunk's backward (U-shape), with the gradient of its output that the client sends."""
        if self.keeps == "gradient":
            self.micros[-1].tensors["gradient"] = parcel.tensors["hidden"].detach()
        if parcel.header.values["last"]:
            for number, old in enumerate(self.beside):
                shown = {name: t for name, t in old.tensors.items() if name not in ("gradient", "output")}
                aside = self._how(how, self.weight, update=False)
                now = (await self.stop.forward(_aside(parcel, number, shown, {}), aside)).tensors["hidden"]
                gradient = old.tensors["gradient"] if self.keeps == "gradient" else _drift(now, old.tensors)
                await self.stop.backward(_aside(parcel, number, {"hidden": gradient}, {}), aside)
            self.cache.keep(self.client, self.micros)
        out: Parcel = await self.stop.backward(parcel, self._how(how, 1 - self.weight))
        return out

    @staticmethod
    def _how(how: How, weight: float, *, update: bool = True) -> How:
        return replace(how, trunk_update=how.trunk_update and update, trunk_weight=how.trunk_weight * weight)


def _drift(now: Tensor, old: Mapping[str, Tensor]) -> Tensor:
    """The gradient of how far a trunk's output [B,T,H] has moved, |now - old|^2 / (2 |old|^2) over real tokens."""
    before = old["output"].to(now.device)
    moved = now - before
    if "mask" in old:
        real = old["mask"].to(now.device)[..., None]
        moved, before = moved * real, before * real
    return moved / before.square().sum()


def _aside(parcel: Parcel, number: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Parcel:
    """Old tensors as a micro-batch beside that of ``parcel``, of which nobody gets a gradient."""
    header = parcel.header
    told = {**header.values, **values, "last": False, "needs_gradient": False}
    micro = header.micro + ASIDE * (number + 1)
    about = header.but(sender=SERVER, micro=micro, values=told, names=tuple(tensors))
    return Parcel(about, [tensor.clone() for tensor in tensors.values()])
