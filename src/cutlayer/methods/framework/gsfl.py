"""Groups of clients: one discipline within a group, groups in parallel (or in turn), group models averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cutlayer.contracts import SHARED, Framework
from cutlayer.methods.framework._cohort import check_options, cohort, local_steps, newest
from cutlayer.methods.framework._groups import dealt
from cutlayer.methods.framework._pool import joint_step
from cutlayer.registry import method

if TYPE_CHECKING:
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

    Between rounds the optimizer's state stays with a group: of its trunk, and (``sequential``) of the part handed on.
    """

    groups: int | list[list[str]] = 2  # how many, dealt one by one; or the members of each
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
    def pooled(self) -> bool:  # type: ignore[override]
        """Whether a group's trunk makes one update for all its members."""
        return self.intra == "psl"

    def members(self, clients: Sequence[str]) -> list[list[str]]:
        """The clients of each group.

        Raises:
            MethodError: a group is empty, or a client is in none or in two.
        """
        return dealt(clients, self.groups, "gsfl")

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
                await run.merge(group)
            return
        if self.intra == "sequential":
            await run.together(lambda name: self._pass_along(run, name, groups[name]), list(groups))
            lasts = {}
            for name, group in groups.items():
                if stayed := [client for client in group if not run.presence.out(client)]:
                    holder = run.holder(self.members(run.clients)[int(name)], name)
                    lasts[holder] = sum(run.federated.sizes[client] for client in stayed)
            if len(self.members(run.clients)) > 1:
                await run.merge(list(lasts), trunks=True, moments=self.moments, weights=lasts)
            return
        clients = [client for group in groups.values() for client in group]
        await run.catch_up(clients, trunks=True)
        await run.together(lambda name: self._train(run, groups[name]), list(groups))
        await run.merge(clients, trunks=True, moments=self.moments)

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
        for _ in range(self.local_steps):
            able = [client for client in group if run.steps_left(client)]
            if self.intra == "psl" and able:
                await joint_step(run, able, self.weight_by)
            elif self.intra == "sfl-v2":
                for client in able:
                    await run.step(client)

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any one client of the last merge; with a single group that hands on, the one that has the part."""
        groups = self.members(run.clients)
        if self.intra == "sequential" and len(groups) == 1:
            return [run.holder(groups[0], "0")]
        return [newest(run)]
