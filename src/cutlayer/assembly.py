"""Step 1, partition: the base is cut, slots are made, and every party gets its place on the clients' routes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cutlayer.agreed import AgreedSecret
from cutlayer.allotting import begin, begin_alone
from cutlayer.build import Data, check_fit, layouts_of
from cutlayer.clients import client_party, private_names
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, SHARED, Example, Framework, Layout, Peft, Planner, Stop
from cutlayer.errors import ConfigError, MethodError
from cutlayer.hosting import hosted_stops
from cutlayer.models.arena import Arena
from cutlayer.models.far import FarSlot
from cutlayer.models.segment import Base, Segment
from cutlayer.models.slots import Slot, new_params
from cutlayer.parties.client import ClientParty
from cutlayer.parties.holder import Holder
from cutlayer.parties.shadow import Shadow
from cutlayer.parties.trunk import Place, Trunk, TrunkParty
from cutlayer.planning import Costs, at_cut
from cutlayer.plans import Outset, at_ranks, first_cuts, outset, slot_ranks
from cutlayer.presence import Presence, Routes
from cutlayer.schedule import (
    MOST_IDLE,
    Told,
    chunks,
    foreseen_steps,
    learning_rate,
    make_optimizer,
    planned_steps,
    told_of,
    updates_of,
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Everything that a driver drives."""

    base: Base
    layouts: dict[str, Layout]  # by client
    clients: Mapping[str, Holder]  # shadows of those that are in processes of their own
    parties: dict[str, Trunk]  # who runs blocks for others, the server first; clients too, where they do
    routes: dict[str, tuple[Stop, ...]]  # by client
    planned: Mapping[str, int]  # the most steps that each client makes
    foreseen: Mapping[str, int]  # those that it will make, without an early stop
    lines: Mapping[str, int]  # by client: the updates that its part will have, its own and those of who holds it too
    new_slot: Callable[..., Slot]  # from its name, what it trains, its updates in the run, and its users
    peft: Peft
    costs: Costs | None  # None where nothing is known of the clients' data
    planner: Planner | None = None
    bounds: Mapping[str, range] | None = None  # by client: the cuts that the planner may give it
    begun: Outset | None = None  # where clients began whose data are at hand
    apart: bool = False  # the clients are in processes of their own, and ``clients`` are their shadows

    @property
    def server(self) -> Trunk:
        """The main server."""
        return self.parties[SERVER]

    def slot(self, stop: Stop) -> Slot:
        """The slot of a stop."""
        return self.parties[stop.party].slots[stop.slot]

    def own(self, stop: Stop) -> bool:
        """Whether a stop's slot is the one that a client's device has for its own part of the model too."""
        return stop.party in self.clients and self.slot(stop) is self.clients[stop.party].slot


def segments_of(base: Base, layout: Layout, route: Sequence[Stop]) -> tuple[Segment, list[Segment], Segment | None]:
    """The client's head, the stops' segments in order, and the client's tail where it holds one."""
    head = base.segment("head", layout.head, bottom=True)
    tail = base.segment("tail", layout.tail, top=True) if layout.tail_at_client else None
    middle = []
    for number, stop in enumerate(route):
        top = not layout.tail_at_client and number == len(route) - 1
        name = "tail" if top else f"trunk{number}" if number else "trunk"
        middle.append(base.segment(name, stop.blocks, top=top))
    return head, middle, tail


def places_of(base: Base, layout: Layout, route: Sequence[Stop]) -> list[Place]:
    """Where on its route each stop is: its segment, its slot, and its neighbours."""
    _, middle, _ = segments_of(base, layout, route)
    names = [None, *(stop.party for stop in route), None]
    return [
        Place(segment, stop.slot, before=names[i], after=names[i + 2])
        for i, (segment, stop) in enumerate(zip(middle, route, strict=True))
    ]


