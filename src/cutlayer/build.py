"""Step 1, partition: from a checked configuration to parties that are ready to be driven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from cutlayer import registry
from cutlayer.config import RunConfig
from cutlayer.contracts import Batch, Example, Framework, Layout, Rows
from cutlayer.costs import Memory, Training, memory
from cutlayer.data.batches import collate, fingerprint, split_eval
from cutlayer.data.classes import classes_of
from cutlayer.data.formats import pack, token_lengths, tokenize
from cutlayer.data.sources import load_rows
from cutlayer.errors import ConfigError, DataError, MethodError, ModelError
from cutlayer.models.heads import Head, head_of
from cutlayer.models.loading import Part, load_model, load_tokenizer
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.models.placement import MAPS, placed
from cutlayer.models.segment import Base
from cutlayer.models.sharing import SharedModels
from cutlayer.profiles import profile_from
from cutlayer.report.division import describe


@dataclass(frozen=True)
class Data:
    """Tokenised examples by client, those for evaluation, and how batches are made."""

    train: Mapping[str, Sequence[Example]]
    evaluation: Sequence[Example]
    collate: Callable[[Sequence[Example]], Batch]
    labels: Sequence[str] | None  # a classifier's classes, in the order of their numbers
    fingerprint: str
    pad_id: int = 0
    division: Mapping[str, Any] | None = None  # who got what, if there are several clients (report/division.py)


def task_of(config: RunConfig) -> Literal["causal", "classification"]:
    """``classification`` for that data format (of all clients, as a check of the run sees to), else ``causal``."""
    name = config.client_names[0]
    return "classification" if config.data_of(name).format == "classification" else "causal"


def layouts_of(config: RunConfig, num_blocks: int) -> dict[str, Layout]:
    """Who holds which blocks, by client.

    Raises:
        MethodError: a cut does not fit the model, or the framework.
    """
    given = {}
    for name in config.client_names:
        spec = config.partition_spec(name)
        given[name] = registry.create("partition", spec.name, spec.options).layout(num_blocks)
    profiles = {name: profile_from(config.profile_of(name)) for name in config.client_names}
    speeds = {name: profile.flops for name, profile in profiles.items() if profile is not None}
    framework: Framework = config.build("framework")
    layouts = dict(framework.layouts(given, num_blocks, speeds if len(speeds) == len(given) else None))
    for client in config.client_list:
        own = [key for key in ("head_blocks", "tail_blocks") if getattr(client, key) is not None]
        if own and layouts[client.name] != given[client.name]:
            options = ", ".join(registry.option_fields(type(framework)))
            raise MethodError(
                f"client '{client.name}' has {' and '.join(own)}, but framework '{config.framework.name}' sets the "
                f"cuts itself: this client's head would have {len(layouts[client.name].head)} of {num_blocks} blocks. "
                f"Leave that out; options of the framework: {options}."
            )
    return layouts


def prepare_data(config: RunConfig, tokenizer: Any, *, head: Callable[[str], Head | None] = head_of) -> Data:
    """Read, split, divide and tokenise; ``head`` says what head a classifier's checkpoint has.

    Raises:
        DataError: something about the data is wrong, or a client has no example.
    """
    data, names = config.data, config.client_names
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
    divided = _divide(config, tokenizer, rows, shared) | own
    return _tokenised(config, tokenizer, {name: divided[name] for name in names}, held_out, head)


def prepare_own(
    config: RunConfig, tokenizer: Any, name: str, *, train: str, held_out: str | None,
    columns: Mapping[str, str] | None = None,
) -> Data:  # fmt: skip
    """Read and tokenise one client's own files, in the form that the run says.

    Args:
        config: the run.
        tokenizer: the model's.
        name: the client's.
        train: its file, glob or Hub data set.
        held_out: what it evaluates on, if anything.
        columns: what its files call the columns, by our name, where that is not what the run says.

    Raises:
        DataError: something about the data is wrong.
    """
    form = config.data_of(name)
    named = {**form.columns, **(columns or {})}
    rows = load_rows(train, columns=named, format=form.format)
    kept = load_rows(held_out, columns=named, format=form.format, split="eval") if held_out else []
    return _tokenised(config, tokenizer, {name: rows}, list(kept))


def _tokenised(
    config: RunConfig, tokenizer: Any, divided: Mapping[str, Sequence[Mapping[str, Any]]],
    held_out: Sequence[Mapping[str, Any]], head: Callable[[str], Head | None] = head_of,
) -> Data:  # fmt: skip
    """The examples of rows by client."""
    data, names, task, classes = config.data, list(divided), task_of(config), None
    if task == "classification":
        everything = [row for part in (*divided.values(), held_out) for row in part]
        classes = classes_of(everything, head(config.model), model=config.model, named=data.classes)
    made = partial(tokenize, tokenizer=tokenizer, task=task, classes=classes.numbers if classes else None)
    train = {name: made(divided[name], config.data_of(name), where=f"client '{name}'") for name in names}
    evaluation = made(held_out, data, where="the evaluation data") if held_out else []
    picture = None
    if len(names) > 1:  # before packing, which hides how long the texts are
        column = data.division.options.get("column")
        picture = describe(train, divided, names=classes.names if classes else None, column=column)
    if data.packing:
        train = {name: pack(part, data.max_length) for name, part in train.items()}
        evaluation = pack(evaluation, data.max_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    together = collating(config, pad or 0)
    prints = [fingerprint(train[name]) for name in names] + [fingerprint(evaluation)]
    return Data(
        train, evaluation, together, classes.names if classes else None, "-".join(p[:16] for p in prints), pad or 0,
        picture,
    )  # fmt: skip


def collating(config: RunConfig, pad_id: int) -> Callable[[Sequence[Example]], Batch]:
    """What makes batches of a run's examples."""
    side, causal = config.data.padding_side, task_of(config) == "causal"
    return partial(collate, pad_id=pad_id, padding_side=side, causal=causal)


