"""``summary.json``: what a run was and what it measured."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cutlayer import allotting
from cutlayer.allotment import Allotter
from cutlayer.assembly import segments_of
from cutlayer.clients import privacy
from cutlayer.models.placement import peak_bytes
from cutlayer.models.segment import Segment
from cutlayer.models.slots import Slot, parameter_of
from cutlayer.parties.memory import storage_bytes
from cutlayer.wire import STEP_NAMES

if TYPE_CHECKING:
    from cutlayer.driver import Run

QUALITY = ("loss", "perplexity", "accuracy")
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
        "lost": {name: counters.lost.get(name, 0) for name in run.clients},
        "stopped_early": counters.stopped,
        "parties": _parties(run),
    }
    if counters.arrangement is not None:
        summary["arrangement"] = counters.arrangement
    base = run.parts.base
    if not base.anatomy.causal:
        names = base.model.config.id2label
        summary["labels"] = [names[number] for number in range(len(names))]
    if counters.evaluations:
        first, last = counters.evaluations[0], counters.evaluations[-1]
        summary["eval"] = {
            "before": {k: first[k] for k in QUALITY},
            "after": {k: last[k] for k in QUALITY},
            "history": counters.evaluations,
        }
    seconds = counters.seconds
    summary |= {
        "bytes": {name: run.meter.by_step.get(name, 0) for name in STEP_NAMES},
        "bytes_up": run.meter.up,
        "bytes_down": run.meter.down,
        **({"bytes_repeated": run.meter.repeated} if run.meter.repeated else {}),
        "frames": run.meter.frames,
        "tokens": counters.tokens,
        "seconds": seconds,
        "tokens_per_second": counters.tokens / seconds if seconds else 0.0,
        "virtual_seconds": run.clock.now() if run.paces.profiles else None,
        "peak_memory": {
            "process_bytes": peak_rss(),
            "accelerator_bytes": peak_bytes(device),
            "by_party": "counted from the tensors that each party holds (see parties/memory.py); base weights that "
            "simulated parties share are counted at each of them",
        },
        "adapter": adapter.relative_to(run.out).as_posix(),  # so that the folder may be moved
        **({"adapters": {name: f"{adapter.name}s/{name}" for name in run.clients}} if run.personal else {}),
        "device": device,
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    if run.parts.planner is not None:
        summary["cuts"] = {
            name: {"head_blocks": len(run.parts.layouts[name].head), "moves": counters.cuts.get(name, [])}
            for name in run.clients
        }
    if config.defense and (spent := privacy(run)):
        summary["privacy"] = spent
    if isinstance(run.parts.peft, Allotter):
        summary["ranks"] = allotting.summary(run)
    if run.paces.profiles:
        summary |= {
            "virtual_by_step": {name: counters.virtual.get(name, 0.0) for name in STEP_NAMES},
            "waiting": {name: counters.waiting.get(name, 0.0) for name in run.clients},
            "critical": {name: counters.critical.get(name, 0) for name in run.clients},
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
    words = ["embeddings"] if any(segment.bottom for segment in segments) else []
    blocks = sorted({block for segment in segments for block in segment.blocks})
    starts = [b for b in blocks if b - 1 not in blocks]
    for first, last in zip(starts, [b for b in blocks if b + 1 not in blocks], strict=True):
        words.append(f"block {first}" if first == last else f"blocks {first}-{last}")
    words += ["norm and head"] if any(segment.top for segment in segments) else []
    if base.anatomy.causal and any(segment.top for segment in segments):
        head = base.model.get_output_embeddings()
        if head is not None and not head.weight.requires_grad:
            frozen[id(head.weight)] = head.weight  # a tied head reads the embedding's matrix, wherever that is counted
    return Holdings(", ".join(words), list(frozen.values()))


def _parties(run: Run) -> dict[str, Any]:
    parts = run.parts
    stretches: dict[str, dict[Segment, None]] = {name: {} for name in parts.parties}
    used: dict[Slot, dict[str, None]] = {}  # what of a slot is trained now: it may hold more, where cuts move
    found = {}
    for name, client in parts.clients.items():
        head, middle, tail = segments_of(parts.base, parts.layouts[name], parts.routes[name])
        for stop, segment in zip(parts.routes[name], middle, strict=True):
            stretches[stop.party][segment] = None
            used.setdefault(parts.slot(stop), {}).update(dict.fromkeys(segment.names))
        own = [head, *([tail] if tail else [])]
        used.setdefault(client.slot, {}).update(dict.fromkeys(n for segment in own for n in segment.names))
        found[name] = _party([*own, *stretches.get(name, {})], {client.slot: used[client.slot]}, client.watch.saved)
    for name, party in parts.parties.items():
        saved = party.watch.saved
        if name in found:
            client = parts.clients[name]
            own = [client.head, *([client.tail] if client.tail else [])]
            slots = {slot: used[slot] for slot in (client.slot, *party.slots.values()) if slot in used}
            found[name] = _party([*own, *stretches[name]], slots, client.watch.saved + saved)
        elif stretches[name]:
            slots = {slot: used[slot] for slot in party.slots.values() if slot in used}
            found[name] = _party(list(stretches[name]), slots, saved)
    if parts.apart:  # what clients elsewhere need was not measured here
        found |= {name: {k: v for k, v in found[name].items() if "memory" not in k} for name in parts.clients}
    return found


def _party(segments: list[Segment], slots: Mapping[Slot, Collection[str]], saved: int) -> dict[str, Any]:
    """What a party holds: the segments' frozen weights once, and what each slot trains (names by slot)."""
    held = holdings(segments)
    trained = [t for slot, names in slots.items() for n, t in slot.get().items() if n in names]
    frozen_bytes, trained_bytes = storage_bytes(held.frozen), storage_bytes(trained)
    moments = storage_bytes(
        t
        for slot, names in slots.items()
        for n, t in slot.get(optimizer=True).items()
        if n.startswith("optimizer/") and parameter_of(n) in names
    )
    count = sum(t.numel() for t in trained)
    found: dict[str, Any] = {
        "blocks": held.words,
        "parameters": sum(p.numel() for p in held.frozen) + count,
        "trainable_parameters": count,
        "peak_memory_bytes": frozen_bytes + 2 * trained_bytes + moments + saved,
        "memory": {
            "frozen": frozen_bytes, "trainable": trained_bytes, "gradients": trained_bytes, "optimizer": moments,
            "activations": saved,
        },
    }  # fmt: skip
    if len(slots) > 1:
        found["slots"] = len(slots)
    return found


def peak_rss() -> int:
    """The largest resident size that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts what the parent had when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
