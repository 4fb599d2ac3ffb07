"""Divide the rows by what a column says, such as the clinic or the topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cutlayer.contracts import Row
from cutlayer.errors import DataError
from cutlayer.methods.data._columns import in_order, values_of
from cutlayer.registry import method


@method("data")
@dataclass
class ByColumn:
    """Give all rows with the same value of a column to the same client.

    If every value is a client's name, each client gets the rows that bear its name. Otherwise the values, in order
    (numbers by size, texts by code point), are dealt to the clients one by one. Row numbers ascend; ``shuffle`` changes
    nothing here.
    """

    column: str  # the file's column whose values are divided

    def divide(self, rows: Sequence[Row], clients: Sequence[str], *, seed: int, shuffle: bool) -> dict[str, list[int]]:
        """The row numbers of each client.

        Raises:
            DataError: the column is missing or lacks values, or a client would be left without rows.
        """
        values = values_of(rows, self.column)
        distinct = in_order(values)
        if {str(value) for value in distinct} <= set(clients):
            owner = {value: str(value) for value in distinct}
        else:
            owner = {value: clients[number % len(clients)] for number, value in enumerate(distinct)}
        divided: dict[str, list[int]] = {client: [] for client in clients}
        for number, value in enumerate(values):
            divided[owner[value]].append(number)
        if without := [client for client, numbers in divided.items() if not numbers]:
            listed = ", ".join(str(value) for value in distinct[:10]) + (", ..." if len(distinct) > 10 else "")
            raise DataError(
                f"Dividing by the column '{self.column}' leaves {', '.join(without)} without rows: it has "
                f"{len(distinct)} value{'s' if len(distinct) > 1 else ''} ({listed}) for {len(clients)} clients. "
                "Take fewer clients, or another column."
            )
        return divided
