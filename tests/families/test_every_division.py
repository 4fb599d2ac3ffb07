"""What every division must satisfy, swept over the registry and over the options that change its course."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cutlayer import registry
from cutlayer.build import prepare_data, tokenizer_of
from cutlayer.config import load_config
from cutlayer.contracts import Rows
from cutlayer.errors import DataError
from tiny import make_model, texts, write_rows

CLIENTS = ["north", "south", "west"]
ROWS = [{"text": text, "label": number % 5, "site": CLIENTS[number // 2 % 3]} for number, text in enumerate(texts(90))]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "by-column": [{"column": "site"}, {"column": "label"}],
    "label-dirichlet": [{}, {"alpha": 0.05, "min_examples": 3}, {"column": "site"}],
    "quantity-skew": [{}, {"alpha": 0.05}, {"alpha": math.inf}, {"shares": [5, 1, 3], "min_examples": 5}],
    "splitft-length-dirichlet": [
        {}, {"alpha": math.inf}, {"edges": [6, 9], "alpha": 1.0}, {"equal_size": True},
        {"equal_size": True, "size": 20},
    ],
}  # fmt: skip
REPEATING = [("splitft-length-dirichlet", {"equal_size": True, "size": 80, "replacement": True})]
EVERY = [(name, options) for name in registry.names("data") for options in VARIANTS.get(name, [{}])]
each = pytest.mark.parametrize(("name", "options"), EVERY, ids=[f"{n}-{'-'.join(o) or 'plain'}" for n, o in EVERY])


def test_the_variants_are_of_methods_that_there_are() -> None:
    assert {*VARIANTS, "iid"} <= set(registry.names("data"))
    assert len(EVERY) >= 14


def given(rows: list[dict[str, Any]]) -> Rows:
    return Rows(rows, batch_size=4, lengths=lambda: [len(row["text"].split()) for row in rows])


def divide(name: str, options: dict[str, Any], *, seed: int = 0, shuffle: bool = True, rows: Any = None) -> Any:
    method = registry.create("data", name, options)
    return method.divide(rows or given(ROWS), CLIENTS, seed=seed, shuffle=shuffle)


@each
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_row_goes_to_at_most_one_client(name: str, options: dict[str, Any], shuffle: bool) -> None:
    for seed in range(5):
        divided = divide(name, options, seed=seed, shuffle=shuffle)
        assert list(divided) == CLIENTS
        dealt = list(chain(*divided.values()))
        assert all(type(number) is int and 0 <= number < len(ROWS) for number in dealt)
        assert max(Counter(dealt).values()) == 1
        assert all(divided.values())
        if "size" not in options:
            assert len(dealt) == len(ROWS)


@pytest.mark.parametrize(("name", "options"), REPEATING)
def test_only_those_that_say_so_repeat_rows(name: str, options: dict[str, Any]) -> None:
    divided = divide(name, options)
    assert max(Counter(chain(*divided.values())).values()) > 1
    assert {number for mine in divided.values() for number in mine} <= set(range(len(ROWS)))


@each
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_seed_alone_decides(name: str, options: dict[str, Any], shuffle: bool) -> None:
    rows = copy.deepcopy(ROWS)
    first = divide(name, options, seed=7, shuffle=shuffle)
    random.seed(1)
    np.random.seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert divide(name, options, seed=7, shuffle=shuffle, rows=given(rows)) == first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state  # type: ignore[index, union-attr]
    assert rows == ROWS  # and nothing of the rows is changed


@each
def test_more_clients_than_rows_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError) as refused:
        divide(name, options, rows=given(ROWS[:2]))
    said = str(refused.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert "clients" in said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divisions")
    make_model(folder / "model", "llama", num_hidden_layers=2)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


@each
def test_in_a_run_every_client_gets_its_rows(place: Path, name: str, options: dict[str, Any]) -> None:
    config = load_config({
        "model": str(place / "model"), "clients": [{"name": client} for client in CLIENTS],
        "data": {"train": str(place / "rows.jsonl"), "division": {"name": name, **options}, "max_length": 8},
    })  # fmt: skip
    tokenizer = tokenizer_of(config)
    made = prepare_data(config, tokenizer)
    whole = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in ROWS]  # an end-of-text token, and nothing cut off
    assert max(whole) > 8
    dealt = divide(name, options, rows=Rows(ROWS, batch_size=4, lengths=lambda: whole))
    for client, numbers in dealt.items():
        assert [len(example.input_ids) for example in made.train[client]] == [min(whole[n], 8) for n in numbers]
    assert made.division is not None
    assert [s["examples"] for s in made.division["clients"].values()] == [len(numbers) for numbers in dealt.values()]
    assert prepare_data(config, tokenizer).fingerprint == made.fingerprint
