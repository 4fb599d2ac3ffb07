"""Cut once: the client keeps the embedding and the first blocks, the server the rest, the labels and the loss.

The client sends hidden states and labels, the server the gradient of the hidden states. The cheapest split in traffic
and the least private one: for a language model the labels are the text. With tied embeddings and full fine-tuning the
two ends hold copies of one matrix, which drift apart; the result is then saved untied.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.contracts import Layout
from cutlayer.errors import MethodError
from cutlayer.registry import method


@method("partition", paper="Gupta and Raskar, arXiv:1810.06060; Vepakomma et al., arXiv:1812.00564")
@dataclass(frozen=True)
class TwoPartSplit:
    """The client keeps the first blocks, the server all the rest with the loss; labels are sent."""

    head_blocks: int = 2  # 0 keeps the embedding only

    def __post_init__(self) -> None:
        if self.head_blocks < 0:
            raise ValueError(f"head_blocks is {self.head_blocks}; it must be 0 or more")

    def layout(self, num_blocks: int) -> Layout:
        """The blocks of each part of a model with ``num_blocks`` blocks."""
        if self.head_blocks > num_blocks:
            raise MethodError(
                f"partition 'two-part-split': head_blocks is {self.head_blocks}, but the model has {num_blocks} "
                f"blocks. Choose 0 to {num_blocks}."
            )
        cut = self.head_blocks
        return Layout(range(cut), range(cut, cut), range(cut, num_blocks), tail_at_client=False)
