"""How a run follows a selection that says who trains with whom: sketches are asked for, routes and slots are made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import Tensor

from cutlayer.arrangement import Arrangement, Arranger, Speed, Told, names_hosts
from cutlayer.assembly import places_of
from cutlayer.build import task_of
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, Framework, Selection, Stop
from cutlayer.costs import BYTES, leg_seconds, shape_of
from cutlayer.errors import MethodError
from cutlayer.leading import Lead
from cutlayer.links.local import Pace
from cutlayer.links.network import NetworkLink
from cutlayer.merging import StepEleven
from cutlayer.models.slots import Slot
from cutlayer.pace import Paces
from cutlayer.parties.trunk import TrunkParty
from cutlayer.report.progress import Reporter
from cutlayer.schedule import learning_rate
from cutlayer.sketches import as_told


class Arranging(StepEleven):
    """The part of a run that follows a selection's arrangements. ``Run`` sets these."""

    config: RunConfig
    framework: Framework
    selection: Selection
    progress: Reporter
    seed: int
    sketches: dict[str, Tensor]  # by client, as they came

    def eligible(self, number: int) -> list[str]:
        """Who may train in round ``number``, by the framework and by the selection; who is away may not."""
        chosen = self.arrangement.chosen
        able = self.presence.able(self.framework.eligible(number, self.clients), number)
        return [client for client in able if chosen is None or client in chosen]

    def local_steps(self, client: str) -> int:
        """How many optimizer steps a client makes in a round."""
        return self.arrangement.steps.get(client, self.framework.local_steps)

    def weights(self, clients: Collection[str]) -> dict[str, float] | None:
        """The weights of these clients in a merge, where the selection gives them."""
        given = self.arrangement.weights
        return {client: given[client] for client in clients} if given else None

    @property
    def unsketched(self) -> list[str]:
        """The clients whose first sketch the selection has not."""
        return [c for c in self.clients if c not in self.sketches] if isinstance(self.selection, Arranger) else []

    async def arrange(self) -> None:
        """Before a round: ask for sketches where they are due, and follow what the selection makes of them.

        Raises:
            MethodError: it arranges what cannot be.
        """
        selection, number = self.selection, self.counters.rounds
        if not isinstance(selection, Arranger):
            return
        every = selection.renews
        if self.unsketched or (every is not None and number and number % every == 0):
            if selection.asks.sees_head:
                await self.catch_up(self.clients)  # features of unequal heads could not be compared
            for client in self.present:  # who is away has told one, which stays
                self.sketches[client] = (await self.ends[client].ask("sketch")).tensors["sketch"]
        elif not selection.each_round:
            return
        before = self.arrangement if self.counters.arrangement is not None else None
        arrangement = selection.arrange(number, self._told(selection), before)
        if not set(selection.gives) <= set(self.framework.takes):  # it only samples here
            arrangement = replace(arrangement, pairs=(), steps={}, weights={})
        self._refuse_wrong(arrangement)
        await self._follow(arrangement)

    def _told(self, selection: Arranger) -> Told:
        paces = Paces(self.config, self.parts)
        server, speeds, step_bytes = self._speeds(paces)
        return Told(
            clients=[c for c in self.clients if self.parts.planned[c] > self.counters.steps[c]],
            everybody=self.clients,
            sketches={client: as_told(selection.asks, self.sketches[client]) for client in self.clients},
            sizes=self.federated.sizes,
            speeds=speeds, timed=bool(paces.profiles), server=server, step_bytes=step_bytes,
            local_steps=self.framework.local_steps, seed=self.seed,
        )  # fmt: skip

    def _speeds(self, paces: Paces) -> tuple[float, dict[str, Speed], int]:
        """Seconds of the server for a step's trunk, each client's speeds, and the bytes of a step's hidden states."""
        config, parts = self.config, self.parts
        shape = shape_of(parts.base.model.config, task=task_of(config))
        known = getattr(parts.base.model.config, "max_position_embeddings", None) or config.data.max_length
        rows, length = config.batch_size * config.gradient_accumulation, min(config.data.max_length, known)
        step_bytes = rows * length * shape.hidden * BYTES[config.precision]
        if not paces.profiles:
            return 1.0, {client: Speed() for client in self.clients}, step_bytes

        def seconds(pace: Pace | None, verbs: Sequence[str]) -> float:
            assert pace is not None  # as there are profiles
            return sum(pace.seconds(verb, rows, length, True) for verb in verbs)

        speeds, server = {}, 0.0
        for client in self.clients:
            profile, layout = paces.profiles[client], parts.layouts[client]
            assert profile is not None
            (place,) = places_of(parts.base, layout, [Stop(client, "", layout.middle)])
            verbs = ["tail_step"] if place.segment.top else ["forward", "backward"]
            party = parts.clients[client]
            own, middle = party.names("own"), place.segment.names
            size = {True: 0, False: 0}
            for name, parameter in parts.base.initial.items():
                for mine in (True, False):
                    size[mine] += parameter.nbytes if name in (own if mine else middle) else 0
            speeds[client] = Speed(
                own=seconds(paces.client(client), ["head_forward", "tail_step", "head_backward"]),
                middle=seconds(paces.stop(client, place.segment), verbs),
                up=profile.up, down=profile.down, rtt=profile.rtt,
                upload=leg_seconds(size[True], profile.up, profile.rtt),
                upload_middle=leg_seconds(size[False], profile.up, profile.rtt),
            )  # fmt: skip
            server = max(server, seconds(paces.stop(SERVER, place.segment), verbs))
        return server, speeds, step_bytes

    def _refuse_wrong(self, new: Arrangement) -> None:
        """Groups, clusters and choices must be of the run's clients."""
        name = self.config.selection.name
        grouped = [client for group in new.groups for client in group.members]
        said = []
        if new.groups and sorted(grouped) != sorted(self.clients):
            said.append("its groups do not have every client once")
        said += ["a group has no clients" for group in new.groups if not group.members]
        said += [f"'{g.host}' hosts a group that it is not in" for g in new.groups if g.host not in (None, *g.members)]
        if new.clusters and set(new.clusters) != set(self.clients):
            said.append("its clusters do not have every client")
        if new.chosen is not None and (not new.chosen or not set(new.chosen) <= set(self.clients)):
            said.append("it chose nobody, or others than the clients")
        paired = [client for pair in new.pairs for client in pair]
        if len(set(paired)) != len(paired) or not set(paired) <= set(self.clients):
            said.append("somebody is in two pairs, or is no client")
        if self.parts.apart and names_hosts(self.config):
            alone = [", ".join(group.members) for group in new.groups if group.host is None]
            said += [f"nobody hosts the group {names}, and over a network a client must" for names in alone]
        if said:
            raise MethodError(f"selection '{name}': {'; '.join(said)}.")

    async def _follow(self, new: Arrangement) -> None:
        """Go over to a new arrangement: clusters get their models, clients their routes, slots what they begin with."""
        old, counters = self.arrangement, self.counters
        changed = (new.groups, new.clusters) != (old.groups, old.clusters) or counters.arrangement is None
        self._regroup_clusters(old, new)
        self.arrangement = new
        counters.arrangement = new.to_json()
        if not changed:
            for client, stops in self.framework.rerouted(new, self.parts.layouts).items() if new.pairs else ():
                self.set_route(client, stops)
            await self.tell_places()
            return
        if said := new.said():
            self.progress.note(said)
        counters.holders.clear()
        counters.totals.clear()
        counters.led = counters.rounds
        began = any(counters.steps.values())
        before = self._mean_trunk() if began else {}
        fresh = self.lead()
        if self.parts.apart:
            await self.reach(self.retime, self.clients)
            await self.tell_places()
        for key in fresh:
            stop = Stop(*key, range(0))
            state = {n: t for n, t in before.items() if n in self.parts.slot(stop).get()}
            await self.put_slot(stop, await self._sent(SERVER, key[0], state))
        if new.groups and began:  # all groups go on from the last merge, whatever their slots were before
            for stop in self._stops(self.clients):
                merged = self._fitting(self.federated.before, self.parts.slot(stop).get())
                await self.put_slot(stop, await self._sent(SERVER, stop.party, merged))

    def _mean_trunk(self) -> dict[str, Tensor]:
        """The mean of the slots on the clients' routes, weighted by the clients' data."""
        total = sum(self.federated.sizes[client] for client in self.clients)
        mean: dict[str, Tensor] = {}
        for client in self.clients:
            share = self.federated.sizes[client] / total
            for slot in self.slots_of([client]):
                for name, tensor in slot.get().items():
                    mean[name] = mean.get(name, 0.0) + tensor.double() * share
        return {name: tensor.to(self.parts.base.initial[name].dtype) for name, tensor in mean.items()}

    def _regroup_clusters(self, old: Arrangement, new: Arrangement) -> None:
        """Clusters that stay keep their models; a new one, and one model of all, start from the mean of these."""
        if old.clusters == new.clusters:
            return
        counters, federated = self.counters, self.federated
        kept = dict(federated.apart)
        if kept:  # before the merge below there is nothing that anybody must take
            federated.rejoin(old.clusters)
            counters.merges += 1
        federated.apart = {name: kept[name] for name in set(new.clusters.values()) if name in kept}
        counters.latest = {
            name: counters.latest[name] if name in federated.apart else counters.merges
            for name in sorted(set(new.clusters.values()))
        }
        for client, cluster in new.clusters.items():
            if kept and old.clusters.get(client) != cluster:
                counters.merged[client] = 0  # it takes its new cluster's model

    def lead(self) -> list[tuple[str, str]]:
        """Lead clients where the arrangement says, and make the slots there; also when a run goes on.

        Gives the parties and names of the slots that are new.
        """
        parts, counters = self.parts, self.counters
        self.framework = self.framework.following(self.arrangement)
        routes = self.framework.rerouted(self.arrangement, parts.layouts)
        for client, stops in routes.items():
            self.set_route(client, stops)
        if not routes or self.arrangement.pairs:
            return []
        names: dict[tuple[str, str], list[str]] = {}
        users: dict[tuple[str, str], list[str]] = {}
        for client in self.clients:
            stops = parts.routes[client]
            for stop, place in zip(stops, places_of(parts.base, parts.layouts[client], stops), strict=True):
                names.setdefault((stop.party, stop.slot), []).extend(place.segment.names)
                users.setdefault((stop.party, stop.slot), []).append(client)
        for party in parts.parties.values():  # what nobody passes any more is in what the others begin with
            party.slots = {of: slot for of, slot in party.slots.items() if (party.name, of) in users}
        kept = {f"{party} {of}" for party, of in users}
        counters.born = {key: born for key, born in counters.born.items() if key in kept}
        fresh = []
        for (party_name, of), wanted in names.items():
            if party_name not in parts.parties:
                parts.parties[party_name] = TrunkParty(party_name, {}, seed=self.seed)
            slots, made = parts.parties[party_name].slots, [counters.steps[c] for c in users[party_name, of]]
            if of not in slots:
                slots[of] = parts.new_slot(
                    of, [n for n in parts.base.initial if n in set(wanted)], 0, users[party_name, of]
                )
                slots[of].version = max(made) if self.framework.pooled else sum(made)  # as far on as its clients
                fresh.append((party_name, of))
                counters.born.setdefault(f"{party_name} {of}", counters.rounds)  # it is known where a run goes on
            self._retime(f"{party_name} {of}", slots[of], users[party_name, of])
        for client, party_of in parts.clients.items():
            if parts.apart and client in parts.parties:
                party_of.trunk = next(iter(parts.parties[client].slots.values()), None)
            line = self.framework.line(client, self.clients)
            self._retime(f"client {client}", party_of.slot, line, pooled=False)
        return fresh

    def _retime(self, key: str, slot: Slot, clients: Sequence[str], *, pooled: bool = True) -> None:
        """Let a slot's learning rate end where its part of the run does."""
        totals = self.counters.totals
        if key not in totals:
            ahead = [self._ahead(client) for client in clients]
            totals[key] = slot.version + (max(ahead) if pooled and self.framework.pooled else sum(ahead))
        slot.retime(learning_rate(self.config, totals[key]))

    async def retime(self, client: str) -> None:
        """Tell a client elsewhere of the last arrangement what ``lead`` has told those in this process."""
        link, key = self.links[client], f"client {client}"
        assert isinstance(link, NetworkLink)
        if key in self.counters.totals:  # of it alone: how many updates it has made, only the client knows
            await link.retime(self.counters.totals[key])

    async def tell_places(self) -> None:
        """Tell clients elsewhere who runs whose blocks, where a selection says it and has said it."""
        if self.parts.apart and names_hosts(self.config) and self.counters.arrangement is not None:
            await self.reach(self.tell_place, self.clients)

    async def tell_place(self, client: str) -> None:
        """Tell a client elsewhere whose blocks it runs, and who runs those between its own."""
        link, routes = self.links[client], self.parts.routes
        assert isinstance(link, NetworkLink)
        owners = [owner for owner in self.clients if any(stop.party == client for stop in routes[owner])]
        lead, trunk = Lead(routes[client][0].party, tuple(owners)), self.parts.clients[client].trunk
        if trunk is not None:
            key = f"{client} {trunk.name}"
            born, total = self.counters.born[key], self.counters.totals[key]
            lead = replace(lead, slot=trunk.name, born=born, version=trunk.version, total=total)
        await link.lead(lead)

    async def give_trunk(self, client: str) -> None:
        """Give a client that is back the trunk that it trains, as the last arrangement left it."""
        for stop in self._stops(self.clients):
            if stop.party == client and self.elsewhere(stop) is not None:
                await self.put_slot(stop, self.parts.slot(stop).get())

    def _ahead(self, client: str) -> int:
        """How many optimizer steps a client will still make, as far as can be said."""
        left = self.parts.planned[client] - self.counters.steps[client]
        if self.config.length[0] != "rounds":
            return left
        foreseen = self.parts.foreseen[client] * self.local_steps(client) // self.framework.local_steps
        return max(0, min(left, foreseen - self.counters.steps[client]))

    def set_route(self, client: str, stops: Sequence[Stop]) -> None:
        """Lead a client's steps, its evaluation and its merges over other stops."""
        self.parts.routes[client] = tuple(stops)
