"""What a run would be: who holds what, what a step would move, and what cuts it would begin with; without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cutlayer.allotting import first_parameters
from cutlayer.assembly import routes_of, segments_of
from cutlayer.build import layouts_of, memory_of, prepare_data, task_of, tokenizer_of, training_of
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, How, Layout, Peft, Stop
from cutlayer.costs import Memory, Training, shape_of
from cutlayer.models.heads import head_by_config
from cutlayer.models.loading import DTYPES
from cutlayer.models.segment import Base, Segment
from cutlayer.parties.trunk import told_how
from cutlayer.plans import Outset, outset
from cutlayer.preflight import check_model
from cutlayer.report.summary import holdings
from cutlayer.wire import Header, Value, frame_length


@dataclass(frozen=True)
class DryRun:
    """``summary`` has the keys of ``summary.json`` that can be known beforehand, and ``memory_bytes`` by party.

    Of ``cutlayer plan`` also ``cuts``, where the run has a planner (``first_cuts``).
    """

    summary: Mapping[str, Any]


def plan_with_data(config: RunConfig) -> DryRun:
    """``plan``; where the run has a planner, with the cuts that it begins with, for which the data are read.

    Raises:
        DataError: something about the data is wrong.
        ModelError: the model is not known, or cannot be cut.
        MethodError: a cut does not fit it, or the clients.
    """
    if config.planner is None:
        return plan(config)
    model_config, _, anatomy_of = check_model(config)
    data = prepare_data(config, tokenizer_of(config), head=head_by_config)
    if data.labels is not None:
        model_config = copy.deepcopy(model_config)
        model_config.num_labels = len(data.labels)
    begun = outset(config, model_config, anatomy_of.num_blocks, data)
    return DryRun({**plan(config, begun.layouts).summary, "cuts": first_cuts(begun)})


def first_cuts(begun: Outset) -> dict[str, Any]:
    """By client its first cut, the head blocks that the planner may ever give it, and what the cost model predicts.

    ``step_seconds`` is of a step of a client that waits for nobody (None without profiles); ``memory_bytes`` is what it
    holds at that cut. Both are for rows as long as the client's are in the mean.
    """
    costs, bounds = begun.costs, begun.bounds
    assert bounds is not None
    return {
        name: {
            "head_blocks": len(layout.head),
            "tail_blocks": len(layout.tail) if layout.tail_at_client else 0,
            "bounds": [bounds[name].start, bounds[name].stop - 1],
            "step_seconds": sum(vars(costs.stages(layout, name)).values()) if name in costs.profiles else None,
            "memory_bytes": costs.memory(layout, name),
        }
        for name, layout in begun.layouts.items()
    }


def plan(config: RunConfig, layouts: Mapping[str, Layout] | None = None) -> DryRun:
    """Lay a run out on a model without weights, by the partition's cuts or by these.

    Raises:
        ModelError: the model is not known, or cannot be cut.
        MethodError: the cut does not fit it.
    """
    task = task_of(config)
    model_config, model, anatomy_of = check_model(config)
    model.requires_grad_(False)
    shape = shape_of(model_config, task=task)
    layouts = layouts_of(config, anatomy_of.num_blocks) if layouts is None else layouts
    routes = routes_of(config, layouts)
    peft: Peft = config.build("peft")
    base: Base = peft.prepare(model, anatomy_of, task=task, seed=config.seed)
    length = min(config.data.max_length, getattr(model_config, "max_position_embeddings", config.data.max_length))
    tokens = config.batch_size * length

    held: dict[str, dict[Segment, None]] = {name: {} for name in layouts}  # segments by party
    slots: dict[str, dict[str, dict[Segment, None]]] = {}  # and by slot, of those who run blocks for others
    for name, layout in layouts.items():
        head, middle, tail = segments_of(base, layout, routes[name])
        held[name] |= dict.fromkeys([head, *([tail] if tail else [])])
        for stop, segment in zip(routes[name], middle, strict=True):
            held.setdefault(stop.party, {})[segment] = None
            slots.setdefault(stop.party, {}).setdefault(stop.slot, {})[segment] = None
    framework = config.build("framework")
    for name, layout in layouts.items():  # where a client may be led to in the run
        for stop in framework.reach(name, layouts):
            if stop.slot not in slots.setdefault(stop.party, {}):
                top = not layout.tail_at_client and stop.blocks.stop == layout.middle.stop
                segment = base.segment("tail" if top else "trunk", stop.blocks, top=top)
                held.setdefault(stop.party, {})[segment] = None
                slots[stop.party][stop.slot] = {segment: None}

    exchange = config.build("exchange")
    frozen = exchange.frozen_head

    def needs(part: Segment) -> Memory:
        still = frozen and part.bottom
        return memory_of(config)(
            shape, blocks=part.blocks, training=Training() if still else training_of(config), tokens=tokens,
            length=length, embedding=part.bottom, lm_head=part.top, backward=not still and not exchange.probes,
        )  # fmt: skip

    def trained(parts: Iterable[Segment], client: str | None, trunks: int = 1) -> int:
        names = dict.fromkeys(n for part in parts if not (frozen and part.bottom) for n in part.names)
        return first_parameters(base, peft, names, client, trunks=trunks)

    parties: dict[str, Any] = {}
    for name, parts in held.items():
        found = holdings(list(parts))
        widest = [max(parts, key=lambda part: len(part.blocks))] if name not in layouts else list(parts)
        copies = len(slots[name]) if name not in layouts else 1
        of_slots = (trained(mine, None, copies) for mine in slots.get(name, {}).values())
        count = trained(parts, name) if name in layouts else sum(of_slots)
        needed = [needs(part) for part in widest]
        parties[name] = {
            "blocks": found.words,
            "parameters": sum(p.numel() for p in found.frozen) + count,
            "trainable_parameters": count,
            "memory_bytes": sum(one.frozen + copies * one.trained + one.activations + one.logits for one in needed),
        }
    first = config.client_names[0]
    head_trains = not frozen and bool(segments_of(base, layouts[first], routes[first])[0].names)
    return DryRun({
        "model": config.model,
        "framework": config.framework.name,
        "partition": config.partition.name,
        **({"planner": config.planner.name} if config.planner else {}),
        "clients": config.client_names,
        "parties": parties,
        "batch": {"rows": config.batch_size, "tokens": length},
        "bytes": step_bytes(
            config, layouts[first], routes[first], head_trains, [config.batch_size, length, shape.hidden]
        ),
    })  # fmt: skip


def step_bytes(
    config: RunConfig, layout: Layout, route: Sequence[Stop], head_trains: bool, shape: Sequence[int]
) -> dict[str, int]:
    """Bytes by step name of one optimizer step of the first client, for full rows [B,T,H] without padding.

    Those that it sends and receives; what other parties on its route send each other is not in it.
    """
    name = config.client_names[0]
    dtype = DTYPES[config.precision]
    labels = [shape[0]] if task_of(config) == "classification" else list(shape[:2])

    peers = dict.fromkeys(("send_activations", "return_gradients"), route[0].party)
    peers |= dict.fromkeys(("return_activations", "send_gradients"), route[-1].party)

    def length(step: str, kind: str, verb: str, up: bool, values: dict[str, Value], tensors: dict[str, Any]) -> int:
        peer = peers.get(step, SERVER)
        sender, receiver = (name, peer) if up else (peer, name)
        header = Header(step, kind, verb, sender, receiver, name, values=values, names=tuple(tensors))
        return frame_length(header, [t[0] for t in tensors.values()], [t[1] for t in tensors.values()])

    hidden = {"hidden": (shape, dtype)}
    packed = {"positions": (list(shape[:2]), torch.int32)} if config.data.packing else {}
    shown: dict[str, Value] = {"last": True, "needs_gradient": head_trains}
    told = told_how(How())
    ack: dict[str, Value] = {"loss": 0.0, "tokens": 0, "label_tokens": 0, "last": True}
    back = ("gradient", hidden) if head_trains else ("no-gradient", {})
    found = {"head_forward": length("head_forward", "control", "head_forward", False, {"graph": True}, {})}
    if layout.tail_at_client:
        found["send_activations"] = length("send_activations", "activations", "", True, shown, {**hidden, **packed})
        found["return_activations"] = length("return_activations", "activations", "tail_step", False, told, hidden)
        found["send_gradients"] = length("send_gradients", "gradient", "", True, {"last": True}, hidden)
        found["return_gradients"] = length("return_gradients", back[0], "head_backward", False, told, back[1])
    elif probes := config.build("exchange").probes:
        points = {f"{side}.{number}": hidden["hidden"] for number in range(probes) for side in ("plus", "minus")}
        looking: dict[str, Value] = {"graph": True, "directions": probes, "mu": 0.0, "copy": True}
        shown = {"last": True, "weight": 1.0, "label_tokens": 0, "tokens": 0}
        both = {**hidden, **packed, "labels": (labels, torch.int32), **points}
        found["head_forward"] = length("head_forward", "control", "probe", False, looking, {})
        found["send_activations"] = length("send_activations", "activations", "", True, shown, both)
        slopes = {"slopes": ([probes], torch.float32)}
        found["return_gradients"] = length("return_gradients", "gradient", "probed", False, {"graph": True}, slopes)
        ack = {}
    else:
        both = {**hidden, **packed, "labels": (labels, torch.int32)}
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