def _divide(
    config: RunConfig, tokenizer: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, list[Any]]:
    if not names:
        return {}
    division = config.build("data")
    count = partial(token_lengths, rows, config.data, tokenizer, where="data.train")
    given = Rows(rows, batch_size=config.batch_size, lengths=count)
    dealt = division.divide(given, names, seed=config.seed, shuffle=config.data.shuffle)
    for name in names:
        if not dealt[name]:
            raise DataError(
                f"Client '{name}' gets no example: {len(rows)} rows are divided over {len(names)} clients by "
                f"'{config.data.division.name}'. Use fewer clients, more data or another data.division."
            )
    return {name: [rows[i] for i in dealt[name]] for name in names}


def load_base(
    config: RunConfig, *, labels: Sequence[str] | None, device: str, models: SharedModels | None = None,
    part: Part | None = None,
) -> Base:  # fmt: skip
    """The whole model, once, with its adapters: every simulated party runs its own part of it.

    Args:
        config: the run.
        labels: a classifier's classes.
        device: where it is to be.
        models: where its weights are shared with other runs of this process.
        part: of the model, where not all of it is needed.

    Raises:
        ConfigError: weights that are shared cannot be spread over several devices.
    """
    task = task_of(config)
    load = partial(
        load_model, config.model, task=task, precision=config.precision, labels=labels, seed=config.seed,
        attn_implementation=config.attn_implementation, part=part,
    )  # fmt: skip
    if models is None:
        model, anatomy = load(device="cpu")
    else:
        if device in MAPS:
            raise ConfigError(
                [f"device is '{device}', which is not for several runs on one base. Take cuda."], "the run"
            )
        new = (tuple(labels), config.seed) if labels is not None else ()  # of a classifier's new head
        key = (config.model, config.precision, config.attn_implementation, device, task, *new)
        model, anatomy = models.model(key, partial(load, device=device))
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
    if config.data.packing and not anatomy.exact:
        raise ModelError(
            f"data.packing needs a family that is known to keep packed examples apart; "
            f"'{model.config.model_type}' is not. Set data.packing: false."
        )
    placed(model, device)
    base: Base = config.build("peft").prepare(model, anatomy, task=task, seed=config.seed)
    if not base.initial:
        raise ModelError("Nothing is trained: the adapter matches no layer. Check peft.targets.")
    return base


def check_fit(config: RunConfig, base: Base, data: Data) -> None:
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


def open_model(config: RunConfig) -> tuple[Any, int]:
    """The model's configuration and number of blocks, before any weight is read; refuses a cut that does not fit."""
    from cutlayer.models.families import number_of_blocks

    found = load_model_config(config.model)
    count = number_of_blocks(found)
    layouts_of(config, count)
    return found, count


def tokenizer_of(config: RunConfig) -> Any:
    """The model's tokenizer."""
    return load_tokenizer(config.model)


def training_of(config: RunConfig) -> Training:
    """What is trained, as the cost model says it (by its plain or highest rank; a rank pattern is not looked at)."""
    options = config.peft.options
    head = task_of(config) == "classification"
    if config.peft.name == "full":
        return Training(full=True)
    targets = options.get("targets", "all-linear")
    return Training(
        rank=getattr(config.build("peft"), "rank", 8),
        targets=[targets] if targets != "all-linear" and isinstance(targets, str) else targets,
        head=head,
    )


def memory_of(config: RunConfig) -> Callable[..., Memory]:
    """``costs.memory`` with what a run's numbers, optimizer and checkpointing make of it."""
    momentum = config.optimizer.arguments.get("momentum")
    optimizer = {"sgd": "momentum" if momentum else "sgd"}.get(config.optimizer.name, "adamw")
    return partial(
        memory, precision=config.precision, optimizer=optimizer, checkpointing=config.gradient_checkpointing,
        eager=config.attn_implementation == "eager",
    )  # fmt: skip
