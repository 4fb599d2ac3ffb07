"""``engine: ray``: the clients of a run in actors on a Ray cluster, each actor with some of them on one frozen base.

The driver stays in this process, and the trunk, unless it is to be in actors too (``staging.py``). Actors get the run,
the examples of their clients, and from then on frames (``links/ray.py``); the model's files are read on each node.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cutlayer import staging
from cutlayer.allotment import Allotter
from cutlayer.apart import hosts
from cutlayer.arrangement import Arranger
from cutlayer.assembly import Parts, routes_of
from cutlayer.build import layouts_of
from cutlayer.config import RunConfig, dump
from cutlayer.crew import Crew, packed, versions
from cutlayer.driver import Links, Run
from cutlayer.errors import ConfigError, Gone
from cutlayer.links.local import Link
from cutlayer.links.ray import ActorLink, Failed
from cutlayer.parties.shadow import Shadow
from cutlayer.report.progress import Reporter

LOOK = 10.0  # seconds between two looks at actors that have not begun
MANY = 1 << 30  # actors that want nothing


def check(config: RunConfig, num_blocks: int) -> None:
    """Refuse what cannot be on a cluster yet, and an address without a cluster.

    Raises:
        ConfigError: with all of it.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            ["engine is 'ray', but Ray is not installed. Install it: pip install 'cutlayer[ray]'"], "the run"
        )
    if wrong := list(problems(config, num_blocks)):
        raise ConfigError(wrong, "the run")
    if config.engine.address not in (None, "auto"):
        _look_for(str(config.engine.address))


def problems(config: RunConfig, num_blocks: int) -> Iterator[str]:
    """What of a run cannot be with ``engine: ray``, a sentence each."""
    instead = "Take engine: local."
    if isinstance(config.build("peft"), Allotter):
        yield f"peft '{config.peft.name}' cannot change ranks with engine 'ray' yet. {instead}"
    if isinstance(config.build("selection"), Arranger):
        yield f"selection '{config.selection.name}' asks for sketches, which engine 'ray' cannot do yet. {instead}"
    if config.fails or any(client.fails for client in config.client_list):
        yield f"fails sets a client back in the middle of a round, which engine 'ray' cannot do yet. {instead}"
    for name, peer in hosts(routes_of(config, layouts_of(config, num_blocks))):
        yield (
            f"framework '{config.framework.name}': client '{peer}' runs blocks for '{name}', which engine 'ray' "
            f"cannot do yet. {instead}"
        )
    yield from staging.problems(config, num_blocks)


@contextlib.contextmanager
def started(config: RunConfig, parts: Parts, pad_id: int, progress: Reporter) -> Iterator[Links]:
    """Actors with all clients of a run; what gives a run its links to them. At the end they are gone.

    Raises:
        ConfigError: there is no such cluster, or no room on it.
        CutlayerError: an actor cannot load its part of the model.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        _connect(config)
    elif config.engine.address not in (None, "auto", here := ray.get_runtime_context().gcs_address):
        raise ConfigError([f"engine.address is '{config.engine.address}', but this program is at '{here}'."], "the run")
    actors: list[_Actor | staging.StretchActor] = []
    try:
        crews = dealt(config.client_names, _crew_size(config))
        progress.note(f"engine 'ray': {len(config.client_names)} clients in {len(crews)} actor{'s' * (len(crews) > 1)}")
        stretches = staging.stretches(config, parts)
        if stretches:
            progress.note(f"engine 'ray': {staging.told(stretches)}")
        actors += [actor for replica in stretches for actor in replica]
        crew = [_actor(config, parts, names, pad_id) for names in crews]
        actors += crew
        _opened(actors, config, progress)
        staging.attach(parts, stretches)
        yield partial(_links, actors=crew)
    finally:
        for actor in actors:
            ray.kill(actor.handle)
        if ours:
            ray.shutdown()


@dataclass(frozen=True)
class _Actor:
    """An actor and the clients in it."""

    names: Sequence[str]
    handle: Any

    @property
    def said(self) -> str:
        """Whom it has, in words."""
        return f"{', '.join(self.names[:3])}{', ...' if len(self.names) > 3 else ''}"

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error of Ray's: words where the actor has died."""
        from ray.exceptions import RayActorError, WorkerCrashedError

        if not isinstance(error, RayActorError | WorkerCrashedError):
            return error
        others = (
            f" (with {', '.join(self.names[1:4])}{', ...' if len(self.names) > 4 else ''})" if self.names[1:] else ""
        )
        said = " ".join(str(error).split())
        return Gone(self.names[0], f"the actor that it was in{others} has died. Ray says: {said[:400]}")


