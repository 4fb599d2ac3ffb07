"""``summary.json``: what a run was and what it measured."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutlayer.build import SHARED
from cutlayer.models.segment import Segment
from cutlayer.models.slots import Slot
from cutlayer.parties.memory import Watch, storage_bytes
from cutlayer.wire import STEP_NAMES

if TYPE_CHECKING:
    from cutlayer.run import Run

PACKAGES = ("cutlayer", "torch", "transformers", "peft", "safetensors")


def summarize(run: Run, *, adapter: Path, device: str) -> dict[str, Any]:
    """The summary of a finished run."""
    config, parts, counters = run.config, run.parts, run.counters
    summary: dict[str, Any] = {
        "model": config.model,
        "framework": config.framework.name,
        "partition": config.partition.name,
        "clients": run.clients,
        "rounds": counters.rounds,
        "steps": dict(counters.steps),
        "stopped_early": counters.stopped,
        "parties": _parties(run),
    }
    if counters.evaluations:
        first, last = counters.evaluations[0], counters.evaluations[-1]
        summary["eval"] = {
            "before": {k: first[k] for k in ("loss", "perplexity")},
            "after": {k: last[k] for k in ("loss", "perplexity")},
            "history": counters.evaluations,
        }
    seconds = counters.seconds
    summary |= {
        "bytes": {name: run.meter.by_step.get(name, 0) for name in STEP_NAMES},
        "bytes_up": run.meter.up,
        "bytes_down": run.meter.down,
        "frames": run.meter.frames,
        "tokens": counters.tokens,
        "seconds": seconds,
        "tokens_per_second": counters.tokens / seconds if seconds else 0.0,
        "virtual_seconds": run.clock.now() if config.profile or any(c.profile for c in config.client_list) else None,
        "peak_memory": {
            "process_bytes": _peak_rss(),
            "accelerator_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
            "by_party": "counted from the tensors that each party holds (see parties/memory.py); base weights that "
            "simulated parties share are counted at each of them",
        },
        "adapter": str(adapter),
        "device": device,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    del parts
    return summary


def _parties(run: Run) -> dict[str, Any]:
    parts = run.parts
    layout = parts.layout
    found = {}
    for name, client in parts.clients.items():
        segments = [client.head, *([client.tail] if client.tail else [])]
        names = ["embeddings", *_ranges(layout.head), *(_ranges(layout.tail) if client.tail else [])]
        if client.tail:
            names.append("norm and head")
        found[name] = _party(segments, client.slot, client.watch, names)
    trunk = parts.trunk
    names = _ranges(layout.trunk if layout.tail_at_client else layout.tail)
    if not layout.tail_at_client:
        names.append("norm and head")
    found["server"] = _party([trunk.segment], trunk.slots[SHARED], trunk.watch, names)
    return found


def _ranges(blocks: range) -> list[str]:
    if not blocks:
        return []
    return [f"block {blocks[0]}"] if len(blocks) == 1 else [f"blocks {blocks[0]}-{blocks[-1]}"]


def _party(segments: list[Segment], slot: Slot, watch: Watch, names: list[str]) -> dict[str, Any]:
    base = segments[0].base
    frozen: dict[int, Tensor] = {}
    for segment in segments:
        for name, parameter in base.model.named_parameters():
            if name not in base.initial and segment.owns(base.owner(name)):
                frozen[id(parameter)] = parameter
    if base.anatomy.causal and any(s.top for s in segments):
        head = base.model.get_output_embeddings()
        if head is not None and not head.weight.requires_grad:
            frozen[id(head.weight)] = head.weight  # a tied head reads the embedding's matrix, wherever that is counted
    trained = slot.get()
    held = storage_bytes(frozen.values()), storage_bytes(trained.values())
    state = slot.get(optimizer=True)
    moments = storage_bytes(t for n, t in state.items() if n.startswith("optimizer/"))
    return {
        "blocks": ", ".join(names),
        "parameters": sum(p.numel() for p in frozen.values()) + sum(t.numel() for t in trained.values()),
        "trainable_parameters": sum(t.numel() for t in trained.values()),
        "peak_memory_bytes": held[0] + 2 * held[1] + moments + watch.saved,
        "memory": {
            "frozen": held[0], "trainable": held[1], "gradients": held[1], "optimizer": moments, "activations": watch.saved,
        },
    }  # fmt: skip


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
