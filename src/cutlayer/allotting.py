"""Ranks by importance: decided at the start, after a warm-up and every so many rounds, for each holder by itself.

A client measures its own matrices and tells the server one number for each (step 1, verb ``importance``); the server
measures its trunks, decides for all by ``Allotter.allot``, and tells each client its ranks by the verb ``move``. The
adapters follow by ``ranks.refit``, and the optimizer state of those that change begins anew.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from cutlayer.allotment import Allotter, Matrix
from cutlayer.contracts import SERVER, Layout, Peft
from cutlayer.models.importance import UNKNOWN, Frozen, Importance
from cutlayer.models.segment import Base
from cutlayer.models.slots import Slot
from cutlayer.plans import slot_ranks
from cutlayer.ranks import pairs, product_norm, refit

if TYPE_CHECKING:
    from cutlayer.assembly import Parts
    from cutlayer.driver import Run

Scores = Mapping[str, Mapping[str, float]]  # by holder and the name of a factor A


def begin(parts: Parts) -> None:
    """Give all holders their first ranks, as if all matrices mattered equally, and watch them from now on.

    Raises:
        MethodError: a budget is too small.
    """
    peft = parts.peft
    if not isinstance(peft, Allotter):
        return
    known: dict[str, Frozen] = {}
    parts.base.install(None)  # a run that was driven before may have left the blocks of one segment there
    for client, party in parts.clients.items():
        fit_slot(party.slot, client_ranks(parts, {}, client, party.names("own")))
        party.slot.importance = _importance(parts.base, peft, party.slot, known)
    for slot in parts.server.slots.values():
        fit_slot(slot, trunk_ranks(parts, {}, slot))
        slot.importance = _importance(parts.base, peft, slot, known)


def begin_alone(base: Base, peft: Peft, client: str, slot: Slot, own: Iterable[str]) -> None:
    """``begin`` for a client that is alone in its process.

    Raises:
        MethodError: its budget is too small.
    """
    if not isinstance(peft, Allotter):
        return
    base.install(None)
    even = importances(base, {}, client, sorted(pairs(set(own))))
    fit_slot(slot, allotted(peft, base, even, peft.limit(client, trunks=1), holder=client))
    slot.importance = _importance(base, peft, slot, {})


async def review(run: Run) -> None:
    """Decide the ranks of those holders anew for whom it is time: they are warm, and ``refresh`` rounds have passed."""
    parts, counters, peft = run.parts, run.counters, run.parts.peft
    if not isinstance(peft, Allotter):
        return
    now = counters.rounds

    def due(holder: str, steps: int) -> bool:
        if steps < peft.warm_up:
            return False
        last = counters.allotted.get(holder)
        return last is None or (peft.refresh > 0 and now - last >= peft.refresh)

    clients = [c for c in run.presence.able(run.clients, now) if due(c, counters.steps[c])]
    trunks = [
        slot for slot in parts.server.slots.values() if slot.importance and due(holder_of(slot), slot.importance.steps)
    ]
    if not clients and not trunks:
        return
    for slot in trunks:
        assert slot.importance is not None
        counters.importance[holder_of(slot)] = dict(slot.importance.scores)

    async def ask(client: str) -> None:
        names = pairs([n for n in parts.clients[client].slot.params if n in parts.clients[client].names("own")])
        told = (await run.ends[client].ask("importance")).tensors["importance"].tolist()
        counters.importance[client] = {a: v for a, v in zip(names, told, strict=True) if v != UNKNOWN}

    async def tell(client: str) -> None:
        layout = parts.layouts[client]
        names = [n for n in parts.clients[client].slot.params if n in parts.clients[client].names("own")]
        await run.ends[client].ask(
            "move", {"head_blocks": len(layout.head)}, **told_ranks(names, ranks_at_client(run, client, names))
        )

    await _all(ask, clients)
    counters.importance = {holder: counters.importance[holder] for holder in sorted(counters.importance)}
    await _all(tell, clients)
    for slot in trunks:
        fit_slot(slot, trunk_ranks(parts, counters.importance, slot))
    counters.allotted |= dict.fromkeys([*clients, *map(holder_of, trunks)], now)
    run.progress.note(f"after round {now}, ranks by importance: {', '.join([*clients, *map(holder_of, trunks)])}")


def ranks_at_client(run: Run, client: str, names: Sequence[str]) -> dict[str, int]:
    """The rank of each factor A among the ``names`` that a client holds; empty where all is as injected."""
    parts = run.parts
    if isinstance(parts.peft, Allotter):
        return client_ranks(parts, run.counters.importance, client, names)
    return slot_ranks(parts.peft, parts.base, names, [parts.layouts[client]])


def ranks_at_trunk(run: Run, slot: Slot, users: Sequence[str]) -> dict[str, int]:
    """The rank of each factor A of a slot at the server, which these clients use."""
    parts = run.parts
    if isinstance(parts.peft, Allotter):
        return trunk_ranks(parts, run.counters.importance, slot)
    return slot_ranks(parts.peft, parts.base, list(slot.params), [parts.layouts[client] for client in users])


def client_ranks(parts: Parts, scores: Scores, client: str, names: Iterable[str]) -> dict[str, int]:
    """What a client's budget gives these of its tensors, by all that is known of their importance."""
    return _ranks(parts, scores, client, sorted(pairs(set(names))), client)


