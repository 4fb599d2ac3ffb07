"""``causal-search``: what a causal head sends is read token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import record, scored, view
from cutlayer.audit.messages import Exchange
from cutlayer.audit.prefixes import cacheable
from cutlayer.audit.public import load_public
from cutlayer.audit.view import View
from cutlayer.registry import create
from spine import TWO, U, model, often

TWO_PARTS: dict[str, Any] = {"name": "two-part-split"}
U_SHAPE: dict[str, Any] = {"name": "u-shaped-split"}


@pytest.mark.parametrize(
    ("family", "partition", "cut"),
    often(
        [
            (family, partition, cut)
            for family in ("llama", "gpt2", "opt", "gemma2")
            for partition in (TWO_PARTS, U_SHAPE)
            for cut in (0, 1, 2)
        ],
        ("llama", U_SHAPE, 2), ("gpt2", TWO_PARTS, 1), ("gemma2", U_SHAPE, 1), ("llama", TWO_PARTS, 0),
    ),
    ids=str,
)  # fmt: skip
def test_every_token_of_the_first_step(family: str, partition: dict[str, Any], cut: int, tmp_path: Path) -> None:
    """At the first step the client's head is the public one, so nothing is left to guess."""
    found = record(model(family), tmp_path, partition={**partition, "head_blocks": cut})
    attack = create("attack", "causal-search", {})
    got = scored(found, attack, view(found, attack))
    assert got.token_recovery == 1.0
    assert got.rouge_l == 1.0
    assert got.constant < 0.5


def test_padding_on_the_left_and_packed_texts(tmp_path: Path) -> None:
    attack = create("attack", "causal-search", {})
    left = record(model(), tmp_path / "left", data={**_data(tmp_path / "left"), "padding_side": "left"}, partition=U)
    assert scored(left, attack, view(left, attack)).token_recovery == 1.0
    packed = record(model(), tmp_path / "packed", data={**_data(tmp_path / "packed"), "packing": True}, partition=TWO)
    assert scored(packed, attack, view(packed, attack)).token_recovery == 1.0


def _data(root: Path) -> dict[str, Any]:
    return {"train": str(root / "rows.jsonl"), "format": "text", "max_length": 24}


def test_the_controls_fall_to_a_constant_guess(tmp_path: Path) -> None:
    found = record(model(), tmp_path, partition={**U_SHAPE, "head_blocks": 2})
    attack = create("attack", "causal-search", {})
    seen = view(found, attack)
    assert scored(found, attack, seen).token_recovery == 1.0
    # Each text's first token may stand where it stood.
    assert scored(found, attack, seen.shuffled()).token_recovery < 0.3
    assert scored(found, attack, seen.with_other_weights()).token_recovery < 0.3


def test_noise_makes_it_harder_and_the_model_s_opinion_counts_then(tmp_path: Path) -> None:
    """Of a noise as large as the states most is lost, of a tenth of it hardly anything."""
    found = record(model(), tmp_path, partition={**U_SHAPE, "head_blocks": 1})
    attack = create("attack", "causal-search", {})
    seen = view(found, attack)
    recovered = [scored(found, attack, _noisy(seen, part)).token_recovery for part in (0.0, 0.1, 3.0)]
    assert recovered[0] == 1.0
    assert recovered[1] > 0.9
    assert recovered[2] < recovered[1] - 0.2
    alone = create("attack", "causal-search", {"prior": "off"})
    assert scored(found, alone, _noisy(seen, 0.1)).token_recovery > 0.8


def _noisy(seen: View, part: float) -> View:
    """The view with Gaussian noise of so many times the states' own root mean square."""

    def noised(one: Exchange) -> Exchange:
        sent = dict(one.tensors["send_activations"])
        hidden = sent["hidden"]
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(one.step))
        sent["hidden"] = hidden + part * hidden.square().mean().sqrt() * noise
        return replace(one, tensors={**one.tensors, "send_activations": sent})

    return replace(seen, exchanges=[noised(one) for one in seen.exchanges])


def test_a_head_that_was_trained_meanwhile(tmp_path: Path) -> None:
    """The drift is corrected from what was found: with a second pass no worse than without."""
    found = record(model(), tmp_path, partition={**U_SHAPE, "head_blocks": 2}, steps=12)
    once, twice = (create("attack", "causal-search", {"passes": passes}) for passes in (1, 2))
    seen = view(found, once, last=True)
    assert seen.exchanges[0].step == 11
    first, second = (scored(found, attack, seen).token_recovery for attack in (once, twice))
    assert second >= first - 0.02
    assert second > 0.5


def test_without_a_cache_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = record(model(), tmp_path, partition={**U_SHAPE, "head_blocks": 1})
    attack = create("attack", "causal-search", {})
    seen = view(found, attack, rows=2)
    assert cacheable(load_public(found.config.model), 1)
    with_cache = attack.finish(seen)
    monkeypatch.setattr("cutlayer.audit.prefixes.cacheable", lambda *_: False)
    without = attack.finish(seen)
    for key, tokens in with_cache.tokens.items():
        assert torch.equal(tokens, without.tokens[key])
