"""The row's check: a chain of three trainers is unsplit training, and its watermarks prove who trained what."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unsplit
from cutlayer import watermark
from cutlayer.driver import Run
from cutlayer.errors import CheckpointError, CutlayerError
from cutlayer.methods.framework.clicooper import dealt_evenly
from cutlayer.parties.client import secret_of
from cutlayer.wire import read_frames
from spine import (  # noqa: F401
    MOSTLY_TWO,
    PARTITIONS,
    TWO,
    U,
    adamw,
    adapter,
    by_turns,
    caught,
    equal,
    losses,
    model,
    resumed,
    train,
    twin_of,
)
from tiny import text_rows

ROWS = {name: text_rows(6, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
DEEP = {"num_hidden_layers": 6}


def chain(**options: Any) -> dict[str, Any]:
    return {"name": "clicooper", **options}


@by_turns("lengths", [None, "uneven"])
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


@MOSTLY_TWO
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


def test_blocks_are_dealt_as_evenly_as_can_be() -> None:
    assert dealt_evenly(7, 3) == [3, 2, 2]
    assert dealt_evenly(8, 3) == [3, 3, 2]
    assert dealt_evenly(2, 3) == [1, 1, 0]  # which the route refuses


def test_more_trainers_than_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=r"1 blocks .* do not fit a chain of 3 trainers"):
        train(model(), tmp_path / "out", ROWS, framework=chain())


MARKED = chain(watermark=0.1, stage_rounds=40, lengths=[1, 2, 2])


def marked(out: Path, **changes: Any) -> Any:
    common = {"partition": TWO, "framework": MARKED, "rounds": 80, "optimizer": {"name": "adamw", "lr": 1e-2}}
    return train(model(**DEEP), out, ROWS, **{**common, **changes})


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A marked run of two stages."""
    out = tmp_path_factory.mktemp("honest") / "out"
    marked(out)
    return out


def stages(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]


def copied(honest: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "watermark"
    shutil.copytree(honest / "watermark", folder)
    return folder


def test_2_every_stage_of_an_honest_run_is_proven(honest: Path) -> None:
    secrets = {name: secret_of(0, name) for name in ROWS}
    found = watermark.verify(honest / "watermark", secrets=secrets)
    assert [(v.stage, v.trainer) for v in found] == [(s, t) for s in (1, 2) for t in ("bob", "cid", "dan")]
    assert [(v.passed, v.error_rate) for v in found] == [(True, 0.0)] * 6
    other = watermark.verify(honest / "watermark", secrets={"cid": b"another"})
    assert [v.passed for v in other] == [v.trainer != "cid" for v in other]


def test_2_an_independent_checkpoint_has_no_mark(honest: Path, tmp_path: Path) -> None:
    """Another seed's run in the places of this one's weights: about half of the bits are wrong."""
    marked(tmp_path / "other", framework={**MARKED, "watermark": 0.0}, seed=1, rounds=20)
    state = {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): tensor
        for name, tensor in adapter(tmp_path / "other").items()
    }
    folder = copied(honest, tmp_path)
    for line in stages(folder)[-3:]:
        path = folder / f"stage-{line['stage']:06d}-{line['trainer']}.safetensors"
        save_file({name: state[name] for name in load_file(path)}, path)
    for verdict in watermark.verify(folder)[-3:]:
        assert abs(verdict.error_rate - 0.5) <= 0.15
        assert "the checkpoint is not the one that was committed to" in verdict.wrong


def test_2_a_skipped_stage_shows(honest: Path, tmp_path: Path) -> None:
    """A trainer that hands in the weights of the stage before."""
    folder = copied(honest, tmp_path)
    shutil.copy(folder / "stage-000001-cid.safetensors", folder / "stage-000002-cid.safetensors")
    wrong = {(v.stage, v.trainer): v for v in watermark.verify(folder) if not v.passed}
    assert set(wrong) == {(2, "cid")}
    assert abs(wrong[2, "cid"].error_rate - 0.5) <= 0.15


def test_2_a_lazy_trainer_that_commits_to_what_it_has_shows(tmp_path: Path) -> None:
    """At rate 0 nothing is trained: digests chain, but the marks are not there."""
    marked(tmp_path / "out", optimizer={"name": "sgd", "lr": 0.0}, rounds=8)
    found = watermark.verify(tmp_path / "out" / "watermark")
    assert [v.stage for v in found] == [1, 1, 1]
    assert all(len(v.wrong) == 1 and "of the bits are wrong" in v.wrong[0] for v in found)
    assert all(abs(v.error_rate - 0.5) <= 0.15 for v in found)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 4), (2, 3)])
