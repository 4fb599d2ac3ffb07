"""All rules of a run that need no model: each is a small function that yields one sentence for each mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cutlayer import config_fit, registry  # noqa: F401 - config_fit adds its rules
from cutlayer.config_optimizer import optimizer_problems
from cutlayer.config_rules import RULES, listed, rule
from cutlayer.config_types import NAME
from cutlayer.config_words import show
from cutlayer.errors import ConfigError, CutlayerError, suggest
from cutlayer.method_check import PROTOCOLS

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|balanced|sequential")
RESERVED = ("server",)


def problems(config: RunConfig, doubtful: frozenset[str] = frozenset()) -> list[str]:
    """Every mistake in a run, as sentences.

    Args:
        config: the run.
        doubtful: dotted keys that hold a stand-in, since what was given there is refused already.
    """
    found = [said for keys, rule in RULES if not any(_touches(key, doubtful) for key in keys) for said in rule(config)]
    wrong = []
    for key, family, spec in config.methods():
        if not _touches(key, doubtful):
            wrong += _method_problems(key, family, spec.name, spec.options)
    found += wrong
    if not wrong and not doubtful:
        found += _misfits(config)
    if not _touches("optimizer", doubtful):
        found += optimizer_problems(config.optimizer)
    return list(dict.fromkeys(found))


def _touches(key: str, doubtful: frozenset[str]) -> bool:
    return any(key == other or key.startswith(other + ".") or other.startswith(key + ".") for other in doubtful)


# The families that the engine of this version drives. A method of another is refused, even if it can be loaded: who
# names a defense must not believe that it is on.
DRIVEN = tuple(family for family in PROTOCOLS if family != "attack")


def _method_problems(key: str, family: str, name: str, options: dict[str, Any]) -> list[str]:
    try:
        registry.create(family, name, options)
    except CutlayerError as error:
        return [f"{key}: {error}"]
    if family == "attack":
        return [f"{key} is '{name}'. Attacks are played by cutlayer audit: cutlayer audit RUN.yaml --attacks {name}"]
    if family not in DRIVEN:
        return [f"{key} is '{name}', but nothing in this version uses a {family} yet. Take it out of the run."]
    return []


def _misfits(config: RunConfig) -> Iterator[str]:
    """What methods say of the rest of the run, once each of them can be made."""
    for key, family, spec in config.methods():
        made = registry.create(family, spec.name, spec.options)
        for said in getattr(made, "problems", lambda _: ())(config):
            yield f"{key}: {family} '{spec.name}' {said}"


def check_profile(value: str | dict[str, Any] | None) -> list[str]:
    """What is wrong with a profile of the virtual clock: a preset's name, numbers, or nothing."""
    if value is None:
        return []
    from cutlayer.costs import profile_from

    try:
        profile_from(value)
    except ConfigError as error:
        return error.problems
    except CutlayerError as error:
        return [str(error)]
    return []


@rule("data.train", "clients")
def _some_text(config: RunConfig) -> Iterator[str]:
    without = [name for name in config.client_names if not config.data_of(name).train]
    if without:
        of_all = len(without) == len(config.client_names)
        some = "" if of_all else f" The clients with no data of their own need it: {', '.join(without)}."
        yield f"data.train is missing. It is a file, a glob or a Hub data set.{some}"


@rule("data.eval", "data.eval_fraction")
def _one_evaluation(config: RunConfig) -> Iterator[str]:
    if config.data.eval is not None and config.data.eval_fraction is not None:
        yield "data.eval and data.eval_fraction are both given. Keep one: a file to evaluate on, or a part of train."


@rule("data.eval", "data.eval_fraction", "eval_every", "early_stop")
def _evaluated(config: RunConfig) -> Iterator[str]:
    nothing = config.data.eval is None and config.data.eval_fraction is None
    for key in ("eval_every", "early_stop"):
        if nothing and getattr(config, key) is not None:
            yield f"{key} is given, but there is nothing to evaluate on. Give data.eval or data.eval_fraction."
    if config.early_stop is not None and config.eval_every is None:
        yield "early_stop is given, but without eval_every it would never look. Set eval_every: 1 (in rounds)."


@rule("data.packing", "data.format", "clients")
def _packing(config: RunConfig) -> Iterator[str]:
    if config.data.packing and any(config.data_of(n).format == "classification" for n in config.client_names):
        yield "data.packing cannot be used with the format 'classification' (a row has one label). Set it to false."


@rule("data.format", "clients")
def _one_task(config: RunConfig) -> Iterator[str]:
    tasks = {config.data_of(name).format == "classification" for name in config.client_names}
    if len(tasks) > 1:
        yield "Some clients have the format 'classification' and others not. All clients of a run train one task."


@rule("data.classes", "data.format", "clients")
def _classes(config: RunConfig) -> Iterator[str]:
    classes = config.data.classes
    if classes is None:
        return
    if config.data_of(config.client_names[0]).format != "classification":
        yield "data.classes is for the format 'classification'. Leave it out, or set data.format: classification."
    if len(set(classes)) < max(2, len(classes)):
        yield "data.classes must name two classes or more, each once."


@rule("data.columns", "data.format", "clients")
def _columns(config: RunConfig) -> Iterator[str]:
    from cutlayer.data.fields import FIELDS

    places = [("data", config.data)]
    places += [(f"clients.{n}.data", config.data_of(c.name)) for n, c in enumerate(config.client_list) if c.data]
    for key, data in places:
        known = list(dict.fromkeys([*FIELDS[data.format], "label"]))
        for ours in data.columns:
            if ours not in known:
                yield (
                    f"{key}.columns.{ours}: the format '{data.format}' has no '{ours}'.{suggest(ours, known)} "
                    f"It has: {', '.join(known)}. Our name comes first, then the file's column."
                )


