"""Packing by hand, and random packings taken apart again."""

import random
from itertools import pairwise

import pytest

from cutlayer.contracts import IGNORE, Example
from cutlayer.data.formats import pack
from cutlayer.errors import DataError


def example(*ids):
    return Example(input_ids=list(ids), labels=list(ids))


def test_packing_by_hand():
    rows = pack([example(4, 5, 1), example(6, 1), example(7, 8, 9, 1)], 5)
    assert rows == [
        Example([4, 5, 1, 6, 1], labels=[IGNORE, 5, 1, IGNORE, 1], position_ids=[0, 1, 2, 0, 1]),
        Example([7, 8, 9, 1], labels=[IGNORE, 8, 9, 1], position_ids=[0, 1, 2, 3]),
    ]
    assert pack([], 5) == []
    with pytest.raises(DataError, match="Example 2 has 6 tokens"):
        pack([example(1), example(*range(6))], 5)
    with pytest.raises(DataError, match="one label a row"):
        pack([Example([1, 2], label=0)], 5)


def test_packing_keeps_every_token_and_every_label_that_counts():
    chance = random.Random(1)
    for _ in range(50):
        examples = []
        for _ in range(chance.randint(1, 30)):
            ids = [chance.randint(1, 99) for _ in range(chance.randint(1, 12))]
            examples.append(Example(ids, labels=[token if chance.random() < 0.7 else IGNORE for token in ids]))
        rows = pack(examples, 12)
        assert [token for row in rows for token in row.input_ids] == [t for e in examples for t in e.input_ids]
        assert sum(row.label_tokens for row in rows) == sum(e.label_tokens for e in examples)
        whole = []  # cut at the positions again: no example crosses a row
        for row in rows:
            assert len(row.input_ids) <= 12
            starts = [place for place, position in enumerate(row.position_ids) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
                assert list(row.position_ids[start:end]) == list(range(end - start))
                whole.append((list(row.input_ids[start:end]), list(row.labels[start + 1 : end])))
        assert whole == [(list(e.input_ids), list(e.labels[1:])) for e in examples]
        # greedy: the first example of a row did not fit into the row before
        for before, row in pairwise(rows):
            first = [*row.position_ids, 0].index(0, 1)
            assert len(before.input_ids) + first > 12
