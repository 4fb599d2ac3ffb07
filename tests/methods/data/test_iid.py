"""Dealing rows like cards."""

from itertools import chain

import pytest

from cutlayer.errors import DataError
from cutlayer.registry import create

ROWS = [{"text": str(number)} for number in range(7)]


def test_without_shuffle_row_i_goes_to_client_i_mod_n():
    divided = create("data", "iid").divide(ROWS, ["a", "b", "c"], seed=0, shuffle=False)
    assert divided == {"a": [0, 3, 6], "b": [1, 4], "c": [2, 5]}


def test_with_shuffle_a_seeded_order_is_dealt():
    def deal(seed):
        return create("data", "iid").divide(ROWS * 10, ["a", "b", "c"], seed=seed, shuffle=True)

    first = deal(0)
    assert sorted(chain(*first.values())) == list(range(70))
    assert [len(numbers) for numbers in first.values()] == [24, 23, 23]
    assert first == deal(0)
    assert first != deal(1)
    assert all(type(number) is int for number in first["a"])


def test_every_client_gets_a_row():
    with pytest.raises(DataError, match="7 rows are too few for 8 clients"):
        create("data", "iid").divide(ROWS, list("abcdefgh"), seed=0, shuffle=False)
