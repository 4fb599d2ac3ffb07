"""What can be checked of one part of a client's reply. ``judging`` is the module to import."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from cutlayer.errors import WireError
from cutlayer.sketches import Sketch
from cutlayer.values import IGNORE
from cutlayer.wire import Value


class Checks:
    """Each check raises WireError, with what came and what was expected. ``_heard`` is the hook for the words.

    Args:
        name: the client's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._verb = ""  # of the request that is answered

    def _only(
        self, values: Mapping[str, Value], found: Collection[str], values_needed: Collection[str] = (),
        needed: Collection[str] = (), spare: Collection[str] = (), *, values_spare: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Everything that is needed is there, and nothing else but what may be."""
        for what, here, must, may in (
            ("value", values.keys(), values_needed, values_spare), ("tensor", found, needed, spare)
        ):  # fmt: skip
            if lacking := [name for name in must if name not in here]:
                self._fail(f"no {what} '{lacking[0]}'", "one")
            if other := [name for name in here if name not in must and name not in may]:
                self._fail(f"the {what} '{other[0]}'", f"none beside {', '.join([*must, *may]) or 'nothing'}")

    def _whole(self, values: Mapping[str, Value], name: str, most: int) -> None:
        value = values[name]
        if type(value) is not int or not 0 <= value <= most:
            self._fail(f"{name} {value!r}", f"a whole number from 0 to {most}")

    def _number(self, values: Mapping[str, Value], name: str, least: float, most: float) -> None:
        value = values[name]
        if type(value) is not float or not least <= value <= most:
            self._fail(f"{name} {value!r}", f"a number from {least:g} to {most:g}")

    def _flag(self, values: Mapping[str, Value], name: str) -> None:
        if type(values[name]) is not bool:
            self._fail(f"{name} {values[name]!r}", "true or false")

    def _like(self, found: Mapping[str, Tensor], name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        if tuple(found[name].shape) != tuple(shape) or found[name].dtype != dtype:
            self._fail(f"'{name}' as {named(found[name])}", f"{list(shape)} {dtype}")

    def _within(
        self, found: Mapping[str, Tensor], name: str, least: int, end: int, *, ignored: bool = False
    ) -> None:  # fmt: skip
        """Numbers from ``least`` to below ``end``; where they may be ``ignored``, also what marks that."""
        wrong = (found[name] < least) | (found[name] >= end)
        if ignored:
            wrong &= found[name] != IGNORE
        if bool(wrong.any()):
            self._fail(f"'{name}' with {int(found[name][wrong][0])} in it", f"numbers from {least} to {end - 1}")

    def _all_finite(self, values: Mapping[str, Value], found: Mapping[str, Tensor]) -> None:
        """No number is infinite, or none."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                self._diverged(f"{name} {value}")
        for name, tensor in found.items():
            if not finite(tensor):
                self._diverged(f"'{name}' with values that are not finite")

    def _heard(self, came: str) -> str:
        """What came, from whom, and when."""
        return f"Client '{self.name}' answered '{self._verb}' with {came}"

    def _diverged(self, came: str) -> NoReturn:
        raise WireError(
            f"{self._heard(came)}; expected: finite ones. Its training has diverged (lower optimizer.lr, or set "
            "max_grad_norm), or the client misbehaves."
        )

    def _fail(self, came: str, wanted: str) -> NoReturn:
        raise WireError(
            f"{self._heard(came)}; expected: {wanted}. Both ends need the same version of cutlayer; if they have it, "
            "the client misbehaves."
        )


@dataclass(frozen=True)
class Bounds:
    """What a client's batches keep to.

    Args:
        rows: of a micro-batch, at most.
        length: tokens of a row, at most.
        micros: micro-batches of a step, at most.
        hidden: the model's hidden size.
        labels: how many labels there are: the vocabulary, or a classifier's classes.
        causal: whether each token has a label; else each row has.
        dtypes: that hidden states may have.
        sketch: what it tells of its data, where the run's selection asks.
    """

    rows: int
    length: int
    micros: int
    hidden: int
    labels: int
    causal: bool
    dtypes: tuple[torch.dtype, ...]
    sketch: Sketch | None = None


class BatchChecks(Checks):
    """Those of a batch that a client shows.

    Args:
        name: the client's.
        bounds: of its batches.
    """

    def __init__(self, name: str, bounds: Bounds) -> None:
        super().__init__(name)
        self.bounds = bounds

    def _batch(self, found: Mapping[str, Tensor], hidden: Tensor, *, most: int = 0) -> tuple[int, int]:
        """Rows and length of a batch that is shown, with all that stands beside its hidden states."""
        most = most or self.bounds.rows
        if hidden.dim() != 3 or hidden.dtype not in self.bounds.dtypes:
            types = " or ".join(map(str, self.bounds.dtypes))
            self._fail(f"'hidden' as {named(hidden)}", f"[rows, length, {self.bounds.hidden}] {types}")
        rows, length, size = hidden.shape
        if not (0 < rows <= most and 0 < length <= self.bounds.length and size == self.bounds.hidden):
            shape = f"at most [{most}, {self.bounds.length}, {self.bounds.hidden}]"
            self._fail(f"'hidden' as {named(hidden)}", f"{shape}, and not empty")
        if "mask" in found:
            self._like(found, "mask", (rows, length), torch.bool)
        if "positions" in found:
            self._like(found, "positions", (rows, length), torch.int32)
            self._within(found, "positions", 0, length)
        if "labels" in found:
            self._like(found, "labels", (rows, length) if self.bounds.causal else (rows,), torch.int32)
            self._within(found, "labels", 0, self.bounds.labels, ignored=self.bounds.causal)
        return rows, length

    def _counts(self, values: Mapping[str, Value], rows: int, length: int, labels: Tensor | None) -> None:
        """Token counts, and in the two-part split the share of the step's."""
        most = rows * length
        self._whole(values, "tokens", most)
        self._whole(values, "label_tokens", most if self.bounds.causal else rows)
        if labels is not None:
            counted = int((labels[:, 1:] != IGNORE).sum()) if labels.dim() == 2 else len(labels)
            if values["label_tokens"] != counted:
                self._fail(f"label_tokens {values['label_tokens']}", f"{counted}, as there are")
        if "weight" in values:
            self._number(values, "weight", 0.0, 1.0)
        if "step_tokens" in values:
            self._whole(values, "step_tokens", self.bounds.micros * self.bounds.rows * self.bounds.length)
            if int(values["step_tokens"]) < int(values["label_tokens"]):
                self._fail(f"step_tokens {values['step_tokens']}", f"at least label_tokens {values['label_tokens']}")


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are: in one pass, without another tensor of its size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(float(end)) for end in tensor.aminmax())


def named(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