def routes_of(config: RunConfig, layouts: Mapping[str, Layout]) -> dict[str, tuple[Stop, ...]]:
    """The stops of each client's step.

    Raises:
        MethodError: the framework cannot lay them out so.
    """
    framework: Framework = config.build("framework")
    names = list(layouts)
    first = names[0]
    if framework.travels and any(layout != layouts[first] for layout in layouts.values()):
        other = next(name for name in names if layouts[name] != layouts[first])
        raise MethodError(
            f"framework '{config.framework.name}' hands the client's part on, but '{first}' and '{other}' have "
            "different cuts (head_blocks, tail_blocks). Give all clients the same cut, or take a framework that merges."
        )
    routes, parties = {}, {SERVER, *names, *framework.parties(names)}
    if config.mixing is not None:
        config.build("mixing").check(layouts)
    for name in names:
        route = joined(config, framework.route(name, layouts))
        covered = [block for stop in route for block in stop.blocks]
        if covered != list(layouts[name].middle) or not route:
            raise MethodError(
                f"framework '{config.framework.name}' routes client '{name}' over the blocks {covered}, but those "
                f"between its head and its tail are {list(layouts[name].middle)}."
            )
        if strange := [stop.party for stop in route if stop.party not in parties]:
            raise MethodError(
                f"framework '{config.framework.name}' routes client '{name}' over '{strange[0]}', which is no client, "
                "and which it does not name in its parties."
            )
        peer = next((stop.party for stop in route if stop.party in names), None)
        if peer is not None and config.build("exchange").frozen_head:
            raise MethodError(
                f"exchange '{config.exchange.name}' trains nothing at a client's head, but in framework "
                f"'{config.framework.name}' client '{peer}' trains blocks for '{name}'. Take another framework."
            )
        routes[name] = route
    return routes


def joined(config: RunConfig, stops: Sequence[Stop]) -> tuple[Stop, ...]:
    """A framework's stops, of which a mixing makes the clients' slots one."""
    return tuple(stops) if config.mixing is None else tuple(replace(stop, slot=SHARED) for stop in stops)


def party_between(config: RunConfig) -> list[str]:
    """The party that a mixing puts between clients and server, if any."""
    mixing = config.build("mixing")
    return [mixing.between] if mixing is not None and mixing.between else []


def neighbours(config: RunConfig, stops: Sequence[Stop]) -> tuple[str, str]:
    """The parties at the two ends of a client's route: who gets its activations, and who its gradients."""
    between = party_between(config)
    return (between or [stops[0].party])[0], (between or [stops[-1].party])[0]


def assemble(config: RunConfig, base: Base, data: Data) -> Parts:
    """Cut the base, make the slots and the parties: all in this process, but with ``engine: ray`` the clients.

    Raises:
        DataError: the data does not fit the model.
        MethodError: the framework does not fit the cuts.
    """
    check_fit(config, base, data)
    begun = outset(config, base.model.config, base.anatomy.num_blocks, data)
    told = {name: told_of(config, begun.data, name, begun.kept[name]) for name in config.client_names}
    seat: Callable[..., Holder] = partial(client_party, config, base, begun.data, begun.kept)
    if config.engine.name == "ray":
        seat = partial(mirror, config, base, begun)
    parts = _assemble(config, base, told, seat, begun.layouts, begun.costs, begun.planner, begun.bounds)
    return replace(parts, begun=begun)


def mirror(
    config: RunConfig, base: Base, begun: Outset, name: str, *, head: Segment, tail: Segment | None, slot: Slot,
    frozen: bool,
) -> Shadow:  # fmt: skip
    """What stands for a client in an actor; its slot is made equal to the client's at each checkpoint."""
    sizes = [len(chunks(rows, config.batch_size)) for rows in (begun.data.evaluation, begun.kept.get(name, []))]
    shadow = Shadow(name, head=head, tail=tail, slot=slot, evaluations=sizes[0], validations=sizes[1])
    if frozen:
        shadow.params = {**{n: base.initial[n] for n in head.names}, **slot.params}
    return shadow


