"""The values that pass between the parts, and the Protocols that methods and parties fulfil.

A method sees what its Protocol hands it and nothing else. Shapes: B rows, T positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from cutlayer.wire import Header

if TYPE_CHECKING:
    from cutlayer.driver import Run

IGNORE = -100  # label of a position that does not count, as in Transformers

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

    ``update``: the last micro-batch ends in an optimizer step. ``graph``: gradients are wanted (False: evaluation).
    ``head_weight`` and ``trunk_weight`` scale what this step adds to the client's and to the server's gradient.
    """

    update: bool = True
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
        ...

    async def head_backward(self, parcel: Parcel, how: How) -> StepResult:
        """Steps 9 and 10."""
        ...


class Hop(Protocol):
    """A stop between head and tail: a slot at a party, or a wrapper of one."""

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """Steps 4 and 5."""
        ...

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """Steps 8 and 9."""
        ...

    async def leave(self, client: str) -> None:
        """The client needs this hop no more in this step (or is lost)."""
        ...


class Tail(Protocol):
    """Who holds the last blocks, the labels and the loss: the client (U-shape) or the server (two-part)."""

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Step 6 (two-part: step 4, forward, loss and backward in one) and 7."""
        ...

    async def leave(self, client: str) -> None:
        """The client needs this tail no more in this step (or is lost)."""
        ...


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


class Partition(Protocol):
    """Family ``partition``: into how many parts, and where labels and loss sit."""

    def layout(self, num_blocks: int) -> Layout:
        """The blocks of each part; raises MethodError where the cut does not fit the model."""
        ...


class Division(Protocol):
    """Family ``data``: how rows are divided over clients."""

    def divide(self, rows: Sequence[Row], clients: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, list[int]]:
        """The row numbers of each client; each row goes to at most one client."""
        ...


class Aggregator(Protocol):
    """Family ``aggregator``: merges the clients' states at step 11."""

    def merge(self, before: State, states: Mapping[str, State], weights: Mapping[str, float]) -> Mapping[str, State]:
        """The new state of each receiver; a framework may need one that is common to all, and then refuses others.

        Args:
            before: the merged state of the last round (empty in the first).
            states: name -> tensor, by client.
            weights: by client, summing to 1.
        """
        ...


class Selection(Protocol):
    """Family ``selection``: which clients take part in a round."""

    def pick(self, number: int, clients: Sequence[str]) -> Sequence[str]:
        """The clients of round ``number``."""
        ...


class Scheduler(Protocol):
    """Family ``scheduler``: order and memory of the server's work."""

    def wrap(self, stop: Any, client: str) -> Any:
        """A stop of the server (``Hop`` or ``Tail``), as this client's step shall meet it."""
        ...


class Exchange(Protocol):
    """Family ``exchange``: when the wire is used within a step."""

    async def step(
        self, inner: Any, client: End, middle: Sequence[Hop], tail: Tail, *, step: int, micro: int, how: How
    ) -> StepResult:
        """Make one micro-batch by ``inner`` (``split_step``) or in its place."""
        ...


class Framework(Protocol):
    """Family ``framework``: who trains when, against which slot, and what is merged."""

    local_steps: int
    travels: bool  # the clients' parts are handed on, rather than each client keeping its own

    async def round(self, run: Run, number: int) -> None:
        """One round. On return nothing is in flight."""
        ...

    def evaluators(self, run: Run) -> Sequence[str]:
        """The clients whose parts, with the trunk, are the model at the end of a round."""
        ...
