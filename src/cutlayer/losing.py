"""Clients that are lost in a round: what they have done in it does not count, and the others go on without them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cutlayer.assembly import Parts
from cutlayer.config import RunConfig
from cutlayer.config_fit import batches_meet
from cutlayer.contracts import State
from cutlayer.errors import NonFinite
from cutlayer.links.local import ClientEnd, Link
from cutlayer.links.network import NetworkLink
from cutlayer.models.slots import Slot
from cutlayer.presence import Lost, Presence
from cutlayer.report.progress import Reporter

if TYPE_CHECKING:
    from cutlayer.absence import Absence
    from cutlayer.merging import Counters

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A client as it was at the begin of a round in which it is lost: the slots of nobody else, and its last merge."""

    slots: Sequence[tuple[Slot, State, int, dict[str, Any]]]  # with the version, and what is known of the importance
    merged: Mapping[str, int]


class Losing:
    """The part of a run that goes on without who was lost. ``Run`` sets these."""

    config: RunConfig
    parts: Parts
    links: Mapping[str, Link]
    clients: list[str]
    counters: Counters
    ends: Mapping[str, ClientEnd]
    presence: Presence
    progress: Reporter
    abort: Callable[[str], None]
    absence: Absence | None = None  # of clients elsewhere, which come and go by themselves
    _kept: dict[str, Kept]  # of this round

    @property
    def present(self) -> list[str]:
        """The clients that can be asked for something."""
        return [client for client in self.clients if client not in self.presence.away]

    def lose(self, client: str) -> None:
        """A client is lost for the rest of the round.

        It, and whoever cannot go on without it, is set back to the round's begin: at once, or, as steps that pass its
        device may be under way, when the round is over. Where clients do not wait for each other, it keeps its copy.
        """
        if client in self.presence.lost:
            return
        self.presence.lost.add(client)
        self.counters.lost[client] = self.counters.lost.get(client, 0) + 1
        self.progress.note(f"round {self.counters.rounds}: '{client}' is lost")
        if self.absence is not None:
            self.absence.lost(client)
        if client in self._kept and not self.presence.shared(client):
            self.set_back(client)

    @contextmanager
    def finite(self, client: str) -> Iterator[None]:
        """Work on a client's batch, which may give what is not finite; nothing is updated with it then.

        Raises:
            Lost: the client is elsewhere, and lost alone, as where its reply is refused.
            NonFinite: it is here, or its batch met others', so that nobody knows whose fault it is: the run ends.
        """
        try:
            yield
        except NonFinite as error:
            link = self.links[client]
            if not isinstance(link, NetworkLink) or batches_meet(self.config):
                raise
            link.refuse(error)

    async def reach(self, work: Callable[[str], Awaitable[object]], clients: Sequence[str]) -> None:
        """Do ``work`` for all that are there at once, outside of steps; who does not answer is lost."""

        async def one(client: str) -> None:
            try:
                await work(client)
            except Lost as lost:
                self.lose(lost.client)

        await at_once(one, [client for client in clients if client not in self.presence.away])

    def end_round(self) -> None:
        """Set back whoever has not been yet; the round is over."""
        out = [client for client in self.clients if self.presence.out(client)]
        for client in out:  # all before the first is set back: their gradients may wait on each other's devices
            self.abort(client)
        for client in out:
            if client in self._kept:
                self.set_back(client)
        self.presence.end()

    def keep(self, clients: Sequence[str]) -> None:
        """Remember clients as they are, for ``set_back``; those elsewhere remember their own part."""
        for client in clients:
            hosted = [s.party for s in self.parts.routes[client] if s.party in self.ends]
            here = (client, *hosted) if not self.parts.apart else ()
            devices = [slot for name in here for slot in self.parts.clients[name].slots.values()]
            slots = [slot for slot in self.own_slots(client) if slot not in devices]
            self._kept[client] = Kept(
                [
                    (slot, _copy(slot), slot.version, slot.importance.state() if slot.importance else {})
                    for slot in (*slots, *devices)
                ],
                {key: self.counters.merged.get(key, 0) for key in (client, *(f"{name}/hosted" for name in hosted))},
            )

    def own_slots(self, client: str) -> list[Slot]:
        """The trunk slots that only this client's steps pass."""
        users = Counter(id(slot) for one in self.clients for slot in self.slots_of([one]))
        return [slot for slot in self.slots_of([client]) if users[id(slot)] == 1]

    def set_back(self, client: str) -> None:
        """Nothing that a client has done in this round counts: it is as it was before, and so is who holds its part."""
        kept = self._kept.pop(client)
        for slot, state, version, watched in kept.slots:
            slot.reset_optimizer()
            slot.put(state, version=version)
            if slot.importance is not None:
                slot.importance.restore(watched)
        self.counters.merged |= kept.merged
        self.pass_back(client)

    def pass_back(self, client: str) -> None:
        """Of parts that are handed on and that this client has: the last before it who can be asked has them again."""
        for line in [line for line, holder in self.counters.holders.items() if holder == client]:
            earlier = self.counters.earlier.get(line, [])
            before = next((name for name in reversed(earlier) if self._reachable(name)), None)
            if before is None:  # nobody else has had it: all have what they began with
                del self.counters.holders[line]
            else:
                earlier.remove(before)
                self.counters.holders[line] = before

    def holder(self, clients: Sequence[str] = (), line: str = "") -> str:
        """Of a part that is handed on among ``clients`` (all): who has it; the first of them at the start."""
        among = clients or self.clients
        return self.counters.holders.get(line) or next(filter(self._reachable, among), among[0])

    def _reachable(self, client: str) -> bool:
        return client not in self.presence.away and not self.presence.out(client)

    def slots_of(self, clients: Iterable[str]) -> list[Slot]:
        """The trunk slots that these clients' steps pass, each once, in the order of the routes."""
        found = {id(slot): slot for c in clients for slot in map(self.parts.slot, self.parts.routes[c])}
        return list(found.values())


async def at_once(work: Callable[[T], Awaitable[None]], of: Sequence[T]) -> None:
    """Do ``work`` for all at once, as each has a link of its own, and wait for all (``cost_model``, section 5: A)."""
    async with asyncio.TaskGroup() as group:
        for one in of:
            group.create_task(_awaited(work(one)), name=str(one))


async def _awaited(work: Awaitable[None]) -> None:
    await work


def _copy(slot: Slot) -> State:
    return {name: tensor.clone() for name, tensor in slot.get(optimizer=True).items()}
