"""Classes divided by Dirichlet proportions."""

import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from cutlayer.errors import DataError, MethodError
from cutlayer.registry import create
from cutlayer.seeds import derive

CLIENTS = ["a", "b", "c", "d"]


def rows_of(*labels):
    return [{"text": "x", "label": label} for label in labels]


def divide(rows, clients=CLIENTS, *, seed=0, shuffle=False, **options):
    return create("data", "label-dirichlet", options).divide(rows, clients, seed=seed, shuffle=shuffle)


def test_against_the_definition():
    """One class, its cut written out: client j gets the rows between the sums of the shares before and with its own."""
    rows = rows_of(*["only"] * 40)
    generator = np.random.default_rng(derive("label-dirichlet", 5))
    shares = generator.dirichlet([2.0] * 4)
    borders = [int(40 * shares[:j].sum()) for j in range(4)] + [40]
    wanted = {client: list(range(borders[j], borders[j + 1])) for j, client in enumerate(CLIENTS)}
    assert min(map(len, wanted.values())) > 0  # so the first draw is taken
    assert divide(rows, seed=5, alpha=2.0) == wanted


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_goes_to_exactly_one_client(shuffle):
    chance = random.Random(0)
    for seed in range(60):
        rows = rows_of(*chance.choices(["x", "y", "z"], k=chance.randint(20, 80)))
        alpha, least = chance.choice([0.05, 0.3, 1.0, 100.0]), chance.randint(1, 3)
        divided = divide(rows, seed=seed, shuffle=shuffle, alpha=alpha, min_examples=least)
        assert list(divided) == CLIENTS
        assert sorted(chain(*divided.values())) == list(range(len(rows)))
        assert all(numbers == sorted(numbers) and len(numbers) >= least for numbers in divided.values())
        assert divided == divide(rows, seed=seed, shuffle=shuffle, alpha=alpha, min_examples=least)


def test_alpha_says_how_unequal():
    rows = rows_of(*[0, 1] * 500)

    def spread(alpha):
        """The mean, over clients, of the larger class's part."""
        parts = []
        for numbers in divide(rows, alpha=alpha).values():
            parts.append(max(Counter(rows[n]["label"] for n in numbers).values()) / len(numbers))
        return sum(parts) / len(parts)

    assert spread(1000.0) < 0.55 < 0.8 < spread(0.05)


def test_seed_shuffle_and_column():
    rows = rows_of(*["x", "y"] * 50)
    assert divide(rows, seed=1) != divide(rows, seed=2)
    assert divide(rows, shuffle=True) != divide(rows)
    renamed = [{"topic": row["label"]} for row in rows]
    assert divide(renamed, column="topic") == divide(rows)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(DataError, match="3 rows are too few for 4 clients with at least 1 each"):
        divide(rows_of(0, 1, 2))
    with pytest.raises(DataError, match=r"40 rows in 1 classes could not be divided .* in 1000 draws with alpha 0\.01"):
        divide(rows_of(*[0] * 40), alpha=0.01, min_examples=9)
    with pytest.raises(DataError, match="no column 'label'"):
        divide([{"text": "x"}] * 9)
    for options, said in [
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": float("nan")}, "above 0"),
        ({"min_examples": 0}, "at least 1"),
    ]:
        with pytest.raises(MethodError, match=said):
            create("data", "label-dirichlet", options)


def test_tiny_alphas_still_place_every_row():
    rows = rows_of(*range(8), *range(8))
    for alpha in (1e-3, 1e-9, 1e-300):
        divided = divide(rows, ["a", "b"], alpha=alpha)
        assert sorted(chain(*divided.values())) == list(range(16))
