"""Deal the rows like cards, so that every client's data has the same distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cutlayer.contracts import Row
from cutlayer.errors import DataError
from cutlayer.registry import method
from cutlayer.seeds import derive


@method("data", paper="McMahan et al., arXiv:1602.05629")
@dataclass
class Iid:
    """Deal the rows to the clients one by one, so that every client's data has the same distribution.

    Without ``shuffle`` row i goes to client i mod N; with it the rows are put in an order drawn from the seed first.
    """

    def divide(self, rows: Sequence[Row], clients: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, list[int]]:
        """The row numbers of each client, in the order they were dealt.

        Raises:
            DataError: fewer rows than clients.
        """
        if len(rows) < len(clients):
            raise DataError(f"{len(rows)} rows are too few for {len(clients)} clients. Add rows or take fewer clients.")
        order = np.arange(len(rows))
        if shuffle:
            order = np.random.default_rng(derive("iid", seed)).permutation(len(rows))
        return {client: order[number :: len(clients)].tolist() for number, client in enumerate(clients)}
