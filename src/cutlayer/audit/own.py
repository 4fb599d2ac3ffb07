"""A run that a client can audit by itself: the one that it joins, with its own text and nobody else."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cutlayer.build import layouts_of
from cutlayer.config import RunConfig
from cutlayer.config_write import tree_of
from cutlayer.files import write_text

SAME = (  # what of a run decides what the server can read of a client
    "precision", "peft", "optimizer", "batch_size", "gradient_accumulation", "defense", "seed",
    "attn_implementation", "exchange",
)  # fmt: skip
STEPS = 40


def own_run(
    config: RunConfig, num_blocks: int, name: str, *, model: str, data: str, held_out: str | None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The keys of a run of one client, with the cut, the training and the defenses that it has in the run it joins.

    Args:
        config: the run that it joins.
        num_blocks: of its model.
        name: the client's.
        model: the whole model, which an audit needs: where it is, or its name on the Hub.
        data: the client's text.
        held_out: what it evaluates on, if anything.
        columns: what its files call the columns, where that is not what the run says.
    """
    tree, layout = tree_of(config), layouts_of(config, num_blocks)[name]
    form = config.data_of(name).model_dump(mode="json", exclude={"train", "eval", "eval_fraction", "division"})
    form["columns"] = {**(form["columns"] or {}), **(columns or {})}
    partition: dict[str, Any] = {"name": "two-part-split", "head_blocks": len(layout.head)}
    if layout.tail_at_client:
        partition = {"name": "u-shaped-split", "head_blocks": len(layout.head), "tail_blocks": len(layout.tail)}
    framework = "sfl-v1" if config.build("exchange").probes else "sequential-sl"  # looking around needs an own trunk
    kept = {key: tree[key] for key in SAME if tree[key] is not None}
    text = {"train": _from_anywhere(data), **({"eval": _from_anywhere(held_out)} if held_out else {}), **form}
    return {
        "model": _from_anywhere(model), "data": {key: value for key, value in text.items() if value is not None},
        "clients": [{"name": name}], "partition": partition, "framework": framework, "steps": STEPS, **kept,
    }  # fmt: skip


def _from_anywhere(place: str) -> str:
    """Files by their whole path, names on the Hub as they are."""
    return os.path.abspath(place) if glob.glob(place) else place


def write_own(run: dict[str, Any], out: Path) -> str:
    """Write it into a client's folder; the command that audits it."""
    file = out / "audit.yaml"
    told = "# The run that this client joined, by itself: to see what its server can read.\n"
    write_text(file, told + yaml.safe_dump(run, sort_keys=False, allow_unicode=True))
    return f"cutlayer audit {shlex.quote(str(file))} --out {shlex.quote(str(out / 'audit'))}"
