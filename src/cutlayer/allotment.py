"""A ``peft`` that gives each matrix of each holder a rank of its own, and gives it anew between rounds.

Holders are the clients (with the part of the model that is theirs) and the server's trunks. ``allotting.py`` asks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from cutlayer.contracts import Peft
from cutlayer.models.importance import Frozen


@dataclass(frozen=True)
class Matrix:
    """An adapted matrix, as a holder has it.

    ``name``: of its factor A. ``cost``: the trained parameters of one rank, inputs + outputs. ``importance``: against
    the mean of the matrices of its kind (the same place in other blocks), which is 1.
    """

    name: str
    cost: int
    importance: float


@runtime_checkable
class Allotter(Peft, Protocol):
    """A ``Peft`` with ranks by importance. Subclass it; it needs an aggregator that merges unequal ranks."""

    warm_up: int  # optimizer steps of a holder before its ranks are decided by importance
    refresh: int  # rounds from one decision to the next; 0: there is one
    decay: float  # of the running mean of the importance

    @property
    @abstractmethod
    def rank(self) -> int:
        """The highest rank, at which ``prepare`` injects the adapters."""

    @property
    def limited(self) -> Collection[str]:
        """The clients that its options name."""
        return ()

    @abstractmethod
    def limit(self, client: str | None, *, trunks: int) -> int | None:
        """The most trained parameters of a client's adapters, or (None) of one of so many trunks; None: any number."""

    @abstractmethod
    def score(self, gradient: Tensor, down: Tensor, frozen: Frozen) -> Tensor:
        """A step's importance of a matrix, a number, from dL/dB [d_out, r] and A [r, d_in]."""

    @abstractmethod
    def allot(self, matrices: Sequence[Matrix], budget: int | None, *, holder: str) -> Mapping[str, int]:
        """The rank of each matrix of a holder, by name; 0: it gets no adapter.

        Raises:
            MethodError: the budget is below the smallest adapter.
        """
