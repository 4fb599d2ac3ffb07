"""``bisr-sip``: an inverter of public text through the public head reads private text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from attacking import record, scored, view
from cutlayer.audit.auditing import audit
from cutlayer.audit.public import PublicModel
from cutlayer.audit.view import View
from cutlayer.errors import MethodError
from cutlayer.models.loading import load_model
from cutlayer.models.segment import Base
from cutlayer.registry import create
from spine import U, model, often
from tiny import text_rows, write_rows

NAME = "bisr-sip"


def public_texts(found: Any, count: int = 80) -> list[torch.Tensor]:
    """Text of the same language as the private one, and none of it."""
    return [torch.tensor(found.tokenizer(row["text"])["input_ids"]) for row in text_rows(count, seed=77)]


def read(found: Any, **options: Any) -> Any:
    """What the attack gets back of a run, and its view."""
    attack = create("attack", NAME, {"epochs": 15, "width": 64, **options})
    seen = replace(view(found, attack), _auxiliary=public_texts(found))
    attack.prepare(replace(seen, exchanges=[]))
    return attack, seen, scored(found, attack, seen)


@pytest.mark.parametrize(
    "options",
    often(
        [{}, {"inverter": "linear", "lr": 0.01}, {"output": "embedding", "lr": 0.01}],
        {},
        {"inverter": "linear", "lr": 0.01},
    ),
    ids=str,
)
def test_private_text_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    attack, seen, got = read(record(model(), tmp_path, partition=U), **options)
    assert got.token_recovery > got.constant + 0.4
    assert attack.held_out > 0.5
    shuffled = attack.finish(seen.shuffled())
    assert shuffled.tokens.keys() == {one.key for one in seen.exchanges}


def test_without_the_public_weights_it_falls(tmp_path: Path) -> None:
    found = record(model(), tmp_path, partition=U)
    attack, seen, got = read(found)
    other = seen.with_other_weights()
    attack.prepare(replace(other, exchanges=[]))
    assert scored(found, attack, other).token_recovery < got.constant + 0.1 < got.token_recovery


def trained_head(seen: View, adapter: Path) -> View:
    """The same with the client's own head in place of the public one."""
    loaded, anatomy = load_model(str(model(num_hidden_layers=6)), task="causal", precision="float32", device="cpu")
    merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    return replace(seen, _public=PublicModel(Base(merged, anatomy)))


@pytest.mark.slow
def test_it_is_near_an_inverter_of_the_trained_head(tmp_path: Path) -> None:
    """After training, an oracle that has the client's own head is at most 20 points better; depth costs some."""
    recovered = {}
    for cut in (1, 4):
        root = tmp_path / str(cut)
        found = record(model(num_hidden_layers=6), root, partition={**U, "head_blocks": cut}, steps=8)
        attack = create("attack", NAME, {})
        seen = replace(view(found, attack, last=True), _auxiliary=public_texts(found, 200))
        shares = {}
        for name, of in {"public": seen, "oracle": trained_head(seen, root / "out/adapter")}.items():
            attack.prepare(replace(of, exchanges=[]))
            shares[name] = scored(found, attack, of).token_recovery
        assert shares["oracle"] - 0.2 <= shares["public"]
        recovered[cut] = shares["public"]
    assert recovered[1] >= recovered[4]


def run_of(tmp_path: Path) -> dict[str, Any]:
    """A run to audit."""
    return {
        "model": str(model()), "clients": 1, "partition": U, "steps": 1, "batch_size": 2, "device": "cpu",
        "data": {"train": str(write_rows(tmp_path / "rows.jsonl", text_rows(4))), "format": "text", "max_length": 24},
    }  # fmt: skip


def test_it_needs_text_of_the_attackers_own(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"needs text of the attacker's own\. Give some with --aux"):
        audit(run_of(tmp_path), out=tmp_path / "a", attacks=[NAME], budget="quick", progress=False)


@pytest.mark.slow
def test_an_audit_gives_it_that_text(tmp_path: Path) -> None:
    aux = write_rows(tmp_path / "aux.jsonl", text_rows(60, seed=77))
    done = audit(run_of(tmp_path), out=tmp_path / "b", attacks=[NAME], aux=aux, budget="quick", progress=False)
    assert done.rows[0]["token_recovery"] > 0.4
    assert done.rows[0]["controls"]["random_weights"] < done.rows[0]["token_recovery"]
