"""Step 11, aggregate: whose parts are merged, handed on or caught up with, by block, over the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from cutlayer.arrangement import Arrangement
from cutlayer.contracts import SERVER, Exchange, Framework, Parcel, State, Stop
from cutlayer.errors import MethodError
from cutlayer.links.local import Carrier
from cutlayer.losing import at_once
from cutlayer.models.slots import parameter_of
from cutlayer.parties.federated import FederatedServer
from cutlayer.presence import Lost
from cutlayer.reaching import Reaching
from cutlayer.wire import Header

T = TypeVar("T")
Moments = Literal["keep", "average", "reset"]  # what becomes of the optimizer's state of slots that are merged


@dataclass
class Counters:
    """What of a run's progress is no tensor; kept in its checkpoints."""

    rounds: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    lines: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    holders: dict[str, str] = field(default_factory=dict)  # of parts that are handed on, by line: who has it
    merges: int = 0
    merged: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)  # requests sent to each client: they number the frames
    virtual: dict[str, float] = field(default_factory=dict)  # seconds on the virtual clock by step name, summed
    waiting: dict[str, float] = field(default_factory=dict)  # seconds in which a client of a round had nothing to do
    critical: dict[str, int] = field(default_factory=dict)  # rounds that ended with this client
    cuts: dict[str, list[list[int]]] = field(default_factory=dict)  # by client: round and head blocks of each move
    own: dict[str, list[float]] = field(default_factory=dict)  # since the last plan: virtual seconds of own work, steps
    cycles: dict[str, float] = field(default_factory=dict)  # asynchronous: seconds that a client's last upload took
    uploads: int = 0  # lines of uploads.jsonl
    unfinished: dict[str, int] = field(
        default_factory=dict
    )  # asynchronous: local steps of who was lost before the last
    lost: dict[str, int] = field(default_factory=dict)  # rounds in the middle of which a client was lost
    earlier: dict[str, list[str]] = field(default_factory=dict)  # by line: who had the part before, oldest first
    away: dict[str, int] = field(
        default_factory=dict
    )  # over a network, who is away: the round as at whose begin it is; -1: as before the first
    fell: dict[str, list[int]] = field(default_factory=dict)  # over a network: the rounds in which each was lost
    missed: dict[str, list[int]] = field(default_factory=dict)  # and those that began without it
    stopped: bool = False
    latest: dict[str, int] = field(default_factory=dict)  # by cluster with a model of its own: its last merge
    arrangement: dict[str, Any] | None = None  # what the selection said last
    importance: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # by holder and matrix: what it told when its ranks were last decided
    allotted: dict[str, int] = field(default_factory=dict)  # by holder: the rounds before its ranks were last decided
    totals: dict[str, int] = field(
        default_factory=dict
    )  # by slot: updates in the run, where an arrangement says it; of clients elsewhere those that were ahead then
    led: int = -1  # the round in which the arrangement last changed who trains with whom; -1: none has
    born: dict[str, int] = field(default_factory=dict)  # by slot that an arrangement made: the round in which it did


