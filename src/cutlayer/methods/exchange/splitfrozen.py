"""The client's head stays as it is and only runs forward: no gradient comes down, and each client may have its own cut.

From the paper: the frozen head, adapters at the server only, and a server that goes no further back than to its first
trained block. In the U-shape the tail trains, so that only the gradient of step 9 is saved. Ours: the cache, and that
the adapters of the head's blocks are kept at their start, where they add exactly nothing.

With ``cache`` the server remembers what each sample's head gave, and from a client's second epoch on only the samples'
numbers travel (in the U-shape its tail needs the other legs still). It is kept for each sample without padding, since a
shuffled epoch pads differently; then it differs from the uncached run by rounding, in file order not at all where rows
have one length. It lies in the server's memory and in each checkpoint: examples times tokens times hidden size.

Not here: the pipeline, in which the device runs ahead of the server (family ``overlap``), and its groups of clients
with one cut; with ``psl`` the server takes one client after another and makes one update. A frozen public head makes
it easy to invert what it shows: the attacker has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cutlayer.contracts import IGNORE, End, Exchange, Hop, How, Parcel, State, StepResult, Tail
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.config import RunConfig


@method("exchange", paper="arXiv:2503.18986")
@dataclass
class SplitFrozen(Exchange):
    """A frozen head that only runs forward; nothing is trained below the cut, and no gradient comes down."""

    cache: bool = False  # send each sample's activations once; later epochs send its number

    frozen_head: ClassVar[bool] = True
    _memory: dict[tuple[str, int], dict[str, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def caches(self) -> bool:
        """As the option says."""
        return self.cache

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What is kept without padding cannot be used where the padding matters."""
        if self.cache and config.data.packing:
            yield "keeps samples without padding (cache: true), which data.packing hides. Set one of them to false."
        if self.cache and config.data.padding_side == "left":
            yield (
                "keeps samples without padding (cache: true), but behind data.padding_side: left a row's first token "
                "is predicted from it. Take padding_side: right, or cache: false."
            )

    async def step(
        self, inner: Any, client: End, middle: Sequence[Hop], tail: Tail, *, step: int, micro: int, how: How
    ) -> StepResult:
        """The step as it is, over a head that wants no gradient."""
        start = _Remembering(client, self) if self.cache else client
        result: StepResult = await inner(start, middle, tail, step=step, micro=micro, how=how)
        return result

    def remembers(self, client: str, sample: int) -> bool:
        """Whether the client has shown this sample, in this process or before its checkpoint."""
        return (client, sample) in self._memory

    def completed(self, parcel: Parcel) -> Parcel:
        """What a client sent, with what is known of it in place of what it did not send."""
        header, tensors = parcel.header, parcel.tensors
        samples = tensors.pop("samples").tolist()
        if "hidden" in tensors:
            for row, sample in enumerate(samples):
                self._memory[header.client, sample] = self._row(tensors, row)
        else:
            tensors = self._batch([self._memory[header.client, sample] for sample in samples])
        return Parcel(header.but(names=tuple(tensors)), list(tensors.values()))

    @staticmethod
    def _row(tensors: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
        """One sample of a batch without its padding: hidden [T,H], labels [T] or []."""
        real = tensors["mask"][row] if "mask" in tensors else slice(None)
        kept = {"hidden": tensors["hidden"][row][real].clone()}
        if "labels" in tensors:
            labels = tensors["labels"][row]
            kept["labels"] = (labels[real] if labels.dim() else labels).clone()
        return kept

    def _batch(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Samples as one batch, padded on the right; there it holds zeros, which nobody looks at."""
        sizes = [len(row["hidden"]) for row in rows]
        longest, like = max(sizes), rows[0]["hidden"]
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        hidden = like.new_zeros(len(rows), longest, like.shape[1])
        labels = torch.full((len(rows), longest), IGNORE, dtype=torch.int32)
        for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            mask[number, :size], hidden[number, :size] = True, row["hidden"]
            if "labels" in row and row["labels"].dim():
                labels[number, :size] = row["labels"]
        found = {"hidden": hidden}
        if min(sizes) < longest:
            found["mask"] = mask
        if "labels" in rows[0]:
            found["labels"] = labels if rows[0]["labels"].dim() else torch.stack([row["labels"] for row in rows])
        return found

    def state(self) -> State:
        """All samples, by client and number."""
        return {
            f"{client}/{sample}/{name}": tensor
            for (client, sample), kept in self._memory.items()
            for name, tensor in kept.items()
        }

    def restore(self, state: State) -> None:
        """Know them again."""
        for key, tensor in state.items():
            client, sample, name = key.split("/")
            self._memory.setdefault((client, int(sample)), {})[name] = tensor


class _Remembering:
    """A client's end, whose parcels are completed where they arrive."""

    def __init__(self, end: End, exchange: SplitFrozen) -> None:
        self.end, self.exchange, self.name = end, exchange, end.name

    async def head_forward(self, *, step: int, micro: int, how: How) -> Parcel:
        """Steps 2 and 3."""
        parcel = await self.end.head_forward(step=step, micro=micro, how=how)

        def made() -> tuple[Any, Sequence[Tensor]]:
            return self.exchange.completed(parcel).open()

        return Parcel(make=made)

    async def head_backward(self, parcel: Parcel, how: How) -> StepResult:
        """Step 10."""
        return await self.end.head_backward(parcel, how)
