"""What is known of a run before anything of it is measured: how much the attacks read in runs of the same cut.

The numbers are those of ``benchmarks/leakage.py``, which writes ``known.json`` beside this file: pretrained models,
real text, no defense.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from cutlayer import registry
from cutlayer.build import layouts_of, task_of
from cutlayer.config import RunConfig
from cutlayer.contracts import Layout

LEAKS = 0.5  # of the tokens, from which on it is said
TABLE = "docs/results/leakage.md"


def measured() -> list[dict[str, Any]]:
    """A line for each model, cut, tail and attack: the share of tokens at the ``first`` and the ``last`` step."""
    found: list[dict[str, Any]] = json.loads((files("cutlayer.audit") / "known.json").read_text(encoding="utf-8"))
    return found


def warnings(config: RunConfig, num_blocks: int, *, command: str, client: str | None = None) -> list[str]:
    """What is to be said of a run before it begins; nothing where its defenses are about all that is known to leak.

    Args:
        config: the run.
        num_blocks: of its model.
        command: what measures it.
        client: of this one only; None: of all.
    """
    covered = {
        target
        for spec in config.defense
        for target in registry.create("defense", spec.name, spec.options).protects
    }  # fmt: skip
    layouts = layouts_of(config, num_blocks)
    found = []
    for layout in dict.fromkeys([layouts[client]] if client is not None else layouts.values()):
        if said := list(_said(config, layout, covered)):
            found.append(f"privacy: {' '.join(said)}")
    return [*found, f"measure what can be read: {command}"] if found else []


def _said(config: RunConfig, layout: Layout, covered: set[str]) -> Iterator[str]:
    if task_of(config) != "causal":
        return
    cut, tail, name = len(layout.head), len(layout.tail), config.model.rstrip("/").rsplit("/", 1)[-1]
    of_cut = [one for one in measured() if one["attack"] == "causal-search" and one["cut"] == cut]
    if "inputs" not in covered and (words := _words(of_cut)):
        yield (
            f"if the weights of '{name}' are public, the server can read the text: with {cut} head blocks an attack "
            f"got back {words} ({TABLE})."
        )
    if "labels" in covered:
        return
    if not layout.tail_at_client:
        yield "The labels, which are the text, are sent to the server in this partition."
        return
    of_tail = [one for one in measured() if one["attack"] == "label-solve" and one["tail"] == tail]
    if words := _words(of_tail):
        yield f"From the gradients alone, with {tail} tail blocks, an attack got back {words}."


def _words(found: Sequence[dict[str, Any]]) -> str:
    """How much, in words; nothing where it was not measured, or little."""
    shares = [share for one in found for share in (one["first"], one["last"])]
    if not shares or min(shares) < LEAKS:
        return ""
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return f"{low} % of the tokens" if low == high else f"{low} to {high} % of the tokens"
