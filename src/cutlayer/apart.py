"""Runs whose clients are elsewhere: what a server reads of a run file, what it offers, and what of it cannot be yet.

Over the network every client brings its own data, so what a run file says of data files is only their form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cutlayer.allotment import Allotter
from cutlayer.arrangement import Arranger, names_hosts
from cutlayer.assembly import routes_of
from cutlayer.build import layouts_of, task_of
from cutlayer.config import DEFAULT_METHODS, FAMILY_KEYS, RunConfig, load_config
from cutlayer.config_read import Overrides, numbered, read
from cutlayer.config_write import tree_of
from cutlayer.contracts import Stop
from cutlayer.data.classes import classes_of
from cutlayer.errors import ConfigError
from cutlayer.hosting import hosted_stops, part_of
from cutlayer.models.heads import head_of
from cutlayer.models.loading import Part
from cutlayer.planning import at_cut
from cutlayer.presence import Routes
from cutlayer.registry import no_files

AT_CLIENT = "at the client"  # in place of every file of data
ANYBODY = ""  # in place of a client that is not known yet
HERE = ("record_wire", "device", "report_to")  # keys that are each party's own


def served(source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """The run of a run file, with all data at the clients.

    Raises:
        ConfigError: with all mistakes, and what cannot be over a network.
    """
    tree, found, where = read(source)
    families = [*FAMILY_KEYS, "data.division", "optimizer"]
    found += Overrides(tree, defaults=DEFAULT_METHODS, families=families).apply(overrides)
    if found:
        raise ConfigError(found, where)
    config = load_config(_without_data(tree))
    if wrong := list(problems(config)):
        raise ConfigError(wrong, where)
    return config


def _without_data(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with a stand-in for every file of data; what is wrong in it is left for the check."""
    clients, data = tree.get("clients", 3), tree.get("data", {})
    if isinstance(clients, int) and not isinstance(clients, bool) and clients > 0:
        clients = [{"name": name} for name in numbered(clients)]
    if isinstance(clients, list):
        clients = [_elsewhere(client) if isinstance(client, dict) else client for client in clients]
    if isinstance(data, str):
        data = {}
    if isinstance(data, dict):
        data = {key: AT_CLIENT if key == "eval" and value else value for key, value in data.items() if key != "train"}
        evaluated = any(tree.get(key) is not None for key in ("eval_every", "early_stop"))
        if evaluated and data.get("eval") is None and data.get("eval_fraction") is None:
            data["eval"] = AT_CLIENT  # whoever joins brings it, or nobody: ``engine.unevaluated``
    return {**tree, "clients": clients, "data": data}


def _elsewhere(client: dict[str, Any]) -> dict[str, Any]:
    own = client.get("data")
    form = {key: value for key, value in own.items() if key != "train"} if isinstance(own, dict) else {}
    return {**client, "data": {**form, "train": AT_CLIENT}}


def problems(config: RunConfig) -> Iterator[str]:
    """What of a run cannot be over the network, a sentence each."""
    simulated = "is for simulated clients; those who join come and go by themselves. Leave it out."
    if names_hosts(config) and len(config.client_names) == 1:
        yield (
            f"selection '{config.selection.name}' has clients run blocks for each other, but there is one client, and "
            "nothing for the server to do. Name more clients."
        )
    if config.data.eval_fraction is not None:
        yield "data.eval_fraction divides one file. Let each client give a file of its own (cutlayer join --eval)."
    if config.fails or any(client.fails for client in config.client_list):
        yield f"fails {simulated}"
    if config.availability != 1 or any(client.availability is not None for client in config.client_list):
        yield f"availability {simulated}"
    if any(client.joins or client.leaves is not None for client in config.client_list):
        yield f"joins and leaves {simulated}"
    for key, _, spec in config.methods():
        if spec.name.endswith(".py"):
            yield f"{key} is the file {spec.name}; over the network both ends need it as an installed method."
    if config.engine.name != "local":
        yield f"engine is '{config.engine.name}', for one owner's machines. serve and join need none: leave it out."


