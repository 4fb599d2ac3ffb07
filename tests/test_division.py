"""Who got what: the numbers by hand, the picture, and both in the output folder."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.dom import minidom

import numpy as np
import pytest

import cutlayer
from cutlayer.contracts import IGNORE, Example
from cutlayer.errors import OutputError
from cutlayer.report.division import SHOWN, describe, distance, save, told
from cutlayer.report.division_picture import ROWS, draw
from cutlayer.report.progress import Quiet
from tiny import make_model, text_rows, write_rows

ROOT = Path(__file__).parents[1]


def example(length: int, *, counted: int = 0, label: int | None = None) -> Example:
    """``counted`` label tokens at its end."""
    labels = None if label is not None else [*[IGNORE] * (length - counted), *[5] * counted]
    return Example([5] * length, labels, label)


def plain(lengths: dict[str, list[int]], *, column: str | None = None, rows: Any = None) -> dict[str, Any]:
    examples = {client: [example(n, counted=1) for n in mine] for client, mine in lengths.items()}
    return describe(examples, rows or {client: [{}] * len(mine) for client, mine in lengths.items()},
                    names=None, column=column)  # fmt: skip


def test_distance_by_hand() -> None:
    assert distance([3, 0], [0, 5]) == pytest.approx(math.sqrt(math.log(2)))
    assert distance([1, 2, 3], [2, 4, 6]) == 0
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4)
    nats = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert distance([7, 0], [2, 2]) == pytest.approx(math.sqrt(nats))
    draws = np.random.default_rng(0).integers(0, 9, (50, 2, 6)) + np.eye(6, dtype=int)[0]
    for left, right in draws:
        assert 0 <= distance(left, right) <= math.sqrt(math.log(2)) + 1e-12
        assert distance(left, right) == pytest.approx(distance(right, left))
        assert distance(left, left) == pytest.approx(0, abs=1e-7)


def test_numbers_by_hand() -> None:
    found = describe(
        {"a": [example(2, counted=1), example(4, counted=3)], "b": [example(6), *[example(8, counted=2)] * 3]},
        {"a": [{}] * 2, "b": [{}] * 4}, names=None, column=None,
    )  # fmt: skip
    assert found["clients"]["a"] == {
        "examples": 2, "tokens": 6, "label_tokens": 4,
        "length": {"mean": 3.0, "min": 2, "p10": 2.2, "p25": 2.5, "p50": 3.0, "p75": 3.5, "p90": 3.8, "max": 4},
    }  # fmt: skip
    assert found["clients"]["b"]["label_tokens"] == 6
    assert found["all"] == {
        "examples": 6, "tokens": 36, "label_tokens": 10,
        "length": {"mean": 6.0, "min": 2, "p10": 3.0, "p25": 4.5, "p50": 7.0, "p75": 8.0, "p90": 8.0, "max": 8},
    }  # fmt: skip
    assert list(found["histograms"]) == ["length"]
    assert found["histograms"]["length"]["classes"] == [[2, 2], [3, 4], [5, 6], [7, 8]]
    assert found["histograms"]["length"]["all"] == [1, 1, 1, 3]
    assert found["histograms"]["length"]["clients"] == {"a": [1, 1, 0, 0], "b": [0, 0, 1, 3]}
    far = found["histograms"]["length"]["distance"]
    assert far["a"] == pytest.approx(distance([1, 1, 0, 0], [1, 1, 1, 3]))
    assert found["histograms"]["length"]["mean_distance"] == pytest.approx((far["a"] + far["b"]) / 2)
    assert json.loads(json.dumps(found)) == found


def test_ten_classes_of_equal_counts_where_lengths_differ_and_fewer_where_they_do_not() -> None:
    found = plain({"a": list(range(1, 51)), "b": list(range(51, 101))})["histograms"]["length"]
    assert found["all"] == [10] * 10
    assert found["classes"][0] == [1, 10]
    assert found["classes"][-1] == [91, 100]
    assert found["mean_distance"] == pytest.approx(distance([1, 0], [1, 1]))
    # Ties stay together: were they spread over classes by their number, equal clients would look different.
    same = plain({"a": [7] * 30, "b": [7] * 30})["histograms"]["length"]
    assert (same["classes"], same["all"], same["mean_distance"]) == ([[7, 7]], [60], 0)
    assert plain({"a": [1], "b": [9]})["histograms"]["length"]["classes"] == [[1, 1], [2, 9]]


def test_labels_and_columns() -> None:
    examples = {"a": [example(3, label=0)] * 3, "b": [example(3, label=0), example(3, label=2)]}
    rows: Any = {"a": [{"site": "x"}] * 3, "b": [{"site": 4}, {"site": "x"}]}
    found = describe(examples, rows, names=["no", "maybe", "yes"], column="site")["histograms"]
    assert list(found) == ["length", "label"]
    assert found["label"]["classes"] == ["no", "maybe", "yes"]
    assert found["label"]["all"] == [4, 0, 1]
    assert found["label"]["clients"] == {"a": [3, 0, 0], "b": [1, 0, 1]}
    by_column = plain({"a": [1] * 3, "b": [1] * 2}, rows=rows, column="site")["histograms"]
    assert by_column["column site"]["classes"] == ["4", "x"]
    assert by_column["column site"]["clients"] == {"a": [0, 3], "b": [1, 1]}
    rows["b"][0] = {}  # a client with a file of its own, which lacks the column
    assert list(plain({"a": [1] * 3, "b": [1] * 2}, rows=rows, column="site")["histograms"]) == ["length"]


def test_the_table_shows_a_few_clients_and_all() -> None:
    said = told(plain({f"client-{n}": [n + 1, 9] for n in range(40)})).splitlines()
    assert len(said) == 2 + SHOWN + 2
    assert said[2].split()[:2] == ["client-0", "2"]
    assert said[-2] == "and 28 more"
    assert said[-1].split()[:5] == ["all,", "mean", "distance", "80", "1,180"]
    assert not [line for line in told(plain({"a": [1], "b": [2]})).splitlines() if "more" in line]
    assert max(map(len, said)) < 120
    assert all(line.isascii() for line in said)


def test_the_picture_is_sound_whatever_the_names() -> None:
    names = ["a<b>&\"'", "$x_1$", "新闻", "bell\x07\x00", "_hidden", "", *(f"topic {n}" for n in range(30))]
    rows = {f"client-{n}": [{"topic": names[(n + k) % len(names)]} for k in range(5)] for n in range(ROWS + 20)}
    found = plain({client: [n % 7 + 1 for n in range(5)] for client in rows}, rows=rows, column="topic")
    drawn = draw(found)
    assert draw(found) == drawn
    read = minidom.parseString(drawn)
    said = [node.firstChild.data for node in read.getElementsByTagName("text") if node.firstChild]  # type: ignore[union-attr]
    assert any(f"the first {ROWS} of {ROWS + 20} clients" in text for text in said)
    assert "client-99" in said
    assert "client-100" not in said
    assert "17 others" in said  # 36 names, 19 with a color of their own
    small = draw(plain({"a": [1, 2, 3], "b": [4]}))
    said = [node.firstChild.data for node in minidom.parseString(small).getElementsByTagName("text")]  # type: ignore[union-attr]
    far = plain({"a": [1, 2, 3], "b": [4]})["histograms"]["length"]["distance"]["b"]
    assert {"a", "b", "3", "1", "all (mean)", f"{far:.2f}"} <= set(said)


class Notes(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def train(folder: Path, out: Path, *, notes: Notes | None = None, **changes: Any) -> Any:
    if not (folder / "model").exists():
        make_model(folder / "model", "llama", num_hidden_layers=2)
        write_rows(folder / "rows.jsonl", text_rows(24))
    config = {
        "model": str(folder / "model"), "clients": 2, "rounds": 2,
        "partition": {"name": "u-shaped-split", "head_blocks": 1},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 8, "packing": True, "division": "quantity-skew"},
    }  # fmt: skip
    return cutlayer.train({**config, **changes}, out=out, progress=notes)


def test_a_run_writes_both_and_says_it_once(tmp_path: Path) -> None:
    notes, out = Notes(), tmp_path / "out"
    train(tmp_path, out, notes=notes)
    found = json.loads((out / "division.json").read_text())
    assert list(found["clients"]) == ["client-0", "client-1"]
    assert found["all"]["examples"] == 24  # before packing
    assert found["all"]["length"]["max"] == 8
    minidom.parseString((out / "division.svg").read_bytes())
    assert [text for text in notes.said if "who got what" in text] == [told(found)]
    assert not list(out.rglob(".*draft*"))
    train(tmp_path, tmp_path / "alone", notes=notes, clients=1)
    assert not list((tmp_path / "alone").glob("division*"))
    assert len([text for text in notes.said if "who got what" in text]) == 1


def test_resuming_rewrites_nothing_but_what_is_missing(tmp_path: Path) -> None:
    notes, out = Notes(), tmp_path / "out"
    train(tmp_path, out)
    (out / "summary.json").unlink()  # as if it had been killed at its end
    before = {name: (out / name).read_bytes() for name in ("division.json", "division.svg")}
    stamps = {name: (out / name).stat().st_mtime_ns for name in before}
    cutlayer.train(resume=out, progress=notes)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == stamps
    assert not [text for text in notes.said if "who got what" in text]
    (out / "summary.json").unlink()
    (out / "division.svg").unlink()  # killed between the two
    cutlayer.train(resume=out, progress=notes)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert (out / "division.json").stat().st_mtime_ns == stamps["division.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "division.json" / "full").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"division\.json cannot be written"):
        save(plain({"a": [1], "b": [2]}), tmp_path, anew=True)
    assert [path.name for path in tmp_path.iterdir()] == ["division.json"]


def test_every_key_is_documented() -> None:
    def keys(value: Any) -> set[str]:
        if not isinstance(value, dict):
            return set()
        below = [keys(inner) for inner in value.values()]
        return set(value).union(*below) - {"a", "b"}

    section = (ROOT / "docs/outputs.md").read_text().partition("## division.json")[2].partition("\n## ")[0]
    told_of = set(re.findall(r"`(\w+)`", section))
    rows: Any = {"a": [{"site": "x"}], "b": [{"site": "y"}]}
    found = plain({"a": [1], "b": [2]}, rows=rows, column="site")
    assert keys(found) - {"column site"} <= told_of
    assert "`column <name>`" in section
