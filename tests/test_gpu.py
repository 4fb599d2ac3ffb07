"""On CUDA a split run is the unsplit model's, trained there; skipped where there is no device.

The comparison is that of ``test_whole`` with the device as an argument; ``test_side_by_side`` tries it and its limits
on the CPU. Bits may differ here and there: some of CUDA's backward kernels add in the order in which threads arrive.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from side_by_side import GPU_LIMITS, SGD, both
from spine import PARTITIONS, losses, model, train
from tiny import text_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("precision", GPU_LIMITS)
@PARTITIONS
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_split_run_on_cuda_is_the_unsplit_model_s(
    family: str, partition: dict[str, str | int], precision: str, tmp_path: Path
) -> None:
    """LoRA, padded rows, steps enough for a mistake to grow."""
    pair = both(family, tmp_path / "out", partition=partition, precision=precision, device="cuda", optimizer=SGD)
    assert next(pair.reference.model.parameters()).device.type == "cuda"
    pair.within(**GPU_LIMITS[precision])


@PARTITIONS
@pytest.mark.parametrize(
    "options", [{"peft": "full"}, {"checkpointing": True}, {"accumulation": 2}, {"clip": 0.05}], ids=str
)
def test_what_touches_the_device_in_other_ways(
    options: dict[str, str | bool | int | float], partition: dict[str, str | int], tmp_path: Path
) -> None:
    """All weights and their optimizer state, recomputation, sums of gradients, and one norm over two parties."""
    pair = both("llama", tmp_path / "out", partition=partition, device="cuda", optimizer=SGD, **options)
    pair.within(**GPU_LIMITS["float32"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@PARTITIONS
def test_cuda_run_follows_the_cpu_run(partition: dict[str, str | int], precision: str, tmp_path: Path) -> None:
    """Two clients: losses within what other kernels give; the wire carries bytes of host memory either way."""
    clients = {name: text_rows(6, seed=seed) for seed, name in enumerate(("ann", "bob"))}
    changes = {"partition": partition, "precision": precision, "optimizer": SGD, "max_grad_norm": 1.0}
    found = {}
    for device in ("cpu", "cuda"):
        train(model(), tmp_path / device, clients, framework="sfl-v2", rounds=5, device=device, **changes)
        found[device] = losses(tmp_path / device)
    assert [client for client, _ in found["cuda"]] == [client for client, _ in found["cpu"]]
    limit = 1e-4 if precision == "float32" else 1e-2
    assert [loss for _, loss in found["cuda"]] == pytest.approx([loss for _, loss in found["cpu"]], abs=limit)
    assert max(loss for _, loss in found["cpu"]) - min(loss for _, loss in found["cpu"]) > 5 * limit
