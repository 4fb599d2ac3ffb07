"""Which methods of a run go together: the rules over several families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cutlayer import registry
from cutlayer.config_rules import listed, rule
from cutlayer.contracts import Peft
from cutlayer.errors import CutlayerError

if TYPE_CHECKING:
    from cutlayer.config import RunConfig


@rule("clients", "framework", "mixing")
def _named_apart(config: RunConfig) -> Iterator[str]:
    names = config.client_names
    try:
        taken = dict.fromkeys(config.build("framework").parties(names), f"framework '{config.framework.name}'")
        if config.mixing is not None and (between := config.build("mixing").between):
            taken[between] = f"mixing '{config.mixing.name}'"
    except CutlayerError:
        return  # said by the other rules
    for number, name in enumerate(names):
        for party, whose in taken.items():
            if name.lower() == party.lower():
                yield f"clients.{number}.name is '{name}', which is the name of a party of {whose}. Choose another."


@rule("mixing", "framework")
def _joinable(config: RunConfig) -> Iterator[str]:
    try:
        if config.mixing is None or config.build("framework").joinable:
            return
        fit = [name for name in registry.names("framework") if registry.load("framework", name).joinable]
    except CutlayerError:
        return  # said by the other rules
    yield (
        f"mixing '{config.mixing.name}' joins clients that train at once, each with a trunk of its own, but in "
        f"framework '{config.framework.name}' they take turns or share one already. Take framework: {' or '.join(fit)}."
    )


@rule("clients", "selection", "framework", "aggregator", "data.format")
def _arranged(config: RunConfig) -> Iterator[str]:
    from cutlayer.arrangement import Arranger

    try:
        framework, selection = config.build("framework"), config.build("selection")
        exchanges = config.build("aggregator").exchanges
    except CutlayerError:
        return  # said by the other rules
    arranges, n = isinstance(selection, Arranger), len(config.client_names)
    gives = selection.gives if arranges else ()
    name, by = config.framework.name, config.selection.name
    for what in framework.needs:
        if what not in gives:
            yield (
                f"framework '{name}' leaves its {what} to the selection, but selection '{by}' makes none. Take another "
                f"selection, or set framework.{what}."
            )
    if not arranges:
        return
    without = [what for what in gives if what not in framework.takes]
    if without and not selection.samples:
        how = f" Set framework.{without[0]}: selection." if hasattr(framework, without[0]) else _followers(gives)
        yield f"selection '{by}' makes {' and '.join(without)}, which framework '{name}' cannot follow as it is.{how}"
    if selection.samples and list(framework.eligible(0, config.client_names)) != config.client_names:
        yield f"selection '{by}' says who takes part, but framework '{name}' has its own rule for that in this run."
    if "clusters" in gives and not exchanges:
        yield (
            f"selection '{by}' averages within clusters, but aggregator '{config.aggregator.name}' merges nothing. "
            "Take another aggregator, or leave the selection out."
        )
    if "pairs" in gives and "pairs" in framework.takes and 2 * round(selection.share(n) * n) > n:
        yield f"selection '{by}' chooses more than half of the {n} clients, but each needs another one for its helper."
    if selection.asks.kind == "labels" and config.data_of(config.client_names[0]).format != "classification":
        yield (
            f"selection '{by}' asks for a sketch of the labels, but the data are texts without classes. Set "
            "selection.sketch to features, hash, tokens or lengths."
        )
    try:
        selection.check(config.client_names)
    except CutlayerError as error:
        yield f"selection: {error}"


def _followers(gives: Sequence[str]) -> str:
    """Which frameworks can follow what a selection makes, as the end of a message."""
    found = []
    for name in registry.names("framework"):
        left = [what for what in gives if what in registry.option_fields(registry.load("framework", name))]
        options = dict.fromkeys(left, "selection")
        if set(gives) <= set(registry.create("framework", name, options).takes):
            said = "".join(f", {what}: selection" for what in left)
            found.append(f"{{name: {name}{said}}}" if said else name)
    return f" Take framework: {' or '.join(found)}." if found else ""


@rule("clients", "partition")
def _one_cut(config: RunConfig) -> Iterator[str]:
    try:
        if not config.build("framework").travels:
            return
        cuts = {name: _cut(config, name) for name in config.client_names}
    except CutlayerError:
        return  # said by the other rules
    first = next(iter(cuts), "")
    others = [name for name in cuts if cuts[name] != cuts[first]]
    if others:
        yield (
            f"{listed(others)} another cut (head_blocks, tail_blocks) than '{first}', but framework "
            f"'{config.framework.name}' hands the client's part on. Give all clients the same cut, or take a framework "
            "that merges parts, such as sfl-v2."
        )


@rule("framework", "aggregator")
def _asynchronous(config: RunConfig) -> Iterator[str]:
    try:
        framework, aggregator = config.build("framework"), config.build("aggregator")
    except CutlayerError:
        return  # said by the other rules
    named = f"framework '{config.framework.name}'"
    if framework.asynchronous and not aggregator.asynchronous:
        yield (
            f"{named} merges each upload as it comes, which aggregator '{config.aggregator.name}' cannot. Take one of: "
            f"{', '.join(_asynchronous_ones('aggregator'))}."
        )
    elif aggregator.asynchronous and not framework.asynchronous:
        yield (
            f"aggregator '{config.aggregator.name}' weighs uploads by their delay, but {named} waits for all, so there "
            f"is none. Take framework: {' or '.join(_asynchronous_ones('framework'))}, or aggregator: fedavg."
        )


def _asynchronous_ones(family: str) -> list[str]:
    return [name for name in registry.names(family) if registry.load(family, name).asynchronous]


@rule("framework", "aggregator")
def _merged(config: RunConfig) -> Iterator[str]:
    try:
        alone = config.build("framework").merges and not config.build("aggregator").exchanges
    except CutlayerError:
        return  # said by the other rules
    if alone:
        yield (
            f"framework '{config.framework.name}' lives by what is merged, but aggregator '{config.aggregator.name}' "
            "merges nothing. Take aggregator: fedavg."
        )


@rule("clients", "peft", "framework", "aggregator", "partition")
def _ranked(config: RunConfig) -> Iterator[str]:
    try:
        peft, aggregator = config.build("peft"), config.build("aggregator")
        cuts = {name: _cut(config, name) for name in config.client_names}
    except CutlayerError:
        return  # said by the other rules
    first = next(iter(cuts), "")
    others = [name for name in cuts if cuts[name] != cuts[first]]
    follows = type(peft).rank_at is not Peft.rank_at
    if others and follows and aggregator.exchanges and not aggregator.reconciles:
        yield (
            f"{listed(others)} another cut than '{first}', and with peft '{config.peft.name}' other ranks in the same "
            f"blocks, which aggregator '{config.aggregator.name}' cannot merge. Take aggregator: lora-products."
        )


@rule("framework", "optimizer", "rounds", "steps", "epochs", "clients", "profile")
def _known_end(config: RunConfig) -> Iterator[str]:
    from cutlayer.cohorts import runs_on

    try:
        if not runs_on(config):
            return
    except CutlayerError:
        return  # said by the other rules
    schedule, warmup = config.optimizer.schedule, config.optimizer.warmup
    if schedule not in ("constant", "constant_with_warmup") or 0 < warmup < 1:
        yield (
            f"optimizer.schedule is '{schedule}' with warmup {warmup:g}, which needs to know how many steps a client "
            f"makes, but with profiles framework '{config.framework.name}' lets each make as many in a round as it has "
            "time for. Give the length in steps or epochs, or take schedule: constant."
        )


def _cut(config: RunConfig, name: str) -> dict[str, Any]:
    spec = config.partition_spec(name)
    made = registry.create("partition", spec.name, spec.options)
    return {key: getattr(made, key) for key in registry.option_fields(type(made))}


def batches_meet(config: RunConfig) -> bool:
    """Whether the clients' batches meet at the trunk, so that a step cannot go on without one that is lost in it."""
    return config.mixing is not None or getattr(config.build("framework"), "joint", "") == "concatenate"


