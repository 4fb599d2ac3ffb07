"""Three tiers, device, edge and cloud, each with a piece of the model that is averaged in its own time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cutlayer.contracts import SERVER, Framework, Layout, Stop
from cutlayer.errors import MethodError
from cutlayer.methods.framework._cohort import check_options, cohort, newest
from cutlayer.methods.framework._groups import dealt
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.driver import Run

EDGE, CLOUD = "edge", "cloud"  # tiers beside the device


@method("framework", paper="Lin et al., arXiv:2412.07197")
@dataclass(frozen=True)
class HSFL(Framework):
    """Device, edge and cloud hold consecutive pieces of the model; each tier is averaged with a period of its own.

    Every device's path has its own copy of each piece, as in SFL-V1 (adapters on one frozen base). The copies of a tier
    are averaged over all devices every so many steps: ``intervals`` for device, edge and cloud, falling (the paper's
    form ends in 1). In the U-shape the device's piece is both its ends. ``edge_blocks: 0`` leaves the edges out: two
    tiers, device and cloud. The joint choice of cuts and intervals, which the paper optimises, is a planner's.

    Unequal cuts, which the paper does not have, are merged by block: each tier's average is over the paths that have
    the block there, and where paths have it in different tiers, the slower one's is over those of the faster one too.
    """

    edges: int | list[list[str]] = 2  # how many edge servers, clients dealt one by one; or the clients of each
    edge_blocks: int = 1  # blocks of the edge's piece
    intervals: tuple[int, int, int] = (4, 2, 1)  # steps between two averages, of device, edge and cloud
    participation: float = 1.0  # the share of the clients that a round takes
    moments: Literal["keep", "average", "reset"] = "keep"  # of the edge's and the cloud's optimizers

    merges = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)
        device, edge, cloud = self.intervals
        if not (device >= edge >= cloud >= 1 and device % edge == 0 and edge % cloud == 0):
            raise ValueError(
                f"intervals is {list(self.intervals)}; they must fall from device to cloud, each a multiple of the next"
            )
        if self.edge_blocks < 0:
            raise ValueError(f"edge_blocks is {self.edge_blocks}; it must be 0 or more")

    @property
    def local_steps(self) -> int:
        """A round lasts until all tiers have been averaged."""
        return self.intervals[0]

    def slots(self, clients: Sequence[str]) -> Mapping[str, str]:
        """A copy for each path."""
        return {client: client for client in clients}

    def parties(self, clients: Sequence[str]) -> Sequence[str]:
        """The edges."""
        number = self.edges if isinstance(self.edges, int) else len(self.edges)
        return [edge_named(edge) for edge in range(number)] if self.edge_blocks else []

    def route(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """Over the client's edge to the server.

        Raises:
            MethodError: the edge's blocks leave the cloud none.
        """
        layout, clients = layouts[client], list(layouts)
        middle = layout.middle
        if not self.edge_blocks:
            return [Stop(SERVER, client, middle)]
        split = middle.start + self.edge_blocks
        if split > middle.stop or (layout.tail_at_client and split == middle.stop):
            raise MethodError(
                f"framework 'hsfl': edge_blocks {self.edge_blocks} leave the cloud no block: the client's cut leaves "
                f"{len(middle)} between. Lower edge_blocks, head_blocks or tail_blocks."
            )
        groups = dealt(clients, self.edges, "hsfl")
        edge = next(number for number, group in enumerate(groups) if client in group)
        return [
            Stop(edge_named(edge), client, range(middle.start, split)),
            Stop(SERVER, client, range(split, middle.stop)),
        ]

    async def round(self, run: Run, number: int) -> None:
        """Steps of all paths at once; after each the tiers whose period is over are averaged, the cloud's first."""
        clients = cohort(run, number, self.participation)
        await run.catch_up(clients, trunks=True)
        device, edge, cloud = self.intervals
        for step in range(1, self.local_steps + 1):
            if able := [client for client in clients if run.steps_left(client)]:
                await run.together(run.step, able)
            if step % cloud == 0:
                await self._average(run, clients, [CLOUD])
            if self.edge_blocks and step % edge == 0:
                await self._average(run, clients, [EDGE, CLOUD])
            if step % device == 0:
                await run.merge(clients)

    async def _average(self, run: Run, clients: Sequence[str], tiers: Sequence[str]) -> None:
        """Average what the first of ``tiers`` holds, each block over the paths that have it in any of them."""
        places = {client: tiers_of(run, client) for client in clients if not run.presence.out(client)}
        averages: dict[tuple[str, ...], list[int | str]] = {}  # by the clients of an average: what is in it
        for owner in dict.fromkeys(o for held in places.values() for o, tier in held.items() if tier == tiers[0]):
            holders = tuple(client for client, held in places.items() if held.get(owner) in tiers)
            averages.setdefault(holders, []).append(owner)
        for holders, owners in averages.items():
            await run.merge(holders, heads=False, trunks=True, moments=self.moments, blocks=owners.__contains__)

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any one client of the last merge."""
        return [newest(run)]


def tiers_of(run: Run, client: str) -> dict[int | str, str]:
    """The tier that has each block of a client's path, and the top; without what its device has."""
    found: dict[int | str, str] = {}
    for stop in run.parts.routes[client]:
        found |= dict.fromkeys(stop.blocks, CLOUD if stop.party == SERVER else EDGE)
    return found if run.parts.layouts[client].tail_at_client else {**found, "top": CLOUD}


def edge_named(number: int) -> str:
    """The name of an edge, from 0."""
    return f"edge-{number}"
