"""``unsplit-label``: of all labels the one whose gradient through a surrogate tail is nearest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import class_rows, record, record_classes, scored, view
from cutlayer.audit.auditing import audit
from cutlayer.audit.norms import squared_lengths
from cutlayer.audit.public import load_public
from cutlayer.audit.softmax import Top
from cutlayer.registry import create
from spine import model, often
from tiny import text_rows, write_rows

NAME = "unsplit-label"


def u_shape(tail: int) -> dict[str, Any]:
    return {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": tail}


@pytest.mark.parametrize(
    ("family", "tail"),
    often(
        [(family, tail) for family in ("llama", "gpt2", "gemma", "gemma2", "opt", "gpt_neox") for tail in (0, 1)],
        ("llama", 0), ("llama", 1), ("gemma2", 0),
    ),
)  # fmt: skip
def test_the_labels_of_the_first_step(family: str, tail: int, tmp_path: Path) -> None:
    """Seen: 1.000 of all, by the square and by the cosine; at most 0.034 with a random surrogate."""
    found = record(model(family), tmp_path, partition=u_shape(tail))
    for distance in ("square", "cosine"):
        attack = create("attack", NAME, {"distance": distance})
        seen = view(found, attack)
        assert scored(found, attack, seen).token_recovery > 0.99
    other = create("attack", NAME, {"surrogate": "random"})
    got = scored(found, other, seen)
    assert got.token_recovery < got.constant
    assert scored(found, attack, seen.shuffled()).token_recovery < 0.5


@pytest.mark.parametrize("tail", often([0, 1], 0))
def test_after_tens_of_steps(tail: int, tmp_path: Path) -> None:
    """Seen after 40 steps of LoRA: above 0.99 with the norm and the head as the tail, above 0.8 with a block more."""
    found = record(model(), tmp_path, partition=u_shape(tail), steps=40, optimizer={"name": "adamw", "lr": 2e-3})
    attack = create("attack", NAME, {})
    seen = view(found, attack, last=True)
    assert seen.exchanges[0].step == 39
    assert scored(found, attack, seen).token_recovery > (0.99 if tail == 0 else 0.8)


def test_completions_alone_have_labels(tmp_path: Path) -> None:
    """Of a prompt's positions nothing is said; the scale of the loss, over few positions, is found."""
    found = record_classes(model(), tmp_path, class_rows(12, [0.5, 0.5]), kind="prompt-completion", steps=1)
    attack = create("attack", NAME, {})
    seen = view(found, attack)
    got = scored(found, attack, seen)
    assert (got.token_recovery, got.positions) == (1.0, 3)
    assert int((next(iter(attack.finish(seen).tokens.values())) >= 0).sum()) == 3


@pytest.mark.parametrize("family", often(["llama", "gpt2", "gemma", "opt", "gpt_neox", "phi"], "llama", "gpt2"))
def test_lengths_in_closed_form(family: str) -> None:
    """``||J^T W_c||^2`` of every token against the gradients of the logits themselves."""
    public = load_public(str(model(family)))
    hidden = 0.3 * torch.randn(4, public.embedding.shape[1], generator=torch.Generator().manual_seed(0))
    top = Top(public, hidden)
    found = squared_lengths(public, hidden, top.logits.detach())
    assert found is not None
    for token in (0, 5, 96):
        own = top.of_labels(torch.full((4,), token)).square().sum(-1)
        assert torch.allclose(found[:, token], own, rtol=1e-4, atol=1e-7)


def test_a_top_that_is_not_known_has_no_closed_form() -> None:
    """Gemma 2 bends its logits; there a shortlist is tried."""
    public = load_public(str(model("gemma2", final_logit_softcapping=1.0)))
    hidden = torch.randn(4, public.embedding.shape[1], generator=torch.Generator().manual_seed(0))
    assert squared_lengths(public, hidden, Top(public, hidden).logits.detach()) is None


@pytest.mark.parametrize("tail", [0, 1])
def test_the_classes_of_a_classifier(tail: int, tmp_path: Path) -> None:
    """Its head is in the checkpoint, or drawn from the run's seed, which the server has."""
    found = record_classes(
        model("roberta", num_labels=4), tmp_path, class_rows(24, [0.25] * 4), steps=2, batch_size=12,
        partition=u_shape(tail),
    )  # fmt: skip
    attack = create("attack", NAME, {})
    seen = view(found, attack, rows=12)
    seen = replace(seen, _public=load_public(found.config.model, task="classification", labels=found.data.labels))
    got = scored(found, attack, seen)
    assert (got.token_recovery, got.positions) == (1.0, 12)
    assert got.constant < 0.6


def test_a_surrogate_that_learns_along(tmp_path: Path) -> None:
    """Published so: its weights change with what was found; those of the public model do not."""
    found = record(model(), tmp_path, partition=u_shape(0), steps=2)
    attack = create("attack", NAME, {"lr": 0.5})
    seen = view(found, attack)
    both = replace(seen, exchanges=[*seen.exchanges, *view(found, attack, last=True).exchanges])
    before = seen.public.model.get_output_embeddings().weight.clone()
    still = create("attack", NAME, {}).finish(both)
    learned = attack.finish(both)
    assert torch.equal(before, seen.public.model.get_output_embeddings().weight)
    first, last = (one.key for one in both.exchanges)
    assert torch.equal(still.tokens[first], learned.tokens[first])
    assert not torch.equal(still.tokens[last], learned.tokens[last])


def test_the_audit_plays_it(tmp_path: Path) -> None:
    run = {
        "model": str(model()), "clients": 1, "steps": 2, "batch_size": 2, "device": "cpu", "partition": u_shape(0),
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", text_rows(6))), "format": "text", "max_length": 24},
    }  # fmt: skip
    done = audit(run, out=tmp_path / "audit", attacks=[NAME], budget="quick", progress=False)
    assert [row["moment"] for row in done.rows] == ["first step", "last step"]
    assert done.rows[0]["token_recovery"] == 1.0
    assert done.rows[0]["controls"]["random_weights"] < 0.3
    assert done.rows[0]["auc"] is None
