"""How much of a client's own source is lost by the end of a round: its held-out loss then, less that after its turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.driver import Run
from cutlayer.models.segment import Segment
from spine import TWO, model, train
from unsplit import text_batches

WORDS = 10
STRIDES = {"ann": 1, "bob": 3, "cid": 7, "dan": 9}  # source c: after word i comes word i + stride, in a ring of 10


def rows(client: str, count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Sentences of a client's source; sources share their words and disagree on what follows."""
    stride = STRIDES[client]
    return [
        {"text": " ".join(f"w{50 + (i + j * stride) % WORDS}" for j in range(12))} for i in range(start, start + count)
    ]


def forgetting(out: Path, clients: list[str], *, framework: dict[str, Any], rounds: int) -> dict[str, float]:
    """By client, in the order of ``clients``, for the last round of a run with full fine-tuning."""
    held_out = {c: text_batches(model("llama"), rows(c, 5, start=3), size=5)[0] for c in clients}
    own: dict[str, float] = {}
    runs: list[Any] = []
    original = Run.step

    def loss(run: Any, holder: str, client: str) -> float:
        base, batch = run.parts.base, held_out[client]
        params = {**run.parts.clients[holder].slot.params, **run.parts.server.slots["shared"].params}
        whole = Segment(base, "whole", range(base.anatomy.num_blocks), bottom=True, top=True)
        with torch.no_grad():
            return float(whole.forward(params, **batch).loss)

    async def step(self: Any, client: str, **options: Any) -> Any:
        result = await original(self, client, **options)
        if self.counters.steps[client] % framework["local_steps"] == 0:
            own[client] = loss(self, client, client)
        runs.append(self)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", step)
        train(
            model("llama"), out, {c: rows(c, 10) for c in clients}, partition=TWO, framework=framework, rounds=rounds,
            peft="full", optimizer={"name": "adamw", "lr": 3e-3}, batch_size=5,
        )  # fmt: skip
    run = runs[-1]
    travels = run.framework.travels
    return {c: loss(run, run.holder() if travels else c, c) - own[c] for c in clients}
