"""Classes of text length divided by Dirichlet proportions: the row's own check, and each rule by itself."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest

from cutlayer.contracts import Rows
from cutlayer.errors import DataError, MethodError
from cutlayer.registry import create
from cutlayer.report.division import distance
from cutlayer.seeds import derive

CLIENTS = ["a", "b", "c", "d", "e"]
LENGTHS = np.maximum(1, np.random.default_rng(0).lognormal(4.0, 0.8, 5000)).astype(int)
CLASS = np.empty(5000, dtype=int)  # of ten with equal counts, ties by row number
CLASS[np.argsort(LENGTHS, kind="stable")] = np.repeat(np.arange(10), 500)


def rows_of(lengths: Any, batch_size: int = 4) -> Rows:
    return Rows([{"text": "x"}] * len(lengths), batch_size=batch_size, lengths=lambda: list(lengths))


def divide(
    lengths: Any, clients: Any = CLIENTS, *, seed: int = 0, shuffle: bool = True, batch_size: int = 4, **options
):
    method = create("data", "splitft-length-dirichlet", options)
    return method.divide(rows_of(lengths, batch_size), clients, seed=seed, shuffle=shuffle)


def mean_distance(divided: dict[str, list[int]]) -> float:
    """Between the client's histogram of the ten classes and that of all rows, mean over the clients."""
    return float(np.mean([distance(np.bincount(CLASS[mine], minlength=10), [500] * 10) for mine in divided.values()]))


@lru_cache
def measured(alpha: float, **options: Any) -> float:
    return float(np.mean([mean_distance(divide(LENGTHS, seed=seed, alpha=alpha, **options)) for seed in range(5)]))


def p_value(some: np.ndarray, pool: np.ndarray) -> float:
    """Of the Kolmogorov-Smirnov test of two samples, by the asymptotic distribution."""
    points = np.unique(pool)
    of_some, of_pool = (np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (some, pool))
    scaled = np.abs(of_some - of_pool).max() * math.sqrt(len(some) * len(pool) / (len(some) + len(pool)))
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, sum(terms))) if scaled > 0.2 else 1.0


def test_the_mean_distance_falls_with_alpha() -> None:
    found = [measured(alpha) for alpha in (0.1, 1.0, 10.0, 100.0)]
    assert all(more > less for more, less in pairwise(found))
    assert found[0] > 3 * found[2]
    assert found == pytest.approx([0.53, 0.28, 0.09, 0.03], rel=0.1)  # as the catalogue expects
    assert found == pytest.approx([0.557, 0.271, 0.090, 0.0295], rel=0.01)  # as it is


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 10.0, math.inf])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_goes_to_exactly_one_client(alpha: float, shuffle: bool) -> None:
    for seed in range(5):
        divided = divide(LENGTHS, seed=seed, shuffle=shuffle, alpha=alpha)
        assert list(divided) == CLIENTS
        assert sorted(chain(*divided.values())) == list(range(5000))
        assert all(mine == sorted(mine) and len(mine) >= 4 for mine in divided.values())
        assert all(type(number) is int for mine in divided.values() for number in mine)
        assert divided == divide(LENGTHS, seed=seed, shuffle=shuffle, alpha=alpha)
    if alpha < math.inf or shuffle:
        assert divide(LENGTHS, seed=1, shuffle=shuffle, alpha=alpha) != divided


def test_lengths_of_a_client_against_the_pool() -> None:
    """Kolmogorov-Smirnov: at alpha 0.1 every client differs from the pool in most seeds, at infinity none does."""
    every = 0
    for seed in range(20):
        strong = divide(LENGTHS, seed=seed, alpha=0.1)
        every += all(p_value(LENGTHS[mine], LENGTHS) < 0.001 for mine in strong.values())
        none = divide(LENGTHS, seed=seed, alpha=math.inf)
        assert [len(mine) for mine in none.values()] == [1000] * 5
        assert not any(p_value(LENGTHS[mine], LENGTHS) < 0.001 for mine in none.values())
    assert every >= 15
    assert p_value(np.array([1, 2]), np.array([1, 2])) == 1.0
    assert p_value(np.arange(100), np.arange(100) + 25) == pytest.approx(0.0039, abs=0.0002)  # D = 1/4: 2 exp(-6.25)


