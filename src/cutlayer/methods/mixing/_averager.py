"""The party between a group of clients and the server: it averages what goes up, and deals out what comes down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.contracts import IGNORE

Tensors = Mapping[str, Tensor]  # what one client sent, by name


@dataclass(frozen=True)
class Piece:
    """Where a client's [B,T,...] lies in the average: its first rows, repeated to fill it, and its columns."""

    rows: Tensor  # [rows of the average]: which of the client's rows is there
    columns: slice

    def own(self, tensor: Tensor) -> Tensor:
        """The client's own rows and columns of a tensor of the average's shape."""
        count = int(self.rows.max()) + 1
        return tensor[:count, self.columns].contiguous()

    def pulled_back(self, gradient: Tensor) -> Tensor:
        """The gradient of what the client sent, of which some rows were used more than once."""
        found = gradient.new_zeros(int(self.rows.max()) + 1, *gradient[:, self.columns].shape[1:])
        return found.index_add_(0, self.rows, gradient[:, self.columns])


class Averager:
    """Averages of one group of clients; it knows everything that they send.

    Args:
        shares: by client, summing to 1.
        left: batches are padded on the left.
        causal: the model's attention is causal, so that such batches need positions.
    """

    def __init__(self, shares: Mapping[str, float], *, left: bool, causal: bool) -> None:
        self.shares, self.left, self.causal = dict(shares), left, causal
        self.pieces: dict[str, Piece] = {}  # of the step that is being made

    def activations(self, sent: Mapping[str, Tensors]) -> dict[str, Tensor]:
        """The averaged hidden states [B,T,H] with a mask and positions; labels become a sparse distribution.

        Clients' batches are padded to one length with zeros. A client with fewer rows brings its first ones again, with
        labels that do not count, so that no row of another goes up alone.
        """
        shapes = {name: tensors["hidden"].shape for name, tensors in sent.items()}
        rows, length = (max(shape[axis] for shape in shapes.values()) for axis in (0, 1))
        self.pieces = {}
        for name, shape in shapes.items():
            start = length - shape[1] if self.left else 0
            self.pieces[name] = Piece(torch.arange(rows) % shape[0], slice(start, start + shape[1]))
        first = next(iter(sent.values()))
        hidden = first["hidden"].new_zeros(rows, length, first["hidden"].shape[2])
        mask = torch.zeros(rows, length, dtype=torch.bool)
        for name, tensors in sent.items():
            piece = self.pieces[name]
            hidden[:, piece.columns] += self.shares[name] * tensors["hidden"][piece.rows]
            mask[:, piece.columns] |= tensors["mask"][piece.rows] if "mask" in tensors else True
        found = {"hidden": hidden}
        if not mask.all():
            found["mask"] = mask
            if self.left and self.causal:
                found["positions"] = (mask.cumsum(-1) - 1).clamp(min=0).to(torch.int32)
        if "labels" in first:
            found |= self._labels({name: tensors["labels"] for name, tensors in sent.items()}, rows, length)
        return found

    def _labels(self, sent: Mapping[str, Tensor], rows: int, length: int) -> dict[str, Tensor]:
        """At each position the labels that some client has, sorted, each once, with their shares: [B,T,K], or [B,K].

        Sorted, so that with equal shares the server cannot tell whose a label is. The masses sum to 1 over the batch.
        """
        ids, masses = [], []
        for name, labels in sent.items():
            shape = (rows,) if labels.dim() == 1 else (rows, length)
            every = torch.full(shape, IGNORE, dtype=torch.int64)
            columns = self.pieces[name].columns
            if labels.dim() == 1:
                every[: len(labels)] = labels
            else:
                every[: len(labels), columns] = labels.to(torch.int64)
                if columns.start:  # its first token has now a position before, but it was not predicted at the client
                    every[:, columns.start] = IGNORE
                every[:, 0] = IGNORE  # nothing stands before, so it is not predicted either
            ids.append(every)
            masses.append((every != IGNORE) * self.shares[name])
        labels_K, order = torch.stack(ids, -1).sort(-1)
        masses_K = torch.stack(masses, -1).gather(-1, order)
        for k in range(1, labels_K.shape[-1]):
            same = labels_K[..., k] == labels_K[..., k - 1]
            masses_K[..., k] += masses_K[..., k - 1] * same
            masses_K[..., k - 1] *= ~same
        total = float(masses_K.sum())
        return {"labels": labels_K.to(torch.int32), "masses": (masses_K / total if total else masses_K).float()}

    def gradients(self, sent: Mapping[str, Tensor]) -> Tensor:
        """The gradient of the joint loss at what the server gave to all: the weighted sum of the clients' own."""
        like = next(iter(sent.values()))
        rows = len(next(iter(self.pieces.values())).rows)
        found = like.new_zeros(rows, max(piece.columns.stop for piece in self.pieces.values()), like.shape[2])
        for name, gradient in sent.items():
            found[: len(gradient), self.pieces[name].columns] += self.shares[name] * gradient
        return found

    def dealt(self, gradient: Tensor, client: str) -> Tensor:
        """A client's share of the gradient of the average."""
        return self.shares[client] * self.pieces[client].pulled_back(gradient)
