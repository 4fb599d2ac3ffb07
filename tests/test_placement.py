"""A model spread over several GPUs. Without any: its hooks change no number, and its map divides no block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cutlayer.errors import ConfigError, ModelError
from cutlayer.models import loading, placement
from spine import adapter, by_turns, equal, losses, model, train
from tiny import text_rows

CLIENTS = {name: text_rows(4, seed=seed) for seed, name in enumerate(("ann", "bob"))}


def tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(model(num_hidden_layers=4))


def test_no_block_is_divided() -> None:
    found = placement.device_map(tiny(), "balanced", {0: 10**6, 1: 10**6})
    assert set(found.values()) == {0, 1}
    blocks = {name: place for name, place in found.items() if ".layers." in name}
    assert len(blocks) == 4
    assert all(name.rpartition(".")[2].isdecimal() for name in blocks)
    assert set(placement.device_map(tiny(), "sequential", {0: 10**6, 1: 10**6}).values()) == {0}


def test_what_the_gpus_have_no_room_for_is_refused() -> None:
    with pytest.raises(ModelError, match="have no room for"):
        placement.device_map(tiny(), "sequential", {0: 40_000, 1: 1_000})


@by_turns("peft", [{"name": "lora", "rank": 2, "dropout": 0.1}, "full"], ids=["lora", "full"])
def test_the_hooks_change_no_number(
    partition: dict[str, Any], peft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate's hooks on each block, all of them on the processor."""
    options = {"framework": "sfl-v1", "partition": partition, "peft": peft}
    train(model(num_hidden_layers=4), tmp_path / "plain", CLIENTS, device="cpu", **options)
    hooked = []

    def spread_here(model: Any, how: str) -> dict[str, str]:
        hooked.append(how)
        return dict.fromkeys(
            placement.infer_auto_device_map(model, max_memory={0: 10**6, 1: 60_000, "cpu": 10**9}), "cpu"
        )

    monkeypatch.setattr(placement, "device_map", spread_here)
    monkeypatch.setattr(loading, "check_map", lambda how: None)
    train(model(num_hidden_layers=4), tmp_path / "hooked", CLIENTS, device="balanced", **options)
    assert hooked == ["balanced"]
    assert losses(tmp_path / "plain") == losses(tmp_path / "hooked")
    if peft == "full":
        files = [next((tmp_path / run / "model").glob("*.safetensors")) for run in ("plain", "hooked")]
        assert files[0].read_bytes() == files[1].read_bytes()
    else:
        assert equal(adapter(tmp_path / "plain"), adapter(tmp_path / "hooked"))


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has several GPUs")
def test_without_several_gpus_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which spreads a model over several GPUs, but this machine has"):
        train(model(), tmp_path / "out", CLIENTS, device="balanced")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
def test_a_model_over_two_gpus_is_the_one_on_one(tmp_path: Path) -> None:
    for device in ("cuda:0", "balanced"):
        train(model(num_hidden_layers=4), tmp_path / device, CLIENTS, device=device, framework="sfl-v1")
    found = [[loss for _, loss in losses(tmp_path / device)] for device in ("cuda:0", "balanced")]
    assert found[1] == pytest.approx(found[0], abs=1e-4)
