"""What the divisions by a column share."""

from __future__ import annotations

from collections.abc import Sequence

from cutlayer.contracts import Row
from cutlayer.errors import DataError, suggest


def values_of(rows: Sequence[Row], column: str) -> list[int | str]:
    """The value of each row: a whole number or text.

    Raises:
        DataError: no row has the column, or some row has no value or another kind of value there.
    """
    there = list(dict.fromkeys(key for row in rows for key in row))
    if column not in there:
        raise DataError(
            f"The data has no column '{column}' to divide by.{suggest(column, there)} "
            f"Columns there: {', '.join(there)}."
        )
    values = [row.get(column) for row in rows]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, int | str):
            raise DataError(
                f"Row {number} has {value!r} in the column '{column}', by which rows are divided. "
                "It takes whole numbers or text; give every row one, or divide by another column."
            )
    return [value for value in values if isinstance(value, int | str)]


def in_order(values: Sequence[int | str]) -> list[int | str]:
    """The distinct values: numbers by size, then texts by code point."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))
