"""The row's check: a chain of three trainers is unsplit training."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import unsplit
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from cutlayer.wire import read_frames
from spine import PARTITIONS, U, adamw, adapter, caught, equal, losses, model, train  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(6, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
DEEP = {"num_hidden_layers": 6}


def chain(**options: Any) -> dict[str, Any]:
    return {"name": "clicooper", **options}


@PARTITIONS
@pytest.mark.parametrize("lengths", [None, "uneven"])
def test_1_a_chain_of_three_equals_unsplit(lengths: str | None, partition: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit: losses, and every trained tensor of the owner's model."""
    out, middle = tmp_path / "out", 5 if partition is not U else 4
    framework = chain(local_steps=2, lengths=None if lengths is None else [1, middle - 2, 1])
    train(model(**DEEP), out, ROWS, partition=partition, framework=framework, rounds=3)
    batches = unsplit.text_batches(model(**DEEP), ROWS["ann"], size=3)
    reference = unsplit.train(
        model(**DEEP), [[b] for b in batches * 3], adapter=out / "adapter_initial", make_optimizer=adamw
    )
    assert losses(out) == [("ann", loss) for loss in reference.losses]
    assert equal(adapter(out), reference.state)


@PARTITIONS
def test_owners_in_turn_equal_sequential_sl(partition: dict[str, Any], tmp_path: Path) -> None:
    """Two owners over a chain of two are sequential SL with the chain for a server."""
    common = {"partition": partition, "rounds": 3}
    framework = chain(owners=["ann", "cid"], chain=["dan", "bob"], local_steps=2)
    train(model(**DEEP), tmp_path / "chain", ROWS, framework=framework, **common)
    owners = {name: ROWS[name] for name in ("ann", "cid")}
    train(model(**DEEP), tmp_path / "sl", owners, framework={"name": "sequential-sl", "local_steps": 2}, **common)
    assert losses(tmp_path / "chain") == losses(tmp_path / "sl")
    assert equal(adapter(tmp_path / "chain"), adapter(tmp_path / "sl"))


@PARTITIONS
def test_who_talks_to_whom(partition: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """Neighbours of the chain only; labels go to the last trainer, or nowhere."""
    wire = tmp_path / "wire"
    train(
        model(**DEEP), tmp_path / "out", ROWS, partition=partition, framework=chain(), rounds=1, record_wire=str(wire)
    )
    path = ["ann", "bob", "cid", "dan"]
    down = list(itertools.pairwise(path)) + ([("dan", "ann")] if partition is U else [])
    seen, labels = {"activations": set(), "gradient": set()}, set()
    for line, header, _ in read_frames(wire):
        if line["kind"] in seen:
            seen[line["kind"]].add((line["sender"], line["receiver"]))
        if "labels" in header.names:
            labels.add(line["receiver"])
    assert seen["activations"] == set(down)
    assert seen["gradient"] == {(b, a) for a, b in down}
    assert labels == (set() if partition is U else {"bob", "cid", "dan"})
    assert all(party.slot.version == 1 for party in caught[0].parts.clients.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"owners": 4}, "needs a trainer beside its 4 of 4 clients"),
        ({"owners": ["eve"]}, "'eve' is no client"),
        ({"owners": ["ann"], "chain": ["bob", "ann"]}, "'ann' is named 2 times"),
        ({"lengths": [1, 1]}, r"lengths \[1, 1\] do not fit a chain of 3 trainers"),
        ({"lengths": [4, 0, 0]}, "each trainer runs at least one block"),
        ({"owners": 0}, "owners is 0"),
    ],
)
def test_what_is_no_chain_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=said):
        train(model(**DEEP), tmp_path / "out", ROWS, framework=chain(**options))


def test_more_trainers_than_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=r"1 blocks .* do not fit a chain of 3 trainers"):
        train(model(), tmp_path / "out", ROWS, framework=chain())
