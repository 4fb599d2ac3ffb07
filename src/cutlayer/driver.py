"""What a framework sees and drives: steps of clients over their routes, and what is merged or handed on.

A framework composes ``run.step`` over clients and merges at the end; the loop around its rounds is the engine's
(``engine.py``): checkpoint, evaluation, early stop.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer.allotment import Allotter
from cutlayer.arrangement import Arrangement
from cutlayer.assembly import Parts, neighbours, places_of
from cutlayer.clock import RunClock
from cutlayer.config import RunConfig
from cutlayer.contracts import Exchange, Framework, How, Joint, Mixing, Rate, StepResult
from cutlayer.links.local import Carrier, ClientEnd, Link, LocalLink, Queues, Station
from cutlayer.links.network import NetworkLink
from cutlayer.links.relay import Relay
from cutlayer.merging import Counters
from cutlayer.pace import Paces, workers
from cutlayer.parties.client import ClientParty
from cutlayer.parties.federated import FederatedServer
from cutlayer.parties.hops import Hosted, ServerTail, TrunkHop
from cutlayer.parties.tails import predicting
from cutlayer.presence import Lost, Presence
from cutlayer.report.progress import Reporter
from cutlayer.step import Tally, split_evaluate, split_step, tallied
from cutlayer.updating import Updating
from cutlayer.wire import Meter, Value

Wrap = Callable[[Any], Any]


class Run(Updating):
    """What a framework sees and drives."""

    def __init__(
        self, config: RunConfig, parts: Parts, *, meter: Meter, clock: RunClock, out: Path, progress: Reporter,
        links: Links | None = None,
    ) -> None:  # fmt: skip
        self.config, self.parts, self.meter, self.clock = config, parts, meter, clock
        self.out, self.progress = out, progress
        self.seed = config.seed
        self.clients = list(parts.clients)
        self.framework: Framework = config.build("framework")
        self.selection = config.build("selection")
        self.arrangement = Arrangement()
        self.sketches: dict[str, Tensor] = {}
        self.scheduler = config.build("scheduler")
        self.mixing: Mixing | None = config.build("mixing")
        self.joined = self.mixing is not None
        self.exchange: Exchange = config.build("exchange")
        self.rate: Rate | None = config.build("optimizer")
        self._joints: dict[str, list[Joint]] = {}  # by client, while it trains at once with others
        self.counters = Counters(steps=dict.fromkeys(self.clients, 0))
        self.paces = Paces(config, parts, real=parts.apart)
        self.presence = Presence(config, parts.routes)
        self._queues = queues = Queues(clock, self.paces.access)
        self.links: Mapping[str, Link] = (links or local_links)(self)
        self.ends = {name: ClientEnd(name, link) for name, link in self.links.items()}
        self.carrier = Carrier(meter, queues)
        self._stations: dict[str, Station] = {}
        self.metrics: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []  # of asynchronous merges
        self.taking: set[str] = set()  # of this round: who makes steps, and on whose devices they are made
        self.finished: dict[str, float] = {}  # of this round, by client: when its last step ended
        self.sizes: dict[str, dict[str, float]] = {}  # by client: its examples and label_tokens
        self.federated = FederatedServer(config.build("aggregator"), {})
        self._kept = {}

    @property
    def personal(self) -> bool:
        """Whether the clients keep parts of their own, or their clusters do, so that there are as many models."""
        tails = not self.framework.travels and any(predicting(party.slot) for party in self.parts.clients.values())
        return self._keeps_parts or bool(self.arrangement.clusters) or tails

    @property
    def _keeps_parts(self) -> bool:
        # Where heads are frozen and cuts differ, nobody can use all that is trained.
        apart = self.exchange.frozen_head and len(set(self.parts.layouts.values())) > 1
        return self.framework.personal or not self.federated.aggregator.exchanges or apart

    def evaluators(self) -> Sequence[str]:
        """The clients whose parts, with their trunks, are the model at the end of a round; all, if each has its own.

        Of clients with parts of their own, those that have come and not left, and are not away.
        """
        if not self.personal:
            return self.framework.evaluators(self)
        last, known = max(0, self.counters.rounds - 1), self.presence.clients
        return [c for c in self.present if known[c].joins <= last and not self.presence.gone(c, last)] or self.clients

    def steps_left(self, client: str) -> int:
        """How many optimizer steps a client may still make in this run; none in a round in which it is lost."""
        if self.presence.out(client) or self.presence.over(client, self.counters.rounds):
            return 0
        return self.parts.planned[client] - self.counters.steps[client]

    async def step(
        self, client: str, *, wrap: Wrap | None = None, trunk_update: bool = True, head_update: bool = True,
        weight: float = 1.0,
    ) -> StepResult | None:  # fmt: skip
        """One optimizer step of a client: all its micro-batches, then the updates.

        None: the client (or one that runs blocks for it) was lost, and nothing of the step is left.

        Args:
            client: its name.
            wrap: puts a framework's own wrapper around the last stop of the route (a turn, a pool).
            trunk_update: False leaves the gradient of the slots in waiting, for ``update_slots``.
            head_update: False leaves that of the client's part in waiting, for ``update_heads``.
            weight: scales all that this step adds to gradients, as a factor of the loss would.
        """
        if self.presence.out(client):
            return None
        self.taking.update(self.presence.hosts(client))
        number = self.counters.steps[client]
        joints = self._joints.get(client, [])
        trunk_update = trunk_update and not self.joined
        end, middle, tail, stop = self.route(client, wrap)
        how = How(
            head_update=head_update and not self.clips, trunk_update=trunk_update and not self.clips,
            head_weight=weight, trunk_weight=weight,
        )  # fmt: skip
        done: list[StepResult] = []
        with tallied() as tally:
            try:
                with self.finite(client):
                    while not done or not done[-1].last:
                        step = self.exchange.step(split_step, end, middle, tail, step=number, micro=len(done), how=how)
                        done.append(await step)
                    if self.clips and (head_update or trunk_update):
                        await self._clipped_update(client, heads=head_update, slots=trunk_update)
            except Lost as lost:
                self.abort(client)
                self.lose(lost.client)
                return None
            except BaseException:
                self.abort(client)
                raise
            finally:
                await stop.leave(client)
        self.counters.steps[client] += 1
        result = StepResult(
            client, number, sum(d.loss for d in done), sum(d.tokens for d in done), sum(d.label_tokens for d in done),
            True,
        )  # fmt: skip
        self._book(result, tally)
        for joint in reversed(joints):  # the mixing's last, which may wait for the others
            await joint.done(result)
        return result

    def _book(self, result: StepResult, tally: Tally) -> None:
        """The line of a step in ``metrics.jsonl``, and its part of the counts."""
        record: dict[str, Any] = {
            "step": result.step, "round": self.counters.rounds, "client": result.client, "loss": result.loss,
            "tokens": result.tokens, "label_tokens": result.label_tokens,
            "bytes_up": tally.bytes_up, "bytes_down": tally.bytes_down,
            "seconds": {k: round(v, 6) for k, v in tally.seconds.items()},
        }  # fmt: skip
        if tally.bytes_between:
            record["bytes_between"] = tally.bytes_between
        if tally.virtual:
            record["virtual_seconds"] = dict(tally.virtual)
            record["virtual_time"] = self.clock.now()
            seconds, steps = self.counters.own.get(result.client, (0.0, 0))
            self.counters.own[result.client] = [seconds + tally.own, steps + 1]
            self.finished[result.client] = self.clock.now()
            for name, seconds in tally.virtual.items():
                self.counters.virtual[name] = self.counters.virtual.get(name, 0.0) + seconds
        self.metrics.append(record)
        self.counters.tokens += result.tokens
        self.progress.update(record)

    def route(self, client: str, wrap: Wrap | None = None) -> tuple[ClientEnd, list[Any], Any, Any]:
        """The client's end, the hops, the tail, and the last of these that is not the client's."""
        layout, stops = self.parts.layouts[client], self.parts.routes[client]
        places = places_of(self.parts.base, layout, stops)
        hops: list[Any] = []
        hop: Any
        for number, (stop, place) in enumerate(zip(stops, places, strict=True)):
            kind = ServerTail if place.segment.top else TrunkHop
            pace = self.paces.stop(stop.party, place.segment, first=place.before is None)
            link = self.links.get(stop.party)
            if isinstance(link, NetworkLink):
                hop = Relay(self.parts.parties[stop.party], place, number, link, client)
            else:
                hop = kind(self.parts.parties[stop.party], place, self._station(stop.party), self.carrier, pace)
            if stop.party in self.ends:
                hop = Hosted(hop, client, self.presence.asked)
            hops.append(self.scheduler.wrap(hop, client))
        if wrap is not None:
            hops[-1] = wrap(hops[-1])
        for joint in self._joints.get(client, []):
            hops[-1] = joint.wrap(hops[-1], client)
        if self.mixing is not None and not self._joints.get(client):
            hops[-1] = self.mixing.alone(self, hops[-1])
        first, last = neighbours(self.config, stops)
        end = ClientEnd(client, self.links[client], first=first, last=last)
        if layout.tail_at_client:
            return end, hops, end, hops[-1]
        return end, hops[:-1], hops[-1], hops[-1]

    def _station(self, party: str) -> Station:
        if party not in self._stations:
            self._stations[party] = Station(party, self._queues, workers=workers(self.paces.profiles, party))
        return self._stations[party]

    def begin_round(self) -> None:
        """Who is there, and who will be lost."""
        number, presence = self.counters.rounds, self.presence
        self.exchange.begin(self)
        self.federated.share = self.exchange.merged_share
        self._kept.clear()
        clients = presence.able(self.framework.eligible(number, self.clients), number)
        micros = self.framework.round_steps * self.config.gradient_accumulation
        presence.begin(number, clients, micros, {c: self.parts.layouts[c].tail_at_client for c in clients})
        if self.absence is not None:  # nobody knows who will be lost
            self.keep(self.present)
        elif not self.framework.asynchronous:
            self.keep([client for client in self.clients if presence.falls(client)])

    def abort(self, client: str) -> None:
        """Forget what is under way of a client, everywhere."""
        self.abort_joint(client)
        self.links[client].abort()

    def abort_joint(self, name: str) -> None:
        """Forget what is under way of a batch that several clients share, in their place."""
        for party in self.parts.parties.values():
            party.abort(name)

    def book_outside(self) -> None:
        """Put what was spent outside of steps (set-up, merges, hand-overs) into the counts."""
        for name, seconds in self._queues.outside.items():
            self.counters.virtual[name] = self.counters.virtual.get(name, 0.0) + seconds
        self._queues.outside.clear()

    def forget_spent(self) -> None:
        """Of what a set-up took that was counted before."""
        self._queues.book_again(({}, {}, {}))

    @property
    def busy(self) -> dict[str, float]:
        """Of this round, by party: seconds in which it or its link was at work."""
        return self._queues.busy

    async def together(self, work: Callable[[str], Awaitable[object]], clients: Sequence[str]) -> None:
        """Do ``work`` for all clients at once, and wait for all. A run's mixing and rate may join their steps."""
        both = [method.gather(self, clients) for method in (self.mixing, self.rate) if method is not None]
        joints = [joint for joint in both if joint is not None]
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(self._among(joints, client, work), name=client)

    async def _among(
        self, joints: Sequence[Joint], client: str, work: Callable[[str], Awaitable[object]]
    ) -> None:  # fmt: skip
        before = self._joints.get(client, [])
        self._joints[client] = [*joints]
        try:
            await work(client)
        finally:
            self._joints[client] = before
            for joint in joints:
                joint.leave(client)

    async def evaluate(self) -> dict[str, float] | None:
        """Mean loss over the label tokens of the evaluation data, its perplexity, and the accuracy: the share of them
        that the model finds most probable. None without such data.

        Of several evaluators (whose models differ) it is the mean. It takes no time on the virtual clock.
        """
        while True:
            names = self.evaluators()
            if not any(self.parts.clients[name].evaluation for name in names):
                return None
            if self.absence is not None:
                await self.absence.hosts_of(names)
            await self.make_ready(names)
            time, booked = self.clock.state(), self._queues.booked()
            try:
                return await self._evaluated(names)
            except Lost as lost:  # over a network only; others can be asked
                self.lose(lost.client)
                if self.absence is not None:
                    await self.absence.somebody()
            finally:
                self.clock.restore(time)
                self._queues.book_again(booked)

    async def _evaluated(self, names: Sequence[str]) -> dict[str, float]:
        total, tokens, correct = 0.0, 0, 0
        for name in names:
            end, middle, tail, _ = self.route(name)
            for number in range(len(self.parts.clients[name].evaluation)):
                with self.finite(name):
                    result = await split_evaluate(end, middle, tail, batch=number)
                total += result.loss * result.label_tokens
                tokens += result.label_tokens
                correct += result.correct
        loss = total / tokens if tokens else math.nan
        accuracy = correct / tokens if tokens else math.nan
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": accuracy}

    async def make_ready(self, names: Sequence[str]) -> None:
        """Give these clients the last merge, unless they keep their own parts, so that theirs is the model."""
        if not self._keeps_parts:
            await self.catch_up(names, trunks=bool(self.arrangement.clusters))

    async def part(self) -> None:
        """When all is done: give everybody what is the model's, also those who were not in the last merge or turn.

        Clients who keep parts of their own have them. In one process nobody needs this, as nobody goes away.
        """
        if self._keeps_parts:
            return
        await self.catch_up(self.present)
        if self.framework.travels and "" in self.counters.holders:
            giver = self.holder()
            for client in self.present:
                await self.hand_over(giver, client, optimizer=False)

    def state(self, client: str | None = None) -> dict[str, Tensor]:
        """All trainable tensors of a client's model as it now is, by name; by default of the first evaluator's."""
        client = client or self.evaluators()[0]
        party = self.parts.clients[client]
        parts = (party.head, *([party.tail] if party.tail else []))
        found = {name: party.params[name].detach() for part in parts for name in part.names}
        found |= predicting(party.slot)
        for place, stop in zip(
            places_of(self.parts.base, self.parts.layouts[client], self.parts.routes[client]),
            self.parts.routes[client],
            strict=True,
        ):
            slot = self.parts.slot(stop)
            found |= {name: slot.params[name].detach() for name in place.segment.names}
        return found

    def adapted(self, client: str) -> int:
        """How many parameters a client's model is trained in, where holders have ranks of their own; else 0."""
        unequal = isinstance(self.parts.peft, Allotter)
        return sum(tensor.numel() for tensor in self.state(client).values()) if unequal else 0

    def told(self, client: str) -> dict[str, Value]:
        """What a client is told at the set-up."""
        layout = self.parts.layouts[client]
        told: dict[str, Value] = {
            "head_blocks": len(layout.head),
            "tail_blocks": len(layout.tail) if layout.tail_at_client else -1,
            "steps": self.parts.planned[client],
        }
        if self.framework.needs_step_tokens or (self.mixing is not None and self.mixing.needs_step_tokens):
            told["tell_step_tokens"] = True
        if self.exchange.caches:
            told["cache"] = True
        return told

    async def set_up(self) -> None:
        """Step 1: tell every client the cut and the length of the run, and learn its sizes."""
        by = {"examples": "examples", "tokens": "label_tokens"}.get(self.federated.aggregator.weight_by)

        async def one(name: str) -> None:
            header = (await self.ends[name].ask("set_up", self.told(name))).header
            self.sizes[name] = {key: float(header.value(key)) for key in ("examples", "label_tokens")}

        if self.absence is not None:  # who is away has told it before
            self.sizes = {name: self.absence.sizes(name) for name in self.clients}
        await self.reach(one, self.clients)
        self.sizes = {name: self.sizes[name] for name in self.clients}  # in their order, whoever answered first
        for name in self.clients:
            self.federated.sizes[name] = self.sizes[name][by] if by else 1.0


Links = Callable[[Run], Mapping[str, Link]]


def local_links(run: Run) -> dict[str, Link]:
    """The links of a run whose clients are all in this process."""
    found: dict[str, Link] = {}
    for name, party in run.parts.clients.items():
        assert isinstance(party, ClientParty)
        found[name] = LocalLink(
            party, meter=run.meter, queues=run._queues, pace=run.paces.client(name), asked=run.presence.asked
        )
    return found
