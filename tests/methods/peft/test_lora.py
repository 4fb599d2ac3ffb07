"""The run's result is an ordinary PEFT adapter: it gives the split run's own logits, for every family and option."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import unsplit
from cutlayer.assembly import segments_of
from cutlayer.errors import CutlayerError, MethodError
from cutlayer.methods.peft._targets import LINEAR
from cutlayer.models.loading import load_model
from cutlayer.models.segment import Segment
from cutlayer.registry import create
from spine import TWO, U, adamw, adapter, caught, losses, model, often, train  # noqa: F401
from tiny import BLOCKS, CLASSIFIERS, FAMILIES, text_rows

ROWS = text_rows(6)


def split_logits(run: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Head, trunk and tail one after the other, as they stand at the end of the run."""
    parts = run.parts
    client, trunk = parts.clients["ann"], parts.server
    segment = segments_of(parts.base, parts.layouts["ann"], parts.routes["ann"])[1][0]
    about = {"attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        hidden = client.head.forward(client.slot.params, input_ids=batch["input_ids"], **about)
        if client.tail is None:
            return segment.forward(trunk.slots["shared"].params, hidden=hidden, **about).logits
        hidden = segment.forward(trunk.slots["shared"].params, hidden=hidden, **about)
        return client.tail.forward(client.slot.params, hidden=hidden, **about).logits


def plain_logits(family: str, out: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    plain = PeftModel.from_pretrained(auto.from_pretrained(model(family)), out / "adapter").eval()
    with torch.no_grad():
        return plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize(
    "family", often(FAMILIES, "gpt2", "opt-projected", "llama", "llama-tied", "gemma3", "distilbert")
)
def test_peft_gives_the_logits_of_the_split_run(family: str, tmp_path: Path, caught: list[Any]) -> None:
    out, classifier = tmp_path / "out", family in CLASSIFIERS
    data = {"format": "classification"} if classifier else {}
    train(model(family), out, {"ann": ROWS}, data=data, partition=U if len(family) % 2 else TWO)
    batch = unsplit.text_batches(model(family), text_rows(4, seed=8), size=4, label=classifier)[0]
    split, plain = split_logits(caught[0], batch), plain_logits(family, out, batch)
    real = slice(None) if classifier else batch["attention_mask"].bool()
    assert torch.equal(split[real], plain[real])
    base = Segment(caught[0].parts.base, "whole", range(BLOCKS), bottom=True, top=True)
    with torch.no_grad():  # and it did learn something
        untrained = base.forward(
            caught[0].parts.base.initial, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
    assert not torch.equal(untrained.logits[real], plain[real])


OPTIONS = {
    "a list of targets": {"targets": ["q_proj", "v_proj"], "rank": 3},
    "a pattern": {"targets": r".*\.layers\.[02]\.mlp\.(up|down)_proj", "rank": 2},
    "ranks by layer": {"rank": 4, "rank_pattern": {"q_proj": 2, "layers.2.mlp.up_proj": 6}},
    "another scale": {"rank": 2, "alpha": 3.0},
    "dropout": {"rank": 2, "dropout": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], tmp_path: Path, caught: list[Any]) -> None:
    """What PEFT makes of each option on the uncut model; without dropout also the same losses and weights."""
    out = tmp_path / "out"
    train(model(), out, {"ann": ROWS}, partition=U, peft={"name": "lora", **options}, rounds=3)
    batch = unsplit.text_batches(model(), ROWS, size=3)[0]
    assert torch.equal(
        *(
            logits[batch["attention_mask"].bool()]
            for logits in (split_logits(caught[0], batch), plain_logits("llama", out, batch))
        )
    )
    config = PeftConfig.from_pretrained(out / "adapter")
    assert config.r == options["rank"]
    assert config.lora_alpha == options.get("alpha", 16)
    assert config.rank_pattern == options.get("rank_pattern", {})
    tensors = adapter(out)
    ranks = {n: t.shape[0] for n, t in tensors.items() if "lora_A" in n}
    if options is OPTIONS["a list of targets"]:
        assert len(ranks) == 2 * BLOCKS
    if options is OPTIONS["a pattern"]:
        assert len(ranks) == 4
    if options is OPTIONS["ranks by layer"]:
        assert len(ranks) == 7 * BLOCKS
        assert sorted(r for r in ranks.values() if r != 4) == [2] * BLOCKS + [6]
    if "dropout" not in options:
        batches = unsplit.text_batches(model(), ROWS, size=3)
        steps = [[batches[i % 2]] for i in range(3)]
        reference = unsplit.train(model(), steps, adapter=out / "adapter_initial", make_optimizer=adamw)
        assert [loss for _, loss in losses(out)] == reference.losses


def test_dropout_is_on_in_training_only(tmp_path: Path) -> None:
    seen = []
    for dropout in (0.0, 0.5):
        out = tmp_path / str(dropout)
        (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        result = train(
            model(), out, {"ann": ROWS}, peft={"name": "lora", "rank": 2, "dropout": dropout}, rounds=3,
            data={"eval": str(tmp_path / "eval.jsonl")},
        )  # fmt: skip
        seen.append((result.summary["eval"]["before"]["loss"], losses(out)))
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]


def test_the_base_is_named_in_the_adapter(tmp_path: Path) -> None:
    train(model(), tmp_path / "out", {"ann": ROWS}, rounds=1)
    for name in ("adapter", "adapter_initial"):
        assert PeftConfig.from_pretrained(tmp_path / "out" / name).base_model_name_or_path == str(model())
    zero = [t for n, t in adapter(tmp_path / "out", "adapter_initial").items() if "lora_B" in n]
    assert zero
    assert not any(t.any() for t in zero)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "a rank must be 1 or more"),
        ({"rank_pattern": {"q_proj": 0}}, "a rank must be 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"rnak": 4}, "Did you mean 'rank'"),
        ({"targets": 3}, "option 'targets' is 3"),
        ({"targets": ["q_proj", " "]}, "targets is empty, or an entry of it is"),
        ({"rank_pattern": {"q_(proj": 2}}, "is no regular expression: missing"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a finite number above 0"),
        ({"alpha": 0}, "alpha is 0.0; it must be a finite number above 0"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        create("peft", "lora", options)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_layers_mean_what_peft_takes_them_for(family: str) -> None:
    """What ``check`` lets pass is adapted, layer by layer; tests/test_preflight.py has what it refuses."""
    task = "classification" if family in CLASSIFIERS else "causal"
    layer = next(name for name in split_map(family) if name.count(".") > 2)
    leaf, path = layer.rpartition(".")[2], ".".join(layer.split(".")[-4:])
    for targets in ("all-linear", [leaf], [path], [layer], rf".*\.{leaf}", [leaf, path]):
        whole, anatomy = load_model(model(family), task=task)
        lora = create("peft", "lora", {"rank": 3, "targets": targets, "rank_pattern": {path: 2}})
        lora.check(whole, anatomy, task=task)
        names = [n for n in lora.prepare(whole, anatomy, task=task, seed=0).initial if "lora_A" in n]
        assert any(layer in name for name in names)
        assert len(names) == 1 or targets not in ([path], [layer])


def split_map(family: str) -> list[str]:
    """The linear layers of a model's blocks."""
    whole, anatomy = load_model(model(family), task="classification" if family in CLASSIFIERS else "causal")
    return [n for n, m in whole.named_modules() if isinstance(m, LINEAR) and isinstance(anatomy.owner(n), int)]


def test_targets_that_no_layer_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match="nowhere"):
        train(model(), tmp_path / "out", {"ann": ROWS}, peft={"name": "lora", "targets": ["nowhere"]})
    assert not (tmp_path / "out").exists()
