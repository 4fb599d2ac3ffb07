"""What a run lays down for its planner and its adapters: its first cuts, the cost model, the ranks of each slot.

The cuts need no weights: the model's configuration and the tokenised data are enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.nn import Parameter

from cutlayer.build import Data, layouts_of, memory_of, task_of, training_of
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, Example, Layout, Peft, Planner
from cutlayer.costs import BYTES, profile_from, shape_of
from cutlayer.errors import DataError
from cutlayer.models.segment import Base
from cutlayer.planning import Costs, Situation, at_cut
from cutlayer.ranks import pairs, refit
from cutlayer.schedule import mean_length
from cutlayer.seeds import derive


@dataclass(frozen=True)
class Begun:
    """Where a run begins: its cuts, what steps and memory cost, and (``bounds``) the cuts that its planner may give."""

    layouts: dict[str, Layout]
    costs: Costs
    planner: Planner | None = None
    bounds: Mapping[str, range] | None = None


@dataclass(frozen=True)
class Outset:
    """Where a run begins: who holds which blocks, what steps and memory cost, and who trains on which examples.

    ``kept`` are the validation shards, which ``data`` has no more; ``bounds`` the cuts that the planner may give.
    """

    layouts: dict[str, Layout]
    costs: Costs
    data: Data
    kept: Mapping[str, Sequence[Example]]
    planner: Planner | None = None
    bounds: Mapping[str, range] | None = None


def outset(config: RunConfig, model_config: Any, num_blocks: int, data: Data) -> Outset:
    """The cuts that a run begins with: the partition's, or those of its planner.

    Args:
        config: the run.
        model_config: the model's configuration, as Transformers has it.
        num_blocks: of the model.
        data: of all clients.

    Raises:
        DataError: a client has too few examples to keep some back.
        MethodError: a cut does not fit the model, the framework or the clients.
    """
    data, kept = keep_back(config, data)
    lengths = {name: mean_length(rows) for name, rows in data.train.items()}
    examples = {name: len(rows) for name, rows in data.train.items()}
    begun = first_cuts(config, model_config, num_blocks, lengths, examples)
    return Outset(begun.layouts, begun.costs, data, kept, begun.planner, begun.bounds)


def first_cuts(
    config: RunConfig, model_config: Any, num_blocks: int, lengths: Mapping[str, int], examples: Mapping[str, int]
) -> Begun:
    """The cuts that a run begins with, from what is known of the clients' data.

    Args:
        config: the run.
        model_config: the model's configuration, as Transformers has it.
        num_blocks: of the model.
        lengths: by client, the mean tokens of a row.
        examples: by client, those that it trains on.

    Raises:
        MethodError: a cut does not fit the model, the framework or the clients.
    """
    layouts, planner = layouts_of(config, num_blocks), config.build("planner")
    costs = costs_of(config, model_config, lengths)
    if planner is None:
        return Begun(layouts, costs)
    now = situation(costs, num_blocks, layouts, examples)
    bounds, cuts = planner.bounds(now), planner.start(now)
    return Begun({name: at_cut(layout, cuts[name]) for name, layout in layouts.items()}, costs, planner, bounds)


def keep_back(config: RunConfig, data: Data) -> tuple[Data, dict[str, Sequence[Example]]]:
    """Take a validation shard out of each client's examples, as large as the planner asks: drawn from the seed, at
    least one.

    Raises:
        DataError: a client has but one example.
    """
    planner: Planner | None = config.build("planner")
    share = planner.validation if planner else 0.0
    train, kept = dict(data.train), dict[str, Sequence[Example]]()
    for name, rows in data.train.items():
        kept[name] = []
        if share:
            if len(rows) < 2:
                raise DataError(
                    f"Client '{name}' has one example, but planner '{config.planner.name if config.planner else ''}' "
                    "needs one to train on and one to validate on. Give it more data, or take planner: none."
                )
            count = min(len(rows) - 1, max(1, round(share * len(rows))))
            drawn = np.random.default_rng(derive(config.seed, "validation", name)).permutation(len(rows))[:count]
            shard = {int(number) for number in drawn}
            kept[name] = [rows[number] for number in sorted(shard)]
            train[name] = [row for number, row in enumerate(rows) if number not in shard]
    return replace(data, train=train), kept


def costs_of(config: RunConfig, model_config: Any, lengths: Mapping[str, int]) -> Costs:
    """The cost model of a run; a row is as long as the client's rows are in the mean (``lengths``)."""
    profiles = {name: profile_from(config.profile_of(name)) for name in config.client_names}
    return Costs(
        shape=shape_of(model_config, task=task_of(config)), training=training_of(config), rows=config.batch_size,
        micro=config.gradient_accumulation, lengths=lengths,
        profiles={name: profile for name, profile in profiles.items() if profile is not None},
        server=profile_from(config.profiles.get(SERVER, SERVER)), number=BYTES[config.precision],
        holds=memory_of(config),
    )  # fmt: skip


def situation(
    costs: Costs, num_blocks: int, layouts: Mapping[str, Layout], examples: Mapping[str, float], **measured: Any
) -> Situation:
    """What a planner is told now."""
    return Situation(num_blocks, dict(layouts), dict(examples), costs.profiles, costs, **measured)


def slot_ranks(peft: Peft, base: Base, names: Sequence[str], layouts: Sequence[Layout]) -> dict[str, int]:
    """The rank of each factor A of a slot, by the layouts of the clients that use it; empty where all is as injected.

    A trunk that serves several clients may want different ranks of one block; it gets the highest that a client wants
    whose trunk the block is in (of a client's own slot, and of blocks that no trunk trains now: that anybody wants).
    """
    ranks = {}
    for name in pairs(names):
        owner = base.owner(name)
        there = [layout for layout in layouts if owner in layout.middle] or layouts
        wanted = [rank for layout in there if (rank := peft.rank_at(owner, layout)) is not None]
        if wanted:
            ranks[name] = max(wanted)
    return ranks


def at_ranks(base: Base, ranks: Mapping[str, int]) -> dict[str, Parameter]:
    """The start of these adapters at other ranks than injected; ``ranks`` by the name of a factor A."""
    both = pairs(base.initial)
    state = {name: base.initial[name].detach() for a in ranks for name in (a, both[a])}
    return {name: Parameter(tensor) for name, tensor in refit(state, ranks).items()}
