"""The clients' batches as one real batch at the trunk: padded to one length, with a table of whose rows are where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutlayer.contracts import IGNORE, How, Parcel
from cutlayer.joint import Meeting, Weighing, portions

if TYPE_CHECKING:
    from cutlayer.driver import Run

JOINT = "all clients"  # whose batch it is, in frames; a name that no client can have


@dataclass(frozen=True)
class _Piece:
    """Where a client's [B,T,...] lies in the joint batch."""

    rows: slice
    columns: slice

    def of(self, tensor: Tensor) -> Tensor:
        return tensor[self.rows, self.columns].contiguous()


@dataclass(frozen=True)
class _Brought:
    """What a client brings: a parcel, how it is to be worked on, and the stop as this client meets it."""

    parcel: Parcel
    how: How
    stop: Any


class Concatenation:
    """One joint step of some clients: at each micro-batch they are a single batch for the trunk.

    The joint loss is the sum of c_i times the clients' own mean losses; what goes back to a client is the gradient of
    its own, that is its slice divided by c_i.
    """

    def __init__(self, run: Run, clients: Sequence[str], by: Weighing) -> None:
        self.run, self.by = run, by
        self.step = run.counters.steps[clients[0]]
        self.there = Meeting[_Brought, Parcel](clients, run.clock, "the concatenated forward")
        self.back = Meeting[_Brought, Parcel](clients, run.clock, "the concatenated backward")
        self._shares: dict[str, float] = {}  # c_i: of all that are there at the first micro-batch
        self._pieces: dict[int, dict[str, _Piece]] = {}  # by micro-batch, between forward and backward

    def wrap(self, stop: Any, client: str) -> Slice:
        """The stop as this client's step meets it."""
        return Slice(self, stop, client)

    def leave(self, client: str) -> None:
        """The client has no more micro-batches in this step (or is lost)."""
        self.there.leave(client)
        self.back.leave(client)

    async def forward(self, brought: Mapping[str, _Brought]) -> Mapping[str, Parcel]:
        """Steps 4 and 5 for all."""
        first = next(iter(brought.values()))
        joint, pieces = self._joined({name: one.parcel for name, one in brought.items()})
        out = await first.stop.forward(joint, first.how)
        self._pieces[joint.header.micro] = pieces
        header, hidden = out.header, out.tensors["hidden"]
        return {name: _to(name, one, header, [pieces[name].of(hidden)]) for name, one in brought.items()}

    async def backward(self, brought: Mapping[str, _Brought]) -> Mapping[str, Parcel]:
        """Steps 8 and 9 for all. A client that was lost since the forward has no gradient."""
        first = next(iter(brought.values()))
        headers = {name: one.parcel.header for name, one in brought.items()}
        pieces = self._pieces.pop(first.parcel.header.micro)
        weights = self._weights({n: float(h.value("step_tokens")) for n, h in headers.items()})
        given = {name: one.parcel.tensors["hidden"] for name, one in brought.items()}
        like = next(iter(given.values()))
        rows, columns = max(p.rows.stop for p in pieces.values()), max(p.columns.stop for p in pieces.values())
        gradient = like.new_zeros(rows, columns, like.shape[2])
        for name, own in given.items():
            gradient[pieces[name].rows, pieces[name].columns] = own * weights[name]
        header = headers[next(iter(headers))].but(
            client=JOINT, sender=JOINT, step=self.step, values={"last": all(h.value("last") for h in headers.values())}
        )
        out = await first.stop.backward(Parcel(header, [gradient]), first.how)
        return {name: self._own(name, one, out, pieces[name], weights[name], {}) for name, one in brought.items()}

    async def tail_step(self, brought: Mapping[str, _Brought]) -> Mapping[str, Parcel]:
        """Step 4 of the two-part split for all: the labels have masses, c_i over the client's label tokens."""
        first = next(iter(brought.values()))
        headers = {name: one.parcel.header for name, one in brought.items()}
        counts = {name: float(header.value("step_tokens")) for name, header in headers.items()}
        weights = self._weights(counts)
        joint, pieces = self._joined({name: one.parcel for name, one in brought.items()})
        tensors = joint.tensors
        labels = tensors["labels"].to(torch.int64)
        masses = torch.zeros(labels.shape)
        for name, piece in pieces.items():
            where = piece.rows if labels.dim() == 1 else (piece.rows, piece.columns)
            masses[where] = weights[name] / counts[name] if counts[name] else 0.0
        masses = masses.masked_fill(labels == IGNORE, 0.0)
        tensors |= {"labels": labels.unsqueeze(-1), "masses": masses.unsqueeze(-1)}
        header = joint.header.but(names=tuple(tensors))
        out = await first.stop.tail_step(Parcel(header, list(tensors.values())), first.how)
        losses = out.tensors["row_losses"]
        given = {}
        for name, one in brought.items():
            share = weights[name]
            loss = float(losses[pieces[name].rows].sum()) / share if share else 0.0
            given[name] = self._own(name, one, out, pieces[name], share, {"loss": loss})
        return given

    def _weights(self, step_tokens: Mapping[str, float]) -> Mapping[str, float]:
        """Each client's c_i, by all that it will bring in this step."""
        self._shares = self._shares or portions(self.run, step_tokens, self.by)
        return self._shares

    def _joined(self, parcels: Mapping[str, Parcel]) -> tuple[Parcel, dict[str, _Piece]]:
        """The joint batch: hidden [sum B_i, max T_i, H], with mask, positions and labels extended to it."""
        data = self.run.config.data
        every = {name: parcel.tensors for name, parcel in parcels.items()}
        shapes = {name: tensors["hidden"].shape for name, tensors in every.items()}
        length = max(shape[1] for shape in shapes.values())
        pieces: dict[str, _Piece] = {}
        row = 0
        for name, shape in shapes.items():
            start = length - shape[1] if data.padding_side == "left" else 0
            pieces[name] = _Piece(slice(row, row + shape[0]), slice(start, start + shape[1]))
            row += shape[0]
        uneven = any(shape[1] < length for shape in shapes.values())
        first = next(iter(every.values()))
        joint = {"hidden": first["hidden"].new_zeros(row, length, first["hidden"].shape[2])}
        if not data.packing and (uneven or any("mask" in tensors for tensors in every.values())):
            joint["mask"] = torch.zeros(row, length, dtype=torch.bool)
        left = data.padding_side == "left" and "mask" in joint
        if any("positions" in t for t in every.values()) or (left and self.run.parts.base.anatomy.causal):
            joint["positions"] = torch.zeros(row, length, dtype=torch.int32)
        if "labels" in first:
            of_rows = first["labels"].dim() == 1
            joint["labels"] = torch.full((row,) if of_rows else (row, length), IGNORE, dtype=torch.int32)
        for name, tensors in every.items():
            piece, size = pieces[name], shapes[name][1]
            columns = piece.columns
            joint["hidden"][piece.rows, columns] = tensors["hidden"]
            if "mask" in joint:
                joint["mask"][piece.rows, columns] = tensors.get("mask", torch.tensor(True))
            if "positions" in joint:
                joint["positions"][piece.rows, columns] = tensors.get(
                    "positions", torch.arange(size, dtype=torch.int32)
                )
                if data.packing:  # the padding is an example of its own
                    pad = slice(0, columns.start) if columns.start else slice(columns.stop, length)
                    joint["positions"][piece.rows, pad] = torch.arange(length - size, dtype=torch.int32)
            if "labels" in joint and joint["labels"].dim() == 1:
                joint["labels"][piece.rows] = tensors["labels"]
            elif "labels" in joint:
                joint["labels"][piece.rows, columns] = tensors["labels"]
                if columns.start:  # its first token has now a position before, but it was not predicted at the client
                    joint["labels"][piece.rows, columns.start] = IGNORE
        headers = [parcel.header for parcel in parcels.values()]
        values = {
            **headers[0].values,
            "last": all(header.value("last") for header in headers),
            "needs_gradient": any(header.value("needs_gradient") for header in headers),
        }
        if "labels" in joint:
            values |= {"weight": 1.0} | {
                key: sum(int(h.value(key)) for h in headers) for key in ("tokens", "label_tokens")
            }
        about = headers[0].but(client=JOINT, sender=JOINT, step=self.step, values=values, names=tuple(joint))
        return Parcel(about, list(joint.values())), pieces

    @staticmethod
    def _own(name: str, one: _Brought, out: Parcel, piece: _Piece, share: float, told: Mapping[str, float]) -> Parcel:
        """A client's part of what came back: the gradient of its own mean loss."""
        header, found = out.header, out.tensors.get("hidden")
        header = header.but(values={**header.values, **told})
        if found is None:
            return _to(name, one, header.but(kind="no-gradient", names=()), [])
        own = piece.of(found)
        return _to(name, one, header.but(names=("hidden",)), [own / share if share else torch.zeros_like(own)])