@rule("clients")
def _clients(config: RunConfig) -> Iterator[str]:
    names = config.client_names
    if not names:
        yield "clients is an empty list. A run needs at least one client."
    for number, name in enumerate(names):
        key = f"clients.{number}.name"
        if not NAME.fullmatch(name):
            yield (
                f"{key} is {show(name)}. A name has letters, digits, '-', '_' and '.', begins with no '-' or '.', "
                "and has at most 64 characters."
            )
        elif name.lower() in RESERVED:
            yield f"{key} is '{name}', which is the name of a party of every run. Choose another."
        first = [other.lower() for other in names].index(name.lower())
        if first < number:
            yield f"{key} is '{name}', as clients.{first}.name ('{names[first]}'). Give each client a name of its own."


@rule("clients", "rounds", "steps", "epochs")
def _comings(config: RunConfig) -> Iterator[str]:
    kind, count = config.length
    for number, client in enumerate(config.client_list):
        if client.leaves is not None and client.leaves <= client.joins:
            yield (
                f"clients.{number}.leaves is {client.leaves}, but it joins in round {client.joins}, so it would never "
                "be there. Let it leave later, or leave it out."
            )
        elif kind == "rounds" and client.joins >= count:
            yield (
                f"clients.{number}.joins is {client.joins}, but the run has {count} rounds, counted from 0. Let it "
                "join earlier, or leave it out."
            )


@rule("clients", "profile", "profiles")
def _profiles(config: RunConfig) -> Iterator[str]:
    drawn = config.profile if isinstance(config.profile, list) else [config.profile]
    places = [("profile" if len(drawn) == 1 else f"profile.{number}", one) for number, one in enumerate(drawn)]
    places += [(f"clients.{number}.profile", client.profile) for number, client in enumerate(config.client_list)]
    places += [(f"profiles.{name}", profile) for name, profile in config.profiles.items()]
    for key, profile in places:
        for problem in check_profile(profile):
            yield f"{key}: {problem}"


@rule("clients", "profile")
def _profiles_of_all(config: RunConfig) -> Iterator[str]:
    without = [name for name in config.client_names if config.client(name).profile is None]
    if config.profile is None and 0 < len(without) < len(config.client_names):
        yield (
            f"{listed(without)} no profile, but other clients have one, so their times could not be compared. Give "
            "each client one, or set profile for all that have none."
        )


@rule("clients", "partition")
def _cuts(config: RunConfig) -> Iterator[str]:
    for number, client in enumerate(config.client_list):
        if client.head_blocks is not None or client.tail_blocks is not None:
            spec = config.partition_spec(client.name)
            if not _method_problems("partition", "partition", config.partition.name, config.partition.options):
                yield from _method_problems(f"clients.{number}", "partition", spec.name, spec.options)


@rule("rounds", "steps", "epochs")
def _length(config: RunConfig) -> Iterator[str]:
    given = [key for key in ("rounds", "steps", "epochs") if getattr(config, key) is not None]
    if len(given) > 1:
        yield f"{' and '.join(given)} are given; a run has one length. Keep one, and leave the rest out or null."


@rule("device")
def _device(config: RunConfig) -> Iterator[str]:
    if not DEVICE.fullmatch(config.device):
        near = suggest(config.device, ["auto", "cpu", "cuda", "balanced", "sequential"])
        allowed = "auto, cpu, cuda, cuda:0, ..., balanced, sequential"
        yield f"device is '{config.device}'.{near} Allowed: {allowed}."


@rule("engine", "device")
def _engine(config: RunConfig) -> Iterator[str]:
    engine = config.engine
    if engine.name == "local":
        given = [key for key in type(engine).model_fields if getattr(engine, key) != getattr(type(engine)(), key)]
        for key in given:
            yield f"engine.{key} is given, but engine is 'local', which has no such option. Set engine.name: ray."
        return
    if config.device.startswith("cuda") and not engine.num_gpus:
        yield (
            f"device is '{config.device}', but the actors of engine 'ray' get no GPU. Set engine.num_gpus, or take "
            "device: auto, which gives each process what it has."
        )
    elif config.device == "cpu" and engine.num_gpus:
        yield "engine.num_gpus reserves GPUs, but device is 'cpu', so none is used. Leave one of the two out."
    if engine.trunk_gpus and not engine.trunk_apart:
        yield "engine.trunk_gpus is given, but the trunk is in no actor. Set engine.trunk_stages (1 or more)."
    elif engine.trunk_gpus and config.device == "cpu":
        yield "engine.trunk_gpus reserves GPUs, but device is 'cpu', so none is used. Leave one of the two out."
    elif engine.trunk_apart and config.device.startswith("cuda") and not engine.trunk_gpus:
        yield (
            f"device is '{config.device}', but the actors of the trunk get no GPU. Set engine.trunk_gpus, or take "
            "device: auto, which gives each process what it has."
        )


@rule("report_to")
def _report_to(config: RunConfig) -> Iterator[str]:
    if config.report_to:
        listed = ", ".join(config.report_to)
        yield f"report_to is {listed}, which does not work yet. Leave it out; all numbers are in metrics.jsonl."
