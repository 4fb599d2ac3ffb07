"""What a driver knows of a client that is in a process of its own: its names and shapes, and none of its values."""

from __future__ import annotations

from cutlayer.models.segment import Segment
from cutlayer.models.slots import Slot
from cutlayer.parties.holder import Holder


class Shadow(Holder):
    """Stands for a client elsewhere.

    Its slot has the tensors' names and shapes as they are there; their values are those of the start, and nobody may
    take them for the client's. What the driver wants of these it asks for by verbs.

    Args:
        name: the client's name.
        head: its segment with the embedding.
        tail: its segment with the norm, the head and the loss; None in the two-part split.
        slot: of the same shapes as the client's.
        evaluations: how many evaluation batches it has.
        validations: how many batches it keeps from training.
    """

    def __init__(
        self, name: str, *, head: Segment, tail: Segment | None, slot: Slot, evaluations: int, validations: int = 0
    ) -> None:
        super().__init__(name, head=head, tail=tail, slot=slot, secret=b"")
        self.evaluation, self.validation = range(evaluations), range(validations)
