"""The gradients of a client's examples one by one, for a defense that bounds what each of them does to the weights.

Each row of a micro-batch passes head and tail by itself. That is the work of the whole micro-batch in as many smaller
pieces (so it is slower), and until they are summed there are as many copies of the gradients of what the client trains
as the micro-batch has rows. What others do with the hidden states between head and tail, they do with all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cutlayer.models.segment import Segment
from cutlayer.models.slots import Key, Slot
from cutlayer.parties._tail import TailResult, TailWork, run_tail
from cutlayer.parties.defending import Defending, Passing
from cutlayer.parties.memory import Watch
from cutlayer.seeds import derive
from cutlayer.values import IGNORE, Batch

Gradients = dict[str, Tensor]


@dataclass
class _Rows:
    """A micro-batch on its way: of each row what the head gave [1,T,H], on a graph of its own, and its gradients."""

    outputs: list[Tensor] = field(default_factory=list)
    joined: Tensor | None = None  # what the head gave for all rows [B,T,H], without their graphs
    gradients: list[Gradients] = field(default_factory=list)


class _Taken:
    """Stands for a slot while one row's gradients are made."""

    def __init__(self, slot: Slot) -> None:
        self._slot, self.params, self.gradients = slot, slot.params, Gradients()

    def collect(self, names: Iterable[str], key: Key, *, weight: float = 1.0) -> None:
        """Take what a backward left at these."""
        self.gradients = self._slot.taken(names)


class ByExample:
    """What a client has of its examples' gradients until those of a step are summed.

    Args:
        slot: gets the sums.
        defending: says what each example counts, and what is added to a sum.
    """

    def __init__(self, slot: Slot, defending: Defending) -> None:
        self._slot, self._defending = slot, defending
        self._open: dict[Key, _Rows] = {}
        self._totals: dict[int, Gradients] = {}  # by step

    def head(self, key: Key, batch: Batch, run: Callable[[Batch, int], Tensor]) -> Tensor:
        """Step 2: the head's output [B,T,H], a leaf of the graph above it; ``run`` gives that of rows with a seed."""
        rows = self._open[key] = _Rows()
        rows.outputs = [run(row_of(batch, row), row) for row in range(len(batch.input_ids))]
        wanted = any(output.requires_grad for output in rows.outputs)
        rows.joined = torch.cat([output.detach() for output in rows.outputs]).requires_grad_(wanted)
        return rows.joined

    def tail(
        self, segment: Segment, work: TailWork, passing: Passing, *, seed: int, watch: Watch
    ) -> TailResult:  # fmt: skip
        """Step 6: as of the whole micro-batch, but for the last bits of its sums."""
        rows = self._open.setdefault((work.client, work.step, work.micro), _Rows())
        loss, gradients = 0.0, []
        for row in range(len(work.labels)):
            own, taken = _row_of_work(work, row), _Taken(self._slot)
            part = replace(passing, batch=row_of(passing.batch, row), records=passing.records[row : row + 1], part=row)
            done = run_tail(
                segment, taken, own, seed=derive(seed, row) if row else seed, slot_weight=1.0, watch=watch,
                instead=self._defending.coefficients(part), entering=self._defending.entering(part),
            )  # fmt: skip
            assert done.gradient is not None
            loss += done.loss
            gradients.append(done.gradient)
            rows.gradients.append(taken.gradients)
        return TailResult(loss, torch.cat(gradients))

    def head_backward(self, key: Key, names: Iterable[str]) -> None:
        """Step 10: on from the gradient that has reached the head's output, row by row; the head must be entered."""
        rows, names = self._open[key], list(names)
        assert rows.joined is not None
        assert rows.joined.grad is not None
        for row, output in enumerate(rows.outputs):
            torch.autograd.backward([output], [rows.joined.grad[row : row + 1]])
            taken = self._slot.taken(names)
            if row < len(rows.gradients):
                rows.gradients[row] = _sum(rows.gradients[row], taken)
            else:
                rows.gradients.append(taken)

    def close(self, key: Key, *, to_sum: float, tokens: int, last: bool, weight: float) -> None:
        """Step 10: add up a micro-batch's examples, and with the step's last one give the slot the sum.

        Args:
            key: of the micro-batch.
            to_sum: what its gradients are multiplied by to be those of the sum over label tokens.
            tokens: the step's label tokens.
            last: whether it is the step's last.
            weight: of the step in the slot.
        """
        step, rows = key[1], self._open.pop(key, _Rows())
        rows.outputs, rows.joined = [], None
        total = self._totals.setdefault(step, {})
        if any(rows.gradients):
            norms = to_sum * torch.stack([_norm(gradients) for gradients in rows.gradients])
            for share, gradients in zip(self._defending.shares(norms).tolist(), rows.gradients, strict=True):
                for name, gradient in gradients.items():
                    scaled = gradient.float() * (share * to_sum)
                    total[name] = total[name] + scaled if name in total else scaled
        if last:
            self._slot.add(self._finished(step, tokens), key=key, weight=weight)

    def _finished(self, step: int, tokens: int) -> Gradients:
        """A step's sum, as it is to be used: of the mean over label tokens."""
        total = self._defending.stirred(self._totals.pop(step), step)
        kinds = {name: parameter.dtype for name, parameter in self._slot.params.items()}
        return {name: (gradient / max(1, tokens)).to(kinds[name]) for name, gradient in total.items()}

    def abort(self) -> None:
        """Forget all of it."""
        self._open.clear()
        self._totals.clear()


def row_of(batch: Batch, row: int) -> Batch:
    """One row of a batch, as long as the batch is."""
    at = slice(row, row + 1)
    mask, positions, labels = batch.attention_mask, batch.position_ids, batch.labels[at]
    return Batch(
        batch.input_ids[at], None if mask is None else mask[at], None if positions is None else positions[at], labels,
        int(mask[at].sum()) if mask is not None else batch.input_ids.shape[1], _counted(labels),
    )  # fmt: skip


def _row_of_work(work: TailWork, row: int) -> TailWork:
    """One row of a tail's work, with its share of the loss."""
    at = slice(row, row + 1)
    mask, positions, labels = work.attention_mask, work.position_ids, work.labels[at]
    counted = _counted(labels)
    return replace(
        work, hidden=work.hidden[at].detach(), attention_mask=None if mask is None else mask[at],
        position_ids=None if positions is None else positions[at], labels=labels, label_tokens=counted,
        weight=work.weight * counted / max(1, work.label_tokens),
    )  # fmt: skip


def _counted(labels: Tensor) -> int:
    return int((labels[:, 1:] != IGNORE).sum()) if labels.dim() == 2 else len(labels)


def _norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """The L2 norm of all of an example's gradients together, in float64."""
    parts = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients.values()]
    found: Tensor = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device) for part in parts]))
    return found


def _sum(one: Gradients, other: Gradients) -> Gradients:
    return {**one, **{name: one[name] + other[name] if name in one else other[name] for name in other}}
