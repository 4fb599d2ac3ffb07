"""Step 1, partition: from a checked configuration to parties that are ready to be driven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import Parameter
from transformers import get_scheduler

from cutlayer import registry
from cutlayer.config import RunConfig
from cutlayer.contracts import Batch, Example, Layout
from cutlayer.data.batches import Batches, collate, fingerprint, split_eval
from cutlayer.data.formats import label_names, pack, tokenize
from cutlayer.data.sources import load_rows
from cutlayer.errors import ConfigError, DataError, ModelError
from cutlayer.models.arena import Arena
from cutlayer.models.families import UNPACKED
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.models.loading import load_model, load_tokenizer
from cutlayer.models.segment import Base, Segment
from cutlayer.models.slots import Slot, new_params
from cutlayer.parties.client import ClientParty
from cutlayer.parties.trunk import TrunkParty

SHARED = "shared"  # the name of the one trunk slot


@dataclass(frozen=True)
class Data:
    """Tokenised examples by client, those for evaluation, and how batches are made."""

    train: Mapping[str, Sequence[Example]]
    evaluation: Sequence[Example]
    collate: Callable[[Sequence[Example]], Batch]
    num_labels: int | None
    fingerprint: str
    pad_id: int = 0


@dataclass(frozen=True)
class Parts:
    """Everything that a driver drives."""

    base: Base
    layout: Layout
    clients: Mapping[str, ClientParty]
    trunk: TrunkParty
    planned: Mapping[str, int]


def task_of(config: RunConfig) -> Literal["causal", "classification"]:
    """``classification`` for that data format, else ``causal``."""
    return "classification" if config.data.format == "classification" else "causal"


def layout_of(config: RunConfig, num_blocks: int) -> Layout:
    """Who holds which blocks.

    Raises:
        ConfigError: clients have different cuts (no framework here merges them yet).
        MethodError: a cut does not fit the model.
    """
    layouts: dict[str, Layout] = {}
    for name in config.client_names:
        spec = config.partition_spec(name)
        layouts[name] = registry.create("partition", spec.name, spec.options).layout(num_blocks)
    if len(set(layouts.values())) > 1:
        raise ConfigError(
            ["clients have different cuts (head_blocks, tail_blocks); no framework of this version merges them. "
             "Give all clients the same cut."]
        )  # fmt: skip
    return next(iter(layouts.values()))


def prepare_data(config: RunConfig, tokenizer: Any) -> Data:
    """Read, split, divide and tokenise.

    Raises:
        DataError: something about the data is wrong, or a client has no example.
    """
    data, names, task = config.data, config.client_names, task_of(config)
    read = partial(load_rows, columns=data.columns, format=data.format)
    shared = [n for n in names if config.client(n).data is None]
    rows = read(data.train) if shared else []
    own = {}
    for name in names:
        if config.client(name).data is not None:
            theirs = config.data_of(name)
            own[name] = load_rows(theirs.train, columns=theirs.columns, format=theirs.format)
    held_out: Sequence[Mapping[str, Any]] = []
    if data.eval is not None:
        held_out = list(read(data.eval, split="eval"))
    elif data.eval_fraction is not None:
        if not shared:
            raise DataError(
                "data.eval_fraction splits data.train, which no client uses. Name an evaluation file in data.eval."
            )
        rows, held_out = split_eval(rows, data.eval_fraction, config.seed, data.shuffle)
    divided = _divide(config, rows, shared) | own
    labels = None
    if task == "classification":
        labels = label_names([row for part in (*divided.values(), held_out) for row in part])
    made = partial(tokenize, tokenizer=tokenizer, task=task, label_names=labels)
    train = {name: made(divided[name], config.data_of(name), where=f"client '{name}'") for name in names}
    evaluation = made(held_out, data, where="the evaluation data") if held_out else []
    if data.packing:
        train = {name: pack(part, data.max_length) for name, part in train.items()}
        evaluation = pack(evaluation, data.max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    together = partial(collate, pad_id=pad or 0, padding_side=data.padding_side, causal=task == "causal")
    prints = [fingerprint(train[name]) for name in names] + [fingerprint(evaluation)]
    return Data(
        train, evaluation, together, len(labels) if labels else None, "-".join(p[:16] for p in prints), pad or 0
    )  # fmt: skip


def _divide(config: RunConfig, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    if not names:
        return {}
    division = config.build("data")
    dealt = division.divide(rows, names, seed=config.seed, shuffle=config.data.shuffle)
    for name in names:
        if not dealt[name]:
            raise DataError(
                f"Client '{name}' gets no example: {len(rows)} rows are divided over {len(names)} clients by "
                f"'{config.data.division.name}'. Use fewer clients, more data or another data.division."
            )
    return {name: [rows[i] for i in dealt[name]] for name in names}


def load_base(config: RunConfig, *, num_labels: int | None, device: str) -> Base:
    """The whole model, once, with its adapters: every simulated party runs its own part of it."""
    task = task_of(config)
    model, anatomy = load_model(
        config.model, task=task, precision=config.precision, attn_implementation=config.attn_implementation,
        num_labels=num_labels, device="cpu", seed=config.seed,
    )  # fmt: skip
    if config.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ModelError(
                f"'{model.config.model_type}' has no gradient checkpointing. Set gradient_checkpointing: false."
            )
        # Transformers 5.23 gave it a new name and deprecated the old one.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if task == "classification" and model.config.pad_token_id is None:
        raise ModelError(
            f"'{config.model}' names no padding token, which a classifier needs to find the end of a text."
        )
    if config.data.packing and (not anatomy.exact or model.config.model_type in UNPACKED):
        raise ModelError(
            f"data.packing needs a family that is known to keep packed examples apart; "
            f"'{model.config.model_type}' is not. Set data.packing: false."
        )
    model.to(device)
    base: Base = config.build("peft").prepare(model, anatomy, task=task, seed=config.seed)
    if not base.initial:
        raise ModelError("Nothing is trained: the adapter matches no layer. Check peft.targets.")
    return base


def _check_fit(config: RunConfig, base: Base, data: Data) -> None:
    """Every token must have an embedding, and every place in a row a position.

    Raises:
        DataError: one has none.
    """
    embedding = base.model.get_input_embeddings()
    known, room = embedding.weight.shape[0], _positions(base)
    if data.pad_id >= known:
        raise DataError(
            f"The tokenizer of '{config.model}' pads with the token number {data.pad_id}, but the model has embeddings "
            f"for 0 to {known - 1} only. Set its pad_token to its eos_token and save it there; padding is masked."
        )
    parts = {**{f"client '{name}'": part for name, part in data.train.items()}, "the evaluation data": data.evaluation}
    for where, part in parts.items():
        for example in part:
            highest = max(example.input_ids)
            if highest >= known:
                raise DataError(
                    f"The text of {where} has the token number {highest}, but '{config.model}' has embeddings for 0 to "
                    f"{known - 1} only: the tokenizer there is not that of the model. Put the right one there."
                )
            if room is not None and len(example.input_ids) > room:
                raise DataError(
                    f"A row of {where} has {len(example.input_ids)} tokens, but '{config.model}' has only {room} "
                    f"positions. Set data.max_length: {room} (it is {config.data.max_length})."
                )


def _positions(base: Base) -> int | None:
    """How many positions a model has learned, or None where it computes them for any length."""
    for path, module in base.model.named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and ("position" in leaf or leaf == "wpe"):
            # OPT leaves the first two unused; RoBERTa counts from the one after its padding.
            unused = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return int(module.num_embeddings - unused)
    return None


def planned_steps(config: RunConfig, data: Data) -> dict[str, int]:
    """How many optimizer steps each client makes at most."""
    kind, count = config.length
    local = config.build("framework").local_steps
    planned = {}
    for name in config.client_names:
        batches = _batches(config, data, name)
        planned[name] = {"rounds": count * local, "steps": count, "epochs": count * batches.steps_per_epoch}[kind]
    return planned


def _batches(config: RunConfig, data: Data, name: str) -> Batches:
    return Batches(
        data.train[name], batch_size=config.batch_size, accumulation=config.gradient_accumulation, seed=config.seed,
        client=name, shuffle=config.data.shuffle, collate=data.collate,
    )  # fmt: skip


def learning_rate(config: RunConfig, total: int) -> Callable[[int], float]:
    """The learning rate, as a multiple of ``optimizer.lr``, by the number of updates that a slot has had."""
    probe = torch.optim.SGD(
        [Parameter(torch.zeros(1))], lr=config.optimizer.lr
    )  # polynomial ends at a rate, not a part
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


def assemble(config: RunConfig, base: Base, data: Data) -> Parts:
    """Cut the base, make the slots and the parties."""
    _check_fit(config, base, data)
    layout = layout_of(config, base.anatomy.num_blocks)
    planned = planned_steps(config, data)
    framework = config.build("framework")
    everything = sum(planned.values())
    head = Segment(base, "head", layout.head, bottom=True)
    tail = Segment(base, "tail", layout.tail, top=True) if layout.tail_at_client else None
    if layout.tail_at_client:
        middle = Segment(base, "trunk", layout.trunk)
    else:
        middle = Segment(base, "tail", layout.tail, top=True)
    make = make_optimizer(config)
    arena = Arena()
    of_trunk = new_params(base.initial, middle.names, arena)
    trunk_slot = Slot(SHARED, of_trunk, make, learning_rate(config, everything), arena)
    trunk = TrunkParty(middle, {SHARED: trunk_slot}, seed=config.seed)
    names = [*head.names, *(tail.names if tail else [])]
    rows = [data.evaluation[i : i + config.batch_size] for i in range(0, len(data.evaluation), config.batch_size)]
    clients = {}
    for name in config.client_names:
        own = everything if framework.travels else planned[name]
        clients[name] = ClientParty(
            name,
            head=head,
            tail=tail,
            slot=Slot(name, new_params(base.initial, names, arena), make, learning_rate(config, own), arena),
            batches=_batches(config, data, name),
            evaluation=[partial(data.collate, part) for part in rows],
            sizes={
                "examples": len(data.train[name]),
                "label_tokens": sum(e.label_tokens for e in data.train[name]),
            },
            seed=config.seed,
        )
    return Parts(base, layout, clients, trunk, planned)


def open_model(config: RunConfig) -> tuple[Any, int]:
    """The model's configuration and number of blocks, before any weight is read; refuses a cut that does not fit."""
    from cutlayer.models.families import number_of_blocks

    found = load_model_config(config.model)
    count = number_of_blocks(found)
    layout_of(config, count)
    return found, count


def tokenizer_of(config: RunConfig) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(config.model)
