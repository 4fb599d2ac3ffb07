"""Both sides estimate gradients from forward passes, and the server makes ``tau`` updates where a client makes one.

A client sends three activations in one message: of its head as it is, and as it is with mu*u added and taken off. The
server improves its copy of the trunk ``tau`` times on the first, each time by two forward passes with a direction of
its own, then sends back the slope between its losses on the other two: one number. The client moves its head along u by
that much. Nobody builds a graph. With ``perturbations`` P it is 1 + 2P activations, P numbers, and means of P
estimates.

From the paper: unbalanced updates with estimates from forward passes. The steps and the global rate follow public
re-implementations, as the authors' code was not seen. Ours: the rates, the server's divided by ``tau`` and the global
one min(1, global_rate * sqrt(tau)) of what a merge changes; and that u is known to the client alone (it follows from
its secret), as the server needs only the activations. The server's directions follow from the run's seed.

The estimate goes into the run's optimizer as its gradient: the paper's update is ``optimizer: sgd``. All forward passes
are without dropout. The noise of an estimate grows with the trained numbers, so train few (LoRA, a low rank), from a
pretrained model. The loss that a step reports is the mean of those at the two points of the server's first update.
``tau: auto`` goes by the round before: the seconds of the slowest client's step by those that the server needs for an
update of each client's copy, at least 1 and at most 8; the first round has 1.

Refused: the U-shape, in which each of the server's updates would need a loss from the client; frameworks in which
clients share a trunk, where its tau updates for one would be stale for the others before they merge; accumulation and
clipping, as batches cost no activations here, and there is no one gradient of both sides to clip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch

from cutlayer.contracts import End, Exchange, Hop, How, Parcel, State, StepResult, Tail
from cutlayer.registry import method
from cutlayer.step import current_tally
from cutlayer.zeroth import Probe

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.driver import Run

MOST = 8  # updates of the server on one embedding


class _End(Protocol):
    """A client that looks around (see ``ClientEnd``)."""

    name: str

    async def probe(self, probe: Probe, *, step: int, micro: int) -> Parcel: ...

    async def probed(self, parcel: Parcel) -> None: ...


class _Tail(Protocol):
    """A server that only runs forward (see ``ServerTail``)."""

    async def improve(self, parcel: Parcel, probe: Probe, *, turn: int, rate: float, last: bool) -> Parcel: ...

    async def judge(self, parcel: Parcel, probe: Probe) -> Parcel: ...


@method("exchange", paper="Liang et al., arXiv:2510.21155")
@dataclass
class MUSplitFed(Exchange):
    """No backpropagation: several zeroth-order updates of the server for each of a client; one number comes down."""

    tau: int | Literal["auto"] = 4  # the server's updates on one embedding, 1 to 8; auto follows the slowest client
    perturbations: int = 1  # directions whose estimates are averaged, on both sides
    mu: float | None = None  # how far a direction is followed; null: 1e-3, in half precision 5e-3
    server_rate: float = 1.0  # of optimizer.lr: the server's rate at tau 1
    global_rate: float = 1.0  # times sqrt(tau), at most 1: how much of the mean change a merge takes
    copy: bool = True  # put a copy of the parameters back after a look around; false takes off what was added

    _tau: int = field(default=1, init=False, repr=False, compare=False)  # of this round
    _mu: float = field(default=1e-3, init=False, repr=False, compare=False)
    _took: dict[str, tuple[float, float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tau != "auto" and not 1 <= self.tau <= MOST:
            raise ValueError(f"tau is {self.tau}; it must be 1 to {MOST}, or auto")
        if self.perturbations < 1:
            raise ValueError(f"perturbations is {self.perturbations}; it must be 1 or more")
        for name in ("mu", "server_rate", "global_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a finite number above 0")

    @property
    def probes(self) -> int:
        """As the option says."""
        return self.perturbations

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What it cannot work with."""
        if any(config.partition_spec(name).name != "two-part-split" for name in config.client_names):
            yield "needs the loss at the server for each of its updates. Take partition: two-part-split."
        framework = config.build("framework")
        if not framework.joinable or config.mixing is not None:
            sharing = f"with mixing '{config.mixing.name}'" if config.mixing else f"in '{config.framework.name}'"
            yield (
                "updates a trunk for each client several times in a step, and merges these copies, but "
                f"{sharing} clients do not train at once with a trunk of their own. Take framework: sfl-v1, without "
                "mixing."
            )
        if not config.build("aggregator").exchanges:
            yield f"needs copies to be merged, but aggregator '{config.aggregator.name}' merges none. Take fedavg."
        if config.scheduler.name != "fifo":
            yield f"has no backward passes that scheduler '{config.scheduler.name}' could order. Take scheduler: fifo."
        if config.planner is not None:
            yield f"has no backward passes, which planner '{config.planner.name}' counts with. Take planner: none."
        if config.gradient_accumulation > 1:
            yield (
                "makes the server's updates on one batch, whose activations it does not keep. Set "
                "gradient_accumulation: 1, and raise batch_size instead: it costs no activations."
            )
        if config.max_grad_norm is not None:
            yield "updates each side by an estimate of its own, and clips none. Leave out max_grad_norm."
        timed = config.profile is not None or all(client.profile is not None for client in config.client_list)
        if self.tau == "auto" and not timed:
            yield "goes by how long clients take (tau: auto), so they need profiles. Give profile, or a number for tau."

    def begin(self, run: Run) -> None:
        """How many updates the server makes in this round."""
        half = run.config.precision != "float32"
        self._mu = self.mu if self.mu is not None else 5e-3 if half else 1e-3
        self._tau = self.tau if self.tau != "auto" else self._measured()

    def _measured(self) -> int:
        """The slowest client's step by an update of each client's copy; 1 where nothing is known."""
        update = sum(update for _, update in self._took.values())
        if not update:
            return 1
        return min(MOST, max(1, int(max(own for own, _ in self._took.values()) / update)))

    @property
    def merged_share(self) -> float:
        """min(1, global_rate * sqrt(tau)), with the tau of this round."""
        return min(1.0, self.global_rate * math.sqrt(self._tau))

    async def step(
        self, inner: Any, client: End, middle: Sequence[Hop], tail: Tail, *, step: int, micro: int, how: How
    ) -> StepResult:
        """Look around at the client, improve the trunk, tell the client its slopes."""
        end, server = cast(_End, client), cast(_Tail, tail)
        assert not middle
        assert how.head_update
        assert how.trunk_update
        probe, tally = Probe(self.perturbations, self._mu, self.copy), current_tally()
        parcel = await end.probe(probe, step=step, micro=micro)
        before, losses = tally.virtual["trunk_forward"] if tally else 0.0, []
        for turn in range(self._tau):
            last, rate = turn == self._tau - 1, self.server_rate / self._tau
            done = await server.improve(parcel, probe, turn=turn, rate=rate, last=last)
            losses.append(float(done.header.value("loss")))
        update = ((tally.virtual["trunk_forward"] if tally else 0.0) - before) / self._tau
        await end.probed(await server.judge(parcel, probe))
        if tally and self.tau == "auto":
            self._took[end.name] = (tally.own, update)
        header = parcel.header
        return StepResult(
            end.name, step, losses[0], int(header.value("tokens")), int(header.value("label_tokens")),
            bool(header.value("last")),
        )  # fmt: skip

    def state(self) -> State:
        """What each client's last step took."""
        return {name: torch.tensor(took, dtype=torch.float64) for name, took in self._took.items()}

    def restore(self, state: State) -> None:
        """Know it again."""
        for name, took in state.items():
            own, update = took.tolist()
            self._took[name] = (own, update)
