"""How fast this machine trains a part of a model: the numbers of a profile, measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutlayer.build import task_of, training_of
from cutlayer.config import RunConfig
from cutlayer.costs import Work, shape_of
from cutlayer.errors import MethodError
from cutlayer.models.families import number_of_blocks
from cutlayer.models.loading import Part, device_named, load_config, load_model
from cutlayer.models.segment import Base, Segment
from cutlayer.models.slots import Slot, new_params
from cutlayer.profiles import GB

WARM_UP = 2  # steps before the clock runs: allocation, compilation of kernels


@dataclass(frozen=True)
class Measured:
    """What a device does in a step of some blocks.

    ``forward`` and ``backward`` are the median seconds of a step of ``rows`` [B] of ``length`` [T] tokens through
    ``blocks`` blocks; ``flops`` the FLOP of the cost model (section 2) for both, divided by their seconds; ``spread``
    the interquartile range of the steps' seconds as a share of the median; ``memory`` the device's free bytes.
    """

    device: str
    blocks: int
    rows: int
    length: int
    forward: float
    backward: float
    flops: float
    spread: float
    memory: int

    def profile(self) -> dict[str, float]:
        """The keys of a run file's ``profile`` that can be measured on one machine: its link is not among them."""
        return {"flops": float(f"{self.flops:.3g}"), "memory_gb": float(f"{self.memory / GB:.3g}")}


def measure(config: RunConfig, *, blocks: int | None = None, length: int | None = None, steps: int = 10) -> Measured:
    """Train some blocks of the run's model on this machine, and time it.

    Only these blocks' weights are read. The batch is of random hidden states: what a block computes does not depend on
    their values.

    Args:
        config: the run; its model, adapter, precision, batch size and device count.
        blocks: how many of the first blocks; by default those of the first client's head, at least one.
        length: tokens a row; by default ``data.max_length``, or as many positions as the model has.
        steps: how many are timed.

    Raises:
        MethodError: the model has fewer blocks, or none of them has an adapter.
    """
    shape_config, device = load_config(config.model), device_named(config.device)
    total = number_of_blocks(shape_config)
    if blocks is None:
        options = config.partition_spec(config.client_names[0]).options
        blocks = min(total, max(1, int(options.get("head_blocks", 1))))
    if not 1 <= blocks <= total:
        raise MethodError(f"blocks is {blocks}, but '{config.model}' has {total}. Give a number from 1 to {total}.")
    positions = getattr(shape_config, "max_position_embeddings", None) or config.data.max_length
    length = min(length or config.data.max_length, positions)
    rows, task = config.batch_size, task_of(config)
    part = Part(0, blocks, bottom=False, top=False)
    model, anatomy = load_model(
        config.model, task=task, precision=config.precision, attn_implementation=config.attn_implementation,
        device=device, seed=config.seed, part=part,
    )  # fmt: skip
    base: Base = config.build("peft").prepare(model, anatomy, task=task, seed=config.seed)
    segment = base.segment("trunk", range(blocks))
    if not segment.names:
        raise MethodError(f"The first {blocks} blocks have nothing to train. Raise blocks, or look at peft.targets.")
    slot = Slot("profile", new_params(base.initial, segment.names), lambda p: torch.optim.SGD(p, lr=0.0))
    shape = shape_of(shape_config, task=task)
    hidden = torch.randn(rows, length, shape.hidden, device=device, dtype=next(model.parameters()).dtype)
    timer = _Timer(device)
    for number in range(WARM_UP + steps):
        timer.keep = number >= WARM_UP
        _step(segment, slot, hidden, timer)
    work = Work(shape, length=length, training=training_of(config))
    flop = rows * length * (work.forward(range(blocks)) + work.backward(range(blocks), input_gradient=True))
    both = [f + b for f, b in zip(timer.found["forward"], timer.found["backward"], strict=True)]
    middle = statistics.median(both)
    return Measured(
        device=device, blocks=blocks, rows=rows, length=length, forward=statistics.median(timer.found["forward"]),
        backward=statistics.median(timer.found["backward"]), flops=flop / middle, spread=_spread(both, middle),
        memory=free_memory(device),
    )  # fmt: skip


def _step(segment: Segment, slot: Slot, hidden: Tensor, timer: _Timer) -> None:
    """Forward and backward of a batch [B,T,H], each timed; what it gives for gradients is forgotten."""
    leaf = hidden.clone().requires_grad_()
    out = timer.run("forward", lambda: segment.forward(slot.params, hidden=leaf, seed=0))
    with segment.entered(slot.params):
        timer.run("backward", lambda: torch.autograd.backward(out, torch.ones_like(out)))
    slot.collect(segment.names, ("profile", 0, 0))
    slot.drop("profile")


class _Timer:
    """Seconds of work, waiting for an accelerator to finish it."""

    def __init__(self, device: str) -> None:
        self.device, self.keep = device, True
        self.found: dict[str, list[float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        self._settle()
        before = time.perf_counter()
        out = work()
        self._settle()
        if self.keep:
            self.found.setdefault(name, []).append(time.perf_counter() - before)
        return out

    def _settle(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def _spread(values: Sequence[float], middle: float) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def free_memory(device: str) -> int:
    """The bytes that a run may still take on a device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    pages: int = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else os.sysconf("SC_PHYS_PAGES")
    free = pages * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # counts what the file cache would give back
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return free
    return free
