"""What a client tells and gives of its data to help others train: counts by category, and rows of a category.

A category is an example's class or, where there are none, its length: the number of binary digits of its tokens (8 to
15 tokens are category 4). Lengths stand in for the topics or domains of free text, which only its owner could tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cutlayer.contracts import Example
from cutlayer.data.batches import Batches
from cutlayer.seeds import derive
from cutlayer.wire import Header

PREFIX = "category/"  # of the values in a header that are counts


def category(example: Example) -> str:
    """The category of an example, as counts name it."""
    return PREFIX + str(len(example.input_ids).bit_length() if example.label is None else example.label)


def histogram(examples: Sequence[Example]) -> dict[str, int]:
    """How many examples there are of each category, by name."""
    return dict(sorted(Counter(map(category, examples)).items()))


def wanted(header: Header) -> dict[str, int]:
    """How many rows of each category a request asks for."""
    return {name: int(count) for name, count in header.values.items() if name.startswith(PREFIX)}


def chosen(batches: Batches, asked: Mapping[str, int], number: int) -> tuple[list[Example], dict[str, int]]:
    """Examples of the categories asked for, drawn for request ``number``, and how many there are of each."""
    rows, given = [], {}
    for name, count in asked.items():
        have = [example for example in batches.examples if category(example) == name]
        draw = np.random.default_rng(derive(batches.seed, "features", batches.client, number, name))
        taken = draw.permutation(len(have))[:count]
        if len(taken):
            rows += [have[i] for i in taken]
            given[name] = len(taken)
    return rows, given
