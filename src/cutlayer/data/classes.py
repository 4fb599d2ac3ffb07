"""Which number a class has: by the data alone, or by the classification head that a checkpoint already has."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutlayer.contracts import Row
from cutlayer.errors import DataError

if TYPE_CHECKING:
    from cutlayer.models.heads import Head

log = logging.getLogger("cutlayer")

MOST = 100_000  # classes; a larger number is an identifier or a value, and would make a head of that size


@dataclass(frozen=True)
class Classes:
    """``names`` of the classes in the order of their numbers, and the number of each label of the data (as text)."""

    names: Sequence[str]
    numbers: Mapping[str, int]


def label_names(rows: Sequence[Row], column: str = "label") -> list[str]:
    """The names of the classes, in the order of their indices.

    Whole numbers are indices themselves: the names are "0" to the largest one, with those in between that no row has.
    Texts are sorted, by their code points.

    Raises:
        DataError: no row, a negative or a huge number, or numbers and texts mixed.
    """
    labels = {row[column] for row in rows}
    if not labels:
        raise DataError("There are no rows to take class labels from.")
    if all(isinstance(label, str) for label in labels):
        return sorted(labels)
    if any(isinstance(label, str) for label in labels):
        raise DataError(f"The column '{column}' mixes numbers and texts, such as {_one_of_each(labels)}. Use one kind.")
    if min(labels) < 0 or max(labels) >= MOST:
        wrong = min(labels) if min(labels) < 0 else max(labels)
        raise DataError(
            f"The column '{column}' holds {wrong}. Labels count from 0 (-1 often means: not labelled) to {MOST - 1}."
        )
    if absent := sorted(set(range(max(labels))) - labels):
        log.warning("No row has the label %s of the %d labels 0 to %d.", absent[0], max(labels) + 1, max(labels))
    return [str(number) for number in range(max(labels) + 1)]


def _one_of_each(labels: set[Any]) -> str:
    texts = sorted(repr(label) for label in labels if isinstance(label, str))
    numbers = sorted(repr(label) for label in labels if not isinstance(label, str))
    return f"{numbers[0]} and {texts[0]}"


def classes_of(
    rows: Sequence[Row], head: Head | None, *, model: str, named: Sequence[str] | None = None
) -> Classes:  # fmt: skip
    """The classes of a run.

    Without a head they are those of the data. A head is kept: whole numbers in the data are its numbers, names are
    looked up among its own, and where it has none the data's sorted names are given to its numbers from 0.

    Args:
        rows: all rows of the run, to train and to evaluate on.
        head: the checkpoint's head, if it has one.
        model: the checkpoint, for messages.
        named: the run's own classes (``data.classes``), in place of those that the rows happen to have.

    Raises:
        DataError: there is one class only, the head has too few or other ones, or a row has none of those named.
    """
    if named is not None:
        return _named(rows, head, named, model)
    ours = label_names(rows)
    numbers = {name: number for number, name in enumerate(ours)}
    if head is None:
        if len(ours) < 2:
            raise DataError(f"All rows have the label {ours[0]!r}: there is nothing to tell apart. Add another class.")
        return Classes(ours, numbers)
    if len(ours) > len(head.names):
        raise DataError(
            f"The data has {len(ours)} classes ({_some(ours)}), but the classification head of '{model}' has "
            f"{len(head.names)} ({_some(head.names)}). Take the others out of the data, or use a checkpoint without a "
            "classification head: it gets a new one for the data's classes."
        )
    if not isinstance(rows[0]["label"], str):
        return Classes(list(head.names), numbers)
    others = [name for name in ours if name not in head.numbers]
    if not others:
        numbers = {name: head.numbers[name] for name in ours}
    elif not head.unnamed or len(others) < len(ours):
        raise DataError(
            f"The data's labels are {_some(ours)}, but the classification head of '{model}' was trained for "
            f"{_some(head.names)}, and nobody knows which of these {others[0]!r} is. Name the classes in the data as "
            "the head does (or give its numbers, from 0), or use a checkpoint without a classification head: it gets a "
            "new one."
        )
    else:
        taken = ", ".join(f"{name} is {number}" for name, number in list(numbers.items())[:10])
        log.warning(
            "The head of '%s' does not name its classes, so they are counted in sorted order: %s.", model, taken
        )
    names = list(head.names)
    for name, number in numbers.items():
        names[number] = name
    return Classes(names, numbers)


def _named(rows: Sequence[Row], head: Head | None, named: Sequence[str], model: str) -> Classes:
    """The classes that a run names, with the numbers of the head where it knows them; all rows must be of these."""
    numbers = {name: number for number, name in enumerate(named)}
    names = list(named)
    if head is not None:
        if head.unnamed and len(named) <= len(head.names):
            names += head.names[len(named) :]
        elif set(named) <= set(head.numbers):
            names, numbers = list(head.names), {name: head.numbers[name] for name in named}
            for name, number in numbers.items():
                names[number] = name
        else:
            raise DataError(
                f"data.classes are {_some(named)}, but the classification head of '{model}' was trained for "
                f"{_some(head.names)}. Name them as the head does, or use a checkpoint without a classification head."
            )
    whole = bool(rows) and not isinstance(rows[0]["label"], str)
    ours = label_names(rows) if rows else []
    if whole and list(numbers.values()) != list(range(len(named))):
        raise DataError(
            f"The labels are whole numbers, but data.classes has the classes in another order than the head of "
            f"'{model}': {_some(head.names if head else names)}. Name them in its order."
        )
    known = {str(number): number for number in range(len(named))} if whole else numbers
    if others := [label for label in ours if label not in known]:
        raise DataError(
            f"A row has the label {others[0]!r}, which is none of the run's classes: {_some(list(known))} "
            "(data.classes). Correct the label, or take the row out."
        )
    return Classes(names, known)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
