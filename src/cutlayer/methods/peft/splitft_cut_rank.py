"""LoRA whose rank is lower in the two blocks that touch a cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cutlayer.contracts import Layout, Peft
from cutlayer.errors import MethodError
from cutlayer.methods.peft._lora import inject_lora, refuse_options
from cutlayer.methods.peft._targets import target_problems
from cutlayer.models.families import Anatomy
from cutlayer.models.segment import Base
from cutlayer.registry import method


@method("peft", paper="SplitFT, arXiv:2604.26388")
@dataclass(frozen=True)
class SplitFTCutRank(Peft):
    """LoRA of rank ``rank``, but ``cut_rank`` in the client's last block before a cut and the server's first after it.

    From the paper, as secondary summaries tell it: 8 at the cut and 16 elsewhere, on both sides, which it found better
    than on the client's side alone (``sides: client``). It makes the adapter traffic of step 11 smaller; activations
    keep their size, so the total falls by 0.4 percent at the paper's cut. Ours: the scaling alpha/rank is the same in
    all blocks, so a lower rank does not change an update's strength; the U-shape has two cuts, so up to four such
    blocks; a trunk that serves clients with different cuts has the low rank only in blocks that touch the cut of all
    whom they serve there; where a cut moves, ranks follow by SVD (down) or by padding (up), and the optimizer state of
    these blocks begins anew.

    Clients with different cuts hold one block at different ranks: merge them with aggregator ``lora-products``.
    """

    rank: int = 16
    cut_rank: int = 8
    alpha: float = 16  # of `rank`; the update is scaled by alpha / rank in all blocks
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"  # PEFT's target_modules: a list of names, or a pattern of whole paths
    sides: Literal["both", "client"] = "both"  # client: the server's block keeps `rank` (the paper's ablation)

    def __post_init__(self) -> None:
        if not 1 <= self.cut_rank <= self.rank:
            raise ValueError(f"cut_rank is {self.cut_rank}; it must be from 1 to rank ({self.rank})")
        refuse_options(self.rank, self.alpha, self.dropout, self.targets, {})

    def check(self, model: Any, anatomy: Anatomy, *, task: str) -> None:
        """Refuse a target that no layer is, and a rank that no layer can have."""
        if problems := list(target_problems(model, self.targets, self.rank, {}, task=task)):
            raise MethodError(f"peft 'splitft-cut-rank': {' '.join(problems)}")

    def prepare(self, model: Any, anatomy: Anatomy, *, task: str, seed: int) -> Base:
        """Inject the adapters at the full rank; each party's slot then has the ranks of its own cut."""
        return inject_lora(
            model, anatomy, task=task, seed=seed, rank=self.rank, alpha=self.alpha, dropout=self.dropout,
            targets=self.targets, rank_pattern={},
        )  # fmt: skip

    def rank_at(self, block: int | str, layout: Layout) -> int | None:
        """``cut_rank`` in the blocks beside a cut of this layout."""
        last, first = layout.head.stop - 1, layout.middle.start
        low = {last} if len(layout.head) else set()
        server = {first} if len(layout.middle) else set()
        if layout.tail_at_client:
            low |= {layout.tail.start} if len(layout.tail) else set()
            server |= {layout.middle.stop - 1} if len(layout.middle) else set()
        return self.cut_rank if block in low | (server if self.sides == "both" else set()) else self.rank
