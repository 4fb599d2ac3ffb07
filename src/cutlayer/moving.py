"""Step 1 again, between rounds: a planner is asked, and blocks change hands over the wire.

Cuts move where every copy of a block is the same: after a merge. What crosses is the block's trained tensors and their
optimizer state, up to the slot that goes on with it or down to the client. Frozen weights are with every party already.
Frameworks that allow it (``replans``) have one stop between a client's head and its tail: a slot at the server.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutlayer.allotting import fit_slot, ranks_at_client, ranks_at_trunk, told_ranks
from cutlayer.assembly import joined, own_trunks
from cutlayer.errors import MethodError
from cutlayer.models.slots import Slot, parameter_of
from cutlayer.planning import at_cut
from cutlayer.plans import situation
from cutlayer.ranks import pairs, refit
from cutlayer.step import split_evaluate

if TYPE_CHECKING:
    from cutlayer.driver import Run

Tensors = Mapping[str, Tensor]


async def replan(run: Run) -> None:
    """Ask the planner, and move what it says.

    Raises:
        MethodError: it left its own bounds.
    """
    planner, parts, counters = run.parts.planner, run.parts, run.counters
    assert planner is not None
    assert parts.bounds is not None
    there, found = run.presence.able(run.clients, counters.rounds), dict[str, float]()
    if planner.validation:
        await _catch_up(run, there)

        async def ask(client: str) -> None:
            found[client] = await validate(run, client)

        await run.together(ask, there)
    measured = {client: seconds / steps for client, (seconds, steps) in counters.own.items()}
    counters.own.clear()
    assert parts.costs is not None  # as there is a planner
    now = situation(
        parts.costs, parts.base.anatomy.num_blocks, parts.layouts,
        {name: sizes["examples"] for name, sizes in run.sizes.items()},
        accuracy={name: found[name] for name in run.clients if name in found}, measured=measured,
    )  # fmt: skip
    cuts = {client: cut for client, cut in planner.plan(now).items() if cut != now.cut(client) and client in there}
    check_bounds(planner, cuts, parts.bounds)
    if cuts:
        await move(run, cuts)
        told = ", ".join(f"{client} {now.cut(client)} -> {cut}" for client, cut in cuts.items())
        run.progress.note(f"after round {counters.rounds}, head blocks: {told}")


def check_bounds(planner: object, cuts: Mapping[str, int], bounds: Mapping[str, range]) -> None:
    """Refuse cuts that the slots were not made for.

    Raises:
        MethodError: the planner left its own bounds.
    """
    for client, cut in cuts.items():
        if cut not in bounds[client]:
            raise MethodError(
                f"The planner {type(planner).__name__} gives client '{client}' {cut} head blocks, but its own bounds "
                f"are {bounds[client].start} to {bounds[client].stop - 1}."
            )


async def validate(run: Run, client: str) -> float:
    """The accuracy of a client's model, with its trunk, on its own validation shard: of label tokens."""
    end, middle, tail, _ = run.route(client)
    party, hits, tokens = run.parts.clients[client], 0, 0
    for number in range(len(party.validation)):
        result = await split_evaluate(end, middle, tail, batch=len(party.evaluation) + number)
        hits, tokens = hits + result.correct, tokens + result.label_tokens
    return hits / tokens if tokens else math.nan


async def move(run: Run, cuts: Mapping[str, int]) -> None:
    """Give clients other cuts (head blocks by client). The function that each client's parts compute stays the same.

    A block that moves up to a slot of the client's own takes its tensors and optimizer state there. A slot that others
    use too has the same tensors already, from the merge; it keeps its optimizer state, and where it has none takes the
    mean of what the movers had. A block that moves down brings tensors and optimizer state.
    """
    parts = run.parts
    await _catch_up(run, cuts)
    before = {client: parts.clients[client].names("own") for client in cuts}
    for client, cut in cuts.items():
        parts.layouts[client] = at_cut(parts.layouts[client], cut)
        run.counters.cuts.setdefault(client, []).append([run.counters.rounds, cut])
    for client in run.clients:
        parts.routes[client] = joined(run.config, run.framework.route(client, parts.layouts))
    given = {client: await _told(run, client, cut) for client, cut in cuts.items()}
    for slot, users in _trunks(run).items():
        if not given.keys() & set(users):
            continue
        fit_slot(slot, ranks_at_trunk(run, slot, users))
        _take_over(slot, [given[client] for client in users if given.get(client)], own=len(users) == 1)
    for client in cuts:
        gained = parts.clients[client].names("own") - before[client]
        (slot,) = run.slots_of([client])
        state = _fitting(_of(slot.get(optimizer=True), gained), parts.clients[client].slot.get())
        own = _trunks(run)[slot] == [client]
        if state:
            await run.ends[client].put(dict(state))
            # At the slot's ranks: the client's may be lower than those of others who catch up later.
            newest = {
                n: t.clone() for n, t in slot.get().items() if n in gained and not (own and n in run.federated.before)
            }
            run.federated.before = {**run.federated.before, **newest}
        if own:
            slot.forget(gained)
    run.federated.aggregator.begin(own_trunks(parts))