def dealt(clients: Sequence[str], size: int) -> list[list[str]]:
    """Clients dealt to actors of at most ``size``, as evenly as can be, neighbours together."""
    count = -(-len(clients) // size)
    borders = [len(clients) * number // count for number in range(count + 1)]
    return [list(clients[first:last]) for first, last in itertools.pairwise(borders)]


def _connect(config: RunConfig) -> None:
    """Join the cluster at the run's address, or start one here."""
    import ray

    address = config.engine.address
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run tells nobody outside that it is
    try:
        ray.init(
            address=address or "local", include_dashboard=None if address else False, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    except Exception as error:
        said = " ".join(str(error).split())[:400] or type(error).__name__
        what = f"no Ray cluster answers at '{address}'" if address else "Ray cannot be started on this machine"
        raise ConfigError([f"engine.address: {what}: {said}"], "the run") from error


def _look_for(address: str) -> None:
    """Refuse an address at which nobody listens; Ray itself would try for minutes.

    Raises:
        ConfigError: it is no address, or nobody answers.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        raise ConfigError(
            [f"engine.address is '{address}'. Write HOST:PORT of the cluster's head (without ray://), or auto."],
            "the run",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            [f"engine.address: no Ray cluster answers at '{address}': {error.strerror or error}."], "the run"
        ) from error


def _crew_size(config: RunConfig) -> int:
    """How many clients an actor gets: where it is not said, as many actors are made as there is room for now.

    Raises:
        ConfigError: there is no room for an actor, or on this machine for so many, and they would wait for ever.
    """
    engine, clients, beside = config.engine, len(config.client_names), staging.wants(config)
    here = "this machine" if engine.address is None else "the cluster"
    room = _room(engine.num_cpus, engine.num_gpus, beside=beside)
    if room is None:
        raise ConfigError([f"engine: {staging.said(config)}, and {here} has no room for that."], "the run")
    if not room:
        raise ConfigError(
            [f"engine: {_wants(config)}, and no node of the cluster has that{_beside(config)}."], "the run"
        )
    if engine.clients_per_actor is None:
        now = min(room, _free_room(engine.num_cpus, engine.num_gpus, beside=beside))
        return -(-clients // min(now or room, clients))
    count = -(-clients // engine.clients_per_actor)
    if count > room and engine.address is None:  # a cluster elsewhere may grow
        raise ConfigError(
            [
                f"engine.clients_per_actor is {engine.clients_per_actor}, which makes {count} actors. {_wants(config)}"
                f", and this machine has room for {room}. Raise it, or lower engine.num_cpus or engine.num_gpus."
            ],
            "the run",
        )
    return engine.clients_per_actor


def _beside(config: RunConfig) -> str:
    return f", as {staging.said(config)}. Lower engine.num_cpus" if staging.wants(config) else ""


def _wants(config: RunConfig) -> str:
    engine = config.engine
    gpus = f" and {engine.num_gpus:g} GPUs" if engine.num_gpus else ""
    return f"Each actor wants {engine.num_cpus:g} CPUs{gpus}"


def _room(num_cpus: float, num_gpus: float, *, beside: Sequence[tuple[float, float]] = ()) -> int | None:
    """How many actors that want so much the cluster's nodes have room for, ``beside`` others with their CPUs and GPUs.

    None: there is no room for these.
    """
    import ray

    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for cpus, gpus in beside:
        node = next((n for n in nodes if n.get("CPU", 0) >= cpus and n.get("GPU", 0) >= gpus), None)
        if node is None:
            return None
        node |= {"CPU": node.get("CPU", 0) - cpus, "GPU": node.get("GPU", 0) - gpus}
    most = 0
    for has in nodes:
        fits = [int(has.get(key, 0) / want) for key, want in (("CPU", num_cpus), ("GPU", num_gpus)) if want]
        most += min(fits) if fits else int(has.get("CPU", 1))
    return most


def _free_room(num_cpus: float, num_gpus: float, *, beside: Sequence[tuple[float, float]] = ()) -> int:
    """For how many actors, at most, the cluster has as much free at the moment, as far as it knows."""
    import ray

    free = ray.available_resources()
    left = {
        "CPU": free.get("CPU", 0.0) - sum(cpus for cpus, _ in beside),
        "GPU": free.get("GPU", 0.0) - sum(gpus for _, gpus in beside),
    }
    wants = [(key, want) for key, want in (("CPU", num_cpus), ("GPU", num_gpus)) if want]
    return max(0, int(min((left[key] / want for key, want in wants), default=MANY)))


def _actor(config: RunConfig, parts: Parts, names: Sequence[str], pad_id: int) -> _Actor:
    import ray

    begun, bounds = parts.begun, parts.bounds
    assert begun is not None
    groups = {f"train/{name}": begun.data.train[name] for name in names}
    groups |= {f"kept/{name}": begun.kept.get(name, []) for name in names}
    cuts = {name: len(begun.layouts[name].head) for name in names}
    task = {
        "clients": list(names), "cuts": cuts, "labels": begun.data.labels, "pad_id": pad_id, "versions": versions(),
        "highest": {name: max(bounds[name]) if bounds else cuts[name] for name in names},
    }  # fmt: skip
    rows = packed({**groups, "evaluation": begun.data.evaluation})
    engine = config.engine
    made = ray.remote(Crew).options(num_cpus=engine.num_cpus, num_gpus=engine.num_gpus)
    return _Actor(names, made.remote(dump(config), json.dumps(task), rows))


def _opened(actors: Sequence[_Actor | staging.StretchActor], config: RunConfig, progress: Reporter) -> None:
    """Wait until all have begun and have loaded their part; who waits for room is named."""
    import ray

    begun = {actor.handle.__ray_ready__.remote(): actor for actor in actors}
    waiting = [actor.handle.open.remote() for actor in actors]
    missing, said = list(begun), ""
    while missing:
        _, missing = ray.wait(missing, num_returns=len(missing), timeout=LOOK)
        words = _missing([begun[one] for one in missing], actors, config)
        if missing and words != said:
            progress.note(words)
            said = words
    for actor, told in zip(actors, waiting, strict=True):
        try:
            found = ray.get(told)
        except Exception as error:
            raise actor.explain(error) from error
        if isinstance(found, Failed):
            raise found.error()


def _missing(
    missing: Sequence[_Actor | staging.StretchActor], actors: Sequence[_Actor | staging.StretchActor], config: RunConfig
) -> str:  # fmt: skip
    """Who has not begun, and what the cluster has for them."""
    import ray

    engine, beside = config.engine, staging.wants(config)
    crews = len(actors) - len(beside)
    wanted = {
        "CPU": crews * engine.num_cpus + sum(cpus for cpus, _ in beside),
        "GPU": crews * engine.num_gpus + sum(gpus for _, gpus in beside),
    }
    has, free = ray.cluster_resources(), ray.available_resources()
    amounts = ", ".join(
        f"{want:g} {key}s of the cluster's {has.get(key, 0):g}, of which {free.get(key, 0):g} are free"
        for key, want in wanted.items()
        if want
    )
    grow = ""
    if any(want > has.get(key, 0) for key, want in wanted.items()):
        grow = " That is more than there is: raise engine.clients_per_actor, or let the cluster grow."
    return (
        f"engine 'ray': {len(missing)} of {len(actors)} actors have not begun "
        f"({'; '.join(actor.said for actor in missing[:5])}{'; ...' if len(missing) > 5 else ''}). "
        f"All together want {amounts or 'nothing'}.{grow}"
    )


def _links(run: Run, *, actors: Sequence[_Actor]) -> dict[str, Link]:
    found: dict[str, Link] = {}
    by_name = {name: actor for actor in actors for name in actor.names}
    for name, party in run.parts.clients.items():
        assert isinstance(party, Shadow)
        actor = by_name[name]
        found[name] = ActorLink(
            party, actor.handle.answer.remote, actor.explain, meter=run.meter, queues=run._queues,
            pace=run.paces.client(name), asked=run.presence.asked,
        )  # fmt: skip
    return found
