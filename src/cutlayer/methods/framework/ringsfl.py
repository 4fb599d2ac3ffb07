"""No big server: a batch travels round a ring of clients, each running its share of the blocks with its own copy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cutlayer.contracts import Framework, Layout, Stop
from cutlayer.errors import MethodError
from cutlayer.methods.framework._cohort import check_options, cohort
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.driver import Run


@method("framework", paper="Shen et al., IEEE TMC 23(5), 2023, after the survey, arXiv:2604.24468")
@dataclass(frozen=True)
class RingSFL(Framework):
    """Clients in a ring: each batch passes all of them, every one runs as many blocks as its speed allows.

    A client's batch starts with its own embedding and first blocks, goes on at the next client's with the next blocks,
    and comes back to its owner for the final norm, the LM head and the loss: labels stay at home, so the partition is
    the U-shape. A device trains its own copy of whatever it ran, for itself and for others; at the end of a round the
    devices' changes are added up. An owner's loss is scaled by its share of the examples, so that with one step a round
    and SGD this is a step on the weighted joint loss. That weighting and the sum are a reconstruction: of the paper the
    ring, the lengths and the blending are known to us.

    The cuts are this framework's, not the partition's: client i runs ``lengths[i]`` blocks of every batch. By default
    they are in proportion to the speeds of the run's profiles (equal without), each at least one.
    """

    lengths: list[int] | None = None  # blocks that each client runs, in the order of the clients; their sum is all
    local_steps: int = 1  # optimizer steps of a client in a round

    merges = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, 1.0)
        if self.lengths is not None and min(self.lengths, default=0) < 1:
            raise ValueError(f"lengths is {self.lengths}; each client runs at least one block")

    @property
    def asks(self) -> Collection[str]:
        """An update of each device, when all owners have made their step."""
        return ("update",)

    @property
    def participation(self) -> float:
        """All: a ring without a member would have no path."""
        return 1.0

    def layouts(
        self, given: Mapping[str, Layout], num_blocks: int, speeds: Mapping[str, float] | None
    ) -> Mapping[str, Layout]:
        """Each client's head is as long as its turn on the ring; its tail is the final norm and the LM head."""
        names = list(given)
        if len(names) < 2:
            raise MethodError("framework 'ringsfl' needs at least 2 clients to make a ring.")
        if len(names) > num_blocks:
            raise MethodError(
                f"framework 'ringsfl': {len(names)} clients, but the model has {num_blocks} blocks, and each client of "
                "a ring runs at least one. Take fewer clients or a deeper model."
            )
        if not all(layout.tail_at_client for layout in given.values()):
            raise MethodError(
                "framework 'ringsfl' computes the loss at the owner of the batch. Take partition: u-shaped-split."
            )
        lengths = self.lengths or shared_out(num_blocks, [speeds[name] if speeds else 1.0 for name in names])
        if len(lengths) != len(names) or sum(lengths) != num_blocks:
            raise MethodError(
                f"framework 'ringsfl': lengths {lengths} do not fit {len(names)} clients and {num_blocks} blocks: give "
                "one number for each client, with that sum."
            )
        nothing = range(num_blocks, num_blocks)
        return {
            name: Layout(range(length), range(length, num_blocks), nothing, tail_at_client=True)
            for name, length in zip(names, lengths, strict=True)
        }

    def problems(self, config: RunConfig) -> Iterator[str]:
        """A ring adds what each device has changed; no rule for means applies."""
        if config.aggregator.name != "fedavg":
            yield (
                f"adds the changes of all devices, which aggregator '{config.aggregator.name}' cannot do otherwise. "
                "Take aggregator: fedavg; its weight_by weighs the owners."
            )

    def route(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """The other clients in ring order, each with the next of the blocks."""
        ring = list(layouts)
        number, start, stops = ring.index(client), len(layouts[client].head), []
        for other in (*ring[number + 1 :], *ring[:number]):
            stop = start + len(layouts[other].head)
            stops.append(Stop(other, other, range(start, stop)))
            start = stop
        return stops

    async def round(self, run: Run, number: int) -> None:
        """Local steps of all owners at once, an update of each device after each, and the sum of the changes."""
        owners = cohort(run, number, self.participation)
        if not owners:
            return
        sizes = {client: run.federated.sizes[client] for client in owners}
        total = sum(sizes.values())
        for _ in range(self.local_steps):
            able = [client for client in owners if run.steps_left(client)]
            await run.together(
                lambda c: run.step(c, head_update=False, trunk_update=False, weight=sizes[c] / total), able
            )
            if run.presence.lost:
                return  # all of them are set back
            await run.update_heads(dict.fromkeys(run.clients, 1.0))
        await run.add_changes(run.clients)

    def evaluators(self, run: Run) -> Sequence[str]:
        """Any client: after a round all hold the same."""
        return run.clients[:1]


def shared_out(num_blocks: int, speeds: Sequence[float]) -> list[int]:
    """Blocks in proportion to speeds: rounded down, at least one each, the rest to who is least loaded."""
    lengths = [max(1, int(num_blocks * speed / sum(speeds))) for speed in speeds]
    while sum(lengths) > num_blocks:  # the minimum of one took more than there is: from who is most loaded
        most = max((i for i in range(len(lengths)) if lengths[i] > 1), key=lambda i: lengths[i] / speeds[i])
        lengths[most] -= 1
    while sum(lengths) < num_blocks:
        lengths[min(range(len(lengths)), key=lambda i: (lengths[i] / speeds[i], i))] += 1
    return lengths