def test_against_the_definition() -> None:
    """Two classes, written out: a draw, an order and a cut for each, short to long."""
    lengths = [9, 1, 9, 1, 1, 9, 9, 1] * 5
    generator = np.random.default_rng(derive("splitft-length-dirichlet", 3))
    wanted: list[list[int]] = [[], [], []]
    for length in (1, 9):
        share = generator.dirichlet([2.0] * 3)
        order = generator.permutation([n for n, found in enumerate(lengths) if found == length])
        borders = [0, math.floor(20 * share[0]), math.floor(20 * (share[0] + share[1])), 20]
        for client in range(3):
            wanted[client] += order[borders[client] : borders[client + 1]].tolist()
    assert min(map(len, wanted)) >= 1  # so the first draw is taken
    divided = divide(lengths, "xyz", seed=3, alpha=2.0, classes=2, min_examples=1)
    assert list(divided.values()) == [sorted(mine) for mine in wanted]


def test_classes_are_of_equal_counts_with_ties_by_row_number_or_between_edges() -> None:
    def classes(lengths: list[int], **options: Any) -> list[list[int]]:
        return [c.tolist() for c in create("data", "splitft-length-dirichlet", options).classes_of(lengths)]

    assert classes([5, 1, 5, 5, 5, 9], classes=3) == [[0, 1], [2, 3], [4, 5]]
    assert classes([3, 2, 1], classes=10) == [[2], [1], [0]]  # seven have no row
    assert classes([4, 5, 9, 10, 99], edges=[5, 10]) == [[0], [1, 2], [3, 4]]
    assert classes([4, 99], edges=[5, 10]) == [[0], [1]]
    assert [np.unique(LENGTHS[c]).size > 0 for c in classes(LENGTHS.tolist())] == [True] * 10
    assert [c for row in classes(LENGTHS.tolist()) for c in row] != list(range(5000))


def test_a_minimum_is_reached_by_moving_rows() -> None:
    lengths = list(range(40))
    for seed in range(20):
        divided = divide(lengths, seed=seed, alpha=1e-6, classes=1, min_examples=6)  # all to one client, in any draw
        assert sorted(map(len, divided.values())) == [6, 6, 6, 6, 16]
        assert sorted(chain(*divided.values())) == lengths
        assert divided == divide(lengths, seed=seed, alpha=1e-6, classes=1, min_examples=6)
    assert min(map(len, divide(lengths, alpha=1e-6, batch_size=8).values())) == 8  # by default a batch
    moved = [
        min(divide(lengths, seed=seed, alpha=1e-6, classes=1, min_examples=6).values(), key=len) for seed in range(9)
    ]
    assert len({tuple(mine) for mine in moved}) > 1  # drawn, not those that happen to stand last


def test_shuffle_draws_an_order_and_file_order_deals_in_turn() -> None:
    assert divide(range(7), "xyz", shuffle=False, alpha=math.inf, min_examples=1) == {
        "x": [0, 3, 6], "y": [1, 4], "z": [2, 5],
    }  # fmt: skip
    assert divide(LENGTHS, alpha=1.0) != divide(LENGTHS, alpha=1.0, shuffle=False)
    blocks = divide([1] * 40, "xy", shuffle=False, classes=1, alpha=1.0)
    assert [*blocks["x"], *blocks["y"]] == list(range(40))  # a class is cut in file order


def test_equal_sizes() -> None:
    for alpha in (0.1, 1.0, math.inf):
        divided = divide(LENGTHS, alpha=alpha, equal_size=True)
        assert sorted(chain(*divided.values())) == list(range(5000))
        assert {len(mine) for mine in divided.values()} == {1000}
        few = divide(LENGTHS, alpha=alpha, equal_size=True, size=300)
        assert {len(mine) for mine in few.values()} == {300}
        assert len(set(chain(*few.values()))) == 1500
        uneven = divide(LENGTHS[:13], "xyz", alpha=alpha, equal_size=True)
        assert [len(set(mine)) for mine in uneven.values()] == [4, 4, 4]
    assert measured(0.1, equal_size=True) > measured(10.0, equal_size=True) > measured(1000.0, equal_size=True)
    # five times 90 rows: no class of 500 runs out, so that all get what they wished for
    assert measured(0.1, equal_size=True, size=90) == pytest.approx(
        measured(0.1, equal_size=True, size=90, replacement=True), abs=1e-9
    )


