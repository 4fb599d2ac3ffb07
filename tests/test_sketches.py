"""What clients tell of their data: only if asked, only what the run names, and exactly those bytes."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arranged import labelled_rows, two_domains
from cutlayer.contracts import Batch, Example
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError, WireError
from cutlayer.sketches import Sketch, Teller, bucket_of, hash_similarity, hashed, simulated_secrets
from cutlayer.wire import Header, read_frames
from spine import caught, losses, model, train  # noqa: F401

TEXTS = two_domains(4)


def told_frames(wire: Path) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    return [
        (line, dict(zip(header.names, tensors, strict=True)))
        for line, header, tensors in read_frames(wire)
        if line["kind"] == "sketch"
    ]


def test_nothing_is_told_unless_the_run_says_so(tmp_path: Path, caught: list[Run]) -> None:
    train(model(), tmp_path / "out", TEXTS, framework="sfl-v1", rounds=1, record_wire=str(tmp_path / "wire"))
    assert told_frames(tmp_path / "wire") == []
    party = caught[0].parts.clients["c0"]
    with pytest.raises(WireError, match="asked for a sketch of its data, and has agreed to none"):
        party.handle(Header("partition", verb="sketch"), [])


def test_labels_leave_as_proportions_once_a_client(tmp_path: Path) -> None:
    rows = {
        "ann": labelled_rows([0, 0, 1, 0], seed=1, telling=1.0),
        "bob": labelled_rows([1, 1], seed=2, telling=1.0),
    }
    for out, selection in (("with", {"name": "csfl", "sketch": "labels", "threshold": 2.0}), ("without", "all")):
        train(
            model("distilbert"), tmp_path / out, rows, data={"format": "classification"}, framework="sfl-v1", rounds=2,
            partition={"name": "two-part-split", "head_blocks": 1}, selection=selection,
            record_wire=str(tmp_path / f"wire-{out}"),
        )  # fmt: skip
    found = told_frames(tmp_path / "wire-with")
    assert [(line["sender"], line["receiver"], line["step_name"]) for line, _ in found] == [
        ("ann", "server", "partition"), ("bob", "server", "partition"),
    ]  # fmt: skip
    assert found[0][1]["sketch"].tolist() == [0.75, 0.25]
    assert found[1][1]["sketch"].tolist() == [0.0, 1.0]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    count = {out: len(list(read_frames(tmp_path / f"wire-{out}"))) for out in ("with", "without")}
    assert count["with"] - count["without"] == 4  # a request and an answer each


def teller(sketch: Sketch, *lengths: int, own: int = 1) -> Teller:
    examples = [Example(input_ids=list(range(3, 3 + length)), labels=list(range(length))) for length in lengths]

    def batch(chosen: Any) -> Batch:
        ids = torch.tensor([list(e.input_ids)[:1] for e in chosen])
        return Batch(ids, None, None, ids, 1, 1)

    return Teller(sketch, "ann", examples, batch, 0, vocabulary=90, seed=0, shared=1, own=own)


def embedded(batch: Batch) -> torch.Tensor:
    """Hidden states [B,1,4] that follow from the first token."""
    return torch.stack([torch.sin(batch.input_ids * k).float() for k in (1.0, 2.0, 3.0, 4.0)], dim=-1)


def test_free_text_sketches_are_what_they_say() -> None:
    lengths = teller(Sketch("lengths"), 1, 2, 3, 8).tell(embedded)
    assert lengths.tolist() == [0.25, 0.0, 0.25, 0.25, 0.0, 0.0, 0.25, *[0.0] * 25]
    tokens = teller(Sketch("tokens"), 1, 3).tell(embedded).double().numpy()
    expected = np.zeros(64)
    for token in (3, 3, 4, 5):
        expected[bucket_of(np.array([token]))[0]] += 0.25
    assert np.allclose(tokens, expected)
    features = teller(Sketch("features"), 2, 3).tell(embedded)
    assert features.shape == (4,)
    assert float(features.norm()) == pytest.approx(1.0)


def test_features_are_told_apart_from_what_is_common() -> None:
    """Less the mean of a common text, clients with unlike texts look unlike; less that of random tokens, less so."""

    def feature(first: int, common: bool) -> np.ndarray:
        made = teller(Sketch("features"), 1)
        texts = [Example(input_ids=[token], labels=[token]) for token in (30, 31)]
        own = [Example(input_ids=[first], labels=[first])]
        made = replace(made, examples=own, common=texts if common else ())
        return made.tell(lambda b: (5 + 0.1 * embedded(b)) * (b.input_ids < 32)[..., None]).double().numpy()

    apart = {common: float(feature(30, common) @ feature(31, common)) for common in (True, False)}
    assert apart[True] == pytest.approx(-1.0)
    assert apart[False] > 0.9


def test_noise_and_flips_are_a_client_s_own_and_stay_the_same() -> None:
    for sketch in (Sketch("lengths", noise=0.1), Sketch("features", noise=0.1), Sketch("hash", flip=0.2)):
        first, again = (teller(sketch, 2, 5).tell(embedded) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, teller(sketch, 2, 5, own=2).tell(embedded))
    blurred = teller(Sketch("lengths", noise=0.1), 2, 5).tell(embedded)
    assert float(blurred.sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(blurred.min()) >= 0


def test_two_tellings_do_not_cancel_the_noise() -> None:
    """Of other values it is other noise, as what two tellings have in common would be known by their difference."""

    def moved(batch: Batch) -> torch.Tensor:
        return embedded(batch) + 0.2 * torch.cos(batch.input_ids * 3.0)[..., None]

    def bits(flip: float, head: Any) -> np.ndarray:
        return np.unpackbits(teller(Sketch("hash", bits=512, flip=flip), 2, 5).tell(head).numpy())

    first, second = (bits(0.2, head) ^ bits(0.0, head) for head in (embedded, moved))  # which bits were turned
    assert (bits(0.0, embedded) != bits(0.0, moved)).any()
    for turned in (first, second):
        assert 60 < turned.sum() < 145  # 102 are to be expected
    assert (first != second).sum() > 100  # 164 are to be expected
    made = teller(Sketch("features", noise=0.1), 2, 5)
    clean = np.array([0.6, 0.8, 0.0, -0.0])
    noise = made._blurred(clean) - clean
    assert np.array_equal(noise, made._blurred(-(0 - clean)) - clean)  # where 0 and -0 have changed places
    others = [clean + change * np.eye(4)[0] for change in (1e-9, 1.0)]
    for other in others:
        assert np.abs(made._blurred(other) - other - noise).min() > 1e-4
    tellings = np.mean([made._blurred(clean + 1e-9 * n) for n in range(2000)], axis=0)
    assert np.abs(tellings - clean).max() < 0.02  # each further telling adds up: this is not hidden from who asks often


def test_a_hash_is_made_with_a_secret_that_is_in_no_frame(tmp_path: Path) -> None:
    feature = np.random.default_rng(0).standard_normal(32)
    sketch = Sketch("hash")
    one, two = (hashed(feature, sketch, shared=shared, own=1) for shared in (1, 2))
    signs = [np.unpackbits(h) * 2.0 - 1 for h in (one, two)]
    assert abs(hash_similarity(*signs)) < 0.3  # of one feature, to who has another secret
    wire = tmp_path / "wire"
    train(
        model(), tmp_path / "out", TEXTS, framework={"name": "gsfl", "groups": "selection"},
        selection="gsfl-hash-grouping", rounds=1, record_wire=str(wire),
    )  # fmt: skip
    secrets = {str(secret) for client in TEXTS for secret in simulated_secrets(0, client)}
    for _, header, _ in read_frames(wire):
        assert not any(secret in str(header) for secret in secrets)


BAD: list[tuple[Any, Any, str]] = [
    ("sfl-v1", {"name": "csfl", "sketch": "labels"}, "the data are texts without classes"),
    ("sfl-v1", "csfl", "needs the option 'sketch'"),
    ("sfl-v1", {"name": "csfl", "sketch": "tokens", "clusters": 5}, "5 clusters for 4 clients"),
    ("sfl-v1", {"name": "csfl", "sketch": "features", "refresh": 2}, "whose features cannot be compared"),
    ("psl", {"name": "csfl", "sketch": "tokens"}, "makes clusters, which framework 'psl' cannot follow"),
    (
        "sfl-v1",
        {"name": "csfl", "sketch": "tokens", "aggregator": "mhsl"},
        "averages within clusters, but aggregator 'mhsl' merges nothing",
    ),
    ("gsfl", "gsfl-hash-grouping", "Set framework.groups: selection"),
    ({"name": "gsfl", "groups": "selection"}, "all", "selection 'all' makes none"),
    ({"name": "gsfl", "groups": "selection"}, {"name": "gsfl-hash-grouping", "groups": 5}, "5 groups for 4 clients"),
    ({"name": "gsfl", "groups": "selection"}, {"name": "gsfl-hash-grouping", "bits": 20}, "a multiple of 8"),
    ({"name": "gsfl", "groups": "selection"}, {"name": "gsfl-hash-grouping", "flip": 0.5}, "below 0.5"),
    (
        {"name": "gsfl", "groups": "selection", "outer": "sequential", "intra": "psl"},
        {"name": "parallelsfl", "sketch": "tokens"},
        "makes hosts, which framework 'gsfl' cannot follow",
    ),
    ({"name": "pairingfl", "pairs": "selection"}, "all", "selection 'all' makes none"),
    ("pairingfl", {"name": "pairingfl-selection", "sketch": "tokens"}, "has its own rule for that"),
    (
        {"name": "pairingfl", "pairs": "selection"},
        {"name": "pairingfl-selection", "sketch": "tokens", "count": 3},
        "more than half of the 4 clients",
    ),
    ("sfl-v1", {"name": "pairingfl-selection", "sketch": "tokens", "count": 5}, "count is 5, but there are 4 clients"),
]


@pytest.mark.parametrize(("framework", "selection", "said"), BAD, ids=[said for _, _, said in BAD])
def test_what_cannot_be_is_refused_before_a_model_is_read(framework: Any, selection: Any, said: str) -> None:
    from cutlayer.config import load_config

    run = {"model": "nowhere", "data": {"train": "nowhere"}, "clients": 4, "partition": "two-part-split"}
    if isinstance(selection, dict):
        selection = dict(selection)
        run |= {"aggregator": selection.pop("aggregator", "fedavg")}
    with pytest.raises(CutlayerError, match=said):
        load_config({**run, "framework": framework, "selection": selection})
