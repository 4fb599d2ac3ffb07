"""Step 11 without waiting for everybody: clients upload when they are ready, and go on with the model as it then is.

The version of the model is the number of merges so far; a client's delay is how many there have been since the one that
it started from. Whatever arrives at one instant is merged in the order of the clients, when all of that instant has
happened: so the order of events does not depend on tasks, and without a profile, when no time passes, it is still one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutlayer.contracts import SERVER, State, Upload, Window

if TYPE_CHECKING:
    from cutlayer.driver import Run


@dataclass(frozen=True)
class _Arrived:
    """A client's copy that waits for its merge."""

    at: float
    state: State
    merged: asyncio.Future[None]


class Desk:
    """The federated server in a period: it takes uploads, merges them when that is due, and lets their clients go on.

    Args:
        run: whose clients and aggregator these are.
        clients: who takes part.
        trunks: a client's copy includes its trunk.
        quota: uploads that the slowest makes; when everybody has made so many, the period is over.
    """

    def __init__(self, run: Run, clients: Sequence[str], *, trunks: bool, quota: int) -> None:
        self.run, self.clients, self.trunks, self.quota = run, list(clients), trunks, quota
        total = sum(run.federated.sizes[client] for client in clients)
        self._weights = {client: run.federated.sizes[client] / total for client in clients}
        self._made = dict.fromkeys(clients, 0)
        self._since = dict.fromkeys(clients, run.clock.now())  # when it was given the model that it trains
        self._arrived: dict[str, _Arrived] = {}
        self._news = asyncio.Event()

    @property
    def over(self) -> bool:
        """Whether everybody still there has made its uploads, so that nobody begins another."""
        return all(made >= self.quota for made in self._made.values())

    async def open(self, work: Callable[[str], Awaitable[object]]) -> None:
        """Let all clients do their ``work`` at once, with ``exchange`` in it, and merge until all have ended it."""
        if not self.clients:
            return
        async with asyncio.TaskGroup() as group:
            server = group.create_task(self._serve(), name=SERVER)

            async def one(client: str) -> None:
                await work(client)
                del self._made[client]
                self._news.set()
                if not self._made:
                    server.cancel()

            for client in self.clients:
                group.create_task(one(client), name=client)

    async def exchange(self, client: str) -> None:
        """Send the client's copy, wait for its merge, and take the model as it is then."""
        run = self.run
        if len(run.clients) == 1:  # nobody to mix with
            self._made[client] += 1
            return
        state = dict((await run.ends[client].ask("get_state", {"optimizer": False, "part": "own"})).tensors)
        for stop in run.parts.routes[client] if self.trunks else ():
            state = {**run.parts.slot(stop).get(), **state}
        merged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrived[client] = _Arrived(run.clock.now(), state, merged)
        run.counters.cycles[client] = run.clock.now() - self._since[client]
        self._news.set()
        with run.clock.waiting(client, "its merge"):
            await merged
        await run.catch_up([client], trunks=self.trunks)

    async def _serve(self) -> None:
        clock, last = self.run.clock, self.run.clock.now()
        while True:
            window = self.run.federated.aggregator.window(self._expected())
            if last + window.seconds > clock.now():
                await clock.sleep(last + window.seconds - clock.now(), key=SERVER)
            while len(self._arrived) < min(window.uploads, max(1, len(self._made))):
                self._news.clear()
                with clock.waiting(SERVER, "uploads"):
                    await self._news.wait()
            await clock.settle()
            last = clock.now()
            for batch in self._due(window):
                self._merge(batch)

    def _expected(self) -> dict[str, float | None]:
        now, cycles = self.run.clock.now(), self.run.counters.cycles
        return {
            client: max(0.0, self._since[client] + cycles[client] - now) if client in cycles else None
            for client in self.clients
            if client in self._made and client not in self._arrived
        }

    def _due(self, window: Window) -> list[list[str]]:
        """Who is merged now: by arrival, at one instant in the order of the clients."""
        queue = sorted(self._arrived, key=lambda client: (self._arrived[client].at, self.clients.index(client)))
        most = window.most or len(queue)
        batches = [queue[i : i + most] for i in range(0, len(queue), most)]
        return [batch for batch in batches if len(batch) >= min(window.uploads, len(self._made))]

    def _merge(self, batch: Sequence[str]) -> None:
        run, counters = self.run, self.run.counters
        arrived = {client: self._arrived.pop(client) for client in batch}
        bases = {client: counters.merged.get(client, 0) for client in batch}
        uploads = [Upload(client, counters.merges - bases[client], self._weights[client]) for client in batch]
        parts = run.federated.absorb(uploads, {client: one.state for client, one in arrived.items()})
        counters.merges += 1 if any(parts) else 0
        for upload, part in zip(uploads, parts, strict=True):
            record: dict[str, Any] = {
                "round": counters.rounds, "client": upload.client, "base": bases[upload.client],
                "delay": upload.delay, "share": part, "version": counters.merges,
            }  # fmt: skip
            if run.paces.profiles:
                record |= {
                    "waited": run.clock.now() - arrived[upload.client].at, "virtual_time": run.clock.now(),
                }  # fmt: skip
            run.uploads.append(record)
            self._made[upload.client] += 1
            self._since[upload.client] = run.clock.now()
            arrived[upload.client].merged.set_result(None)