def test_equal_sizes_follow_the_clients_own_draws() -> None:
    """Written out for classes that are large enough: each client's count of a class is its share of its quota."""
    lengths = np.repeat([1, 2, 3], 400)
    generator = np.random.default_rng(derive("splitft-length-dirichlet", 5))
    wishes = 100 * generator.dirichlet([2.0 / 3] * 3, size=4)
    divided = divide(lengths, "wxyz", seed=5, alpha=2.0, classes=3, equal_size=True, size=100)
    for wish, mine in zip(wishes, divided.values(), strict=True):
        counts = Counter(lengths[mine].tolist())
        assert [counts[length] for length in (1, 2, 3)] == pytest.approx(wish, abs=1)


def test_with_replacement_a_class_begins_again() -> None:
    divided = divide([1] * 10, "xy", alpha=0.5, classes=1, equal_size=True, size=25, replacement=True)
    assert [len(mine) for mine in divided.values()] == [25, 25]
    assert set(Counter(chain(*divided.values())).values()) == {5}  # all rows equally often
    even = divide([1] * 10, "xy", alpha=math.inf, equal_size=True, size=25, replacement=True)
    assert set(Counter(chain(*even.values())).values()) == {5}
    shares = [np.bincount(CLASS[mine], minlength=10) for mine in divide(
        LENGTHS, alpha=0.01, equal_size=True, size=12000, replacement=True).values()]  # fmt: skip
    assert max(np.max(counts) for counts in shares) > 11000  # a class of 500 rows still gives what was drawn


def test_lengths_are_counted_once_and_only_if_needed() -> None:
    calls = []
    rows = Rows([{}] * 50, batch_size=2, lengths=lambda: calls.append(1) or list(range(50)))  # type: ignore[func-returns-value]
    create("data", "splitft-length-dirichlet", {"alpha": math.inf}).divide(rows, "xy", seed=0, shuffle=True)
    assert calls == []
    for seed in range(3):
        create("data", "splitft-length-dirichlet").divide(rows, "xy", seed=seed, shuffle=True)
    assert calls == [1]


def test_extreme_alphas_still_place_every_row() -> None:
    for alpha in (5e-324, 1e-9, 1e308):
        assert sorted(chain(*divide(LENGTHS, alpha=alpha).values())) == list(range(5000))
        assert sorted(chain(*divide(LENGTHS, alpha=alpha, equal_size=True).values())) == list(range(5000))
        again = divide(LENGTHS, alpha=alpha, equal_size=True, replacement=True)
        assert {len(mine) for mine in again.values()} == {1000}


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(DataError, match="19 rows are too few for 5 clients with at least 4 each"):
        divide(range(19))
    with pytest.raises(DataError, match="Each of 5 clients would get 3 of 19 rows, and must have at least 4"):
        divide(range(19), equal_size=True)
    with pytest.raises(DataError, match=r"5 clients with 5 rows each need 25 rows; there are 19.* replacement: true"):
        divide(range(19), equal_size=True, size=5)
    for options, said in [
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": float("nan")}, "above 0"),
        ({"classes": 0}, "at least 1"),
        ({"edges": []}, "larger than the one before"),
        ({"edges": [0, 5]}, "above 0"),
        ({"edges": [5, 5]}, "larger than the one before"),
        ({"edges": [5, 9], "classes": 4}, "classes is 4, but the edges make 3"),
        ({"min_examples": 0}, "at least 1"),
        ({"size": 5}, "go with equal_size: true"),
        ({"replacement": True}, "go with equal_size: true"),
        ({"equal_size": True, "size": 0}, "at least 1"),
    ]:
        with pytest.raises(MethodError, match=said):
            create("data", "splitft-length-dirichlet", options)
    assert create("data", "splitft-length-dirichlet", {"edges": [5, 9], "classes": 3})
