"""Examples to batches: padding, one client's endless schedule, the train/eval split, and a fingerprint.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cutlayer.contracts import IGNORE, Batch, Example
from cutlayer.errors import DataError
from cutlayer.seeds import derive

R = TypeVar("R")


def collate(examples: Sequence[Example], *, pad_id: int, padding_side: str, causal: bool) -> Batch:
    """One batch, padded to its longest row; ``attention_mask`` is None where nothing is padded.

    Left-padded rows of causal models get positions that count real tokens: the mask's running sum minus one, and 0
    where the mask is 0, as Transformers' ``generate`` makes them. Without padding they are None, which is the same.

    Packed rows keep the positions they have, and ``attention_mask`` stays None, because only then (and only with
    ``use_cache=False``) does Transformers take the borders between examples from the positions. Their padding counts
    from 0 again, and so is an example of its own, which no real token sees and whose labels are ``IGNORE``.

    Args:
        examples: B of them, all with ``labels`` or all with ``label``.
        pad_id: the token to pad with; the mask hides it, so any id of the vocabulary will do.
        padding_side: ``right`` or ``left``.
        causal: whether the model's attention is causal; other models find positions for themselves.
    """
    assert examples
    assert padding_side in ("left", "right")
    sizes = [len(example.input_ids) for example in examples]
    longest = max(sizes)
    packed = any(example.position_ids is not None for example in examples)
    padded = min(sizes) < longest
    # where each row's real tokens stand
    places = [slice(longest - size, longest) if padding_side == "left" else slice(0, size) for size in sizes]

    input_ids_BT = torch.full((len(examples), longest), pad_id)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, (example, place) in enumerate(zip(examples, places, strict=True)):
        input_ids_BT[row, place] = torch.as_tensor(example.input_ids)
        mask_BT[row, place] = 1

    position_ids_BT = None
    if packed:
        position_ids_BT = _packed_positions(examples, places, longest)
    elif padded and causal and padding_side == "left":
        position_ids_BT = (mask_BT.cumsum(-1) - 1).masked_fill(mask_BT == 0, 0)

    labels = _labels(examples, places, longest)
    # Counted as the model's loss counts: behind left padding a row's first token is predicted too, from the padding.
    counted = int((labels[:, 1:] != IGNORE).sum()) if labels.dim() == 2 else len(labels)
    return Batch(
        input_ids=input_ids_BT,
        attention_mask=mask_BT if padded and not packed else None,
        position_ids=position_ids_BT,
        labels=labels,
        tokens=sum(sizes),
        label_tokens=counted,
    )


def _packed_positions(examples: Sequence[Example], places: Sequence[slice], longest: int) -> Tensor:
    positions_BT = torch.empty(len(examples), longest, dtype=torch.int64)
    for row, (example, place) in enumerate(zip(examples, places, strict=True)):
        size = place.stop - place.start
        padding = slice(0, place.start) if place.start else slice(place.stop, longest)
        positions_BT[row, padding] = torch.arange(longest - size)
        own = example.position_ids
        positions_BT[row, place] = torch.arange(size) if own is None else torch.as_tensor(own)
    return positions_BT


def _labels(examples: Sequence[Example], places: Sequence[slice], longest: int) -> Tensor:
    if examples[0].labels is None:
        return torch.tensor([example.label for example in examples])
    labels_BT = torch.full((len(examples), longest), IGNORE)
    for row, (example, place) in enumerate(zip(examples, places, strict=True)):
        assert example.labels is not None
        labels_BT[row, place] = torch.as_tensor(example.labels)
    return labels_BT


class Batches:
    """One client's endless schedule: which rows each optimizer step takes, as a function of the step's number alone.

    An epoch is every example once, in ``ceil(n / batch_size)`` micro-batches of which the last may be smaller. A step
    takes ``accumulation`` of them and never reaches over the end of an epoch, so the last step of an epoch may have
    fewer. With ``shuffle`` each epoch has an order of its own, drawn from (seed, client, epoch); without, file order.
    Nothing is stored between steps but the current epoch's order, so a resumed run asks for the number it is at.

    Args:
        examples: the client's examples; at least one.
        batch_size: examples of one micro-batch.
        accumulation: micro-batches of one optimizer step.
        seed: the run's seed.
        client: the client's name; clients draw different orders.
        shuffle: whether to draw an order.
        collate: makes a batch of a few examples.

    Raises:
        DataError: there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        accumulation: int,
        seed: int,
        client: str,
        shuffle: bool,
        collate: Callable[[Sequence[Example]], Batch],
    ) -> None:
        assert batch_size >= 1
        assert accumulation >= 1
        if not examples:
            raise DataError(f"Client '{client}' has no examples. Give it data, or take it out of the run.")
        self.examples = examples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.client = client
        self.shuffle = shuffle
        self.collate = collate
        self.change: Callable[[Example, int, int], Example] | None = (
            None  # what makes of an example of an epoch its own
        )
        self._order: tuple[int, Sequence[int]] | None = None  # an epoch, and its order

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return math.ceil(math.ceil(len(self.examples) / self.batch_size) / self.accumulation)

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of optimizer step ``number``, counted from 0."""
        epoch = number // self.steps_per_epoch
        return [self.collate([self._example(row, epoch) for row in rows]) for rows in self.rows(number)]

    def _example(self, row: int, epoch: int) -> Example:
        example = self.examples[row]
        return example if self.change is None else self.change(example, row, epoch)

    def rows(self, number: int) -> list[list[int]]:
        """The rows of each micro-batch of optimizer step ``number``."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order = self._order_of(epoch)
        first = within * self.accumulation * self.batch_size
        end = min(first + self.accumulation * self.batch_size, len(order))
        return [list(order[start : min(start + self.batch_size, end)]) for start in range(first, end, self.batch_size)]

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.examples))
        if self._order is None or self._order[0] != epoch:
            generator = np.random.default_rng(derive("order", self.seed, self.client, epoch))
            self._order = epoch, generator.permutation(len(self.examples)).tolist()
        return self._order[1]