def assemble_server(config: RunConfig, base: Base, told: Mapping[str, Told]) -> Parts:
    """Cut the base and make the server's slots, for clients in processes of their own.

    Raises:
        MethodError: the framework does not fit the cuts.
    """

    def shadow(name: str, *, head: Segment, tail: Segment | None, slot: Slot, frozen: bool) -> Shadow:
        counts = told[name].evaluation_batches, told[name].validation_batches
        return Shadow(name, head=head, tail=tail, slot=slot, evaluations=counts[0], validations=counts[1])

    num_blocks = base.anatomy.num_blocks
    if config.planner is None:
        parts = _assemble(config, base, told, shadow, layouts_of(config, num_blocks))
    else:
        lengths = {name: one.length for name, one in told.items()}
        examples = {name: one.examples for name, one in told.items()}
        begun = first_cuts(config, base.model.config, num_blocks, lengths, examples)
        parts = _assemble(config, base, told, shadow, begun.layouts, begun.costs, begun.planner, begun.bounds)
    return replace(parts, apart=True)


def assemble_client(
    config: RunConfig, base: Base, data: Data, kept: Mapping[str, Sequence[Example]], name: str, *, updates: int,
    secret: bytes, agreed: AgreedSecret | None = None, cuts: tuple[int, int] | None = None,
) -> ClientParty:  # fmt: skip
    """A client that is alone in its process.

    Args:
        config: the run.
        base: the client's own blocks, or more of the model.
        data: its own.
        kept: the examples that it validates with.
        name: its name.
        updates: how many its part will have in the run, for the learning rate.
        secret: of this client alone.
        agreed: what the run's clients agreed on among themselves, if it has it.
        cuts: its head blocks now and at most, where a planner says them.

    Raises:
        DataError: the data does not fit the model.
    """
    check_fit(config, base, data)
    layouts = layouts_of(config, base.anatomy.num_blocks)
    framework: Framework = config.build("framework")
    highest = None
    if cuts is not None:
        layouts[name] = at_cut(layouts[name], cuts[0])
        highest = base.segment("head", range(cuts[1]), bottom=True)
    routes = routes_of(config, layouts)
    head, tail = base.segment("head", layouts[name].head, bottom=True), None
    if layouts[name].tail_at_client:
        tail = base.segment("tail", layouts[name].tail, top=True)
    names, frozen = own_names(config, head, tail, highest)
    first = {n: base.initial[n].detach() for n in names}
    others = {n for stop in hosted_stops(name, layouts, routes) for n in stop.place(base).segment.names}
    names = names if not others else [n for n in base.initial if n in others | set(names)]
    ranks = slot_ranks(config.build("peft"), base, names, [layouts[name]])
    start = {**base.initial, **at_ranks(base, ranks)} if ranks else base.initial
    arena = Arena()
    params = new_params(start, [*names, *private_names(config, tail)], arena)
    slot = Slot(name, params, make_optimizer(config), learning_rate(config, updates), arena)
    party = client_party(
        config, base, data, kept, name, head=head, tail=tail, slot=slot, frozen=frozen, secret=secret,
        agreed=agreed,
    )  # fmt: skip
    party.most = cuts[1] if cuts is not None else len(head.blocks)
    party.slot.put(framework.start(name, config.client_names, first, config.seed))
    begin_alone(base, config.build("peft"), name, slot, party.names("own"))
    return party


