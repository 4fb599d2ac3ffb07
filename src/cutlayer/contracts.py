"""The Protocols that methods and parties fulfil, with the values that pass between them (``values.py``).

A method sees what its Protocol hands it and nothing else. Shapes: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from cutlayer.defense import Defense
from cutlayer.framework import Framework
from cutlayer.threat import Threat
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
    Upload,
    Window,
)

if TYPE_CHECKING:
    from cutlayer.audit.scores import Guesses
    from cutlayer.audit.view import View
    from cutlayer.config import RunConfig
    from cutlayer.driver import Run
    from cutlayer.models.families import Anatomy
    from cutlayer.models.segment import Base
    from cutlayer.planning import Situation

__all__ = [
    "IGNORE",
    "SERVER",
    "SHARED",
    "Aggregator",
    "Attack",
    "Batch",
    "Defense",
    "Division",
    "End",
    "Example",
    "Exchange",
    "Framework",
    "Hop",
    "How",
    "Joint",
    "Layout",
    "Mixing",
    "Parcel",
    "Partition",
    "Peft",
    "Planner",
    "Rate",
    "Row",
    "Rows",
    "Scheduler",
    "Selection",
    "Slot",
    "State",
    "StepResult",
    "Stop",
    "Tail",
    "Upload",
    "Window",
]


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

    def rank_at(self, block: int | str, layout: Layout) -> int | None:
        """The adapters' rank in a block (or ``bottom``, ``top``) of a client with this layout; None: as injected."""
        return None


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
    asynchronous: ClassVar[bool] = False  # clients do not wait for each other: copies are merged by window and weigh
    reconciles: ClassVar[bool] = False  # merges copies of unequal ranks, and gives each receiver its own

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

    def window(self, expected: Mapping[str, float | None]) -> Window:
        """Asynchronous: when the next merge is due.

        Args:
            expected: by client that trains, seconds until its upload, judged by its last one; None: it had none.
        """
        return Window()

    def weigh(self, uploads: Sequence[Upload]) -> Sequence[float]:
        """Asynchronous: the part of each upload in the new model; the rest of 1 is the current model's.

        ``merge`` then gets the copies whose part is above 0, and the current model as that of ``server``.
        """
        return [upload.weight for upload in uploads]

    def state(self) -> Mapping[str, float]:
        """What it must remember beyond a merge, for checkpoints."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with what ``state`` gave."""


class Planner(Protocol):
    """Family ``planner``: the cut of each client, before the run and again between its rounds.

    Subclass it: what has a body here is the default.
    """

    every: int  # rounds between two plans; 0: the first one holds

    @property
    def validation(self) -> float:
        """The share of each client's examples that it keeps from training and reports its accuracy on; 0: none."""
        return 0.0

    @abstractmethod
    def bounds(self, now: Situation) -> Mapping[str, range]:
        """The head blocks that each client may come to hold in this run.

        Raises:
            MethodError: a client can hold none.
        """

    @abstractmethod
    def start(self, now: Situation) -> Mapping[str, int]:
        """The head blocks of each client at the start."""

    def plan(self, now: Situation) -> Mapping[str, int]:
        """The head blocks of each client from now on."""
        return {client: len(layout.head) for client, layout in now.layouts.items()}

    def state(self) -> Mapping[str, float]:
        """What it must remember from plan to plan, for checkpoints."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on with what ``state`` gave."""


class Selection(Protocol):
    """Family ``selection``: which clients take part in a round; an ``Arranger`` (arrangement.py) says with whom."""

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
    def probes(self) -> int:
        """Directions in which both sides look around in place of backpropagation (``zeroth.py``); 0: they do not."""
        return 0

    @property
    def merged_share(self) -> float:
        """How much of the change that the clients' copies have made on average a merge takes."""
        return 1.0

    def begin(self, run: Run) -> None:
        """A round begins."""

    @property
    def caches(self) -> bool:
        """Whether clients name the samples of a batch, and send only their numbers from the second epoch on."""
        return False

    def remembers(self, client: str, sample: int) -> bool:
        """Whether it has what a client showed of a sample, where ``caches``."""
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


class Attack(Protocol):
    """Family ``attack``: plays an adversary, who has a View and nothing else.

    ``threat`` says who it is, what it reads and what it knows; a passive one changes no number of the run.
    """

    threat: ClassVar[Threat]

    def prepare(self, view: View) -> None:
        """Before anything private is read: train inverters, load tables. ``view`` has no exchanges yet."""

    def finish(self, view: View) -> Guesses:
        """What it makes of what it read."""
