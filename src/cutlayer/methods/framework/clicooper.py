"""No server: an owner of data hands the deeper blocks of its model to a chain of trainers, one segment each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from cutlayer.contracts import Framework, Layout, Stop
from cutlayer.errors import MethodError, suggest
from cutlayer.methods.framework._cohort import check_options, cohort, local_steps
from cutlayer.registry import method
from cutlayer.seeds import derive
from cutlayer.watermark import genesis, record

if TYPE_CHECKING:
    from cutlayer.driver import Run


@dataclass
class _Chain:
    """Of the watermark: the stages that are over, how many records there are of them, and the digest that they left."""

    stages: int = 0
    records: int = 0
    digest: str = ""


@method("framework", paper="Deng et al., IEEE TSC, 2026, arXiv:2603.08421")
@dataclass(frozen=True)
class CliCooper(Framework):
    """An owner keeps its text and the first blocks; a chain of other clients trains the rest, a segment each.

    Hidden states go down the chain from device to device and gradients come back; the main server sees neither. In the
    two-part split the last trainer has the loss (the published form), and the labels pass every trainer on their way to
    it. In the U-shape the chain comes back to the owner, which keeps them: take it for language models, whose labels
    are the text.

    With ``watermark`` every trainer writes bits into the weights of its segment, by a loss on them that is added to its
    objective with that factor, stage by stage, each tied to the one before (``cutlayer/watermark.py``). The owner gets
    each stage's weights and digests, and the keys once the stage is over; they are kept in the run's output folder, and
    ``cutlayer.watermark.verify`` proves from them who trained what, in which order. A run that is stopped early leaves
    its last stage unproven, and a stage can be too short: on a tiny model 8 steps of AdamW at 3e-3 left a third of the
    bits wrong, 40 at 1e-2 none. The chain of watermarks is the paper's, its formulas are standard ones in their place.
    What the owner adds before its data leave, noise on the hidden states and secret labels, belongs to the family
    defense and is not part of this class.

    The paper knows one owner. Several take turns here, as in ``sequential-sl``: the chain is the same, and the owner's
    part is handed on (over the coordinator), so that there is one model. Trainers bring no data of their own, whatever
    the run file gives them. Blocks are dealt evenly over the chain unless ``lengths`` says otherwise.
    """

    owners: int | list[str] = 1  # who brings data: so many of the first clients, or these
    chain: list[str] | None = None  # the trainers, from the owner on; by default all other clients
    lengths: list[int] | None = None  # blocks of each trainer, in the order of the chain
    local_steps: int = 1  # optimizer steps of an owner in its turn
    participation: float = 1.0  # of the owners
    watermark: float = 0.0  # weight of the mark's loss, 0.01 to 0.1; 0: no mark
    mark_bits: int = 128  # of a trainer's mark
    mark_weights: int = 1024  # how many of a segment's weights carry the mark, at most
    stage_rounds: int = 10  # rounds of a stage
    _chain: _Chain = field(default_factory=_Chain, init=False, repr=False, compare=False)

    travels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self.local_steps, self.participation)
        if isinstance(self.owners, int) and self.owners < 1:
            raise ValueError(f"owners is {self.owners}; it must be 1 or more")
        if self.lengths is not None and min(self.lengths, default=0) < 1:
            raise ValueError(f"lengths is {self.lengths}; each trainer runs at least one block")
        if not 0 <= self.watermark < math.inf:
            raise ValueError(f"watermark is {self.watermark}; it must be a finite number from 0 on")
        for name in ("mark_bits", "stage_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.mark_weights < self.mark_bits:
            raise ValueError(f"mark_weights is {self.mark_weights}; it must be mark_bits ({self.mark_bits}) or more")

    @property
    def optimizer_travels(self) -> bool:
        """With the owners' part."""
        return True

    @property
    def asks(self) -> Collection[str]:
        """The stages of the watermark."""
        return ("begin_stage", "end_stage") if self.watermark else ()

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
        """A turn of every owner; a stage of the watermark lasts some rounds."""
        owners, chain = self.roles(run.clients)
        if self.watermark:
            await self._begin_stage(run, chain)
        for owner in cohort(run, number, self.participation):
            await run.hand_over(run.holder(owners), owner, optimizer=True)
            await local_steps(run, owner, self.local_steps)
        kind, count = run.config.length
        ended = number + 1 == count if kind == "rounds" else not any(map(run.steps_left, owners))
        if self.watermark and (ended or (number + 1) % self.stage_rounds == 0):
            await self._end_stage(run, chain)

    async def _begin_stage(self, run: Run, chain: Sequence[str]) -> None:
        """Tell the trainers the stage. In each of its rounds, as one that was resumed must learn it again."""
        about: dict[str, str | int | float] = {
            "digest": self._chain.digest or genesis(nonce_of(run)), "nonce": nonce_of(run),
            "stage": self._chain.stages + 1, "strength": self.watermark, "bits": self.mark_bits,
            "used": self.mark_weights,
        }  # fmt: skip
        for trainer in chain:
            await run.ends[trainer].ask("begin_stage", about)

    async def _end_stage(self, run: Run, chain: Sequence[str]) -> None:
        """Every trainer in turn carries the digest on over its weights, and reveals its key."""
        kept = self._chain
        kept.stages += 1
        kept.digest = kept.digest or genesis(nonce_of(run))
        for trainer in chain:
            parcel = await run.ends[trainer].ask("end_stage", {"digest": kept.digest})
            about = {
                "stage": kept.stages, "trainer": trainer, "nonce": nonce_of(run), "bits": self.mark_bits,
                "used": self.mark_weights, **parcel.header.values,
            }  # fmt: skip
            record(run.out / "watermark", kept.records, about, parcel.tensors)
            kept.records += 1
            kept.digest = str(parcel.header.value("digest"))

    def state(self) -> Mapping[str, Any]:
        """Where the chain of stages is."""
        return asdict(self._chain)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with what ``state`` gave."""
        vars(self._chain).update(state)

    def evaluators(self, run: Run) -> Sequence[str]:
        """The owner that has the live copy of its part."""
        return [run.holder(self.roles(run.clients)[0])]


def nonce_of(run: Run) -> str:
    """A name of the run that every party may know."""
    return f"{derive(run.seed, 'nonce'):016x}"


def dealt_evenly(blocks: int, trainers: int) -> list[int]:
    """Blocks of each trainer: as equal as can be, the first ones having one more."""
    return [blocks // trainers + (number < blocks % trainers) for number in range(trainers)]
