"""The values that pass between the parts, and the Protocols that methods and parties fulfil.

A method sees what its Protocol hands it and nothing else. Shapes: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from cutlayer.wire import Header

if TYPE_CHECKING:
    from cutlayer.driver import Run
    from cutlayer.models.families import Anatomy
    from cutlayer.models.segment import Base

IGNORE = -100  # label of a position that does not count, as in Transformers
SERVER = "server"  # the party that everybody reaches
SHARED = "shared"  # the slot of a trunk that serves all clients

Row = Mapping[str, Any]  # one row of a data set: column -> value


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    ``labels`` is aligned with ``input_ids`` (``IGNORE`` where a position does not count; the shift by one happens
    inside the model's loss and nowhere else). A classification example has ``label`` and no ``labels``.
    ``position_ids`` is set on packed rows only: it restarts at 0 at each packed example.
    """

    input_ids: Sequence[int]
    labels: Sequence[int] | None = None
    label: int | None = None
    position_ids: Sequence[int] | None = None

    @property
    def label_tokens(self) -> int:
        """How many positions the loss averages over (a classification example counts one)."""
        if self.labels is None:
            return 1
        return sum(1 for label in self.labels[1:] if label != IGNORE)


@dataclass(frozen=True)
class Batch:
    """A collated batch.

    ``input_ids`` [B,T] int64; ``attention_mask`` [B,T] int64, or None where no position is padding; ``position_ids``
    [B,T] int64, set for left-padded and packed batches of causal models; ``labels`` [B,T] or, for classification, [B],
    int64. ``tokens`` counts real tokens, ``label_tokens`` the positions that the loss averages over.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor
    tokens: int
    label_tokens: int


State = Mapping[str, Tensor]  # a slot's tensors by name


class Parcel:
    """A header and its tensors on their way between two stops; opaque to the driver.

    ``make`` may be given instead of the two: it is called when the content is first looked at. The local link hands out
    such parcels, so that of clients that wait for their turn none holds an open graph before its turn comes.
    """

    def __init__(
        self,
        header: Header | None = None,
        tensors: Sequence[Tensor] = (),
        *,
        make: Callable[[], tuple[Header, Sequence[Tensor]]] | None = None,
    ) -> None:
        assert (header is None) != (make is None)
        self._content = (header, tensors) if header is not None else None
        self._make = make

    def open(self) -> tuple[Header, Sequence[Tensor]]:
        """The header and the tensors."""
        if self._content is None:
            assert self._make is not None
            self._content = self._make()
            self._make = None
        return self._content

    @property
    def header(self) -> Header:
        """The header."""
        return self.open()[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        header, tensors = self.open()
        return dict(zip(header.names, tensors, strict=True))


@dataclass(frozen=True)
class How:
    """How a step is to be made.

    ``head_update`` and ``trunk_update``: the last micro-batch ends in an optimizer step of the client's part, of the
    slots on its route. ``graph``: gradients are wanted (False: evaluation). ``head_weight`` and ``trunk_weight`` scale
    what this step adds to the client's and to the server's gradient.
    """

    head_update: bool = True
    trunk_update: bool = True
    graph: bool = True
    head_weight: float = 1.0
    trunk_weight: float = 1.0


@dataclass(frozen=True)
class StepResult:
    """What one micro-batch (or a whole optimizer step, summed) gave.

    ``loss`` is the mean over the ``label_tokens`` of the whole optimizer step (a micro-batch: its share of that mean),
    ``last`` whether the micro-batch was the step's last.
    """

    client: str
    step: int
    loss: float
    tokens: int
    label_tokens: int
    last: bool


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


@dataclass(frozen=True)
class Layout:
    """Who holds which blocks. The embedding is always with the head, the norm and the LM head with the tail."""

    head: range
    trunk: range
    tail: range
    tail_at_client: bool

    @property
    def middle(self) -> range:
        """The blocks that are not the client's."""
        return self.trunk if self.tail_at_client else self.tail

    @property
    def at_client(self) -> tuple[range, ...]:
        """The runs of blocks that the client holds."""
        return (self.head, self.tail) if self.tail_at_client else (self.head,)


@dataclass(frozen=True)
class Stop:
    """A stretch of the route between a client's head and its tail: who runs which blocks, with which slot.

    In the two-part split the last stop has the norm, the head and the loss as well.
    """

    party: str
    slot: str
    blocks: range


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


class Rows(Sequence[Row]):
    """The rows that a division deals, and what it may ask beyond their columns.

    Args:
        rows: in file order.
        batch_size: rows of a micro-batch in this run.
        lengths: counts the tokens of all rows; called once, if ever.
    """

    def __init__(self, rows: Sequence[Row], *, batch_size: int, lengths: Callable[[], Sequence[int]]) -> None:
        self._rows = rows
        self.batch_size = batch_size
        self._count = lengths
        self._lengths: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    @property
    def lengths(self) -> Sequence[int]:
        """The tokens of each row by the run's tokenizer, before anything is cut off."""
        if self._lengths is None:
            self._lengths = self._count()
        return self._lengths


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


class Exchange(Protocol):
    """Family ``exchange``: when the wire is used within a step."""

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
