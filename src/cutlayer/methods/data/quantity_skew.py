"""Give the clients unequally many rows of the same distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cutlayer.contracts import Row
from cutlayer.errors import DataError
from cutlayer.methods.data._shares import apportion, check_alpha, check_enough, draw
from cutlayer.registry import method
from cutlayer.seeds import derive

DRAWS = 1000  # how often the shares are drawn before giving up


@method("data", paper="NIID-Bench (quantity skew), Li et al., arXiv:2102.02079")
@dataclass
class QuantitySkew:
    """Give the clients unequally many rows of the same distribution: shares drawn from Dirichlet(alpha), or given.

    As NIID-Bench does it: one draw over the clients, again while a client has fewer than ``min_examples`` (there 10).
    ``shares`` are taken as they are, in the order of the clients; only their proportions count. ``alpha: .inf`` gives
    equal shares. Every row goes to exactly one client.

    With ``shuffle`` the rows are in an order drawn from the seed; without it each client's lie evenly over the file, so
    that equal shares are dealt round-robin, as ``iid`` does. Row numbers ascend.
    """

    alpha: float = 0.5  # concentration: the smaller, the more unequal; .inf gives equal shares
    shares: list[float] | None = None  # in place of a draw: a share for each client, such as [5, 3, 2]
    min_examples: int = 1  # rows that each client must get

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.shares is not None and not all(math.isfinite(share) and share > 0 for share in self.shares):
            raise ValueError(f"shares is {self.shares}; each must be a finite number above 0.")
        if self.min_examples < 1:
            raise ValueError(f"min_examples is {self.min_examples}; it must be at least 1.")

    def divide(self, rows: Sequence[Row], clients: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, list[int]]:
        """The row numbers of each client.

        Raises:
            DataError: there are not as many shares as clients, or a client would get fewer than ``min_examples``.
        """
        check_enough(len(rows), len(clients), self.min_examples)
        generator = np.random.default_rng(derive("quantity-skew", seed))
        sizes = self._sizes(len(rows), len(clients), generator)
        order = generator.permutation(len(rows)) if shuffle else np.arange(len(rows))
        # the k-th of a client's n rows is due at (k + 1/2) / n of the way; at the same time the clients go in order
        due = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        owners = np.repeat(np.arange(len(clients)), sizes)[np.argsort(due, kind="stable")]
        return {client: np.sort(order[owners == number]).tolist() for number, client in enumerate(clients)}

    def _sizes(self, rows: int, clients: int, generator: np.random.Generator) -> np.ndarray:
        if self.shares is not None:
            if len(self.shares) != clients:
                raise DataError(
                    f"quantity-skew has {len(self.shares)} shares for {clients} clients that divide the rows. Give one "
                    "for each, or leave shares out to draw them."
                )
            sizes = apportion(rows, np.asarray(self.shares))
            if min(sizes) < self.min_examples:
                raise DataError(
                    f"By the shares {self.shares} of {rows} rows a client gets {min(sizes)}, and must have at least "
                    f"{self.min_examples}. Make the shares less unequal, add rows, or lower min_examples."
                )
            return sizes
        if math.isinf(self.alpha):
            return apportion(rows, np.ones(clients))
        for _ in range(DRAWS):
            sizes = apportion(rows, draw(generator, [self.alpha] * clients, size=1)[0])
            if min(sizes) >= self.min_examples:
                return sizes
        raise DataError(
            f"{rows} rows could not be divided over {clients} clients with at least {self.min_examples} each, in "
            f"{DRAWS} draws with alpha {self.alpha}. Raise alpha, lower min_examples, or take fewer clients."
        )