class StepEleven(Reaching):
    """The part of a run that moves parameters between parties. ``Run`` sets these."""

    carrier: Carrier
    federated: FederatedServer
    exchange: Exchange
    joined: bool  # the clients' trunks are one slot, which has nothing to be merged with
    arrangement: Arrangement
    framework: Framework

    async def merge(
        self,
        clients: Sequence[str],
        *,
        trunks: bool = False,
        heads: bool = True,
        moments: Moments = "keep",
        weights: Mapping[str, float] | None = None,
        blocks: Callable[[int | str], bool] = lambda _: True,
    ) -> None:
        """Step 11: merge these clients' copies of the model, and give each its own back.

        A block that some of them hold in their heads and others have in a trunk is merged over all (by block). Where a
        selection has made clusters with models of their own, each cluster is merged by itself.

        Args:
            clients: whose copies are merged; those that were lost are left out.
            trunks: merge their slots as well.
            heads: merge what the clients hold; False sends nothing.
            moments: what becomes of the optimizer's state of merged slots.
            weights: in place of the aggregator's, by client, in any unit.
            blocks: which owners (a block's number, ``bottom``, ``top``) are merged.
        """
        clients = [client for client in clients if self._reachable(client)]
        alone = len(self.clients) == 1 and self.federated.share == 1  # nobody to average with
        if not clients or not self.federated.aggregator.exchanges or alone:
            return
        trunks = trunks and not self.joined
        if self.exchange.frozen_head:
            heads = heads and any(self.parts.clients[name].names("own") for name in clients)
            if not heads and not trunks:
                return
        groups: dict[str, list[str]] = {}
        for name in clients:
            groups.setdefault(self.cluster(name), []).append(name)
        given = {
            cluster: await self._copies(members, trunks=trunks, heads=heads, moments=moments, blocks=blocks)
            for cluster, members in groups.items()
        }
        given = {cluster: copies for cluster, copies in given.items() if copies}
        if not given:  # all were lost
            return
        self.counters.merges += 1
        merged = {}
        for cluster, copies in given.items():
            merged[cluster] = self.federated.merge({c: s for c, s in copies.items() if s}, weights, cluster)
            if cluster:
                self.counters.latest[cluster] = self.counters.merges
        if self.arrangement.pull:
            merged = self.federated.pulled(self.arrangement.clusters, list(merged), self.arrangement.pull)
        for cluster, copies in given.items():
            await self._give_back(list(copies), merged[cluster], trunks=trunks, heads=heads, moments=moments)

    def cluster(self, client: str) -> str:
        """The cluster with a model of its own that a client is in; empty where all train one model."""
        return self.arrangement.clusters.get(client, "")

    async def _copies(
        self, clients: Sequence[str], *, trunks: bool, heads: bool, moments: Moments,
        blocks: Callable[[int | str], bool],
    ) -> dict[str, State]:  # fmt: skip
        """By client: what of its copy of the model is merged; those that were lost are left out."""
        owner = self.parts.base.owner
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in clients}
        if heads:

            async def ask(name: str) -> None:
                parts[name] = await self._asked(name, "own")

            await self.reach(ask, clients)
            clients = [client for client in clients if self._reachable(client)]
        shared = {n for part in parts.values() for n in part}
        copies: dict[str, State] = {}
        sent: dict[Stop, dict[str, Tensor]] = {}  # what each slot gave, once

        async def fetch(stop: Stop) -> None:
            if self.parts.own(stop):
                sent[stop] = await self._asked(stop.party, "hosted") if trunks else {}
                return
            if not trunks and self.elsewhere(stop) is not None:
                raise AssertionError("who leaves trunks to clients elsewhere merges them whole")
            found = await self.slot_state(stop, optimizer=moments == "average")
            wanted = {n for n in found if (trunks or n in shared) and blocks(owner(parameter_of(n)))}
            sent[stop] = await self._sent(stop.party, SERVER, {n: t for n, t in found.items() if n in wanted})

        every = {(stop.party, stop.slot): stop for stop in self._stops(clients)}
        await at_once(fetch, list(every.values()))
        for name in clients:
            rest: dict[str, Tensor] = {}
            for stop in self._stops([name]):
                rest |= sent[every[stop.party, stop.slot]]
            own = {n: t for n, t in parts[name].items() if blocks(owner(n))}
            copies[name] = {**rest, **own}
        return copies

    async def _give_back(
        self, clients: Sequence[str], merged: State, *, trunks: bool, heads: bool, moments: Moments
    ) -> None:
        """To each client, and to the slots on its route, what is theirs of a merged state."""

        async def give(name: str) -> None:
            if heads:
                await self._give(name, merged)
            self.counters.merged[name] = self.counters.merges

        async def put(stop: Stop) -> None:
            if self.parts.own(stop):
                await self._give(stop.party, merged, part="hosted")
                self.counters.merged[f"{stop.party}/hosted"] = self.counters.merges
                return
            slot = self.parts.slot(stop)
            state = self._fitting(merged, slot.get(optimizer=moments == "average"))
            # Of the tiers of a route only some may be in this merge.
            reset = moments == "reset" and trunks and bool(state)
            await self.put_slot(stop, await self._sent(SERVER, stop.party, state), reset=reset)

        await self.reach(give, clients)
        await at_once(put, self._stops([client for client in clients if self._reachable(client)]))
        if heads and not trunks:
            self._note_shared_trunk(merged)

    def _note_shared_trunk(self, merged: State) -> None:
        """Those who were not in a merge and hold more blocks than those who were get the trunk's newest copy of these.

        Of a block that only they have in their heads, the trunk's copy has been trained meanwhile.
        """
        if len(set(self.parts.layouts.values())) == 1:
            return
        stops = {(stop.party, stop.slot) for stop in self._stops(self.clients)}
        if len(stops) > 1 or stops.pop()[0] != SERVER:
            return  # copies of their own: there is no newest one
        (slot,) = self.slots_of(self.clients)
        held = {name for client in self.clients for name in self.parts.clients[client].names("own")}
        newer = {n: t.clone() for n, t in slot.get().items() if n in held and n not in merged}
        self.federated.before = {**self.federated.before, **newer}

    def _stops(self, clients: Iterable[str]) -> list[Stop]:
        """The stops of these clients' routes, each party's slot once."""
        found = {(s.party, s.slot): s for c in clients for s in self.parts.routes[c]}
        return list(found.values())

    async def _sent(self, giver: str, taker: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A slot's tensors at the other end: over the wire, unless both are the server."""
        if giver == taker or not state:
            return state
        header = Header("aggregate", "state", "", giver, taker, names=tuple(state))
        return (await self.carrier.carry(Parcel(header, list(state.values())))).tensors

    async def _asked(self, client: str, part: str) -> dict[str, Tensor]:
        """What a client's device holds: its ``own`` part of its model, or what it runs for others (``hosted``)."""
        return (await self.ends[client].ask("get_state", {"optimizer": False, "part": part})).tensors

    async def _give(self, client: str, merged: State, part: str = "own") -> None:
        party = self.parts.clients[client]
        mine = {n: t for n, t in party.slot.get().items() if n in party.names(part)}
        if state := self._fitting(merged, mine):
            await self.ends[client].put(state)

    def _fitting(self, merged: State, mine: State) -> dict[str, Tensor]:
        aggregator, shapes = self.federated.aggregator, {name: tuple(tensor.shape) for name, tensor in mine.items()}
        fitting = dict(aggregator.fit(merged, shapes))
        for name, tensor in fitting.items():
            if tuple(tensor.shape) != shapes.get(name):
                raise MethodError(
                    f"The aggregator {type(aggregator).__name__} gives '{name}' of shape {list(tensor.shape)}, but it "
                    f"is {list(shapes.get(name, ()))} where it is to go. Unequal ranks need an aggregator that fits."
                )
        return fitting

    async def add_changes(self, clients: Sequence[str]) -> None:
        """Step 11 of rings: to what all had before the round comes the sum of what each has changed, in all it holds.

        Raises:
            NonFinite: a client sent a tensor that is not finite; nothing is changed.
        """
        before = self.federated.before or {n: p.detach() for n, p in self.parts.base.initial.items()}
        states: dict[str, dict[str, Tensor]] = {}

        async def ask(name: str) -> None:
            states[name] = await self._asked(name, "all")

        await at_once(ask, clients)
        self.federated.refuse_wrong(states)
        merged = {}
        for name, start in before.items():
            changes = [states[c][name].double() - start.double() for c in sorted(states) if name in states[c]]
            merged[name] = (start.double() + sum(changes)).to(start.dtype)
        self.federated.before = {n: t.clone() for n, t in merged.items()}
        self.counters.merges += 1

        async def give(name: str) -> None:
            await self._give(name, merged, part="all")
            self.counters.merged[name] = self.counters.merges

        await at_once(give, clients)

    async def catch_up(self, clients: Sequence[str], *, trunks: bool = False) -> None:
        """Give the last merge to those that were not in it; with ``trunks`` to the slots on their routes too."""
        merged = self.counters.merged

        async def one(name: str) -> None:
            cluster = self.cluster(name)
            latest = self.counters.latest.get(cluster, 0) if cluster else self.counters.merges
            before = self.federated.last(cluster)
            late = merged.get(name, 0) < latest
            if late:
                merged[name] = latest
                await self._give(name, before)
            for stop in self.parts.routes[name] if trunks and not self.joined else ():
                if self.parts.own(stop):
                    if merged.get(f"{stop.party}/hosted", 0) < latest:
                        merged[f"{stop.party}/hosted"] = latest
                        await self._give(stop.party, before, part="hosted")
                elif late:
                    state = self._fitting(before, self.parts.slot(stop).get())
                    await self.put_slot(stop, await self._sent(SERVER, stop.party, state))

        await self.reach(one, clients)

    async def hand_over(self, giver: str, taker: str, *, optimizer: bool, line: str = "") -> None:
        """Step 11 of the sequential kind: ``taker`` goes on with the part of ``giver``, of one of several lines.

        Where the giver is lost, the last before it has the part; where nobody has had it, the taker has what all began
        with. A taker that is lost does not get it.
        """
        while self._reachable(taker):
            if not self._reachable(giver):
                self.pass_back(giver)
                giver = self.counters.holders.get(line, taker)
            try:
                await self._handed(giver, taker, optimizer=optimizer)
            except Lost as lost:
                self.lose(lost.client)
                continue
            earlier = self.counters.earlier.setdefault(line, [])
            if giver != taker:
                earlier[:] = [name for name in earlier if name not in (giver, taker)] + [giver]
            self.counters.holders[line] = taker
            return

    async def _handed(self, giver: str, taker: str, *, optimizer: bool) -> None:
        if giver != taker and not (self.exchange.frozen_head and not self.parts.clients[giver].names("own")):
            parcel = await self.ends[giver].ask("get_state", {"optimizer": optimizer, "part": "own"})
            version = int(parcel.header.value("version"))
            await self.ends[taker].put(dict(parcel.tensors), version=version, reset=not optimizer)
            self.counters.merged[taker] = self.counters.merged.get(giver, 0)  # it has what the giver had
