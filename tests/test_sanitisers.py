"""Defenses that replace tokens: what all of them keep to, and what is still read of real text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cutlayer
import sanitising
from apart import Apart, steps
from cutlayer.contracts import IGNORE, Example
from cutlayer.defense import Sends, spent_in_words
from cutlayer.errors import ConfigError
from cutlayer.noise import Noise
from cutlayer.parties.client import secret_of
from defending import ROWS, client, defending, frames, run_of, trained
from sanitising import SPECIALS, made, sanitised, toy
from spine import TWO, U, adapter, equal, losses, often

NAMES = ["dchi-embedding", "santext", "custext", "rantext", "cape"]
EVERY = pytest.mark.parametrize("name", NAMES)
WEAK = {name: {"eta" if name == "dchi-embedding" else "epsilon": 1e6} for name in NAMES}
WEAK["cape"] |= {"buckets": 1000, "fit": 0.0}
METRIC = ("dchi-embedding", "santext")
KINDS = {"dchi-embedding": "metric", "santext": "metric", "custext": "local", "rantext": "empirical", "cape": "local"}


@pytest.mark.parametrize("name", often(NAMES, "dchi-embedding"))
def test_what_changes_no_token_changes_no_bit(name: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", [])
    same = trained(tmp_path / "same", [{"name": name, **WEAK[name]}])
    assert losses(plain.out) == losses(same.out)
    assert equal(adapter(plain.out), adapter(same.out))
    assert plain.summary["eval"]["after"] == same.summary["eval"]["after"]
    other = trained(tmp_path / "other", [name])
    assert losses(plain.out) != losses(other.out)
    assert plain.summary["bytes"] == other.summary["bytes"]


@EVERY
def test_special_tokens_stay_and_nothing_becomes_one(name: str) -> None:
    defense = made(name, toy(40), unchanged=0.3)
    rows = [[0, *range(2, 40), 1, *range(2, 40)] for _ in range(5)]
    for row, other in zip(rows, sanitised(defense, rows), strict=True):
        assert [at for at, token in enumerate(other) if token in SPECIALS] == [0, 39]
        assert (other[0], other[39]) == (row[0], row[39])
        assert other != row
        assert max(other) < 40
    assert sanitised(defense, [[0, 1]]) == [[0, 1]]


@EVERY
def test_labels_are_of_the_new_text_or_true(name: str) -> None:
    row = list(range(2, 30))
    example = Example(row, [IGNORE] * 10 + row[10:])
    new = made(name, toy(40), unchanged=0.3).example(example, Noise(b"s", 0))
    assert new.labels == [IGNORE] * 10 + list(new.input_ids)[10:]
    true = made(name, toy(40), unchanged=0.3, labels="true").example(example, Noise(b"s", 0))
    assert (true.input_ids, true.labels) == (new.input_ids, example.labels)
    classified = made(name, toy(40), unchanged=0.3).example(Example(row, label=1), Noise(b"s", 0))
    assert (classified.labels, classified.label) == (None, 1)


@pytest.mark.parametrize("name", often(NAMES, "dchi-embedding", "custext"))
def test_a_text_is_replaced_once_or_in_each_epoch_anew(name: str, tmp_path: Path) -> None:
    for mode, other in (("once", False), ("fresh", True)):
        party = client(tmp_path / mode, [{"name": name, "mode": mode, "unchanged": 0.3}])
        epoch = party.batches.steps_per_epoch
        shown: list[dict[int, tuple[int, ...]]] = [{}, {}]
        for turn, found in enumerate(shown):
            for step in range(turn * epoch, (turn + 1) * epoch):
                for batch, rows in zip(party.batches.step(step), party.batches.rows(step), strict=True):
                    for row, ids in zip(rows, batch.input_ids, strict=True):
                        found[row] = tuple(ids[: len(party.batches.examples[row].input_ids)].tolist())
        assert (shown[0] != shown[1]) == other
        (first, *_) = [make().input_ids for make in party.evaluation]
        (again, *_) = [make().input_ids for make in party.evaluation]
        assert torch.equal(first, again)
    assert made(name, toy(40)).example(Example([5] * 9, [5] * 9), Noise(b"a")).input_ids != (
        made(name, toy(40)).example(Example([5] * 9, [5] * 9), Noise(b"b")).input_ids
    )


@EVERY
def test_strength_is_set_by_the_share_that_stays(name: str) -> None:
    """What is sought on public random tokens holds for others of that kind; more of it, more stays."""
    ground, rows = toy(60), [list(range(2, 60)) * (4 if name == "cape" else 40)]
    stays = []
    for unchanged in (0.3, 0.6, 0.9):
        defense = made(name, ground, unchanged=unchanged, **({"radius": 3.0} if name == "rantext" else {}))
        assert defense.stay == pytest.approx(unchanged, abs=0.01)
        stays.append(sanitising.share(rows, sanitised(defense, rows)))
        if name != "cape":  # which goes by tokens that fit
            assert stays[-1] == pytest.approx(unchanged, abs=0.08)
    assert stays == sorted(stays)


@EVERY
def test_what_is_claimed(name: str, tmp_path: Path) -> None:
    """Bounds add up over versions of a text; none is claimed where true labels carry it past the replacement."""
    told = made(name, toy(40), unchanged=0.5).spent(toy(40), Sends(3, 2))
    assert told.releases == 1
    packed = replace(toy(40), packed=True)
    assert made(name, packed, unchanged=0.5).spent(packed, Sends(3, 2)) == told, "what is claimed is of a token"
    fresh = made(name, toy(40), unchanged=0.5, mode="fresh").spent(toy(40), Sends(3, 5))
    assert fresh.releases == 3
    assert "50% of " in told.mechanism
    words = spent_in_words({"defense": name, **told.told()})
    assert ("no epsilon" in words) == (told.kind != "local"), "a rate of distance is not called one"
    assert (told.kind, told.delta) == (KINDS[name], 0.0 if KINDS[name] == "local" else None)
    if told.kind != "empirical":
        assert fresh.epsilon == pytest.approx(3 * told.epsilon)
    (trains,) = defending(tmp_path / "a", [name]).told(Sends(1, 1))
    assert (trains["kind"], trains["why"]) == (told.kind, told.why), "what is trained on is what was released"
    assert bool(told.why) == (told.kind == "empirical") == (told.epsilon is None)
    (true,) = defending(tmp_path / "b", [{"name": name, "labels": "true"}]).told(Sends(1, 1))
    assert (true["kind"], true["epsilon"]) == ("empirical", None)
    assert "the true labels, which are the text, can be solved" in true["not_covered"]
    with pytest.raises(ConfigError, match="would send the true text as labels"):
        cutlayer.train(run_of(tmp_path / "c", [{"name": name, "labels": "true"}], partition=TWO), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "partition"), often([(n, p) for n in NAMES for p in (TWO, U) if n != "cape" or p is U], ("santext", TWO))
)
def test_the_server_never_sees_the_text(name: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """Labels that are sent are those of the new text, in training and in evaluation."""
    trained(
        tmp_path / "run", [{"name": name, "unchanged": 0.02 if name in METRIC else 0.3}], partition=partition,
        record_wire=str(tmp_path / "wire"),
    )  # fmt: skip
    true = set()
    for make in client(tmp_path / "plain", [], partition=partition).evaluation:
        true |= {tuple(row[row != IGNORE].tolist()) for row in make().labels}
    seen = {
        tuple(row[row != IGNORE].tolist())
        for header, tensors in frames(tmp_path / "wire") if header.sender != "server"
        for key, tensor in tensors.items() if key == "labels"
        for row in tensor
    }  # fmt: skip
    assert bool(seen) == (partition is TWO)
    assert not seen & true


@pytest.mark.slow
def test_between_processes_is_the_simulation(tmp_path: Path) -> None:
    """Over several epochs, one defense after the other."""
    defense = [{"name": "custext", "mode": "fresh", "unchanged": 0.7}, {"name": "santext", "unchanged": 0.7}]
    run = Apart(tmp_path / "apart", {"ann": ROWS, "bob": ROWS[:5]}, defense=defense, rounds=2)
    for name in run.files:
        (run.root / name).mkdir()
        (run.root / name / "secret").write_bytes(secret_of(0, name))
    server = run.serve()
    run.ended({**{name: run.join(name) for name in run.files}, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)
    assert run.summary()["bytes"] == alone.summary["bytes"]


@pytest.mark.slow
@EVERY
def test_of_real_text_less_is_read_the_more_is_replaced_and_the_model_pays(
    name: str, record_property: pytest.RecordProperty
) -> None:
    """An inverter that was fitted on clean public states reads what was fed: hardly more than what stayed.

    Who sanitised public text, too, guesses more; that is reported, and bounded by nothing.
    """
    rows = sanitising.real_texts(count=4 if name == "cape" else 16)
    read, losses = [], [sanitising.loss(rows)]
    for unchanged in sanitising.SHARES:
        defense = made(name, sanitising.real_ground(), unchanged=unchanged)
        fed = sanitised(defense, rows)
        stayed = sanitising.share(rows, fed)
        read.append(sanitising.share(rows, sanitising.inverted(fed)))
        losses.append(sanitising.loss(fed))
        assert read[-1] < stayed + 0.1
        adaptive = None if name == "cape" else sanitising.share(rows, sanitising.informed(defense, fed))  # too long
        print(name, unchanged, "stayed", stayed, "read", read[-1], "adaptive", adaptive, "loss", losses[-1])
        record_property(f"{name} {unchanged}", (stayed, read[-1], adaptive, losses[-1]))
    assert sanitising.share(rows, sanitising.inverted(rows)) > 0.9
    assert read == sorted(read, reverse=True)
    assert losses == sorted(losses)
