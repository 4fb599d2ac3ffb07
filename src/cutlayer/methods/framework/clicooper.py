"""No server: an owner of data hands the deeper blocks of its model to a chain of trainers, one segment each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cutlayer.contracts import Framework, Layout, Stop
from cutlayer.errors import MethodError, suggest
from cutlayer.methods.framework._cohort import check_options, cohort, local_steps
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run


@method("framework", paper="Deng et al., IEEE TSC, 2026, arXiv:2603.08421")
@dataclass(frozen=True)
class CliCooper(Framework):
    """An owner keeps its text and the first blocks; a chain of other clients trains the rest, a segment each.

    Hidden states go down the chain from device to device and gradients come back; the main server sees neither. In the
    two-part split the last trainer has the loss (the published form), and the labels pass every trainer on their way to
    it. In the U-shape the chain comes back to the owner, which keeps them: take it for language models, whose labels
    are the text.

    The paper knows one owner. Several take turns here, as in ``sequential-sl``: the chain is the same, and the owner's
    part is handed on (over the coordinator), so that there is one model. Trainers bring no data of their own, whatever
    the run file gives them. Blocks are dealt evenly over the chain unless ``lengths`` says otherwise.
    """

    owners: int | list[str] = 1  # who brings data: so many of the first clients, or these
    chain: list[str] | None = None  # the trainers, from the owner on; by default all other clients
    lengths: list[int] | None = None  # blocks of each trainer, in the order of the chain
    local_steps: int = 1  # optimizer steps of an owner in its turn
    participation: float = 1.0  # of the owners

    travels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)
        if isinstance(self.owners, int) and self.owners < 1:
            raise ValueError(f"owners is {self.owners}; it must be 1 or more")
        if self.lengths is not None and min(self.lengths, default=0) < 1:
            raise ValueError(f"lengths is {self.lengths}; each trainer runs at least one block")

    def trainers(self, clients: Sequence[str]) -> Sequence[str]:
        """Who makes steps in a run: the owners.

        Raises:
            MethodError: the owners are no clients, or leave nobody for the chain.
        """
        return self.roles(clients)[0]

    def roles(self, clients: Sequence[str]) -> tuple[list[str], list[str]]:
        """The owners, and the chain.

        Raises:
            MethodError: a name is unknown, twice or in both roles, or the chain is empty.
        """
        owners = list(clients[: self.owners]) if isinstance(self.owners, int) else list(self.owners)
        chain = self.chain
        chain = [client for client in clients if client not in owners] if chain is None else list(chain)
        named = [*owners, *chain]
        problems = [f"'{name}' is no client.{suggest(name, clients)}" for name in named if name not in clients]
        problems += [f"'{name}' is named {named.count(name)} times" for name in clients if named.count(name) > 1]
        problems += ["there is no owner"] if not owners else []
        if problems:
            raise MethodError(f"framework 'clicooper': owners and trainers do not fit: {'; '.join(problems)}.")
        if not chain:
            raise MethodError(
                f"framework 'clicooper' needs a trainer beside its {len(owners)} of {len(clients)} clients that are "
                "owners. Add a client, or take fewer owners."
            )
        return owners, chain

    def route(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """The chain, with consecutive blocks; the same for every owner."""
        _, chain = self.roles(list(layouts))
        middle = layouts[client].middle
        lengths = self.lengths or dealt_evenly(len(middle), len(chain))
        if len(lengths) != len(chain) or sum(lengths) != len(middle) or min(lengths) < 1:
            raise MethodError(
                f"framework 'clicooper': {len(middle)} blocks between the owner's cuts and lengths {lengths} do not "
                f"fit a chain of {len(chain)} trainers: give one number for each, with that sum, none below 1."
            )
        stops, start = [], middle.start
        for trainer, length in zip(chain, lengths, strict=True):
            stops.append(Stop(trainer, trainer, range(start, start + length)))
            start += length
        return stops

    def eligible(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """The owners."""
        return self.roles(clients)[0]

    def line(self, client: str, clients: Sequence[str]) -> Sequence[str]:
        """The owners' part goes from hand to hand, and a trainer serves them all."""
        return self.roles(clients)[0]

    async def round(self, run: Run, number: int) -> None:
        """A turn of every owner."""
        owners, _ = self.roles(run.clients)
        for owner in cohort(run, number, self.participation):
            await run.hand_over(run.holder(owners), owner, optimizer=True)
            await local_steps(run, owner, self.local_steps)

    def evaluators(self, run: Run) -> Sequence[str]:
        """The owner that has the live copy of its part."""
        return [run.holder(self.roles(run.clients)[0])]


def dealt_evenly(blocks: int, trainers: int) -> list[int]:
    """Blocks of each trainer: as equal as can be, the first ones having one more."""
    return [blocks // trainers + (number < blocks % trainers) for number in range(trainers)]
