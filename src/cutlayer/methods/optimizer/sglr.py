"""The trunk's rate grows with the number of clients of a step, and clients may get one averaged gradient at the cut.

From the paper's abstract: a server that learns faster than the clients, and gradients averaged over clients where they
leave it, which act like an average of the heads without sending them. The exponent is not known to us: eta_s = eta_c *
N^a with N the clients of this very step, ``a: 0.5`` for adaptive optimizers and 1 only for SGD. The warm-up goes from
eta_c to eta_s, so that a = 0 changes nothing. To clip the trunk's gradient set ``max_grad_norm``.

Averages are element by element over [B,T,H], from the first row and position on; a client without a row or a position
counts as zero there. On text they mix gradients of unrelated tokens, which nearly cancel, so the default is the rate
alone; averages are for classifiers on rows of one length. Links here are one to one: an average is sent to each client,
and ``bytes_repeated`` in ``summary.json`` says how much of that a broadcast would save. The random subset of clients
that the paper averages over is not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from cutlayer.contracts import How, Joint, Parcel, Rate, StepResult
from cutlayer.joint import Meeting
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.driver import Run


@method("optimizer", paper="Pal et al., arXiv:2112.05929")
@dataclass(frozen=True)
class SGLR(Rate):
    """A trunk's rate that grows with a power of the clients of a step, and one averaged gradient at the cut."""

    a: float = 0.5  # the trunk's rate is the clients' times N^a
    mode: Literal["lr_only", "avg_only", "both"] = "lr_only"  # the rate, the averaged gradient at the cut, or both
    warmup: int = 100  # updates of the trunk over which its rate rises from the clients' to its own

    def __post_init__(self) -> None:
        if not (math.isfinite(self.a) and self.a >= 0):
            raise ValueError(f"a is {self.a}; it must be a finite number from 0 on")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be 0 or more")

    def problems(self, config: RunConfig) -> Iterator[str]:
        """It needs updates by several clients, and to average a gradient that comes down."""
        if not config.build("framework").pooled and config.mixing is None:
            yield (
                f"looks at how many clients an update is by, but in framework '{config.framework.name}' each has its "
                "own. Take framework psl, gsfl with intra: psl, or sfl-v1 with mixing: minibatch-sfl."
            )
        if self.mode != "lr_only" and config.build("exchange").frozen_head:
            yield f"averages gradients, but exchange '{config.exchange.name}' sends none. Take mode: lr_only."

    def factor(self, participants: int, updates: int) -> float:
        """N^a, or on the way there."""
        if self.mode == "avg_only":
            return 1.0
        risen = min(1.0, (updates + 1) / self.warmup) if self.warmup else 1.0
        return float(1.0 + (participants**self.a - 1.0) * risen)

    def gather(self, run: Run, clients: Sequence[str]) -> Joint | None:
        """Where the clients' gradients are averaged."""
        return None if self.mode == "lr_only" else Averaging(run, clients)


class Averaging(Joint):
    """Clients that get the mean of their gradients at the cut."""

    def __init__(self, run: Run, clients: Sequence[str]) -> None:
        self.run = run
        self._members, self._through = list(clients), set[str]()  # of all, those that have made the step
        self.meeting: Meeting[Parcel, Parcel] = self._anew()

    def _anew(self) -> Meeting[Parcel, Parcel]:
        return Meeting(self._members, self.run.clock, "sglr")

    def wrap(self, stop: Any, client: str) -> Any:
        """The stop, whose gradients are averaged."""
        return _Averaged(self, stop, client)

    async def done(self, result: StepResult) -> None:
        """When all have made the step, all are waited for in the next."""
        self._through.add(result.client)
        self._look()

    def leave(self, client: str) -> None:
        """Nobody waits for it."""
        self._members.remove(client)
        self.meeting.leave(client)
        self._look()

    def _look(self) -> None:
        if self._through.issuperset(self._members):
            self._through.clear()
            self.meeting = self._anew()

    async def average(self, parcels: Mapping[str, Parcel]) -> Mapping[str, Parcel]:
        """Each client's parcel with the mean, of its own shape; all but the first carry it once more."""
        found = {name: parcel.tensors["hidden"] for name, parcel in parcels.items() if "hidden" in parcel.tensors}
        if not found:
            return parcels
        rows, length = (max(tensor.shape[axis] for tensor in found.values()) for axis in (0, 1))
        like = next(iter(found.values()))
        mean = torch.zeros(rows, length, like.shape[2], dtype=torch.float64)
        for tensor in found.values():  # in float64: the mean of equal numbers is then that number, to the bit
            mean[: tensor.shape[0], : tensor.shape[1]] += tensor.double()
        mean /= len(found)
        given = {}
        for name, parcel in parcels.items():
            if name not in found:
                given[name] = parcel
                continue
            own = mean[: found[name].shape[0], : found[name].shape[1]].to(like.dtype)
            header = parcel.header.but(values={**parcel.header.values, "again": name != next(iter(found))})
            given[name] = Parcel(header, [own])
        return given


@dataclass(frozen=True)
class _Averaged:
    """A stop as one client's step meets it."""

    joint: Averaging
    stop: Any
    client: str

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """As it is."""
        out: Parcel = await self.stop.forward(parcel, how)
        return out

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """The gradient of the clients that are there."""
        last = bool(parcel.header.value("last"))
        return await self._mean(await self.stop.backward(parcel, how), last)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """The gradient of the clients that are there."""
        last = bool(parcel.header.value("last"))
        return await self._mean(await self.stop.tail_step(parcel, how), last)

    async def leave(self, client: str) -> None:
        """The others go on without it in this step."""
        self.joint.meeting.leave(client)
        await self.stop.leave(client)

    async def _mean(self, parcel: Parcel, last: bool) -> Parcel:
        out = await self.joint.meeting.bring(self.client, parcel, self.joint.average)
        if last:  # a client with fewer micro-batches is done earlier
            self.joint.meeting.leave(self.client)
        return out
