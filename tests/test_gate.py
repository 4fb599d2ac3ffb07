"""What a hostile review found: each a wrong result or a message that misled, and its test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cutlayer
from cutlayer.errors import ConfigError, MethodError, ModelError
from cutlayer.models.verify import verify
from cutlayer.run import dry_run, train
from tiny import make_model, text_rows, write_rows


def run(folder: Path, out: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    """A short run; the data's keys are merged."""
    data = {"train": str(write_rows(out.parent / "rows.jsonl", rows)), "shuffle": False, **changes.pop("data", {})}
    config = {"model": str(folder), "data": data, "clients": 1, "batch_size": 2, "steps": 1, **changes}
    return cutlayer.train(config, out=out)


def test_a_decoder_as_a_classifier_is_refused(tmp_path: Path) -> None:
    """It looks for a row's last token in input_ids, which the party with the head never sees."""
    folder = make_model(tmp_path / "model", "llama")
    with pytest.raises(ModelError, match="not known to be cut exactly"):
        run(folder, tmp_path / "out", text_rows(8), data={"format": "classification"})
    assert not (tmp_path / "out").exists()


def test_an_encoder_as_a_language_model_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "bert")
    with pytest.raises(ModelError, match="each position sees its own label"):
        run(folder, tmp_path / "out", text_rows(8))


def test_packing_needs_a_family_that_keeps_examples_apart(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "bloom")
    with pytest.raises(ModelError, match="keep packed examples apart"):
        run(folder, tmp_path / "out", text_rows(8), data={"packing": True})


@pytest.mark.parametrize("partition", ["two-part-split", "u-shaped-split"])
def test_a_dry_run_says_what_a_step_moves(partition: str, tmp_path: Path) -> None:
    """Full rows without padding, accumulation and clipping: the bytes of the line in metrics.jsonl."""
    folder = make_model(tmp_path / "model", "llama")
    rows = text_rows(8, shortest=9, longest=9)
    changes = {"partition": {"name": partition, "head_blocks": 1}, "gradient_accumulation": 2, "max_grad_norm": 1.0}
    run(folder, tmp_path / "out", rows, data={"max_length": 10}, **changes)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text())
    told = dry_run(tmp_path / "out" / "run.yaml").summary["bytes"]
    assert sum(told.values()) == line["bytes_up"] + line["bytes_down"]


@pytest.mark.parametrize("partition", ["two-part-split", "u-shaped-split"])
def test_a_dry_run_of_packed_rows_counts_their_positions(partition: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    rows = text_rows(8, shortest=9, longest=9)
    changes = {"partition": {"name": partition, "head_blocks": 1}}
    run(folder, tmp_path / "out", rows, data={"max_length": 10, "packing": True}, **changes)
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    told = dry_run(tmp_path / "out" / "run.yaml").summary["bytes"]
    assert sum(told.values()) == line["bytes_up"] + line["bytes_down"]


def test_memory_does_not_add_up_over_micro_batches(tmp_path: Path) -> None:
    """Only one micro-batch's graph is open at a time."""
    folder, rows, saved = make_model(tmp_path / "model", "llama"), text_rows(8, shortest=9, longest=9), []
    for number in (1, 4):
        result = run(folder, tmp_path / f"out{number}", rows, gradient_accumulation=number)
        saved.append(result.summary["parties"]["server"]["memory"]["activations"])
    assert saved[0] > 0
    assert saved[1] <= saved[0] * 1.05


def test_verify_refuses_rather_than_fails(tmp_path: Path) -> None:
    folder = str(make_model(tmp_path / "model", "llama", pad_token_id=96))
    assert all(found.exact for found in verify(folder, cut=1))  # padding is the vocabulary's last token
    with pytest.raises(ConfigError, match="does not have"):
        verify(folder, device="cuda:99")
    with pytest.raises(MethodError, match="--tail"):
        verify(folder, cut=1, tail=1, partition="two-part-split")


def test_what_a_call_would_ignore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resume takes the run as it was"):
        train("run.yaml", resume=tmp_path)
    with pytest.raises(ConfigError, match="give a run"):
        train()


def test_an_adapter_on_the_embedding_starts_from_the_seed(tmp_path: Path) -> None:
    """Not from wherever PyTorch's own generator happens to be."""
    folder, starts = make_model(tmp_path / "model", "llama"), []
    for number in (1, 2):
        torch.manual_seed(number)
        peft = {"name": "lora", "rank": 4, "targets": ["embed_tokens", "q_proj"]}
        run(folder, tmp_path / f"out{number}", text_rows(8), peft=peft)
        starts.append(load_file(tmp_path / f"out{number}" / "adapter_initial" / "adapter_model.safetensors"))
    assert any("lora_embedding_A" in name for name in starts[0])
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
