"""What a run would be: who holds what, and what a step would move. No weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cutlayer.build import layout_of, task_of
from cutlayer.config import RunConfig
from cutlayer.contracts import How, Layout
from cutlayer.costs import memory, shape_of
from cutlayer.models.families import anatomy
from cutlayer.models.loading import DTYPES, load_config
from cutlayer.models.segment import Base, Segment
from cutlayer.pace import training_of
from cutlayer.parties.trunk import told_how
from cutlayer.report.summary import holdings
from cutlayer.wire import Header, Value, frame_length


@dataclass(frozen=True)
class DryRun:
    """``summary`` has the keys of ``summary.json`` that can be known beforehand, and ``memory_bytes`` by party."""

    summary: Mapping[str, Any]


def plan(config: RunConfig) -> DryRun:
    """Lay a run out on a model without weights.

    Raises:
        ModelError: the model is not known, or cannot be cut.
        MethodError: the cut does not fit it.
    """
    task = task_of(config)
    model_config = load_config(config.model)
    auto: Any = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(model_config)
    model.requires_grad_(False)
    shape = shape_of(model_config, task=task)
    anatomy_of = anatomy(model, causal=task == "causal")
    layout = layout_of(config, anatomy_of.num_blocks)
    base: Base = config.build("peft").prepare(model, anatomy_of, task=task, seed=config.seed)
    head = Segment(base, "head", layout.head, bottom=True)
    tail = Segment(base, "tail", layout.tail, top=True)
    trunk = Segment(base, "trunk", layout.trunk) if layout.tail_at_client else tail
    ours = [head, tail] if layout.tail_at_client else [head]
    length = min(config.data.max_length, getattr(model_config, "max_position_embeddings", config.data.max_length))
    tokens = config.batch_size * length
    optimizer = {"sgd": "momentum" if config.optimizer.arguments.get("momentum") else "sgd"}.get(
        config.optimizer.name, "adamw"
    )
    parties: dict[str, Any] = {}
    for name, segments in {**dict.fromkeys(config.client_names, ours), "server": [trunk]}.items():
        needed = [
            memory(
                shape, blocks=part.blocks, training=training_of(config), tokens=tokens, length=length,
                embedding=part.bottom, lm_head=part.top, precision=config.precision, optimizer=optimizer,
                checkpointing=config.gradient_checkpointing, eager=config.attn_implementation == "eager",
            ).total
            for part in segments
        ]  # fmt: skip
        held = holdings(segments)
        names = {n: base.initial[n] for part in segments for n in part.names}
        trained = sum({id(p): p.numel() for p in names.values()}.values())
        parties[name] = {
            "blocks": held.words,
            "parameters": sum(p.numel() for p in held.frozen) + trained,
            "trainable_parameters": trained,
            "memory_bytes": sum(needed),
        }
    return DryRun({
        "model": config.model,
        "framework": config.framework.name,
        "partition": config.partition.name,
        "clients": config.client_names,
        "parties": parties,
        "batch": {"rows": config.batch_size, "tokens": length},
        "bytes": step_bytes(config, layout, bool(head.names), [config.batch_size, length, shape.hidden]),
    })  # fmt: skip


def step_bytes(config: RunConfig, layout: Layout, head_trains: bool, shape: Sequence[int]) -> dict[str, int]:
    """Bytes by step name of one optimizer step of the first client, for full rows [B,T,H] without padding."""
    name = config.client_names[0]
    dtype = DTYPES[config.precision]
    labels = [shape[0]] if task_of(config) == "classification" else list(shape[:2])

    def length(step: str, kind: str, verb: str, up: bool, values: dict[str, Value], tensors: dict[str, Any]) -> int:
        sender, receiver = (name, "server") if up else ("server", name)
        header = Header(step, kind, verb, sender, receiver, name, values=values, names=tuple(tensors))
        return frame_length(header, [t[0] for t in tensors.values()], [t[1] for t in tensors.values()])

    hidden = {"hidden": (shape, dtype)}
    shown: dict[str, Value] = {"last": True, "needs_gradient": head_trains}
    told = told_how(How())
    ack: dict[str, Value] = {"loss": 0.0, "tokens": 0, "label_tokens": 0, "last": True}
    back = ("gradient", hidden) if head_trains else ("no-gradient", {})
    found = {"head_forward": length("head_forward", "control", "head_forward", False, {"graph": True}, {})}
    if layout.tail_at_client:
        found["send_activations"] = length("send_activations", "activations", "", True, shown, hidden)
        found["return_activations"] = length("return_activations", "activations", "tail_step", False, told, hidden)
        found["send_gradients"] = length("send_gradients", "gradient", "", True, {"last": True}, hidden)
        found["return_gradients"] = length("return_gradients", back[0], "head_backward", False, told, back[1])
    else:
        both = {**hidden, "labels": (labels, torch.int32)}
        shown |= {"weight": 1.0, "label_tokens": 0, "tokens": 0}
        found["send_activations"] = length("send_activations", "activations", "", True, shown, both)
        found["return_gradients"] = length(
            "return_gradients", back[0], "head_backward", False, {**told, "loss": 0.0}, back[1]
        )
    found["head_backward"] = length("head_backward", "ack", "", True, ack, {})
    found = {step: count * config.gradient_accumulation for step, count in found.items()}
    if config.max_grad_norm is not None:  # the update is then a verb of its own, once a step
        for verb, asked, told_back in (("grad_norm", {}, {"squared_norm": 0.0}), ("update", {"scale": 1.0}, {})):
            found["head_backward"] += length("head_backward", "control", verb, False, dict(asked), {})
            found["head_backward"] += length("head_backward", "ack", "", True, dict(told_back), {})
    return found
