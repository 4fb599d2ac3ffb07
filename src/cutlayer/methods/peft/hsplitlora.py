"""LoRA whose ranks follow how much each matrix matters, within each client's budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.allotment import Allotter, Matrix
from cutlayer.errors import MethodError
from cutlayer.methods.peft._lora import inject_lora, refuse_options
from cutlayer.methods.peft._targets import named, target_problems, whole_path
from cutlayer.models.families import Anatomy
from cutlayer.models.importance import Frozen
from cutlayer.models.segment import Base
from cutlayer.registry import method


@method("peft", paper="Lin et al., HSplitLoRA, arXiv:2505.02795")
@dataclass(frozen=True)
class HSplitLora(Allotter):
    """LoRA with a rank of its own for each matrix of each client and trunk, by its importance and the holder's budget.

    From the paper (of which only the abstract was at hand): important matrices are found in training and get the
    adapters, with ranks by each client's budget; adapters of unequal ranks are merged by concatenation, without the
    noise of averaged factors. That merge is aggregator ``lora-products``; the cut by a client's capability is a planner
    (``capability-cut``).

    Ours: the importance of a matrix W with gradient G is |G| |W| / (entries of W), a bound of the mean |W * G|. |G| is
    estimated from LoRA's own gradient, |dL/dB| / (scaling |A| / sqrt(inputs)), which is right in the mean for a random
    A, as at the start, and leans to the directions that A has learnt later. It is so at the server too, which could
    have G itself. It is averaged over the holder's optimizer steps, and taken against the mean of the same matrix in
    other blocks and at other holders, for which each client tells the server one number a matrix. Ranks are given one
    after the other, to the matrix with the most importance for the parameters of its next rank, until no more fits;
    rank 0 is no adapter. Until a holder has made ``warm_up`` steps all its matrices count alike. A matrix at rank 0 has
    no gradient, so it keeps the importance that it had. All ranks have the scaling alpha / (the highest of ``ranks``),
    as products are merged. Where ranks change, adapters follow by SVD (down) or by padding (up), and their optimizer
    state begins anew.

    A budget counts the trained parameters of the adapters. In float32 with AdamW that is 16 bytes of memory each (with
    gradient and optimizer state), 4 bytes in each upload, and 6 FLOP a token.
    """

    ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])  # the ranks that a matrix may have, beside 0
    budget: int | None = None  # the most trained parameters of a client's adapters; null: any number
    budgets: dict[str, int] = field(default_factory=dict)  # of clients that have a budget of their own
    server_budget: int | None = None  # of all the server's trunks together, in equal parts; null: any number
    warm_up: int = 20  # optimizer steps of a client (or trunk) before its ranks are decided by importance
    refresh: int = 10  # rounds from one decision to the next; 0: one decision, after the warm-up
    decay: float = 0.9  # of the running mean of the importance, by optimizer step
    alpha: float = 16  # the update is scaled by alpha / (the highest of ranks), at every rank
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"  # PEFT's target_modules: a list of names, or a pattern of whole paths

    def __post_init__(self) -> None:
        if not self.ranks or self.ranks != sorted(set(self.ranks)) or self.ranks[0] < 1:
            raise ValueError(f"ranks is {self.ranks}; it must be a rising list of ranks from 1 on")
        refuse_options(max(self.ranks), self.alpha, self.dropout, self.targets, {})
        for name, budget in {"budget": self.budget, "server_budget": self.server_budget, **self.budgets}.items():
            if budget is not None and budget < 1:
                raise ValueError(f"the budget of parameters {name} is {budget}; it must be 1 or more")
        if self.warm_up < 1 or self.refresh < 0:
            raise ValueError(f"warm_up is {self.warm_up} and refresh {self.refresh}; they must be at least 1 and 0")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; it must be at least 0 and below 1")

    @property
    def rank(self) -> int:
        """The highest of ``ranks``."""
        return max(self.ranks)

    @property
    def limited(self) -> Collection[str]:
        """The clients with a budget of their own."""
        return self.budgets

    def check(self, model: Any, anatomy: Anatomy, *, task: str) -> None:
        """Refuse a target that no layer is or that is an embedding, and a rank that no layer can have."""
        problems = list(target_problems(model, self.targets, self.rank, {}, task=task))
        means = [whole_path(self.targets)] if isinstance(self.targets, str) else [named(t) for t in self.targets]
        problems += [
            f"targets means '{name}', an embedding, whose adapter begins with A = 0 and so tells nothing of its "
            "importance. Name linear layers."
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and any(mean(name) for mean in means)
        ]
        if problems:
            raise MethodError(f"peft 'hsplitlora': {' '.join(problems)}")

    def prepare(self, model: Any, anatomy: Anatomy, *, task: str, seed: int) -> Base:
        """Inject the adapters at the highest rank; each holder's slot then gets its own."""
        return inject_lora(
            model, anatomy, task=task, seed=seed, rank=self.rank, alpha=self.alpha, dropout=self.dropout,
            targets=self.targets, rank_pattern={},
        )  # fmt: skip

    def limit(self, client: str | None, *, trunks: int) -> int | None:
        """A client's own, or a trunk's share of the server's."""
        if client is None:
            return None if self.server_budget is None else self.server_budget // trunks
        return self.budgets.get(client, self.budget)

    def score(self, gradient: Tensor, down: Tensor, frozen: Frozen) -> Tensor:
        """|dL/dB| / (scaling |A| / sqrt(d_in)) * |W| / entries, in Frobenius norms."""
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        reach = frozen.scaling * torch.linalg.vector_norm(down, dtype=torch.float64) / math.sqrt(down.shape[1])
        found: Tensor = norm / reach * (frozen.norm / frozen.entries)
        return found

    def allot(self, matrices: Sequence[Matrix], budget: int | None, *, holder: str) -> Mapping[str, int]:
        """Greedily: the next rank goes to the matrix with the most importance for what it costs, if that still fits."""
        given = {matrix.name: 0 for matrix in matrices}
        steps = list(zip([0, *self.ranks], self.ranks, strict=False))
        left = math.inf if budget is None else budget
        # Ties go to the earlier matrix, so that the same numbers give the same ranks.
        waiting = [(-one.importance / (steps[0][1] * one.cost), number, 0) for number, one in enumerate(matrices)]
        heapq.heapify(waiting)
        while waiting:
            _, number, at = heapq.heappop(waiting)
            one, (low, high) = matrices[number], steps[at]
            price = (high - low) * one.cost
            if price > left:
                continue  # nor do its higher ranks
            left -= price
            given[one.name] = high
            if at + 1 < len(steps):
                low, high = steps[at + 1]
                heapq.heappush(waiting, (-one.importance / ((high - low) * one.cost), number, at + 1))
        if matrices and not any(given.values()):
            least = min(steps[0][1] * one.cost for one in matrices)
            raise MethodError(
                f"peft 'hsplitlora': the budget of '{holder}' is {budget} trained parameters, but its smallest adapter "
                f"has {least}. Raise budget, budgets or server_budget."
            )
        return given
