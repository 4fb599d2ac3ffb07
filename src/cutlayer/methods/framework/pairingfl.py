"""Clients in pairs: one brings data and the first blocks, its partner the rest; the server sees models only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cutlayer.contracts import Framework, Layout, Stop
from cutlayer.errors import MethodError, suggest
from cutlayer.methods.framework._cohort import check_options, cohort, local_steps, newest
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.arrangement import Arrangement
    from cutlayer.driver import Run


@method("framework", paper="IEEE/ACM Transactions on Networking, 2025, after the survey, arXiv:2604.24468")
@dataclass(frozen=True)
class PairingFL(Framework):
    """Pairs of clients train like one federated client each: hidden states pass between the two, models to the server.

    In every round one member of a pair is the data client (its text, the first blocks and, in the U-shape, the last),
    the other helps with the blocks between, on its own device and with its own copy. At the end of the round the data
    clients' parts and the helpers' parts are averaged, weighted by the data clients' data: the same numbers as SFL-V1
    with these data clients. Hidden states (and, in the two-part split, labels) are shown to the PARTNER: it is the
    curious party here, not the server.

    ``roles: alternate`` (ours) swaps them each round, so that everybody's data count; ``fixed`` keeps the first member
    of a pair the data client. ``pairs: selection`` leaves choice and matching to the run's selection, as published
    (take selection ``pairingfl-selection``); ``roles`` then says nothing, and a schedule of the learning rate counts
    the steps that a device is expected to run for itself and for others.
    """

    pairs: list[tuple[str, str]] | Literal["selection"] | None = None  # by default neighbours in the list of clients
    roles: Literal["alternate", "fixed"] = "alternate"  # whether the two swap who brings the data, each round
    local_steps: int = 1  # optimizer steps of a client in a round
    participation: float = 1.0  # of the pairs

    merges = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)

    @property
    def needs(self) -> Collection[str]:
        """Pairs, where they are left to the selection."""
        return ("pairs",) if self.pairs == "selection" else ()

    @property
    def takes(self) -> Collection[str]:
        """What it needs, and nothing else."""
        return self.needs

    def paired(self, clients: Sequence[str]) -> list[tuple[str, str]]:
        """The pairs.

        Raises:
            MethodError: a client has no partner, or two.
        """
        assert self.pairs != "selection"
        if self.pairs is None:
            if len(clients) % 2:
                raise MethodError(
                    f"framework 'pairingfl' needs an even number of clients, not {len(clients)}. Add one, or leave one "
                    "out."
                )
            return [(clients[i], clients[i + 1]) for i in range(0, len(clients), 2)]
        named = [name for pair in self.pairs for name in pair]
        problems = [f"'{name}' is no client.{suggest(name, clients)}" for name in named if name not in clients]
        problems += [f"'{client}' is in {named.count(client)} pairs" for client in clients if named.count(client) != 1]
        if problems:
            raise MethodError(f"framework 'pairingfl': the pairs do not fit the clients: {'; '.join(problems)}.")
        return list(self.pairs)

    def route(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """The partner's device; before the selection has matched anybody, the next client's."""
        if self.pairs == "selection":
            return self._next(client, layouts)
        partner = {name: other for a, b in self.paired(list(layouts)) for name, other in ((a, b), (b, a))}
        first, second = layouts[client], layouts[partner[client]]
        if first != second:
            raise MethodError(
                f"framework 'pairingfl': '{client}' and its partner '{partner[client]}' have different cuts. Give both "
                "the same head_blocks and tail_blocks."
            )
        return [Stop(partner[client], partner[client], first.middle)]

    def _next(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        names, middle = list(layouts), layouts[client].middle
        if len(names) < 2:
            raise MethodError("framework 'pairingfl' needs at least 2 clients to make a pair.")
        if any(layout != layouts[client] for layout in layouts.values()):
            raise MethodError(
                "framework 'pairingfl': a selection may pair any two clients, but some have different cuts. Give all "
                "the same head_blocks and tail_blocks."
            )
        helper = names[(names.index(client) + 1) % len(names)]
        return [Stop(helper, helper, middle)]

    def rerouted(self, arrangement: Arrangement, layouts: Mapping[str, Layout]) -> Mapping[str, Sequence[Stop]]:
        """From each data client to the device of its helper."""
        return {data: [Stop(helper, helper, layouts[data].middle)] for data, helper in arrangement.pairs}

    def eligible(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """The data client of each pair; whom the selection chooses, it chooses from all."""
        if self.pairs == "selection":
            return clients
        turn = number % 2 if self.roles == "alternate" else 0
        return [pair[turn] for pair in self.paired(clients)]

    def trainers(self, clients: Sequence[str]) -> Sequence[str]:
        """Everybody, or the first of each pair."""
        return (
            clients
            if self.roles == "alternate" or self.pairs == "selection"
            else [first for first, _ in self.paired(clients)]
        )

    def line(self, client: str, clients: Sequence[str]) -> Sequence[str]:
        """A device makes its own steps and its partner's."""
        if self.pairs == "selection":
            return list(dict.fromkeys([client, clients[(list(clients).index(client) + 1) % len(clients)]]))
        return next(pair for pair in self.paired(clients) if client in pair)

    async def round(self, run: Run, number: int) -> None:
        """Local steps of all pairs at once, then one merge of both parts over the pairs."""
        data = cohort(run, number, self.participation)
        await run.catch_up(data, trunks=True)
        await run.together(lambda client: local_steps(run, client, self.local_steps), data)
        await run.merge(data, trunks=True, weights=run.weights(data))

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any data client of the last merge: with its partner it has the merged model."""
        return [newest(run)]
