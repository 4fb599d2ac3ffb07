"""Clients that come late, leave, are away for a round, or are lost in the middle of one: who is there, and when.

All of it follows from the run file and its seed, by client and round, so that a run is the same every time and goes on
from a checkpoint as if it had not been interrupted. A client that is lost is so at one of the messages that it is sent
in its steps (its own, and those in which it runs blocks for others); the server notices at once.

Over a network clients are lost when they are; ``absence.py`` says here who is away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.seeds import derive

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.contracts import Stop

Routes = Mapping[str, Sequence["Stop"]]


class Lost(Exception):
    """A client does not answer any more."""

    def __init__(self, client: str) -> None:
        super().__init__(client)
        self.client = client


class Presence:
    """Who is there in which round, and in the present one who was lost.

    Args:
        config: the run.
        routes: by client; who runs blocks for it must be there, too.
    """

    def __init__(self, config: RunConfig, routes: Routes) -> None:
        self.seed, self.routes = config.seed, routes
        self.clients = {client.name: client for client in config.client_list}
        self._availability = {
            name: config.availability if one.availability is None else one.availability
            for name, one in self.clients.items()
        }
        self._fails = {name: config.fails if one.fails is None else one.fails for name, one in self.clients.items()}
        self.lost: set[str] = set()  # in the present round
        self.away: set[str] = set()  # over a network: who was lost and has not been taken back
        self.left: set[str] = set()  # of these: who is not waited for any more
        self.by_themselves = False  # over a network: clients come and go as they do
        self._messages: dict[str, int] = {}  # until it is lost, of those that will be

    @property
    def steady(self) -> bool:
        """Whether everybody is there all the time, but for being lost in the middle of a round."""
        stays = all(one.joins == 0 and one.leaves is None for one in self.clients.values())
        return stays and all(chance == 1 for chance in self._availability.values())

    @property
    def changing(self) -> bool:
        """Whether it may be that nobody can train in a round."""
        return self.by_themselves or not self.steady or any(map(self.may_lose, self.clients))

    def hosts(self, client: str) -> list[str]:
        """The clients without whom this one cannot train: itself, and who runs blocks for it."""
        return list(dict.fromkeys([client, *(s.party for s in self.routes[client] if s.party in self.clients)]))

    def there(self, client: str, number: int) -> bool:
        """Whether a client itself is there in round ``number``."""
        one, chance = self.clients[client], self._availability[client]
        if number < one.joins or self.gone(client, number) or client in self.away:
            return False
        return chance == 1 or bool(self._draw("availability", client, number).random() < chance)

    def gone(self, client: str, number: int) -> bool:
        """Whether a client has left for good."""
        leaves = self.clients[client].leaves
        return client in self.left or (leaves is not None and number >= leaves)

    def able(self, clients: Iterable[str], number: int) -> list[str]:
        """Those that can train in round ``number``: they and their hosts are there."""
        return [c for c in clients if all(self.there(host, number) for host in self.hosts(c))]

    def over(self, client: str, number: int) -> bool:
        """Whether a client can never train again, as it or a host has left for good."""
        return any(self.gone(host, number) for host in self.hosts(client))

    def may_lose(self, client: str) -> bool:
        """Whether a client is ever lost in the middle of a round."""
        return bool(self._fails[client])

    def begin(self, number: int, clients: Sequence[str], micros: int, tails: Mapping[str, bool]) -> None:
        """A round begins; whoever will be lost in it is drawn, and at which message.

        Args:
            number: of the round.
            clients: who may train in it.
            micros: micro-batches that each makes in it.
            tails: by client, whether it holds a tail.
        """
        self.end()
        messages: Counter[str] = Counter()
        for client in clients:
            messages[client] += micros * (3 if tails[client] else 2)
            for place, stop in enumerate(self.routes[client]):
                top = place == len(self.routes[client]) - 1 and not tails[client]
                messages[stop.party] += micros * (1 if top else 2)
        for name in dict.fromkeys(host for client in clients for host in self.hosts(client)):
            fails = self._fails[name]
            draw = self._draw("fails", name, number)
            if (number in fails) if isinstance(fails, list) else (draw.random() < fails):
                self._messages[name] = int(draw.integers(messages[name]))

    def shared(self, client: str) -> bool:
        """Whether a client's steps pass other devices, or theirs its own."""
        return (
            any(client in self.hosts(other) for other in self.clients if other != client) or len(self.hosts(client)) > 1
        )

    def falls(self, client: str) -> bool:
        """Whether a client will be lost in this round, or a host of it."""
        return any(host in self._messages for host in self.hosts(client))

    def end(self) -> None:
        """The round is over."""
        self.lost.clear()
        self._messages.clear()

    def asked(self, client: str, owner: str) -> None:
        """A client is sent a message of a training step of ``owner``.

        Raises:
            Lost: it does not answer, or another has not without whom the step cannot go on.
        """
        if self.lost:
            for host in (client, *self.hosts(owner)):
                if host in self.lost:
                    raise Lost(host)
        if client in self._messages:
            if not self._messages[client]:
                raise Lost(client)
            self._messages[client] -= 1

    def out(self, client: str) -> bool:
        """Whether a client's steps cannot go on in this round: it or a host was lost."""
        return bool(self.lost) and any(host in self.lost for host in self.hosts(client))

    def _draw(self, what: str, client: str, number: int) -> np.random.Generator:
        return np.random.default_rng(derive(self.seed, what, client, number))
