"""Every weight is trained, and the result is a model that ``from_pretrained`` loads."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from spine import TWO, U, caught, model, train  # noqa: F401
from tiny import CLASSIFIERS, text_rows

ROWS = text_rows(6)


@pytest.mark.parametrize(
    ("family", "partition"),
    [("llama", U), ("llama-tied", TWO), ("llama-tied", U), ("gpt2", U), ("gpt_neox", TWO), ("distilbert", TWO)],
    ids=["llama-u", "tied-two-part", "tied-u", "gpt2-u", "gpt_neox-two-part", "distilbert-two-part"],
)
def test_the_saved_model_loads_and_is_the_run_s(
    family: str, partition: dict[str, Any], tmp_path: Path, caught: list[Any]
) -> None:
    classifier = family in CLASSIFIERS
    data = {"format": "classification"} if classifier else {}
    result = train(model(family), tmp_path / "out", {"ann": ROWS}, partition=partition, peft="full", data=data)
    assert result.adapter == tmp_path / "out" / "model"
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    saved = dict(auto.from_pretrained(result.adapter).named_parameters(remove_duplicate=False))
    start = dict(auto.from_pretrained(model(family)).named_parameters(remove_duplicate=False))
    state = caught[0].state()
    assert len(state) >= len(start) - 1  # a tied weight once
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())
    assert not any(
        torch.equal(saved[name], start[name])
        for name in state
        if name.endswith("weight") and state[name].dim() > 1 and "position" not in name and "wpe" not in name
    )
    assert AutoTokenizer.from_pretrained(result.adapter)("w5").input_ids == [5]


def test_all_parameters_are_trainable_by_someone(tmp_path: Path, caught: list[Any]) -> None:
    result = train(model(), tmp_path / "out", {"ann": ROWS}, peft="full", rounds=1)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model()).parameters())
    parties = result.summary["parties"]
    assert parties["ann"]["trainable_parameters"] + parties["server"]["trainable_parameters"] == whole
