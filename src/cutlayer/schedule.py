"""How long a run is for each of its clients, and how its learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from transformers import get_scheduler

from cutlayer.build import Data
from cutlayer.cohorts import foreseen, runs_on
from cutlayer.config import RunConfig
from cutlayer.contracts import Example, Framework
from cutlayer.data.batches import Batches
from cutlayer.presence import Presence

MOST_IDLE = 1000  # rounds in a row without a step, after which a run without a fixed number of them gives up
ENDLESS = 2**31  # more steps than any client will make


@dataclass(frozen=True)
class Told:
    """What a client tells of its data before a run begins: no more than a run needs to know.

    ``length``, the mean tokens of a row, and ``validation_batches`` are told to a planner only, else they are 0.
    """

    examples: int
    label_tokens: int
    steps_per_epoch: int
    evaluation_batches: int
    length: int = 0
    validation_batches: int = 0


def told_of(config: RunConfig, data: Data, name: str, kept: Sequence[Example] = ()) -> Told:
    """What a client with these data tells; ``kept`` are the examples that it validates with."""
    rows, batches = data.train[name], batches_of(config, data, name)
    return Told(
        examples=len(rows),
        label_tokens=sum(example.label_tokens for example in rows),
        steps_per_epoch=batches.steps_per_epoch,
        evaluation_batches=len(chunks(data.evaluation, config.batch_size)),
        length=mean_length(rows) if config.planner else 0,
        validation_batches=len(chunks(kept, config.batch_size)),
    )


def mean_length(rows: Sequence[Example]) -> int:
    """The mean tokens of a row, rounded up; at least 1."""
    return math.ceil(sum(len(row.input_ids) for row in rows) / max(1, len(rows))) or 1


def planned_steps(config: RunConfig, told: Mapping[str, Told]) -> dict[str, int]:
    """How many optimizer steps each client makes at most."""
    kind, count = config.length
    framework: Framework = config.build("framework")
    local = framework.round_steps if not runs_on(config) else ENDLESS
    planned = dict.fromkeys(config.client_names, 0)
    for name in framework.trainers(config.client_names):
        planned[name] = {
            "rounds": min(count * local, ENDLESS),
            "steps": count,
            "epochs": count * told[name].steps_per_epoch,
        }[kind]
    return planned


def foreseen_steps(config: RunConfig, planned: Mapping[str, int], presence: Presence) -> dict[str, int]:
    """How many optimizer steps each client will make: fewer than planned where a round takes only some of them.

    Where clients run on it is those of the slowest; a schedule that needs to know the end is refused there.
    """
    kind, count = config.length
    framework, selection, clients = config.build("framework"), config.build("selection"), list(planned)
    if kind != "rounds":
        last = max(client.leaves or 0 for client in config.client_list)
        stay = foreseen(framework, selection, clients, last, config.seed, presence) if last else {}
        leaving = {c: stay[c] * framework.round_steps for c in clients if presence.clients[c].leaves is not None}
        return {name: min(planned[name], leaving.get(name, planned[name])) for name in clients}
    rounds = foreseen(framework, selection, clients, count, config.seed, presence)
    return {name: rounds[name] * framework.round_steps for name in planned}


def batches_of(config: RunConfig, data: Data, name: str) -> Batches:
    """A client's training schedule."""
    return Batches(
        data.train[name], batch_size=config.batch_size, accumulation=config.gradient_accumulation, seed=config.seed,
        client=name, shuffle=config.data.shuffle, collate=data.collate,
    )  # fmt: skip


def learning_rate(config: RunConfig, total: int) -> Callable[[int], float]:
    """The learning rate, as a multiple of ``optimizer.lr``, by the number of updates that a slot has had."""
    # The run's own rate, as polynomial ends at a rate and not at a part of one.
    probe = torch.optim.SGD([Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    warmup = config.optimizer.warmup_steps(total)
    schedule = get_scheduler(
        config.optimizer.schedule, probe, num_warmup_steps=warmup, num_training_steps=max(total, 1)
    )
    rate: Callable[[int], float] = schedule.lr_lambdas[0]
    return rate


def make_optimizer(config: RunConfig) -> Callable[[list[Parameter]], torch.optim.Optimizer]:
    """Makes the run's optimizer for some parameters."""
    optimizer = config.optimizer
    return lambda params: optimizer.torch_class(params, lr=optimizer.lr, **optimizer.arguments)  # type: ignore[call-arg]


def updates_of(config: RunConfig, framework: Framework, steps: Mapping[str, int], clients: Sequence[str]) -> int:
    """How many optimizer steps a trunk slot will make: one for each step of its clients, or one for all of them."""
    if not framework.pooled and config.mixing is None:
        return sum(steps[client] for client in clients) // framework.branches
    kind, count = config.length
    return count * framework.round_steps if kind == "rounds" else max(steps[client] for client in clients)


def chunks(rows: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Rows in parts of ``size``, in order."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
