"""The row's check: nobody waits longer than a window, the fast one's share falls, a window of all is FedAvg."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from cutlayer.contracts import Upload
from cutlayer.errors import CutlayerError, MethodError
from cutlayer.registry import create
from spine import MOSTLY_TWO, adapter, equal, model, train
from tiny import text_rows
from unequal import run, uploads

SPEEDS = {"slow": 1, "middle": 2, "fast": 4}


def shares_of(found: list[dict[str, Any]], *, interval: bool = True) -> dict[str, float]:
    """Each client's part of all that was mixed in; without the intervals as if every I_i were 1."""
    total: defaultdict[str, float] = defaultdict(float)
    for version in {one["version"] for one in found}:
        window = [one for one in found if one["version"] == version]
        b = sum(one["share"] for one in window)
        for one in window:
            total[one["client"]] += one["share"] if interval else b / len(window)
    return {client: part / sum(total.values()) for client, part in total.items()}


def test_clients_at_speeds_1_2_and_4(tmp_path: Path) -> None:
    """Windows as long as the fast one's work: it is in all, the others in every second and every fourth."""
    run(tmp_path / "first", SPEEDS)
    cycle = uploads(tmp_path / "first")[0]["virtual_time"]
    length = 1.001 * cycle
    aggregator = {"name": "safsl-window", "length": length}
    run(tmp_path / "out", SPEEDS, aggregator=aggregator, framework={"uploads": 3})
    found = uploads(tmp_path / "out")
    assert max(one["waited"] for one in found) <= length
    assert max(one["waited"] for one in found if one["client"] == "fast") == pytest.approx(0.001 * cycle, rel=1e-3)
    assert {one["version"]: one["virtual_time"] for one in found} == {
        number: pytest.approx(number * length) for number in range(1, 13)
    }
    assert [one["version"] for one in found if one["client"] == "slow"] == [4, 8, 12]
    assert shares_of(found, interval=False)["fast"] == pytest.approx(4 / 7)
    assert shares_of(found)["fast"] == pytest.approx(0.442, abs=5e-4)
    assert shares_of(found)["fast"] == pytest.approx((1 / 3 + 2 / 9 + 1 / 3 + 1 / 7) / (7 / 3))


@MOSTLY_TWO
def test_a_window_until_all_are_done_is_fedavg(partition: dict[str, Any], tmp_path: Path) -> None:
    """With unequal speeds and data, every tensor equal to synchronous sfl-v1."""
    rows = {name: text_rows(size, seed=i) for i, (name, size) in enumerate({"slow": 3, "middle": 6, "fast": 9}.items())}
    both: dict[str, Any] = {"partition": partition, "rounds": 3}
    run(tmp_path / "a", SPEEDS, rows=rows, aggregator={"name": "safsl-window", "done": 1.0}, **both)
    twin = {"name": "sfl-v1", "moments": "keep"}
    train(model(num_hidden_layers=4), tmp_path / "b", rows, framework=twin, **both)
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))
    assert {one["delay"] for one in uploads(tmp_path / "a")} == {0}  # all intervals are 1


def test_without_a_clock_every_window_has_everybody(tmp_path: Path) -> None:
    rows = {name: text_rows(3, seed=i) for i, name in enumerate(SPEEDS)}
    train(model(), tmp_path / "a", rows, framework="async-sfl", aggregator="safsl-window")
    train(model(), tmp_path / "b", rows, framework={"name": "sfl-v1", "moments": "keep"})
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


def test_windows_that_follow_the_clients(tmp_path: Path) -> None:
    """First until half are done, then as long as half are expected to need; it may hold none, and is longer then."""
    made = create("aggregator", "safsl-window", {"done": 0.5})
    assert made.window({"a": None, "b": None, "c": 2.0}).uploads == 2
    assert made.window({"a": 4.0, "b": 1.0, "c": 2.0}).seconds == 2.0
    assert made.window({"a": 4.0, "b": 1.0, "c": 2.0, "d": 3.0}).seconds == 2.0
    assert create("aggregator", "safsl-window", {"done": 0.8}).window({"a": 4.0, "b": 1.0, "c": 2.0}).seconds == 4.0
    run(tmp_path / "out", SPEEDS, aggregator={"name": "safsl-window", "done": 0.5}, framework={"uploads": 4})
    found = uploads(tmp_path / "out")
    times = sorted({one["virtual_time"] for one in found})
    lengths = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert all(one["waited"] <= max(lengths) for one in found)
    assert {one["client"] for one in found} == set(SPEEDS)


def test_weights_by_data_and_interval() -> None:
    uploads_ = [Upload("a", 0, 0.25), Upload("b", 3, 0.25)]
    assert create("aggregator", "safsl-window", {}).weigh(uploads_) == pytest.approx([0.1, 0.4])  # b = 0.5
    assert create("aggregator", "safsl-window", {"step": "full"}).weigh(uploads_) == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(("options", "said"), [({"done": 0.0}, "done is 0.0"), ({"length": 0.0}, "length is 0.0")])
def test_options_out_of_bounds(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        create("aggregator", "safsl-window", options)


def test_a_framework_that_waits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=r"aggregator 'safsl-window' weighs uploads by their delay"):
        train(model(), tmp_path / "out", {"ann": text_rows(3), "bob": text_rows(3)}, aggregator="safsl-window")
