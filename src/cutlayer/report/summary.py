"""``summary.json``: what a run was and what it measured."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
    from cutlayer.driver import Run

PACKAGES = ("cutlayer", "torch", "transformers", "peft", "safetensors")


def summarize(run: Run, *, adapter: Path, device: str) -> dict[str, Any]:
    """The summary of a finished run."""
    config, counters = run.config, run.counters
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
            "process_bytes": peak_rss(),
            "accelerator_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
            "by_party": "counted from the tensors that each party holds (see parties/memory.py); base weights that "
            "simulated parties share are counted at each of them",
        },
        "adapter": str(adapter),
        "device": device,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    return summary


@dataclass(frozen=True)
class Holdings:
    """What segments are made of: in words, and the frozen parameters, each once."""

    words: str
    frozen: list[Tensor]


def holdings(segments: Sequence[Segment]) -> Holdings:
    """What a party with these segments holds."""
    base = segments[0].base
    frozen: dict[int, Tensor] = {}
    for name, parameter in base.model.named_parameters():
        if name not in base.initial and any(segment.owns(base.owner(name)) for segment in segments):
            frozen[id(parameter)] = parameter
    words = []
    for segment in segments:
        words += ["embeddings"] if segment.bottom else []
        blocks = segment.blocks
        if len(blocks):
            words.append(f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}-{blocks[-1]}")
        words += ["norm and head"] if segment.top else []
    if base.anatomy.causal and any(segment.top for segment in segments):
        head = base.model.get_output_embeddings()
        if head is not None and not head.weight.requires_grad:
            frozen[id(head.weight)] = head.weight  # a tied head reads the embedding's matrix, wherever that is counted
    return Holdings(", ".join(words), list(frozen.values()))


def _parties(run: Run) -> dict[str, Any]:
    found = {}
    for name, client in run.parts.clients.items():
        found[name] = _party([client.head, *([client.tail] if client.tail else [])], client.slot, client.watch)
    trunk = run.parts.trunk
    found["server"] = _party([trunk.segment], trunk.slots[SHARED], trunk.watch)
    return found


def _party(segments: list[Segment], slot: Slot, watch: Watch) -> dict[str, Any]:
    held = holdings(segments)
    trained = slot.get()
    frozen_bytes, trained_bytes = storage_bytes(held.frozen), storage_bytes(trained.values())
    moments = storage_bytes(t for n, t in slot.get(optimizer=True).items() if n.startswith("optimizer/"))
    return {
        "blocks": held.words,
        "parameters": sum(p.numel() for p in held.frozen) + sum(t.numel() for t in trained.values()),
        "trainable_parameters": sum(t.numel() for t in trained.values()),
        "peak_memory_bytes": frozen_bytes + 2 * trained_bytes + moments + watch.saved,
        "memory": {
            "frozen": frozen_bytes, "trainable": trained_bytes, "gradients": trained_bytes, "optimizer": moments,
            "activations": watch.saved,
        },
    }  # fmt: skip


def peak_rss() -> int:
    """The largest resident size that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the parent had when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