def trunk_ranks(parts: Parts, scores: Scores, slot: Slot) -> dict[str, int]:
    """The same of a trunk. What it holds but does not train now keeps the highest rank, so that no merge is cut short.

    It trains what lies between head and tail of a client that uses it.
    """
    users = [c for c, route in parts.routes.items() if any(parts.slot(stop) is slot for stop in route)]
    layouts = [parts.layouts[client] for client in users]
    every = list(pairs(slot.params))
    trained = [a for a in every if _in_a_trunk(parts.base.owner(a), layouts)]
    return {**dict.fromkeys(every, _allotter(parts).rank), **_ranks(parts, scores, holder_of(slot), trained, None)}


def told_ranks(names: Iterable[str], ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """How the ranks of these tensors are told to a client."""
    return {"ranks": torch.tensor([ranks[a] for a in pairs(set(names))], dtype=torch.int32)} if ranks else {}


def fit_slot(slot: Slot, ranks: Mapping[str, int]) -> None:
    """Give a slot's adapters these ranks; the optimizer state of those that change begins anew."""
    held = slot.get()
    slot.reshape({n: t for n, t in refit(held, ranks).items() if t.shape != held[n].shape})


def holder_of(slot: Slot) -> str:
    """The name of a trunk among the holders."""
    return f"{SERVER}/{slot.name}"


def summary(run: Run) -> dict[str, Any]:
    """For ``summary.json``: by holder its budget, the trained parameters of its adapters, the rank of each, and
    what of the last merge these leave out."""
    parts, merged = run.parts, run.federated.before
    found: dict[str, Any] = {}
    for holder, slot, client in [
        *((name, party.slot, name) for name, party in parts.clients.items()),
        *((holder_of(slot), slot, None) for slot in parts.server.slots.values()),
    ]:
        users = [c for c, route in parts.routes.items() if any(parts.slot(stop) is slot for stop in route)]
        own = parts.clients[client].names("own") if client else set(slot.params)
        layouts = [parts.layouts[user] for user in users]
        trained = [a for a in pairs(own) if client or _in_a_trunk(parts.base.owner(a), layouts)]
        ranks = {a: len(slot.params[a]) for a in trained}
        found[holder] = {
            "budget": _limit(parts, client),
            "parameters": sum(rank * _cost(parts.base, a) for a, rank in ranks.items()),
            "decided_after_round": run.counters.allotted.get(holder),
            "discarded": _discarded(merged, ranks),
            "ranks": {_path(a): rank for a, rank in ranks.items()},
        }
    return found


def _discarded(merged: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> float | None:
    """The part of the merged updates that ranks leave out, relative in the Frobenius norm over all these matrices.

    Of balanced factors (``lora-products``) it is that of the singular values beyond the rank.
    """
    total = lost = 0.0
    for a, b in pairs(merged).items():
        if a in ranks:
            up, down = merged[b], merged[a]
            total += product_norm(up, down) ** 2
            lost += product_norm(up[:, ranks[a] :], down[ranks[a] :]) ** 2
    return math.sqrt(lost / total) if total else None


def _ranks(parts: Parts, scores: Scores, holder: str, names: Sequence[str], client: str | None) -> dict[str, int]:
    peft, base, limit = _allotter(parts), parts.base, _limit(parts, client)
    return allotted(peft, base, importances(base, scores, holder, names), limit, holder=holder)


def allotted(
    peft: Allotter, base: Base, importance: Mapping[str, float], limit: int | None, *, holder: str
) -> dict[str, int]:
    """The ranks of a holder's matrices, whose importance this is, within so many trained parameters."""
    matrices = [Matrix(a, _cost(base, a), value) for a, value in importance.items()]
    return dict(peft.allot(matrices, limit, holder=holder))


def first_parameters(base: Base, peft: Peft, names: Iterable[str], client: str | None, *, trunks: int) -> int:
    """How many parameters of these names a holder trains at the start, where a tied one counts once."""
    names = list(names)
    count = sum({id(base.initial[n]): base.initial[n].numel() for n in names}.values())
    if not isinstance(peft, Allotter):
        return count
    even = dict.fromkeys(pairs(names), 1.0)
    limit = peft.limit(client, trunks=trunks)
    ranks = allotted(peft, base, even, limit, holder=client or SERVER)
    return count - sum((peft.rank - rank) * _cost(base, a) for a, rank in ranks.items())


def _limit(parts: Parts, client: str | None) -> int | None:
    return _allotter(parts).limit(client, trunks=len(parts.server.slots))


def importances(base: Base, scores: Scores, holder: str, names: Sequence[str]) -> dict[str, float]:
    """The importance of a holder's matrices, each against the mean of its kind over all holders and blocks.

    A matrix that the holder has not measured counts as those who have found it, and else as the mean.
    """
    kinds: dict[str, list[float]] = {}
    by_name: dict[str, list[float]] = {}
    for who in sorted(scores):
        for name, score in scores[who].items():
            kinds.setdefault(_kind(base, name), []).append(score)
            by_name.setdefault(name, []).append(score)
    found = {}
    for name in names:
        mean = _mean(kinds.get(_kind(base, name), []))
        mine = _mean([scores[holder][name]] if name in scores.get(holder, ()) else by_name.get(name, []))
        found[name] = mine / mean if mine is not None and mean else 1.0
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _kind(base: Base, name: str) -> str:
    """A tensor's name without the number of its block."""
    owner = base.owner(name)
    return name.replace(f".{owner}.", ".*.", 1) if isinstance(owner, int) else name


def _in_a_trunk(owner: int | str, layouts: Sequence[Layout]) -> bool:
    return owner == "top" or any(owner in layout.middle for layout in layouts)


def _cost(base: Base, a: str) -> int:
    return base.initial[a].shape[1] + base.initial[pairs(base.initial)[a]].shape[0]


def _path(a: str) -> str:
    return re.split(r"\.lora_(?:embedding_)?A\.", a)[0]


def _allotter(parts: Parts) -> Allotter:
    assert isinstance(parts.peft, Allotter)
    return parts.peft


def _importance(base: Base, peft: Allotter, slot: Slot, known: dict[str, Frozen]) -> Importance:
    for a in pairs(slot.params):
        if a not in known:
            layer = base.model.get_submodule(_path(a))
            weight = layer.get_base_layer().weight
            norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
            known[a] = Frozen(norm, weight.numel(), layer.scaling["default"])
    return Importance(slot.params, known, peft.score, decay=peft.decay)


async def _all(ask: Any, clients: Sequence[str]) -> None:
    async with asyncio.TaskGroup() as together:
        for client in clients:
            together.create_task(ask(client), name=client)
