"""The values that pass between the parts. Shapes: B rows, T positions, H hidden size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cutlayer.wire import Header

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
    ``last`` whether the micro-batch was the step's last, ``correct`` how many labels were hit (evaluation only).
    """

    client: str
    step: int
    loss: float
    tokens: int
    label_tokens: int
    last: bool
    correct: int = 0


@dataclass(frozen=True)
class Upload:
    """What an asynchronous merge is told of a client's copy, beside the copy itself.

    ``delay`` counts the versions of the model since the one that the client started from; ``weight`` is its share by
    size among all clients of the period (they sum to 1).
    """

    client: str
    delay: int
    weight: float


@dataclass(frozen=True)
class Window:
    """When an asynchronous merge is due: ``uploads`` are there, and ``seconds`` have passed since the last merge.

    It takes the first ``most`` of them (None: all that are there), and what is left makes the next.
    """

    uploads: int = 1
    seconds: float = 0.0
    most: int | None = None


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
