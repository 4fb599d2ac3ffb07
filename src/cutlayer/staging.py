"""The trunk of ``engine: ray`` in actors: stages with a stretch of its blocks each, and replicas for its slots.

Every replica has all stages, each with its own copy of the frozen base of its stretch, and some of the slots: those of
all parties that run blocks for others. The driver keeps what checkpoints and merges read (``models/far.py``).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cutlayer.assembly import Parts, joined, routes_of
from cutlayer.build import layouts_of
from cutlayer.config import RunConfig, dump
from cutlayer.contracts import Framework
from cutlayer.crew import versions
from cutlayer.errors import TrunkGone
from cutlayer.links.stages import Stage, StagedTrunk, owned
from cutlayer.models.placement import MAPS
from cutlayer.stretch import Stretch

Slots = Sequence[tuple[str, str]]  # by party and name


@dataclass(frozen=True)
class StretchActor:
    """An actor with a stretch of the trunk, and the slots that it serves."""

    blocks: range
    top: bool
    slots: Slots
    handle: Any

    @property
    def said(self) -> str:
        """The blocks in words."""
        first, last = self.blocks.start, self.blocks.stop - 1
        blocks = [f"block {first}" if first == last else f"blocks {first}-{last}"] if len(self.blocks) else []
        return " and ".join([*blocks, *(["norm and head"] if self.top else [])])

    def explain(self, error: Exception) -> Exception:
        """What to raise for an error of Ray's: words where the actor has died."""
        from ray.exceptions import RayActorError, WorkerCrashedError

        if not isinstance(error, RayActorError | WorkerCrashedError):
            return error
        return TrunkGone(self.said, f"it has died. Ray says: {' '.join(str(error).split())[:400]}")

    @property
    def stage(self) -> Stage:
        """The actor as its link sees it."""
        return Stage(self.blocks, self.top, self.handle.answer.remote, self.explain)


def problems(config: RunConfig, num_blocks: int) -> Iterator[str]:
    """What of a run cannot be with its trunk in actors, a sentence each."""
    engine = config.engine
    if not engine.trunk_apart:
        return
    stages, replicas = _counts(config)
    planner = config.build("planner")
    if config.planner is not None and planner.every:
        yield (
            f"planner '{config.planner.name}' moves cuts during the run, which blocks in actors cannot follow yet. "
            "Leave engine.trunk_stages and engine.trunk_replicas out, or take planner: none."
        )
    if config.device in MAPS:
        yield (
            f"device is '{config.device}', which spreads the trunk over the GPUs of one process, but with "
            "engine.trunk_stages it is in actors. Take device: auto, and set engine.trunk_gpus."
        )
    if stages > 1 and config.build("exchange").probes:
        yield (
            f"exchange '{config.exchange.name}' looks around in the trunk as a whole, which engine.trunk_stages: "
            f"{stages} cuts. Take 1; engine.trunk_replicas can stay."
        )
    layouts = layouts_of(config, num_blocks)
    routes = routes_of(config, layouts)
    stops = [stop for route in routes.values() for stop in route]
    count = max(stop.blocks.stop for stop in stops) - min(stop.blocks.start for stop in stops)
    if stages > max(1, count):
        yield (
            f"engine.trunk_stages is {stages}, but the trunk has {count} block{'s' * (count != 1)} to cut. Lower it, "
            "or give the clients fewer blocks."
        )
    framework: Framework = config.build("framework")
    for client in layouts:
        stops += joined(config, framework.reach(client, layouts))
    slots = len({(stop.party, stop.slot) for stop in stops})
    if replicas > slots:
        has = "one trunk for all" if slots == 1 else f"{slots} trunks"
        yield (
            f"engine.trunk_replicas is {replicas}, but framework '{config.framework.name}' has {has} here, and a trunk "
            "is in one replica only. Lower it, or take a framework with more trunks, such as sfl-v1 or gsfl."
        )


def wants(config: RunConfig) -> list[tuple[float, float]]:
    """The CPUs and GPUs that each actor of the trunk wants."""
    stages, replicas = _counts(config)
    engine = config.engine
    return [(engine.num_cpus, engine.trunk_gpus)] * (stages * replicas)


def said(config: RunConfig) -> str:
    """The same in words."""
    engine, count = config.engine, len(wants(config))
    gpus = f" and {engine.trunk_gpus:g} GPUs" if engine.trunk_gpus else ""
    return f"the trunk is in {count} actor{'s' * (count > 1)} that want {engine.num_cpus:g} CPUs{gpus} each"


def stretches(config: RunConfig, parts: Parts) -> list[list[StretchActor]]:
    """The actors of the trunk, by replica and stage, on their way; none where it is in this process."""
    if not config.engine.trunk_apart:
        return []
    stages, replicas = _counts(config)
    stops = [stop for route in parts.routes.values() for stop in route]
    first, last = min(stop.blocks.start for stop in stops), max(stop.blocks.stop for stop in stops)
    has_top = any(not layout.tail_at_client for layout in parts.layouts.values())
    slots = [(party.name, of) for party in parts.parties.values() for of in party.slots]
    found = []
    for served in cut(range(len(slots)), replicas):
        dealt = [slots[number] for number in served]
        found.append([
            _actor(config, parts, blocks, dealt, top=has_top and number == stages - 1)
            for number, blocks in enumerate(cut(range(first, last), stages))
        ])  # fmt: skip
    return found


def attach(parts: Parts, replicas: Sequence[Sequence[StretchActor]]) -> None:
    """Let the run's parties be served by these actors, which have loaded their part."""
    stages: dict[str, dict[str, list[Stage]]] = {}
    for actors in replicas:
        row = [actor.stage for actor in actors]
        for party, of in actors[0].slots:
            stages.setdefault(party, {})[of] = row
    for name, theirs in stages.items():
        parts.parties[name] = StagedTrunk(parts.parties[name], theirs, parts.base.owner)


def told(replicas: Sequence[Sequence[StretchActor]]) -> str:
    """What of the trunk is where, in words."""
    blocks = "; ".join(actor.said for actor in replicas[0])
    return f"the trunk in actors: {blocks}" + (f"; {len(replicas)} times" if len(replicas) > 1 else "")


def cut(what: range, count: int) -> list[range]:
    """A range as so many, one after another, of nearly equal length."""
    borders = [what.start + len(what) * number // count for number in range(count + 1)]
    return [range(first, stop) for first, stop in itertools.pairwise(borders)]


def _counts(config: RunConfig) -> tuple[int, int]:
    """How many stages and replicas; none of both where the trunk is in this process."""
    engine = config.engine
    return (engine.trunk_stages or 1, engine.trunk_replicas or 1) if engine.trunk_apart else (0, 0)


def _actor(config: RunConfig, parts: Parts, blocks: range, slots: Slots, *, top: bool) -> StretchActor:
    import ray

    begun, engine = parts.begun, config.engine
    assert begun is not None
    names: dict[str, dict[str, list[str]]] = {}
    for party, of in slots:
        held = parts.parties[party].slots[of].params
        names.setdefault(party, {})[of] = [n for n in held if owned(parts.base.owner(n), blocks, top=top)]
    task = {
        "start": blocks.start, "stop": blocks.stop, "top": top, "slots": names, "labels": begun.data.labels,
        "versions": versions(),
    }  # fmt: skip
    made = ray.remote(Stretch).options(num_cpus=engine.num_cpus, num_gpus=engine.trunk_gpus)
    return StretchActor(blocks, top, slots, made.remote(dump(config), json.dumps(task)))