def test_2_swapped_stages_break_the_chain(first: int, second: int, honest: Path, tmp_path: Path) -> None:
    """As they are, and numbered anew."""
    folder = copied(honest, tmp_path)
    lines = stages(folder)
    lines[first], lines[second] = lines[second], lines[first]
    orders = [lines, [{**line, "stage": number // 3 + 1} for number, line in enumerate(lines)]]
    kept = {(line["stage"], line["trainer"]): line["weights"] for line in stages(folder)}
    assert len(set(kept.values())) == 6
    for order in orders:
        (folder / "stages.jsonl").write_text("".join(json.dumps(line) + "\n" for line in order))
        for line in order:  # each with its own checkpoint
            source = next(key for key, weights in kept.items() if weights == line["weights"])
            target = folder / f"stage-{line['stage']:06d}-{line['trainer']}.safetensors"
            shutil.copy(honest / "watermark" / f"stage-{source[0]:06d}-{source[1]}.safetensors", target)
        found = watermark.verify(folder)
        broken = [i for i, v in enumerate(found) if "the digest does not follow from the stage before" in v.wrong]
        assert {first, second} <= set(broken)


def test_2_the_task_is_learnt_as_well(honest: Path, tmp_path: Path) -> None:
    """The mean loss of the last epochs is within 2 % of the unmarked run's."""
    marked(tmp_path / "plain", framework={**MARKED, "watermark": 0.0})
    late = [sum(loss for _, loss in losses(out)[-6:]) / 6 for out in (honest, tmp_path / "plain")]
    print(late)
    assert late[1] < 0.97 * losses(honest)[0][1]
    assert abs(late[0] / late[1] - 1) <= 0.02
    assert not (tmp_path / "plain" / "watermark").exists()


@MOSTLY_TWO
def test_a_marked_run_goes_on_exactly_after_an_end(partition: dict[str, Any], tmp_path: Path) -> None:
    """In the middle of a stage, clipping on; what is proven is the same."""
    changes = {
        "partition": partition, "rounds": 4, "checkpoint_every": 1, "max_grad_norm": 0.5,
        "framework": chain(watermark=0.1, stage_rounds=3),
    }  # fmt: skip
    train(model(**DEEP), tmp_path / "whole", ROWS, **changes)
    part = twin_of(tmp_path / "whole")
    resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    assert equal(adapter(part), adapter(tmp_path / "whole"))
    assert stages(part / "watermark") == stages(tmp_path / "whole" / "watermark")
    assert [line["stage"] for line in stages(part / "watermark")] == [1, 1, 1, 2, 2, 2]


def test_a_pattern_uses_each_weight_once_and_follows_its_key() -> None:
    for weights, used, bits in ((200, 150, 128), (130, 1024, 128), (10_000, 1024, 256)):
        pattern = watermark.pattern_of(b"key", weights=weights, used=used, bits=bits)
        count = min(used, weights)
        assert len(set(pattern.places.tolist())) == len(pattern.places) == count
        assert pattern.signs.shape == (bits, count)
        assert set(pattern.signs.unique().tolist()) == {-1.0, 1.0}
        assert 0.3 < float(pattern.bits.mean()) < 0.7
        again = watermark.pattern_of(b"key", weights=weights, used=used, bits=bits)
        assert torch.equal(pattern.signs, again.signs)
        assert torch.equal(pattern.places, again.places)
        other = watermark.pattern_of(b"yek", weights=weights, used=used, bits=bits)
        assert not torch.equal(pattern.signs, other.signs)


def test_what_cannot_be_marked_or_read_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"watermark": -1.0}, "watermark is -1.0"),
        ({"watermark": float("inf")}, "a finite number from 0 on"),
        ({"mark_weights": 8}, r"mark_weights is 8; it must be mark_bits \(128\) or more"),
        ({"stage_rounds": 0}, "stage_rounds is 0"),
        ({"watermark": 0.1, "mark_bits": 1000, "lengths": [1, 2, 1]}, "needs as many trained weights"),
    ):
        with pytest.raises(CutlayerError, match=said):
            train(model(**DEEP), tmp_path / "out", ROWS, framework=chain(**options))
    with pytest.raises(CheckpointError, match="cannot be read"):
        watermark.verify(tmp_path)