def split_eval(rows: Sequence[R], fraction: float, seed: int, shuffle: bool) -> tuple[list[R], list[R]]:
    """The training rows and the evaluation rows, each in file order.

    The evaluation part has ``ceil(fraction * n)`` rows: drawn from the seed with ``shuffle``, the file's last without.

    Raises:
        DataError: one of the parts would be empty.
    """
    # exact: 0.07 * 100 is 7.000000000000001 in floating point, and would give 8
    held_out = math.ceil(Fraction(str(fraction)) * len(rows))
    kept = len(rows) - held_out
    if held_out < 1 or kept < 1:
        raise DataError(
            f"data.eval_fraction {fraction} of {len(rows)} rows leaves {kept} to train on and {held_out} to evaluate. "
            "Both need at least one: change the fraction, add rows, or name a file in data.eval."
        )
    order = np.arange(len(rows))
    if shuffle:
        order = np.random.default_rng(derive("eval split", seed)).permutation(len(rows))
    return [rows[row] for row in sorted(order[:kept])], [rows[row] for row in sorted(order[kept:])]


def fingerprint(examples: Sequence[Example]) -> str:
    """The sha256 of all token ids, labels and positions, in order; the same in every process and on every machine."""
    digest = hashlib.sha256()
    for example in examples:
        for values in (example.input_ids, example.labels, example.position_ids):
            # the length goes first, or [1][2, 3] and [1, 2][3] would be one; -1 is what is not there
            array = np.asarray([-1] if values is None else [len(values), *values], dtype="<i8")
            digest.update(array.tobytes())
        digest.update(np.asarray([example.label is not None, example.label or 0], dtype="<i8").tobytes())
    return digest.hexdigest()