def ranks_elsewhere(run: Run) -> dict[str, dict[str, int]]:
    """For a checkpoint: by client that writes its own, the rank of each factor A of its slot."""
    if not run.parts.apart:
        return {}
    slots = {client: party.slot.params for client, party in run.parts.clients.items()}
    return {client: {a: len(params[a]) for a in pairs(params)} for client, params in slots.items()}


def restore(run: Run, ranks: Mapping[str, Mapping[str, int]]) -> None:
    """Give a resumed run the cuts that it had; ``ranks`` as ``ranks_elsewhere`` gave them."""
    parts = run.parts
    for client, theirs in ranks.items():
        fit_slot(parts.clients[client].slot, theirs)
    for client, moves in run.counters.cuts.items():
        parts.layouts[client] = at_cut(parts.layouts[client], moves[-1][1])
        parts.clients[client].head = parts.base.segment("head", parts.layouts[client].head, bottom=True)
    for client in run.clients:
        parts.routes[client] = joined(run.config, run.framework.route(client, parts.layouts))


async def _catch_up(run: Run, clients: Collection[str]) -> None:
    """Give the last merge to those that were not in it, and to their slots where they have their own."""
    for slot, users in _trunks(run).items():
        late = [client for client in clients if slot in run.slots_of([client])]
        await run.catch_up(late, trunks=len(users) == 1)


def _trunks(run: Run) -> dict[Slot, list[str]]:
    """The slots at the server, each with the clients that use it."""
    found: dict[Slot, list[str]] = {}
    for client in run.clients:
        for slot in run.slots_of([client]):
            found.setdefault(slot, []).append(client)
    return found


async def _told(run: Run, client: str, cut: int) -> Tensors:
    """Tell a client its cut, and the ranks of its adapters where they depend on it; what it gives up."""
    parts, party = run.parts, run.parts.clients[client]
    head = parts.base.segment("head", parts.layouts[client].head, bottom=True)
    names = [n for n in party.slot.params if n in {*head.names, *(party.tail.names if party.tail else [])}]
    ranks = ranks_at_client(run, client, names)
    return (await run.ends[client].ask("move", {"head_blocks": cut}, **told_ranks(names, ranks))).tensors


def _take_over(slot: Slot, given: Sequence[Tensors], *, own: bool) -> None:
    """Go on with blocks that clients gave up."""
    if not given:
        return
    held = slot.get(optimizer=True)
    if own:
        slot.put(_fitting(given[0], held))
        return
    known = {parameter_of(name) for name in held if name.startswith("optimizer/")}
    moments: dict[str, Tensor] = {}
    for name in {name: None for state in given for name in state if name.startswith("optimizer/")}:
        fits = [s[name] for s in given if name in s and _same_shape(name, s, held)]
        if parameter_of(name) not in known and fits:
            moments[name] = torch.stack([tensor.double() for tensor in fits]).mean(dim=0).to(fits[0].dtype)
    slot.put(moments)


def _fitting(state: Tensors, held: Tensors) -> dict[str, Tensor]:
    """A state at the ranks of who gets it; optimizer state of another rank is left out."""
    ranks = {a: len(held[a]) for a in pairs(state) if a in held}
    values = refit({n: t for n, t in state.items() if not n.startswith("optimizer/")}, ranks)
    moments = {n: t for n, t in state.items() if n.startswith("optimizer/") and _same_shape(n, state, held)}
    return {**values, **moments}


def _same_shape(name: str, state: Tensors, held: Tensors) -> bool:
    """Whether a tensor of optimizer state is of a parameter that has the same shape (rank) at both ends."""
    return state[parameter_of(name)].shape == held[parameter_of(name)].shape


def _of(state: Tensors, names: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if parameter_of(name) in names}
