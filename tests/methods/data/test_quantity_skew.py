"""Unequally many rows of the same distribution."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest

from cutlayer.errors import DataError, MethodError
from cutlayer.registry import create
from cutlayer.seeds import derive

CLIENTS = ["a", "b", "c", "d"]


def divide(count: int, clients: Any = CLIENTS, *, seed: int = 0, shuffle: bool = True, **options: Any) -> Any:
    rows = [{"text": str(number)} for number in range(count)]
    return create("data", "quantity-skew", options).divide(rows, clients, seed=seed, shuffle=shuffle)


def sizes(divided: dict[str, list[int]]) -> list[int]:
    return [len(mine) for mine in divided.values()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_goes_to_exactly_one_client(shuffle: bool) -> None:
    for seed in range(40):
        options = {"alpha": [0.1, 0.5, 5.0, math.inf][seed % 4], "min_examples": 1 + seed % 3}
        divided = divide(97, seed=seed, shuffle=shuffle, **options)
        assert list(divided) == CLIENTS
        assert sorted(chain(*divided.values())) == list(range(97))
        assert all(mine == sorted(mine) and len(mine) >= options["min_examples"] for mine in divided.values())
        assert all(type(number) is int for mine in divided.values() for number in mine)
        assert divided == divide(97, seed=seed, shuffle=shuffle, **options)


def test_against_the_definition() -> None:
    """One draw over the clients; each gets its share of all rows."""
    share = np.random.default_rng(derive("quantity-skew", 4)).dirichlet([0.5] * 4)
    assert min(share) * 1000 > 2  # so the first draw is taken
    assert sizes(divide(1000, seed=4)) == pytest.approx(1000 * share, abs=1)


def test_alpha_says_how_unequal() -> None:
    def spread(alpha: float) -> float:
        return float(np.mean([np.std(sizes(divide(1000, seed=seed, alpha=alpha))) for seed in range(20)]))

    assert spread(0.1) > spread(0.5) > spread(5.0) > spread(500.0) > spread(math.inf) == 0
    assert sizes(divide(10, "xyz", alpha=math.inf)) == [4, 3, 3]
    assert sizes(divide(10, "xy", alpha=1e308)) == [5, 5]
    assert sizes(divide(1000, "xyz", alpha=5e-324, shares=[1, 1, 8])) == [100, 100, 800]


def test_sizes_follow_the_given_shares() -> None:
    assert sizes(divide(100, shares=[5, 3, 1, 1])) == [50, 30, 10, 10]
    assert sizes(divide(100, shares=[0.5, 0.3, 0.1, 0.1])) == [50, 30, 10, 10]
    assert sizes(divide(10, "xyz", shares=[1, 1, 1])) == [4, 3, 3]
    assert sizes(divide(11, "xyz", shares=[6.0, 3.0, 2.0])) == [6, 3, 2]
    assert sizes(divide(12, "xyz", shares=[6.0, 3.0, 2.0])) == [7, 3, 2]  # 6.55, 3.27, 2.18


def test_the_rows_of_each_client_lie_evenly_over_the_file() -> None:
    assert divide(7, "xyz", alpha=math.inf, shuffle=False) == create("data", "iid").divide(
        [{}] * 7, "xyz", seed=0, shuffle=False
    )
    assert divide(8, "xy", shares=[3, 1], shuffle=False) == {"x": [0, 1, 3, 4, 5, 7], "y": [2, 6]}
    for shuffle in (False, True):
        for mine in divide(10_000, shares=[5, 3, 1, 1], shuffle=shuffle).values():
            assert np.mean(mine) == pytest.approx(5000, rel=0.1)


def test_seed_and_shuffle() -> None:
    assert divide(60, seed=1) != divide(60, seed=2)
    assert divide(60, shuffle=True) != divide(60, shuffle=False)
    assert sizes(divide(60, shuffle=True)) == sizes(divide(60, shuffle=False))
    fixed = {"shares": [1, 2, 3, 4], "shuffle": False}
    assert divide(60, seed=1, **fixed) == divide(60, seed=2, **fixed)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(DataError, match="3 rows are too few for 4 clients with at least 1 each"):
        divide(3)
    with pytest.raises(DataError, match=r"40 rows could not be divided .* in 1000 draws with alpha 0\.001"):
        divide(40, alpha=0.001, min_examples=9)
    with pytest.raises(DataError, match="2 shares for 4 clients"):
        divide(40, shares=[1, 2])
    with pytest.raises(DataError, match="a client gets 0, and must have at least 1"):
        divide(40, shares=[1000, 1, 1, 1])
    for options, said in [
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": float("nan")}, "above 0"),
        ({"shares": [1, 0]}, "above 0"),
        ({"shares": [1, math.inf]}, "finite"),
        ({"min_examples": 0}, "at least 1"),
    ]:
        with pytest.raises(MethodError, match=said):
            create("data", "quantity-skew", options)
