"""Runs with clients of unequal speeds on the virtual clock, whose links take next to no time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spine import U, model, train

ROWS = [
    {"text": " ".join(f"w{40 + (7 * i + j) % 50}" for j in range(8))} for i in range(24)
]  # of one length: w3 is special


def profile(flops: float) -> dict[str, float]:
    """A device of that speed on a link without delay."""
    return {"flops": flops, "up_mbps": 1e9, "down_mbps": 1e9, "rtt_ms": 0.0}


def run(out: Path, speeds: Mapping[str, float], **changes: Any) -> Any:
    """An asynchronous run whose clients are as fast as ``speeds`` says, with a server that takes no time."""
    framework = {"name": "async-sfl", **changes.pop("framework", {})}
    rows = changes.pop("rows", {name: ROWS[i::4] for i, name in enumerate(speeds)})
    options: dict[str, Any] = {"partition": U, "aggregator": "dt-asfl", "rounds": 1, **changes}
    return train(
        model(num_hidden_layers=4), out, rows, framework=framework,
        profiles={name: profile(1e6 * speed) for name, speed in speeds.items()},
        profiles_of_others={"server": profile(1e15)}, **options,
    )  # fmt: skip


def uploads(out: Path) -> list[dict[str, Any]]:
    """The lines of ``uploads.jsonl``."""
    return [json.loads(line) for line in (out / "uploads.jsonl").read_text().splitlines()]
