"""Divide each class over the clients by proportions drawn from a Dirichlet distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cutlayer.contracts import Row
from cutlayer.errors import DataError
from cutlayer.methods.data._columns import in_order, values_of
from cutlayer.methods.data._shares import check_enough, cut, draw
from cutlayer.registry import method
from cutlayer.seeds import derive

DRAWS = 1000  # how often the proportions are drawn before giving up


@method("data", paper="Yurochkin et al., arXiv:1905.12022; Hsu et al., arXiv:1909.06335")
@dataclass
class LabelDirichlet:
    """Divide each class over the clients by proportions drawn from Dirichlet(alpha): the smaller, the more unequal.

    As Yurochkin et al. do it: one draw over the clients for each class, all draws again while a client has fewer than
    ``min_examples``. Hsu et al. draw, for each client, a distribution over the classes, and give all clients equally
    many rows; here their sizes differ too. Every row goes to exactly one client.

    Without ``shuffle`` a class is cut in file order, with it in an order drawn from the seed. Row numbers ascend.
    """

    alpha: float = 0.5  # concentration; 100 is nearly iid, 0.1 gives most of a class to one client
    min_examples: int = 1  # rows that each client must get
    column: str = "label"  # the column of the classes

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha is {self.alpha}; it must be a finite number above 0.")
        if self.min_examples < 1:
            raise ValueError(f"min_examples is {self.min_examples}; it must be at least 1.")

    def divide(self, rows: Sequence[Row], clients: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, list[int]]:
        """The row numbers of each client.

        Raises:
            DataError: the column is missing or lacks values, or no draw gave each client ``min_examples``.
        """
        check_enough(len(rows), len(clients), self.min_examples)
        values = values_of(rows, self.column)
        numbers = np.arange(len(rows))
        generator = np.random.default_rng(derive("label-dirichlet", seed))
        if shuffle:
            numbers = generator.permutation(numbers)
        by_class: dict[int | str, list[int]] = {value: [] for value in in_order(values)}
        for number in numbers.tolist():
            by_class[values[number]].append(number)
        classes = list(by_class.values())
        for _ in range(DRAWS):
            shares = draw(generator, [self.alpha] * len(clients), size=len(classes))
            divided: list[list[int]] = [[] for _ in clients]
            for members, share in zip(classes, shares, strict=True):
                for mine, part in zip(divided, cut(members, share), strict=True):
                    mine.extend(part)
            if min(map(len, divided)) >= self.min_examples:
                return {client: sorted(mine) for client, mine in zip(clients, divided, strict=True)}
        raise DataError(
            f"{len(rows)} rows in {len(classes)} classes could not be divided over {len(clients)} clients with at "
            f"least {self.min_examples} each, in {DRAWS} draws with alpha {self.alpha}. Raise alpha, lower "
            "min_examples, or take fewer clients."
        )
