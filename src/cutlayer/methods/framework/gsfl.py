"""Groups of clients: one discipline within a group, groups in parallel (or in turn), group models averaged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from cutlayer.contracts import SERVER, SHARED, Framework, Layout, Stop
from cutlayer.methods.framework._cohort import check_options, cohort, local_steps, newest
from cutlayer.methods.framework._groups import dealt
from cutlayer.methods.framework._pool import joint_step
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.arrangement import Arrangement
    from cutlayer.driver import Run


@method("framework", paper="Zhang et al., arXiv:2305.18889; Wu et al. (CPSL), arXiv:2204.08119")
@dataclass(frozen=True)
class GSFL(Framework):
    """Clients in groups that share a trunk; group models are averaged at the end of the round.

    ``intra`` is what happens in a group: ``sequential`` hands the client's part from member to member, ``psl`` makes
    joint steps with one update of the group's trunk, ``sfl-v2`` serves the members one after another in each step.
    ``outer: parallel`` gives each group its trunk and averages trunks and clients' parts (GSFL, ParallelSFL);
    ``sequential`` visits the groups in turn with one trunk, the parts being averaged within each group and handed on
    (CPSL); with ``intra: sequential`` that is sequential split learning, so it is refused.

    ``groups: selection`` leaves the groups to the run's selection. With ``outer: parallel`` it may also name a member
    whose device runs the group's trunk, and say how many steps each group makes and what it weighs.

    Between rounds the optimizer's state stays with a group: of its trunk, and (``sequential``) of the part handed on.
    """

    groups: int | list[list[str]] | Literal["selection"] = 2  # a number, dealt one by one; lists; or the selection's
    intra: Literal["sequential", "psl", "sfl-v2"] = "sequential"  # what happens within a group
    outer: Literal["parallel", "sequential"] = "parallel"  # groups at once, or one after another
    local_steps: int = 1  # optimizer steps of a client in a round
    participation: float = 1.0  # the share of the clients that a round takes
    weight_by: Literal["tokens", "examples", "uniform"] = "tokens"  # psl: a client's share of a joint step
    moments: Literal["keep", "average", "reset"] = "average"  # of the trunks' optimizers, when they are merged

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)
        if isinstance(self.groups, int) and self.groups < 1:
            raise ValueError(f"groups is {self.groups}; it must be 1 or more")
        if self.outer == "sequential" and self.intra == "sequential":
            raise ValueError("outer and intra are both sequential: that is framework 'sequential-sl'")

    @property
    def pooled(self) -> bool:
        """Whether a group's trunk makes one update for all its members."""
        return self.intra == "psl"

    def members(self, clients: Sequence[str]) -> list[list[str]]:
        """The clients of each group; all in one before the selection has said more.

        Raises:
            MethodError: a group is empty, or a client is in none or in two.
        """
        return dealt(clients, 1 if self.groups == "selection" else self.groups, "gsfl")

    @property
    def needs(self) -> Collection[str]:
        """Groups, where they are left to the selection."""
        return ("groups",) if self.groups == "selection" else ()

    @property
    def takes(self) -> Collection[str]:
        """A trunk at a member where each group has one of its own."""
        return (*self.needs, "hosts") if self.needs and self.outer == "parallel" else self.needs

    @property
    def merges(self) -> bool:
        """Groups with a trunk each do."""
        return self.outer == "parallel"

    @property
    def optimizer_travels(self) -> bool:
        """Along a group."""
        return self.intra == "sequential"

    def following(self, arrangement: Arrangement) -> GSFL:
        """With the selection's groups."""
        return replace(self, groups=[list(group.members) for group in arrangement.groups])

    def rerouted(self, arrangement: Arrangement, layouts: Mapping[str, Layout]) -> Mapping[str, Sequence[Stop]]:
        """To the group's trunk, at the server or at one of its members."""
        slots, hosts = self.slots(list(layouts)), {c: g.host for g in arrangement.groups for c in g.members}
        return {c: [Stop(hosts[c] or SERVER, slots[c], layouts[c].middle)] for c in layouts}

    def slots(self, clients: Sequence[str]) -> Mapping[str, str]:
        """One for each group; one for all where the groups take turns."""
        groups = self.members(clients)
        if self.outer == "sequential":
            return dict.fromkeys(clients, SHARED)
        return {client: f"group-{number}" for number, group in enumerate(groups) for client in group}

    def line(self, client: str, clients: Sequence[str]) -> Sequence[str]:
        """A group hands on among its members."""
        group = next(group for group in self.members(clients) if client in group)
        return group if self.intra == "sequential" else [client]

    async def round(self, run: Run, number: int) -> None:
        """Every group trains; then one merge over all."""
        taking = set(cohort(run, number, self.participation))
        groups = {str(i): [c for c in g if c in taking] for i, g in enumerate(self.members(run.clients))}
        groups = {name: group for name, group in groups.items() if group}
        if self.outer == "sequential":
            for group in groups.values():
                await run.catch_up(group)
                await self._train(run, group)
                await run.merge(group, weights=run.weights(group))
            return
        if self.intra == "sequential":
            await run.together(lambda name: self._pass_along(run, name, groups[name]), list(groups))
            sizes, lasts = run.weights(run.clients) or run.federated.sizes, {}
            for name, group in groups.items():
                if stayed := [client for client in group if not run.presence.out(client)]:
                    holder = run.holder(self.members(run.clients)[int(name)], name)
                    lasts[holder] = sum(sizes[client] for client in stayed)
            if len(self.members(run.clients)) > 1 or run.arrangement.groups:  # groups may change, so all must be told
                await run.merge(list(lasts), trunks=True, moments=self.moments, weights=lasts)
            return
        clients = [client for group in groups.values() for client in group]
        await run.catch_up(clients, trunks=True)
        await run.together(lambda name: self._train(run, groups[name]), list(groups))
        await run.merge(clients, trunks=True, moments=self.moments, weights=run.weights(clients))

    async def _pass_along(self, run: Run, name: str, group: Sequence[str]) -> None:
        """The members' steps one after another, with one part that goes from hand to hand."""
        everybody = self.members(run.clients)[int(name)]
        for client in group:
            holder = run.holder(everybody, name)
            await run.catch_up([holder], trunks=True)  # a group that sat out the last merge
            await run.hand_over(holder, client, optimizer=True, line=name)
            await local_steps(run, client, self.local_steps)

    async def _train(self, run: Run, group: Sequence[str]) -> None:
        """The members' steps together."""
        for number in range(max(map(run.local_steps, group))):
            able = [client for client in group if run.steps_left(client) and number < run.local_steps(client)]
            if self.intra == "psl" and able:
                await joint_step(run, able, self.weight_by, merged=True)
            elif self.intra == "sfl-v2":
                for client in able:
                    await run.step(client)

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any one client of the last merge; with a single group that hands on, the one that has the part."""
        groups = self.members(run.clients)
        if self.intra == "sequential" and len(groups) == 1:
            return [run.holder(groups[0], "0")]
        return [newest(run)]
