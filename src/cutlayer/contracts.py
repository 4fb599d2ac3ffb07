"""The Protocols that methods and parties fulfil, with the values that pass between them (``values.py``).

A method sees what its Protocol hands it and nothing else. Shapes: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cutlayer.values import (
    IGNORE,
    SERVER,
    SHARED,
    Batch,
    Example,
    How,
    Layout,
    Parcel,
    Row,
    Rows,
    State,
    StepResult,
    Stop,
)

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.driver import Run
    from cutlayer.models.families import Anatomy
    from cutlayer.models.segment import Base

__all__ = [
    "IGNORE", "SERVER", "SHARED", "Aggregator", "Batch", "Division", "End", "Example", "Exchange", "Framework", "Hop",
    "How", "Joint", "Layout", "Mixing", "Parcel", "Partition", "Peft", "Rate", "Row", "Rows", "Scheduler", "Selection",
    "Slot", "State", "StepResult", "Stop", "Tail",
]  # fmt: skip


class End(Protocol):
    """The client, as the driver sees it: the first and the last stop of a step."""

    name: str

    async def head_forward(self, *, step: int, micro: int, how: How) -> Parcel:
        """Steps 2 and 3."""

    async def head_backward(self, parcel: Parcel, how: How) -> StepResult:
        """Steps 9 and 10."""


class Hop(Protocol):
    """A stop between head and tail: a slot at a party, or a wrapper of one."""

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """Steps 4 and 5."""

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """Steps 8 and 9."""

    async def leave(self, client: str) -> None:
        """The client needs this hop no more in this step (or is lost)."""


class Tail(Protocol):
    """Who holds the last blocks, the labels and the loss: the client (U-shape) or the server (two-part)."""

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Step 6 (two-part: step 4, forward, loss and backward in one) and 7."""

    async def leave(self, client: str) -> None:
        """The client needs this tail no more in this step (or is lost)."""


class Slot(Protocol):
    """What of a slot a framework may know."""

    name: str
    version: int


class Partition(Protocol):
    """Family ``partition``: into how many parts, and where labels and loss sit."""

    def layout(self, num_blocks: int) -> Layout:
        """The blocks of each part; raises MethodError where the cut does not fit the model."""


class Peft(Protocol):
    """Family ``peft``: what is trained, and where in the model it is put."""

    def check(self, model: Any, anatomy: Anatomy, *, task: str) -> None:
        """Refuse by MethodError what does not fit the whole model, whose weights are not there yet (device meta)."""

    def prepare(self, model: Any, anatomy: Anatomy, *, task: str, seed: int) -> Base:
        """Make a model, whole or in part, trainable; the start follows from the seed."""


class Division(Protocol):
    """Family ``data``: how rows are divided over clients."""

    def divide(self, rows: Rows, clients: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, list[int]]:
        """The row numbers of each client; each row goes to at most one client, unless an option says otherwise."""


class Aggregator(Protocol):
    """Family ``aggregator``: merges the clients' copies of the model at step 11.

    A copy is all that is trained of one client's model: what the client holds, and what of its trunk is to be merged.
    Where cuts differ, a block that is one client's head is another's trunk, and its copy comes from there.
    """

    exchanges: ClassVar[bool] = True  # False: nothing is merged or sent, every holder keeps what it has

    @property
    def weight_by(self) -> str:
        """What a client's weight is proportional to: ``examples``, ``tokens`` or ``uniform``."""
        return "examples"

    def begin(self, trunks: Mapping[str, Collection[str]]) -> None:
        """Told at the start: by client, what of its trunk nobody else trains. MethodError: it cannot work with that."""

    @abstractmethod
    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> State:
        """The merged state, by name.

        Args:
            before: what was last merged of each tensor, and the start of those that never were.
            states: name -> tensor, by client; shapes may differ (ranks), and names (cuts).
            weights: by client, summing to 1.
        """

    def fit(self, merged: State, shapes: Mapping[str, Sequence[int]]) -> State:
        """What a receiver that holds tensors of these names and shapes gets of a merged state."""
        return {name: merged[name] for name in shapes if name in merged}

    def state(self) -> Mapping[str, float]:
        """What it must remember beyond a merge, for checkpoints."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with what ``state`` gave."""


