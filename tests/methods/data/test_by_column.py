"""Dividing by what a column says."""

import pytest

from cutlayer.errors import DataError, MethodError
from cutlayer.registry import create


def divide(values, clients, column="site", shuffle=False):
    rows = [{"text": "x", "site": value} for value in values]
    return create("data", "by-column", {"column": column}).divide(rows, clients, seed=0, shuffle=shuffle)


def test_values_that_are_client_names_go_to_those_clients():
    values = ["north", "south", "north", "south"]
    assert divide(values, ["south", "north"]) == {"south": [1, 3], "north": [0, 2]}
    assert divide([2, 1, 2], ["1", "2"]) == {"1": [1], "2": [0, 2]}  # numbers are read as names, too
    assert divide(values, ["south", "north"], shuffle=True) == divide(values, ["south", "north"])


def test_other_values_are_dealt_in_order():
    assert divide(["d", "b", "a", "c", "b"], ["x", "y"]) == {"x": [2, 3], "y": [0, 1, 4]}  # a, c | b, d
    assert divide([10, 9, 2], ["x", "y"]) == {"x": [0, 2], "y": [1]}  # 2, 10 | 9: by size, not by digits
    assert divide(["x", "b"], ["x", "y"]) == {"x": [1], "y": [0]}  # "b" is no client, so no value is taken as a name


def test_a_client_without_rows_is_refused():
    with pytest.raises(DataError, match=r"leaves z without rows: it has 2 values \(x, y\) for 3 clients"):
        divide(["x", "y"], ["x", "y", "z"])
    with pytest.raises(DataError, match="leaves q without rows: it has 1 value "):
        divide(["a", "a"], ["p", "q"])


def test_columns_and_values_that_cannot_be_used():
    with pytest.raises(DataError, match=r"no column 'sites' .*Did you mean 'site'\? Columns there: text, site"):
        divide(["x"], ["x"], column="sites")
    for wrong in (None, 1.5, ["x"]):
        with pytest.raises(DataError, match="Row 2 has "):
            divide(["x", wrong], ["x"])
    with pytest.raises(MethodError, match="needs the option 'column'"):
        create("data", "by-column")