@dataclass(frozen=True)
class Slice:
    """A stop as one client's step meets it: it gives its batch, and gets its rows back."""

    joint: Concatenation
    stop: Any
    client: str

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """With the others."""
        return await self.joint.there.bring(self.client, self._opened(parcel, how), self.joint.forward)

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """With the others."""
        last = bool(parcel.header.value("last"))
        out = await self.joint.back.bring(self.client, self._opened(parcel, how), self.joint.backward)
        return self._after(out, last)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """With the others."""
        last = bool(parcel.header.value("last"))
        out = await self.joint.there.bring(self.client, self._opened(parcel, how), self.joint.tail_step)
        return self._after(out, last)

    async def leave(self, client: str) -> None:
        """The others go on without it."""
        self.joint.leave(client)
        await self.stop.leave(client)

    def _opened(self, parcel: Parcel, how: How) -> _Brought:
        parcel.open()  # here, so that its bytes and seconds are booked on this client's step
        return _Brought(parcel, replace(how, trunk_update=False), self.stop)

    def _after(self, out: Parcel, last: bool) -> Parcel:
        if last:
            self.joint.leave(self.client)
        return out


def _to(name: str, one: _Brought, header: Any, tensors: Sequence[Tensor]) -> Parcel:
    """A parcel for one of the clients, of its own step."""
    asked = one.parcel.header
    return Parcel(header.but(client=name, receiver=name, step=asked.step, turn=asked.turn), tensors)