class Selection(Protocol):
    """Family ``selection``: which clients take part in a round."""

    def pick(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """The clients of round ``number``."""


class Scheduler(Protocol):
    """Family ``scheduler``: order and memory of the server's work."""

    def wrap(self, stop: Any, client: str) -> Any:
        """A stop of the server (``Hop`` or ``Tail``), as this client's step shall meet it."""


class Joint(Protocol):
    """What clients that train at once share while they do so."""

    def wrap(self, stop: Any, client: str) -> Any:
        """The last stop of this client's route (``Hop`` or ``Tail``), as its step shall meet it."""

    async def done(self, result: StepResult) -> None:
        """The client's step is made; what has to wait for the others waits here."""

    def leave(self, client: str) -> None:
        """The client makes no more steps among these (or is lost)."""


class Mixing(Protocol):
    """Family ``mixing``: joins at the trunk what several clients do at once. Subclass it.

    The clients' trunks become one slot, which is updated as the mixing says.
    """

    needs_step_tokens: ClassVar[bool] = False  # clients tell the label tokens of a step before the trunk's backward

    between: ClassVar[str] = ""  # a party that stands between the clients and the server

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What of a run it cannot work with, a sentence each; asked before a model is read."""
        yield from ()

    def check(self, layouts: Mapping[str, Layout]) -> None:
        """Refuse by MethodError cuts that it cannot join."""

    @abstractmethod
    def gather(self, run: Run, clients: Sequence[str]) -> Joint:
        """For clients that are about to train at once."""

    def alone(self, run: Run, stop: Any) -> Any:
        """The stop as a client that evaluates shall meet it."""
        return stop


class Rate(Protocol):
    """Family ``optimizer``: what an update by several clients has of the learning rate (a run's ``rate``).

    Subclass it.
    """

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What of a run it cannot work with, a sentence each; asked before a model is read."""
        yield from ()

    @abstractmethod
    def factor(self, participants: int, updates: int) -> float:
        """What the rate of a slot is multiplied by in its update number ``updates`` (from 0), by so many clients."""

    def gather(self, run: Run, clients: Sequence[str]) -> Joint | None:
        """For clients that are about to train at once; None changes nothing in their steps."""
        return None


class Exchange(Protocol):
    """Family ``exchange``: when the wire is used within a step. Subclass it: what has a body here is the default."""

    frozen_head: ClassVar[bool] = False  # the client's head is never trained, and runs without dropout

    @property
    def caches(self) -> bool:
        """Whether clients name the samples of a batch, and send only their numbers from the second epoch on."""
        return False

    def problems(self, config: RunConfig) -> Iterator[str]:
        """What of a run it cannot work with, a sentence each; asked before a model is read."""
        yield from ()

    def state(self) -> State:
        """What it must remember between steps, for checkpoints."""
        return {}

    def restore(self, state: State) -> None:
        """Go on with what ``state`` gave."""

    @abstractmethod
    async def step(
        self, inner: Any, client: End, middle: Sequence[Hop], tail: Tail, *, step: int, micro: int, how: How
    ) -> StepResult:
        """Make one micro-batch by ``inner`` (``split_step``) or in its place."""


class Framework(Protocol):
    """Family ``framework``: who trains when, against which slot, and what is merged.

    Subclass it: what has a body here is the default.
    """

    local_steps: int  # optimizer steps of a client in a round
    participation: float  # the share of the selected clients that a round takes
    travels: ClassVar[bool] = False  # the clients' parts are handed on, rather than each client keeping its own
    pooled: ClassVar[bool] = False  # a slot makes one update for all clients of a step, not one for each
    joinable: ClassVar[bool] = False  # all train at once, each with a trunk of its own, which a mixing may make one
    needs_step_tokens: ClassVar[bool] = False  # clients tell the label tokens of a step before the trunk's backward
    personal: ClassVar[bool] = False  # clients end with parts of their own, so there are as many models

    def layouts(
        self, given: Mapping[str, Layout], num_blocks: int, speeds: Mapping[str, float] | None
    ) -> Mapping[str, Layout]:
        """The cut of each client; by default as the run's partition has it.

        Args:
            given: the partition's, by client.
            num_blocks: of the model.
            speeds: FLOP/s by client, where the run has profiles.

        Raises:
            MethodError: the model or the clients do not fit this framework.
        """
        return given

    def slots(self, clients: Sequence[str]) -> Mapping[str, str]:
        """The trunk slot of each client; by default one for all."""
        return dict.fromkeys(clients, SHARED)

    def route(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """The stops between the client's head and its tail, in order; by default one at the server.

        Raises:
            MethodError: the model or the clients do not fit this framework.
        """
        return [Stop(SERVER, self.slots(list(layouts))[client], layouts[client].middle)]

    def reach(self, client: str, layouts: Mapping[str, Layout]) -> Sequence[Stop]:
        """Every stop that the client may come to in the run; more than its route where that changes (``set_route``)."""
        return self.route(client, layouts)

    def eligible(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """Who may train in round ``number``: the others help, or wait for their turn."""
        return clients

    def trainers(self, clients: Sequence[str]) -> Sequence[str]:
        """Who trains at all in a run."""
        return clients

    def line(self, client: str, clients: Sequence[str]) -> Sequence[str]:
        """The clients among whom this client's part is handed on: their steps are those of one schedule."""
        return clients if self.travels else [client]

    @abstractmethod
    async def round(self, run: Run, number: int) -> None:
        """One round. On return nothing is in flight."""

    @abstractmethod
    def evaluators(self, run: Run) -> Sequence[str]:
        """The clients whose parts, with their trunks, are the model (or the models) at the end of a round."""
