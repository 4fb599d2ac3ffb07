"""Divide classes of text length over the clients by proportions drawn from a Dirichlet distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cutlayer.contracts import Rows
from cutlayer.errors import DataError
from cutlayer.methods.data._shares import apportion, check_alpha, check_enough, cut, draw, rationed
from cutlayer.registry import method
from cutlayer.seeds import derive

CLASSES = 10
REDRAWS = 100  # how often everything is drawn again before rows are moved


@method("data", paper="SplitFT, arXiv:2604.26388; equal sizes: Hsu et al., arXiv:1909.06335")
@dataclass
class SplitftLengthDirichlet:
    """Divide classes of text length over the clients by proportions drawn from Dirichlet(alpha).

    Free text has no class to skew, so its length takes the class's place: tokens by the run's tokenizer, before
    anything is cut off. The rows, sorted by length (ties by row number), are put into ``classes`` of equally many, or
    into those between ``edges``. Each class is cut by one draw over the clients. While a client has fewer than
    ``min_examples`` everything is drawn again, up to 100 times; then rows drawn from the largest client are moved one
    by one. Every row goes to exactly one client. ``alpha: .inf`` is an equal split without regard to length.

    ``equal_size``: each client gets equally many rows (``size``, or else an equal part of all, which may leave out a
    few). Each draws its own proportions of the classes from Dirichlet(alpha * the classes' parts of all)
    and takes its rows class by class. Where a class runs out it is rationed in proportion to the wishes, and those that
    got too little take from the others by their own proportions; with ``replacement`` the class begins again instead,
    so that a row may go to several clients, and to one more than once.

    Without ``shuffle`` a class is cut in file order (``.inf``: row i goes to client i mod N), with it in an order drawn
    from the seed. Row numbers ascend.

    The paper gives neither the number of classes nor their borders, and 12,000 samples to each client: 10 classes,
    equal counts and unequal sizes are ours. Blank rows are dropped where a file is read.
    """

    alpha: float = 0.1  # concentration: 0.1 gives a client mostly texts of few lengths, 10 is nearly iid, .inf is iid
    classes: int = CLASSES  # how many, with equally many rows in each
    edges: list[int] | None = None  # in place of classes: the lengths at which the second and further classes begin
    min_examples: int | None = None  # rows that each client must get; null: a batch
    equal_size: bool = False  # give every client equally many rows
    size: int | None = None  # with equal_size: how many; null: an equal part of all
    replacement: bool = False  # with equal_size: a class that runs out begins again

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.classes < 1:
            raise ValueError(f"classes is {self.classes}; it must be at least 1.")
        if self.edges is not None:
            if not self.edges or self.edges[0] < 1 or any(low >= high for low, high in pairwise(self.edges)):
                raise ValueError(f"edges is {self.edges}; it must be lengths above 0, each larger than the one before.")
            if self.classes not in (CLASSES, len(self.edges) + 1):
                made = len(self.edges) + 1
                raise ValueError(f"classes is {self.classes}, but the edges make {made}. Give one of both.")
        if self.min_examples is not None and self.min_examples < 1:
            raise ValueError(f"min_examples is {self.min_examples}; it must be at least 1, or null for a batch.")
        if not self.equal_size and (self.replacement or self.size is not None):
            raise ValueError("size and replacement go with equal_size: true. Set it, or leave them out.")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1.")

    def divide(self, rows: Rows, clients: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, list[int]]:
        """The row numbers of each client.

        Raises:
            DataError: there are too few rows for what is asked.
        """
        least = rows.batch_size if self.min_examples is None else self.min_examples
        generator = np.random.default_rng(derive("splitft-length-dirichlet", seed))
        size = self._size(len(rows), len(clients), least) if self.equal_size else None
        if size is None:
            check_enough(len(rows), len(clients), least)
        if math.isinf(self.alpha):
            order = generator.permutation(len(rows)) if shuffle else np.arange(len(rows))
            dealt = order if size is None else np.resize(order, size * len(clients))  # from the start again, if need be
            divided = [dealt[number :: len(clients)].tolist() for number in range(len(clients))]
        elif size is None:
            divided = self._unequal(self.classes_of(rows.lengths), len(clients), least, generator, shuffle)
        else:
            divided = self._equal(self.classes_of(rows.lengths), len(clients), size, generator, shuffle)
        return {client: sorted(mine) for client, mine in zip(clients, divided, strict=True)}

    def classes_of(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """The row numbers of each class that has any, short to long."""
        order = np.argsort(lengths, kind="stable")
        if self.edges is None:
            found = np.array_split(order, self.classes)
        else:
            found = np.split(order, np.searchsorted(np.asarray(lengths)[order], self.edges))
        return [np.sort(members) for members in found if len(members)]

    def _size(self, rows: int, clients: int, least: int) -> int:
        """The rows of each client, where all have equally many."""
        size = rows // clients if self.size is None else self.size
        if size < least:
            raise DataError(
                f"Each of {clients} clients would get {size} of {rows} rows, and must have at least {least}. "
                "Add rows, lower min_examples, or take fewer clients."
            )
        if size * clients > rows and not self.replacement:
            raise DataError(
                f"{clients} clients with {size} rows each need {size * clients} rows; there are {rows}. Lower size, or "
                "set replacement: true to give rows more than once."
            )
        return size

    def _unequal(
        self, classes: list[np.ndarray], clients: int, least: int, generator: np.random.Generator, shuffle: bool
    ) -> list[list[int]]:
        """Every class cut by a draw of its own."""
        for _ in range(1 + REDRAWS):
            divided: list[list[int]] = [[] for _ in range(clients)]
            for members in classes:
                [share] = draw(generator, [self.alpha] * clients, size=1)
                order = generator.permutation(members) if shuffle else members
                for mine, part in zip(divided, cut(order.tolist(), share), strict=True):
                    mine.extend(part)
            if min(map(len, divided)) >= least:
                return divided
        while short := [mine for mine in divided if len(mine) < least]:
            giver = max(divided, key=len)
            short[0].append(giver.pop(int(generator.integers(len(giver)))))
        return divided

    def _equal(
        self, classes: list[np.ndarray], clients: int, size: int, generator: np.random.Generator, shuffle: bool
    ) -> list[list[int]]:
        """``size`` rows for each client, in proportions of its own."""
        there = np.array([len(members) for members in classes])
        wishes = draw(generator, self.alpha * (there / there.sum()), size=clients)
        if self.replacement:
            taken = np.stack([apportion(size, wish) for wish in wishes])
        else:
            taken = rationed(wishes, there, size)
        divided: list[list[int]] = [[] for _ in range(clients)]
        for members, numbers in zip(classes, taken.T, strict=True):
            order = generator.permutation(members) if shuffle else members
            dealt = np.resize(order, int(numbers.sum())).tolist()  # with replacement: from the start again
            for mine, (start, end) in zip(divided, pairwise([0, *np.cumsum(numbers).tolist()]), strict=True):
                mine.extend(dealt[start:end])
        return divided