def _assemble(
    config: RunConfig, base: Base, told: Mapping[str, Told], seat: Callable[..., Holder],
    layouts: Mapping[str, Layout], costs: Costs | None = None, planner: Planner | None = None,
    bounds: Mapping[str, range] | None = None,
) -> Parts:  # fmt: skip
    """The slots and the parties, for these cuts; ``seat`` makes a client's."""
    framework: Framework = config.build("framework")
    peft: Peft = config.build("peft")
    routes = routes_of(config, layouts)
    planned = planned_steps(config, told)
    steps = foreseen_steps(config, planned, Presence(config, routes))
    make, arena = make_optimizer(config), Arena()
    kind = FarSlot if config.engine.trunk_apart else Slot

    held: dict[tuple[str, str], list[str]] = {}  # names by (party, slot)
    users: dict[tuple[str, str], list[str]] = {}  # clients by (party, slot)
    for client, layout in layouts.items():
        reach = [*routes[client], *joined(config, framework.reach(client, layouts))]
        if bounds:  # a trunk may come to train all from the lowest cut on
            lowest = at_cut(layout, min(bounds[client]))
            reach += joined(config, framework.reach(client, {**layouts, client: lowest}))
        for stop in reach:
            top = not layout.tail_at_client and stop.blocks.stop == layout.middle.stop
            segment = base.segment("tail" if top else "trunk", stop.blocks, top=top)
            key = (stop.party, stop.slot)
            known = held.setdefault(key, [])
            known += [name for name in segment.names if name not in known]
            users.setdefault(key, [])
            users[key] += [client] if client not in users[key] else []

    def slot(name: str, names: Sequence[str], updates: int, users: Sequence[str], private: Sequence[str] = ()) -> Slot:
        ranks = slot_ranks(peft, base, names, [layouts[user] for user in users])
        start = {**base.initial, **at_ranks(base, ranks)} if ranks else base.initial
        params = new_params(start, [*names, *private], arena)
        return kind(name, params, make, learning_rate(config, updates), arena)

    slots: dict[str, dict[str, Slot]] = {SERVER: {}}
    for (party, name), names in held.items():
        if party not in layouts:
            ordered = [n for n in base.initial if n in set(names)]
            updates = updates_of(config, framework, steps, users[party, name])
            slots.setdefault(party, {})[name] = slot(name, ordered, updates, users[party, name])
    clients: dict[str, Holder] = {}
    lines = {}
    for name in config.client_names:
        head, _, tail = segments_of(base, layouts[name], routes[name])
        others = {n for (party, _), names in held.items() if party == name for n in names}
        highest = base.segment("head", at_cut(layouts[name], max(bounds[name])).head, bottom=True) if bounds else head
        own, frozen = own_names(config, head, tail, highest)
        names = own if not others else [n for n in base.initial if n in others | set(own)]
        lines[name] = sum(steps[other] for other in framework.line(name, config.client_names)) // framework.branches
        made = slot(name, names, lines[name], [name], private_names(config, tail))
        clients[name] = seat(name, head=head, tail=tail, slot=made, frozen=frozen)
        clients[name].slot.put(
            framework.start(name, config.client_names, {n: base.initial[n].detach() for n in own}, config.seed)
        )
        for (party, of), _ in held.items():
            if party == name:
                slots.setdefault(party, {})[of] = clients[name].slot
    parties: dict[str, Trunk] = {name: TrunkParty(name, theirs, seed=config.seed) for name, theirs in slots.items()}
    parts = Parts(
        base, dict(layouts), clients, parties, routes, planned, steps, lines, slot, peft, costs, planner, bounds
    )  # fmt: skip
    begin(parts)
    return parts


def own_names(
    config: RunConfig, head: Segment, tail: Segment | None, highest: Segment | None = None
) -> tuple[list[str], bool]:
    """What a client's slot trains of its own model, and whether its head is frozen; ``highest`` may its head become."""
    frozen = bool(config.build("exchange").frozen_head)
    own = [*([] if frozen else head.names), *(tail.names if tail else [])]
    if not frozen and highest is not None:
        own = list(dict.fromkeys([*own, *highest.names]))
    return own, frozen


def own_trunks(parts: Parts) -> dict[str, frozenset[str]]:
    """By client, the trained tensors of the slots on its route that are on nobody else's."""
    users = Counter(key for route in parts.routes.values() for key in {(stop.party, stop.slot) for stop in route})
    found = {}
    for client, route in parts.routes.items():
        places = places_of(parts.base, parts.layouts[client], route)
        own = [p for stop, p in zip(route, places, strict=True) if users[stop.party, stop.slot] == 1]
        found[client] = frozenset(name for place in own for name in place.segment.names)
    return found


def check_somebody_trains(config: RunConfig, routes: Routes) -> None:
    """Refuse a run in which nobody is ever there with all that it needs.

    Raises:
        ConfigError: nobody could train.
    """
    kind, count = config.length
    presence, framework = Presence(config, routes), config.build("framework")
    rounds = count if kind == "rounds" else MOST_IDLE
    if not presence.steady and not any(
        presence.able(framework.eligible(number, list(routes)), number) for number in range(rounds)
    ):
        raise ConfigError(
            [
                f"in {rounds} rounds nobody is ever there with all that it needs to train. Look at joins and leaves of "
                "the clients and at availability."
            ],
            "the run",
        )
