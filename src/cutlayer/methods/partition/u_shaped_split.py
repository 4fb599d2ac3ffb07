"""Cut twice: the client keeps both ends with the labels and the loss, the server the blocks between.

Twice the traffic of the two-part split. The labels stay, but splitting alone hides little: see the README.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.contracts import Layout
from cutlayer.errors import MethodError
from cutlayer.registry import method


@method("partition", paper="Vepakomma et al., arXiv:1812.00564")
@dataclass(frozen=True)
class UShapedSplit:
    """The client keeps the first and the last blocks, labels and loss; the server trains the middle."""

    head_blocks: int = 2  # 0 keeps the embedding only
    tail_blocks: int = 0  # 0 keeps the final norm and the LM head (or classifier) only

    def __post_init__(self) -> None:
        for name in ("head_blocks", "tail_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")

    def layout(self, num_blocks: int) -> Layout:
        """The blocks of each part of a model with ``num_blocks`` blocks."""
        start, stop = self.head_blocks, num_blocks - self.tail_blocks
        if start > num_blocks or stop < 0 or start > stop:
            raise MethodError(
                f"partition 'u-shaped-split': head_blocks {self.head_blocks} and tail_blocks {self.tail_blocks} "
                f"overlap: the model has {num_blocks} blocks. Their sum may be at most {num_blocks - 1}."
            )
        if start == stop:
            raise MethodError(
                f"partition 'u-shaped-split': head_blocks {self.head_blocks} and tail_blocks {self.tail_blocks} take "
                f"all {num_blocks} blocks and leave the server none. Their sum may be at most {num_blocks - 1}."
            )
        return Layout(range(start), range(start, stop), range(stop, num_blocks), tail_at_client=True)
