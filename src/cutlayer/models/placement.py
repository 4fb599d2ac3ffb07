"""Where a model's weights are: on one device, or block by block over all local GPUs, by Accelerate's device map.

Spread over GPUs, a step passes them one after the other; each block's adapters and optimizer state are where the block
is. Nothing is offloaded to the processor or the disk: hooks that load weights as they are needed would put the base's
own adapters back where a slot has bound others.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from cutlayer.errors import ConfigError, ModelError

MAPS = ("balanced", "sequential")  # equal parts for all GPUs; fill one after the other


def check_map(how: str) -> None:
    """Refuse a map where there is nothing to spread over.

    Raises:
        ConfigError: there are fewer than two GPUs.
    """
    found = torch.cuda.device_count()
    if found < 2:
        raise ConfigError(
            [f"device is '{how}', which spreads a model over several GPUs, but this machine has {found}. Use auto."]
        )


def placed(model: Any, device: str) -> Any:
    """The model on a device, or spread as one of ``MAPS`` says.

    Raises:
        ModelError: the GPUs have no room for it.
    """
    if device not in MAPS:
        return model.to(device)
    return spread(model, device_map(model, device))


def device_map(model: Any, how: str, memory: dict[int | str, int] | None = None) -> dict[str, int | str]:
    """Which module goes to which GPU; no block is divided.

    Args:
        model: on the processor.
        how: one of ``MAPS``.
        memory: bytes by GPU; None asks the GPUs what is free.

    Raises:
        ModelError: the GPUs have no room for it.
    """
    whole = [*(getattr(model, "_no_split_modules", None) or [])]
    room = memory
    if how == "balanced":
        room = get_balanced_memory(model, max_memory=memory, no_split_module_classes=whole)
    elif room is None:
        room = {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    found: dict[str, int | str] = infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole)
    if left := [name for name, place in found.items() if place in ("cpu", "disk")]:
        raise ModelError(
            f"device is '{how}', but the GPUs have no room for {len(left)} parts of the model, for instance "
            f"'{left[0]}'. Take precision: bfloat16, a smaller model, or more GPUs."
        )
    return found


def spread(model: Any, places: dict[str, int | str]) -> Any:
    """The model with each module where ``places`` says, and hooks that bring its inputs there."""
    return dispatch_model(model, device_map=places, force_hooks=True)


def gpus_of(device: str) -> list[int]:
    """The numbers of the GPUs that a device's name stands for; none of the processor."""
    if device in MAPS:
        return list(range(torch.cuda.device_count()))
    if not device.startswith("cuda"):
        return []
    return [int(device.partition(":")[2] or torch.cuda.current_device())]


def peak_bytes(device: str) -> int | None:
    """The most that these GPUs have held, summed; None of the processor."""
    gpus = gpus_of(device)
    return sum(torch.cuda.max_memory_allocated(number) for number in gpus) if gpus else None