@rule("mixing", "framework", "clients", "fails")
def _losable(config: RunConfig) -> Iterator[str]:
    fails = [config.fails, *(client.fails for client in config.client_list)]
    try:
        meet = batches_meet(config)
    except CutlayerError:
        return  # said by the other rules
    if meet and any(fails):
        what = f"mixing '{config.mixing.name}'" if config.mixing else f"framework '{config.framework.name}' (joint)"
        yield (
            f"fails is given, but with {what} the clients' batches meet at the trunk, and a step that one of them is "
            "lost in cannot be taken apart again. Leave fails out, or take framework: psl, which sums their gradients."
        )


def _leaves_unequal(config: RunConfig) -> list[str]:
    """What of a run leaves the clients' parts unequal after a round, or sets the cuts itself, in words."""
    framework, aggregator = config.build("framework"), config.build("aggregator")
    wrong = {
        f"framework '{config.framework.name}'": not framework.replans,
        f"aggregator '{config.aggregator.name}'": not aggregator.exchanges,
        f"selection '{config.selection.name}'": "clusters" in getattr(config.build("selection"), "gives", ()),
        f"exchange '{config.exchange.name}'": config.build("exchange").frozen_head,
    }
    return [name for name, found in wrong.items() if found]


@rule("peft", "framework", "aggregator", "selection", "exchange", "clients")
def _allots(config: RunConfig) -> Iterator[str]:
    from cutlayer.allotment import Allotter

    try:
        peft, aggregator = config.build("peft"), config.build("aggregator")
        if not isinstance(peft, Allotter):
            return
        unequal = _leaves_unequal(config)
    except CutlayerError:
        return  # said by the other rules
    named = f"peft '{config.peft.name}'"
    for which in unequal:
        yield (
            f"{named} gives out ranks anew after a merge of all, but {which} leaves the clients' parts unequal, or "
            "goes its own way. Take framework sfl-v1 or sfl-v2 with aggregator: lora-products."
        )
    if aggregator.exchanges and not aggregator.reconciles:
        fit = [name for name in registry.names("aggregator") if registry.load("aggregator", name).reconciles]
        yield (
            f"{named} gives clients unequal ranks, which aggregator '{config.aggregator.name}' cannot merge. Take "
            f"aggregator: {' or '.join(fit)}."
        )
    for name in sorted(set(peft.limited) - set(config.client_names)):
        yield f"{named} has a budget for '{name}', which is no client. There are: {', '.join(config.client_names)}."


