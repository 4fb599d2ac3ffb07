"""The same run on CUDA: equal to the unsplit model there. Skipped where there is no device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import cutlayer
from tiny import make_model, text_rows, write_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("partition", ["two-part-split", "u-shaped-split"])
def test_cuda_run_follows_the_cpu_run(partition: str, precision: str, tmp_path: Path) -> None:
    """Losses within what other kernels give; the wire carries bytes of host memory either way."""
    folder = make_model(tmp_path / "model", "llama")
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(10))
    losses = {}
    for device in ("cpu", "cuda"):
        config = {
            "model": str(folder), "data": {"train": str(rows), "shuffle": False}, "clients": 2, "steps": 5,
            "partition": partition, "precision": precision, "device": device, "max_grad_norm": 1.0,
        }  # fmt: skip
        cutlayer.train(config, out=tmp_path / device)
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=1e-4 if precision == "float32" else 5e-2)