def check_routes(config: RunConfig, num_blocks: int) -> None:
    """Refuse runs in which clients run blocks for each other, and something in them changes how.

    Raises:
        ConfigError: with what.
    """
    there = next(hosts(routes_of(config, layouts_of(config, num_blocks))), None)
    moving = names_hosts(config)
    if there is None and not moving:
        return
    how = f"'{there[1]}' runs blocks for '{there[0]}'" if there else "the selection says who runs blocks for whom"
    chosen = {
        "planner": config.planner is not None and config.planner.name,
        "peft": isinstance(config.build("peft"), Allotter) and config.peft.name,
        "exchange": config.exchange.name != "plain" and config.exchange.name,
        "mixing": config.mixing is not None and config.mixing.name,
        "selection": not moving and isinstance(config.build("selection"), Arranger) and config.selection.name,
    }
    wrong = [
        f"{family} '{name}' is not yet over the network in a run in which {how} (framework '{config.framework.name}'). "
        "Leave it out, or train in one process."
        for family, name in chosen.items()
        if name
    ]
    if wrong:
        raise ConfigError(wrong, "the run")


def needs_secret(config: RunConfig, num_blocks: int) -> str | None:
    """Why a run needs a secret that its clients have agreed on, in words; None: it does not."""
    for name, peer in hosts(routes_of(config, layouts_of(config, num_blocks))):
        return (
            f"client '{peer}' runs blocks for '{name}', and the server, which passes on what they send, may not read it"
        )
    if names_hosts(config):
        return (
            f"selection '{config.selection.name}' says which client runs blocks for which, and the server, which "
            "passes on what they send, may not read it"
        )
    selection = config.build("selection")
    if isinstance(selection, Arranger) and selection.asks.kind == "hash":
        return (
            f"selection '{config.selection.name}' asks for hashes, whose projections the server may not know, as it "
            "could take the hashes back to what they are made of"
        )
    return None


def hosts(routes: Routes) -> Iterator[tuple[str, str]]:
    """The clients for whom another runs blocks, each with the first that does."""
    for name, stops in routes.items():
        peer = next((stop.party for stop in stops if stop.party in routes), None)
        if peer is not None:
            yield name, peer


def parts_of(config: RunConfig, num_blocks: int) -> dict[str, Part]:
    """What each client may come to hold: where a planner moves cuts, all blocks but the trunk's last.

    Where a selection may have it run blocks for any other, all that is between their heads and tails.
    """
    layouts = layouts_of(config, num_blocks)
    if config.planner is not None:  # then nobody runs blocks for others
        return {name: part_of(at_cut(layout, layout.middle.stop - 1)) for name, layout in layouts.items()}
    routes = routes_of(config, layouts)
    if names_hosts(config):
        routes = {name: (Stop(ANYBODY, "", layout.middle),) for name, layout in layouts.items()}
        return {name: part_of(layout, hosted_stops(ANYBODY, layouts, routes)) for name, layout in layouts.items()}
    return {name: part_of(layout, hosted_stops(name, layouts, routes)) for name, layout in layouts.items()}


def known_classes(config: RunConfig) -> Sequence[str] | None:
    """A classifier's classes, as both ends know them without each other's data; None: the run is none.

    Raises:
        ConfigError: neither the run nor the model's own head names them.
    """
    if task_of(config) != "classification":
        return None
    head = head_of(config.model)
    if config.data.classes is not None:
        return classes_of([], head, model=config.model, named=config.data.classes).names
    if head is None or head.unnamed:
        raise ConfigError(
            [
                "data.classes is missing: over the network nobody sees the labels of all clients, and the model has no "
                "head that names its classes. Name them, such as: data.classes: [negative, positive]"
            ],
            "the run",
        )
    return head.names


def offer(config: RunConfig) -> dict[str, Any]:
    """The run as the server tells it to a client: nothing of the server's own machine is in it."""
    tree = tree_of(config)
    tree["model"] = Path(config.model).name if Path(config.model).is_dir() else config.model
    if (classes := known_classes(config)) is not None:  # all of the head's, as a client may not hold the head
        tree["data"]["classes"] = list(classes)
    return {key: value for key, value in tree.items() if key not in HERE}


def taken(tree: Mapping[str, Any], *, model: str | None, device: str) -> RunConfig:
    """The run that a server offers, with what is the client's own.

    Args:
        tree: as ``offer`` made it.
        model: where the client has the model; None: where the run says.
        device: of the client.

    Raises:
        ConfigError: this version cannot read it, or has not the methods, or no run can be so over a network. Nothing
            that the server names is executed.
    """
    own = {key: value for key, value in tree.items() if key not in HERE}
    with no_files():
        config = load_config({**own, **({"model": model} if model else {}), "device": device})
    if wrong := list(problems(config)):
        raise ConfigError(wrong, "the run that the server offers")
    return config
