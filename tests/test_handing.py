"""A client that gets its part of the model from the server: the same run, only its own tensors, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import cutlayer
from apart import ROWS, Apart, steps
from spine import TWO, U, often


def own_tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {n: (file.get_slice(n).get_dtype(), file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("partition", "tied"),
    often([(p, t) for p in ("two-part", "u-shape") for t in (False, True)], ("two-part", False), ("u-shape", True)),
    ids=str,
)
def test_a_handed_model_changes_no_number(partition: str, tied: bool, tmp_path: Path) -> None:
    """The same losses, bytes and weights as with a local model, and only the client's own tensors came."""
    from spine import model

    kind = {"two-part": TWO, "u-shape": U}[partition]
    whole = str(model(num_hidden_layers=4, tie_word_embeddings=tied))
    run = Apart(tmp_path / "apart", partition=kind, model=whole, rounds=2)
    server = run.serve()
    run.ended({**{name: run.join(name, model=False) for name in ROWS}, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one")
    assert run.same(tmp_path / "one")
    assert steps(run.root / "server") == steps(tmp_path / "one")
    assert run.summary()["bytes"] == alone.summary["bytes"]
    found = own_tensors(run.root / "ann" / "model")
    blocks = {name.split(".")[2] for name in found if ".layers." in name}
    others = {name for name in found if ".layers." not in name}
    assert blocks == ({"0"} if partition == "two-part" else {"0", "3"})
    top = {"model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert others == {"model.embed_tokens.weight"} | (top if partition == "u-shape" else set())
    size = sum(path.stat().st_size for path in (run.root / "ann" / "model").iterdir())
    came = run.summary()["network"]["ann"]["model_bytes"]
    assert 0.9 * size < came < 1.3 * size, "what came is the part, and what it takes to ask for it"
    adapter = json.loads((run.root / "ann" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == Path(whole).name
