"""The row's check: step 11 is silent, heads stay apart while the trunk is one, and little is lost on alike data."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cutlayer.driver import Run
from spine import PARTITIONS, U, block_of, caught, lines, model, train  # noqa: F401
from tiny import BLOCKS, text_rows

ROWS = {name: text_rows(4, seed=i) for i, name in enumerate(("ann", "bob", "cid"))}


@PARTITIONS
def test_step_11_is_silent_and_only_the_trunk_is_common(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    out = tmp_path / "out"
    result = train(model(), out, ROWS, partition=partition, framework="sfl-v2", aggregator="mhsl", rounds=3)
    assert result.summary["bytes"]["aggregate"] == 0
    states = {name: load_file(out / "adapters" / name / "adapter_model.safetensors") for name in ROWS}
    for name in states["ann"]:
        own = block_of(name) < 1 or (partition["name"] == U["name"] and block_of(name) >= BLOCKS - 1)
        gaps = [float((states["ann"][name] - states[c][name]).abs().max()) for c in ("bob", "cid")]
        assert (min(gaps) > 0) == own, name
    assert result.summary["adapters"] == {name: f"adapters/{name}" for name in ROWS}


def test_the_evaluation_is_the_mean_over_the_clients_own_models(tmp_path: Path, caught: list[Run]) -> None:
    from tiny import write_rows

    held_out = write_rows(tmp_path / "eval.jsonl", text_rows(5, seed=9))
    result = train(
        model(), tmp_path / "out", ROWS, framework="sfl-v2", aggregator="mhsl", rounds=3, data={"eval": str(held_out)}
    )
    run = caught[0]
    losses = []
    for name in ROWS:
        run.parts.base.install(None)
        run.parts.base.bind({n: torch.nn.Parameter(t) for n, t in run.state(name).items()})
        run.parts.base.train(False)
        total = tokens = 0.0
        for make in run.parts.clients[name].evaluation:
            batch = make()
            with torch.no_grad():
                loss = run.parts.base.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
                ).loss
            total += float(loss) * batch.label_tokens
            tokens += batch.label_tokens
        losses.append(total / tokens)
    assert max(losses) - min(losses) > 1e-6
    assert abs(result.summary["eval"]["after"]["loss"] - sum(losses) / 3) < 1e-6


@pytest.mark.slow
def test_alike_data_lose_little_against_averaged_heads(tmp_path: Path) -> None:
    """One block of six at the client, the same kind of text for all: within 5 percent of SFL-V2."""
    from tiny import write_rows

    held_out = write_rows(tmp_path / "eval.jsonl", [{"text": "w5 w6 w7 w8 w9 w10 w11 w12"}] * 3)
    rows = {name: [{"text": "w5 w6 w7 w8 w9 w10 w11 w12"}] * 3 for name in ROWS}
    after = {}
    for aggregator in ("fedavg", "mhsl"):
        result = train(
            model(num_hidden_layers=6), tmp_path / aggregator, rows, framework="sfl-v2", aggregator=aggregator,
            rounds=15, data={"eval": str(held_out)}, partition={"name": "two-part-split", "head_blocks": 1},
        )  # fmt: skip
        after[aggregator] = result.summary["eval"]["after"]["loss"]
        assert after[aggregator] < 0.85 * result.summary["eval"]["before"]["loss"]
    assert after["mhsl"] < 1.05 * after["fedavg"]
