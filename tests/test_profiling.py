"""``cutlayer profile``: what it measures, what it reads, and that a run file can take what it prints."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cutlayer import profiling
from cutlayer.cli.main import app
from cutlayer.config import RunConfig, load_config
from cutlayer.costs import Training, Work, shape_of
from cutlayer.errors import MethodError
from cutlayer.models.loading import load_config as model_config
from cutlayer.profiles import profile_from
from spine import model
from tiny import make_model, text_rows, write_rows


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(4))
    return load_config({
        "model": str(model(num_hidden_layers=5)), "data": {"train": str(rows), "max_length": 24}, "clients": 2,
        "partition": {"name": "u-shaped-split", "head_blocks": 2, "tail_blocks": 1}, "device": "cpu", "batch_size": 3,
        "peft": {"name": "lora", "rank": 4},
    })  # fmt: skip


def test_flops_are_the_cost_models_over_the_measured_seconds(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which each forward takes one second and each backward three."""
    ticks = itertools.accumulate(itertools.cycle([5.0, 1.0, 5.0, 3.0]))
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = profiling.measure(config, steps=3)
    assert (found.forward, found.backward, found.spread) == (1.0, 3.0, 0.0)
    assert (found.blocks, found.rows, found.length, found.device) == (2, 3, 24, "cpu")
    shape = shape_of(model_config(config.model), task="causal")
    work = Work(shape, length=24, training=Training(rank=4))
    flop = 3 * 24 * (work.forward(range(2)) + work.backward(range(2), input_gradient=True))
    assert found.flops == pytest.approx(flop / 4)
    assert found.memory > 0


def test_only_the_blocks_are_read(config: RunConfig, tmp_path: Path) -> None:
    """With the shards of all others deleted."""
    whole = make_model(tmp_path / "whole", "llama", num_hidden_layers=5)
    split = tmp_path / "split"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(split, max_shard_size="20KB")
    for file in split.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            if not any(".layers.0." in name or ".layers.1." in name for name in shard.keys()):  # noqa: SIM118
                file.unlink()
    found = profiling.measure(config.model_copy(update={"model": str(split)}), blocks=2, steps=1)
    assert found.flops > 0


@pytest.mark.parametrize(("blocks", "said"), [(0, "blocks is 0"), (6, "from 1 to 5")])
def test_blocks_that_are_not_there(config: RunConfig, blocks: int, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        profiling.measure(config, blocks=blocks)


def test_what_is_printed_goes_into_a_run_file(config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "profile.yaml"
    rows = text_rows(1)
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {config.model}\ndata: {{train: {write_rows(tmp_path / 'one.jsonl', rows)}, max_length: 8}}\n"
    )
    result = CliRunner().invoke(
        app, ["profile", str(run), "device=cpu", "--steps", "2", "--link", "dsl", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert out.read_text() in result.output
    told = yaml.safe_load(out.read_text())["profile"]
    assert told["link"] == "dsl"
    profile = profile_from(told)
    assert profile is not None
    assert profile.flops == told["flops"]
    assert load_config(str(run), {"profile": told}).profile is not None
    assert torch.is_grad_enabled()


def test_mistakes_of_the_call(config: RunConfig, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["profile"]).exit_code == 2
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {config.model}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\n")
    for arguments in (["--link", "smoke"], ["--blocks", "77"]):
        assert CliRunner().invoke(app, ["profile", str(run), *arguments]).exit_code == 2
