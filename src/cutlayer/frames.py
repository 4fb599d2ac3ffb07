"""The most that a frame of a run can hold, so that neither end takes a larger one: what is too large is refused before
any memory is asked for it."""

from __future__ import annotations

from typing import Any

from cutlayer.build import task_of, training_of
from cutlayer.config import RunConfig
from cutlayer.costs import BYTES, Training
from cutlayer.shapes import ModelShape, shape_of
from cutlayer.wire import Limits

SLACK, LEAST = 1.25, 1 << 20  # times what is computed, and bytes
PLACE = 3 * 8  # bytes of what stands beside a token's hidden state, at most: label, position, padding
STATE = 4 + 3 * 4  # bytes of a trained number and of what an optimizer keeps for it, at most


def limits_of(config: RunConfig, model_config: Any) -> Limits:
    """The limits of a run's frames, the same at both ends.

    A frame is a batch on its way (a row for each padded token: hidden state, and what stands beside it) or the trained
    tensors of the model with their optimizer's state. Replay shows rows of many batches at once, so its frames keep the
    general limit.

    Args:
        config: the run.
        model_config: the model's configuration.

    Raises:
        ModelError: the model cannot be cut.
    """
    if getattr(config.build("framework"), "replay", False):
        return Limits()
    shape = shape_of(model_config, task=task_of(config))
    length = max(config.data.max_length, *(config.data_of(name).max_length for name in config.client_names))
    copies = 1 + 2 * config.build("exchange").probes
    batch = config.batch_size * length * (copies * shape.hidden * BYTES[config.precision] + PLACE)
    state = _trained(config, shape) * STATE
    return Limits(body_bytes=LEAST + int(SLACK * max(batch, state)))


def _trained(config: RunConfig, shape: ModelShape) -> int:
    """How many numbers are trained at most, whoever holds them."""
    if training_of(config).full:
        return shape.params + shape.shared  # two parties may hold a tied tensor
    options = vars(config.build("peft"))
    ranks = [number for name, value in options.items() if "rank" in name for number in _numbers(value)]
    if not ranks:
        return shape.params + shape.shared  # adapters of another kind: as many as all weights, at most
    rank = max(ranks)
    around = 2 * rank * (shape.vocab + shape.hidden)  # adapters of the embedding and the head
    return Training(rank=rank).adapter_params(shape, range(shape.num_blocks)) + around


def _numbers(value: object) -> list[int]:
    """The whole numbers in an option, however deep."""
    if isinstance(value, dict):
        return _numbers(list(value.values()))
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, int) else []
