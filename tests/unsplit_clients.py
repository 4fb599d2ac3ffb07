"""References for several clients, in plain Transformers and PEFT, without any of cutlayer's code: one whole model a
client, whose trunk's adapters are one and the same Parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

Batch = dict[str, Tensor]
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer, int], Any]


@dataclass
class Reference:
    """Client and loss of each step, the adapter of each client's model at the end, and the trunk's update count."""

    losses: list[tuple[str, float]]
    states: dict[str, dict[str, Tensor]]
    trunk_updates: int


def sfl_v2(
    folder: Path,
    initial: Path,
    plan: Sequence[str | tuple[str, ...]],
    *,
    batches: Mapping[str, Sequence[Batch]],
    sizes: Mapping[str, int],
    of_client: Callable[[str], bool],
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule | None = None,
    merge_by: Callable[[list[Tensor], list[float]], Tensor] | None = None,
) -> Reference:
    """``plan`` lists whose step comes next, and, as a tuple, who is averaged.

    Args:
        folder: the base model.
        initial: the adapter to start from.
        plan: as above.
        batches: of each client, taken round and round.
        sizes: the weight of each client in an average.
        of_client: whether an adapter's tensor lies in the client's part.
        make_optimizer: for one party's parameters.
        make_schedule: from an optimizer and its number of steps to a learning-rate scheduler.
        merge_by: how to average; by default in float64, clients in the order of their names.
    """
    models = {}
    for client in batches:
        base = AutoModelForCausalLM.from_pretrained(folder)
        base.config.use_cache = False
        models[client] = PeftModel.from_pretrained(base, initial, is_trainable=True).train()
    first = next(iter(models.values()))
    trunk = {n: p for n, p in first.named_parameters() if p.requires_grad and not of_client(n)}
    for model in models.values():  # one trunk for all
        for name, parameter in trunk.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, parameter)
    heads = {c: {n: p for n, p in m.named_parameters() if p.requires_grad and of_client(n)} for c, m in models.items()}
    optimizers = {c: make_optimizer(list(head.values())) for c, head in heads.items()}
    trunk_optimizer = make_optimizer(list(trunk.values()))
    own = {c: sum(entry == c for entry in plan) for c in models}
    schedules = []
    if make_schedule is not None:
        schedules = [make_schedule(trunk_optimizer, sum(own.values()))]
    client_schedules = {c: make_schedule(optimizers[c], own[c]) for c in models} if make_schedule else {}
    done = dict.fromkeys(models, 0)
    losses = []
    for entry in plan:
        if isinstance(entry, tuple):
            total = sum(sizes[c] for c in entry)
            for name in heads[entry[0]]:
                tensors = [heads[c][name].detach() for c in sorted(entry)]
                weights = [sizes[c] / total for c in sorted(entry)]
                mean = (merge_by or _mean)(tensors, weights)
                for client in entry:
                    heads[client][name].data.copy_(mean)
            continue
        batch = batches[entry][done[entry] % len(batches[entry])]
        loss = models[entry](**batch).loss
        loss.backward()
        losses.append((entry, loss.item()))
        for optimizer in (trunk_optimizer, optimizers[entry]):
            optimizer.step()
            optimizer.zero_grad()
        for schedule in (*schedules, *([client_schedules[entry]] if client_schedules else [])):
            schedule.step()
        done[entry] += 1
    states = {c: {n: t.clone() for n, t in get_peft_model_state_dict(m).items()} for c, m in models.items()}
    return Reference(losses, states, sum(done.values()))


def _mean(tensors: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([t.double() * w for t, w in zip(tensors, weights, strict=True)]).sum(0).to(tensors[0].dtype)


def groups_that_hand_on(
    folder: Path,
    initial: Path,
    groups: Sequence[Sequence[str]],
    *,
    rounds: int,
    local_steps: int,
    batches: Mapping[str, Sequence[Batch]],
    sizes: Mapping[str, int],
    make_optimizer: MakeOptimizer,
) -> Reference:
    """A model and an optimizer a group, which its members train in turn; then the mean of the groups, each round.

    The optimizers' states are the groups' own. All groups end with the same adapter, given under the first client.
    """
    models = []
    for _ in groups:
        base = AutoModelForCausalLM.from_pretrained(folder)
        base.config.use_cache = False
        models.append(PeftModel.from_pretrained(base, initial, is_trainable=True).train())
    held = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in models]
    optimizers = [make_optimizer(list(params.values())) for params in held]
    done, losses = dict.fromkeys(batches, 0), []
    weights = [float(sum(sizes[client] for client in group)) for group in groups]
    for _ in range(rounds):
        for model, optimizer, group in zip(models, optimizers, groups, strict=True):
            for client in [client for client in group for _ in range(local_steps)]:
                loss = model(**batches[client][done[client] % len(batches[client])]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append((client, loss.item()))
                done[client] += 1
        for name in held[0]:
            mean = _mean([params[name].detach() for params in held], [w / sum(weights) for w in weights])
            for params in held:
                params[name].data.copy_(mean)
    state = {n: t.clone() for n, t in get_peft_model_state_dict(models[0]).items()}
    return Reference(losses, {groups[0][0]: state}, sum(done.values()))
