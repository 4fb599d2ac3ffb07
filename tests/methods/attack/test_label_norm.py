"""``label-norm``: of two labels the rarer one has the longer gradients, once the model predicts by frequency."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import class_rows, class_view, record_classes, scored, truth, with_gradients
from cutlayer.audit.auditing import audit
from cutlayer.audit.classes import samples_of
from cutlayer.audit.scores import auc_error
from cutlayer.contracts import Attack, Layout
from cutlayer.errors import MethodError
from cutlayer.registry import create
from spine import U, model, often
from tiny import text_rows, write_rows

NAME = "label-norm"
# What a run is, and its steps at which the loss is that of the labels' shares and no class is learned yet.
CLASSIFIER: dict[str, Any] = {"family": "roberta", "kind": "classification", "lr": 1e-2, "steps": range(4, 12)}
WORDS: dict[str, Any] = {
    "family": "llama", "kind": "prompt-completion", "lr": 3e-3, "peft": "full", "steps": range(24, 36)
}  # fmt: skip


def leaked(root: Path, rarer: float, run: dict[str, Any], **options: Any) -> tuple[Any, Attack, Any]:
    """A run in which the rarer label has that share, and what the attack's adversary has of the steps in question."""
    rows = class_rows(320, [1 - rarer, rarer], told=0.3)
    changes = {key: run[key] for key in ("kind", "peft") if key in run}
    found = record_classes(
        model(run["family"]), root, rows, batch_size=16, steps=run["steps"].stop,
        optimizer={"name": "adamw", "lr": run["lr"]}, **changes,
    )  # fmt: skip
    attack = create("attack", NAME, options)
    return found, attack, class_view(found, attack, run["steps"])


@pytest.mark.parametrize("run", often([CLASSIFIER, WORDS], CLASSIFIER), ids=["classifier", "words"])
def test_the_rarer_label_is_longer(run: dict[str, Any], tmp_path: Path) -> None:
    """Seen: AUC 1.00 at 10/90 against 0.73 at 50/50 (classifier), 1.00 and 0.55 (two words of a language model)."""
    found, attack, seen = leaked(tmp_path / "unequal", 0.1, run)
    got = scored(found, attack, seen)
    assert got.auc is not None
    assert got.auc > 0.9
    assert got.token_recovery > got.constant
    equal, _, half = leaked(tmp_path / "equal", 0.5, run)
    balanced = scored(equal, attack, half).auc
    assert balanced is not None
    assert abs(balanced - 0.5) < abs(got.auc - 0.5) - 0.1
    assert scored(found, attack, seen.shuffled()).auc == pytest.approx(0.5, abs=0.2)
    separate = create("attack", NAME, {"threshold": "groups"})
    assert scored(found, separate, seen).token_recovery > got.constant


def test_lengths_that_say_nothing(tmp_path: Path) -> None:
    """Each gradient times exp(s N(0, 1)): the AUC falls to that of two normals so far apart, and to 0.5 with a large s.

    The catalogue has s = 3 for 0.5. Not so at 10/90, where the logarithms are ln 9 apart: 0.70 is left, as computed.
    """
    found, attack, seen = leaked(tmp_path, 0.1, CLASSIFIER)
    lengths = samples_of(seen.exchanges, None, ["send_gradients"]).sent["send_gradients"].norm(dim=1).log()
    rare = truth(found, seen) == list(found.classes)[-1]
    error = auc_error(int(rare.sum()), int((~rare).sum()))
    for size in (3.0, 10.0):
        other = with_gradients(
            seen, lambda g, drawn, size=size: g * torch.exp(size * torch.randn(len(g), 1, 1, generator=drawn))
        )
        apart = lengths[rare].mean() - lengths[~rare].mean()
        expected = float(torch.distributions.Normal(0.0, 1.0).cdf(apart / (size * 2**0.5)))
        assert scored(found, attack, other).auc == pytest.approx(expected, abs=2.5 * error)
        assert expected > 0.6 if size == 3.0 else expected < 0.58


def test_what_it_cannot_have_is_refused(tmp_path: Path) -> None:
    threat = create("attack", NAME, {}).threat
    at_client, at_server = (Layout(range(1), range(1, 3), range(3, 3), tail_at_client=at) for at in (True, False))
    why = partial(threat.unmet, task="classification", auxiliary=False)
    assert why(at_client, classes=2) is None
    assert why(at_client, classes=3) == "it tells two classes apart, and this run has 3"
    assert "here the server holds the tail" in str(why(at_server, classes=2))
    others = partial(create("attack", "label-cluster", {}).threat.unmet, at_client, task="causal", auxiliary=False)
    assert others(classes=64) is None
    assert others(classes=65) == "it tells 2 to 64 classes apart, and this run has 65"
    run: dict[str, Any] = {
        "model": str(model()), "clients": 1, "partition": U, "steps": 1, "batch_size": 2, "device": "cpu",
        "data": {"train": str(write_rows(tmp_path / "b.jsonl", text_rows(2))), "format": "text"},
    }  # fmt: skip
    with pytest.raises(
        MethodError, match=r"rows of this run have more than one label each\. It needs a classifier, or"
    ):
        audit(run, out=tmp_path / "text", attacks=[NAME], budget="quick", progress=False)


def test_the_audit_of_a_classifier_plays_it(tmp_path: Path) -> None:
    """With the other attacks on labels of this family, over the whole run, and with an AUC of what ranks."""
    run = {
        "model": str(model("roberta")), "clients": 1, "steps": 8, "batch_size": 8, "device": "cpu",
        "partition": {**U, "tail_blocks": 0}, "optimizer": {"name": "adamw", "lr": 1e-2},
        "data": {"train": str(write_rows(tmp_path / "a.jsonl", class_rows(64, [0.75, 0.25]))),
                 "format": "classification", "max_length": 24},
    }  # fmt: skip
    done = audit(run, out=tmp_path / "audit", budget="quick", progress=False)
    rows = {row["attack"]: row for row in done.rows if row["moment"] == "whole run"}
    assert set(rows) >= {NAME, "label-direction", "label-distance", "label-cluster", "exploit-label"}
    assert rows[NAME]["auc"] > 0.8
    assert rows[NAME]["positions"] == 64
    assert rows["label-direction"]["positions"] == 62, "two of them were told"
    assert rows["label-distance"]["auc"] is None
    assert "AUC of" in " ".join(done.verdict) or "of the labels" in " ".join(done.verdict)