@rule("planner", "clients")
def _one_planner(config: RunConfig) -> Iterator[str]:
    own = [client.name for client in config.client_list if client.head_blocks is not None]
    if config.planner is not None and own:
        yield (
            f"{listed(own)} head_blocks, but planner '{config.planner.name}' sets all cuts. Leave head_blocks out, or "
            "take planner: none."
        )


@rule("planner", "peft", "framework", "aggregator", "selection", "exchange")
def _moves(config: RunConfig) -> Iterator[str]:
    if config.planner is None:
        return
    try:
        unequal, aggregator = _leaves_unequal(config), config.build("aggregator")
        ranked = type(config.build("peft")).rank_at is not Peft.rank_at
    except CutlayerError:
        return  # said by the other rules
    if ranked and aggregator.exchanges and not aggregator.reconciles:
        yield (
            f"peft '{config.peft.name}' has ranks that follow the cut, and planner '{config.planner.name}' gives "
            f"clients unequal cuts, but aggregator '{config.aggregator.name}' cannot merge unequal ranks. Take "
            "aggregator: lora-products."
        )
    for which in unequal:
        yield (
            f"planner '{config.planner.name}' gives clients cuts of their own, and blocks change hands where all "
            f"copies are equal: after a merge. But {which} leaves the clients' parts unequal, or sets the cuts itself. "
            "Take framework sfl-v1 or sfl-v2 with an aggregator that merges, or planner: none."
        )


@rule("defense", "exchange", "framework", "selection")
def _all_defended(config: RunConfig) -> Iterator[str]:
    """What a client shows beside a step's own messages passes no defense yet, so it is refused with one."""
    if not config.defense:
        return
    try:
        exchange, framework = config.build("exchange"), config.build("framework")
        learning = [spec.name for spec in config.defense if registry.load("defense", spec.name).learning]
        sketch = getattr(config.build("selection"), "asks", None)
    except CutlayerError:
        return  # said by the other rules
    names = " and ".join(f"'{spec.name}'" for spec in config.defense)
    if learning and exchange.frozen_head:
        yield (
            f"exchange '{config.exchange.name}' sends no gradient back to the clients, and defense '{learning[0]}' "
            "learns by it. Leave one of the two out."
        )
    if learning and config.engine.name == "ray":
        yield (
            f"defense '{learning[0]}' learns, and actors of engine 'ray' do not keep that yet. Take engine: local, or "
            "leave the defense out."
        )
    if exchange.probes:
        yield (
            f"exchange '{config.exchange.name}' shows each batch at several points, which no defense covers yet, so "
            f"defense {names} cannot be on with it. Leave one of the two out."
        )
    if sketch is not None and sketch.kind != "lengths":  # how long texts are is covered by no defense, and it is said
        yield (
            f"selection '{config.selection.name}' has each client tell a sketch ({sketch.kind}) of its texts, which no "
            f"defense covers yet, so defense {names} cannot be on with it. Leave one of the two out."
        )
    if getattr(framework, "replay", False):
        yield (
            f"framework '{config.framework.name}' with replay has idle clients show features, which no defense covers "
            f"yet, so defense {names} cannot be on with it. Set framework.replay: false, or leave the defense out."
        )
