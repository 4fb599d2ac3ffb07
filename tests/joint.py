"""References for several clients in plain Transformers and PEFT: joint batches, and FedAvg of whole models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

Batch = dict[str, Tensor]
LR = 0.05


def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
    """Plain SGD, with which a mean of updates is the update by the mean."""
    return torch.optim.SGD(params, lr=LR)


def load(folder: Path, adapter: Path) -> Any:
    """The whole model with its adapter."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).train()


def gradients(folder: Path, adapter: Path, batch: Batch) -> dict[str, Tensor]:
    """The gradient of a batch's mean loss, by the adapter file's names."""
    model = load(folder, adapter)
    model(**batch).loss.backward()
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros(()) if g is None else g for n, g in grads.items()}


def fedavg(
    folder: Path,
    initial: Path,
    *,
    rounds: int,
    local_steps: int,
    batches: Mapping[str, Sequence[Batch]],
    sizes: Mapping[str, float],
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> dict[str, Tensor]:
    """FedAvg of unsplit models: local steps of each client, then the weighted mean of all their tensors."""
    models = {client: load(folder, initial) for client in batches}
    params = {c: [p for p in m.parameters() if p.requires_grad] for c, m in models.items()}
    optimizers = {c: make_optimizer(p) for c, p in params.items()}
    done = dict.fromkeys(models, 0)
    total = sum(sizes.values())
    for _ in range(rounds):
        for client, model in models.items():
            for _ in range(local_steps):
                batch = batches[client][done[client] % len(batches[client])]
                model(**batch).loss.backward()
                optimizers[client].step()
                optimizers[client].zero_grad()
                done[client] += 1
        with torch.no_grad():
            for parts in zip(*params.values(), strict=True):
                mean = sum(p.double() * (sizes[c] / total) for p, c in zip(parts, params, strict=True))
                assert isinstance(mean, Tensor)
                for p in parts:
                    p.copy_(mean.float())
    return get_peft_model_state_dict(next(iter(models.values())))
