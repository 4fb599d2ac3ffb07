"""The row's check: the exact limits, and which grouping is fast on the virtual clock."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import unsplit
import unsplit_clients
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from spine import MOSTLY_TWO, MOSTLY_U, TWO, adamw, adapter, by_turns, caught, equal, losses, model, train  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(3 + 3 * i, seed=i) for i, name in enumerate(("ann", "bob", "cid"))}


@MOSTLY_TWO
def test_one_group_that_hands_on_is_sequential_sl(partition: dict[str, Any], tmp_path: Path) -> None:
    common = {"partition": partition, "rounds": 3}
    train(model(), tmp_path / "one", ROWS, framework={"name": "sequential-sl", "local_steps": 2}, **common)
    train(model(), tmp_path / "two", ROWS, framework={"name": "gsfl", "groups": 1, "local_steps": 2}, **common)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert equal(adapter(tmp_path / "one"), adapter(tmp_path / "two"))


@by_turns("intra", ["sequential", "psl", "sfl-v2"])
def test_groups_of_one_are_sfl_v1(intra: str, partition: dict[str, Any], tmp_path: Path) -> None:
    common = {"partition": partition, "rounds": 3}
    train(model(), tmp_path / "one", ROWS, framework={"name": "sfl-v1", "local_steps": 2}, **common)
    framework = {"name": "gsfl", "groups": 3, "intra": intra, "local_steps": 2}
    train(model(), tmp_path / "two", ROWS, framework=framework, **common)
    assert sorted(losses(tmp_path / "one")) == sorted(losses(tmp_path / "two"))
    assert equal(adapter(tmp_path / "one"), adapter(tmp_path / "two"))


@MOSTLY_U
def test_groups_of_two_and_three_equal_plain_ones(partition: dict[str, Any], tmp_path: Path) -> None:
    """Three rounds, so that members go on who were no group's last, and with more than one step each."""
    sizes = {"ann": 3, "bob": 6, "cid": 4, "dan": 9, "eve": 2}
    rows = {name: text_rows(size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    groups, out = [["ann", "cid"], ["bob", "dan", "eve"]], tmp_path / "out"
    framework = {"name": "gsfl", "groups": groups, "local_steps": 2, "moments": "keep"}
    train(model(), out, rows, partition=partition, framework=framework, rounds=3)
    reference = unsplit_clients.groups_that_hand_on(
        model(), out / "adapter_initial", groups, rounds=3, local_steps=2, sizes=sizes, make_optimizer=adamw,
        batches={name: unsplit.text_batches(model(), texts, size=3) for name, texts in rows.items()},
    )  # fmt: skip
    assert sorted(losses(out)) == sorted(reference.losses)
    assert equal(adapter(out), reference.states["ann"])


def round_time(out: Path, run: list[Run], groups: list[list[str]], intra: str, outer: str) -> tuple[float, float]:
    """Virtual seconds of a round, and of all waiting in it."""
    fast, slow = {"device": "phone", "flops": 4e8}, {"device": "phone", "flops": 1e8}
    quick = {"up_mbps": 1e6, "down_mbps": 1e6, "rtt_ms": 0}
    clients = {f"{kind}{i}": text_rows(3, shortest=12, longest=12) for kind in ("f", "s") for i in range(4)}
    profiles = {name: {**(fast if name[0] == "f" else slow), **quick} for name in clients}
    framework = {"name": "gsfl", "groups": groups, "intra": intra, "outer": outer}
    train(model(), out, clients, partition=TWO, framework=framework, profiles=profiles, rounds=1)
    return run[-1].clock.now(), sum(run[-1].counters.waiting.values())


def test_which_grouping_is_fast(tmp_path: Path, caught: list[Run]) -> None:
    """Speeds 1:4, two groups of four; the server's and the links' time is next to nothing."""
    alike = [[f"f{i}" for i in range(4)], [f"s{i}" for i in range(4)]]
    mixed = [["f0", "f1", "s0", "s1"], ["f2", "f3", "s2", "s3"]]
    time = {
        (outer, intra, name): round_time(tmp_path / f"{outer}-{intra}-{name}", caught, groups, intra, outer)
        for outer, intra in (("sequential", "psl"), ("parallel", "sequential"), ("parallel", "psl"))
        for name, groups in (("alike", alike), ("mixed", mixed))
    }
    unit = time["parallel", "psl", "alike"][0] / 4  # the slowest sets it: a slow client's step, 4 units
    units = {key: round(value[0] / unit, 1) for key, value in time.items()}
    assert units["sequential", "psl", "alike"] == 5  # 1 + 4
    assert units["sequential", "psl", "mixed"] == 8  # 4 + 4
    assert units["parallel", "sequential", "alike"] == 16  # 4 * 4
    assert units["parallel", "sequential", "mixed"] == 10  # 2 * 1 + 2 * 4
    assert units["parallel", "psl", "mixed"] == 4


def test_bad_groups_are_refused(tmp_path: Path) -> None:
    for groups, said in (
        (4, "4 groups for 3 clients leave a group without clients"),
        ([["ann", "bob", "cid"], []], "group 1 has no clients"),
        ([["ann", "bobb"], ["cid"]], r"'bobb' is no client. Did you mean 'bob'\?; 'bob' is in no group"),
        ([["ann", "bob"], ["bob", "cid"]], "'bob' is in more than one group"),
    ):
        with pytest.raises(CutlayerError, match=said):
            train(model(), tmp_path / "out", ROWS, framework={"name": "gsfl", "groups": groups})
    with pytest.raises(CutlayerError, match="that is framework 'sequential-sl'"):
        train(model(), tmp_path / "out", ROWS, framework={"name": "gsfl", "outer": "sequential"})
