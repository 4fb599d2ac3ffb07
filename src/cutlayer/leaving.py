"""What each answer of a client may hold, and of which kind it is: the table that the guard goes by.

What is not in the table may not leave.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.errors import PolicyRefused
from cutlayer.models.slots import PRIVATE, parameter_of
from cutlayer.parties.client import ClientParty
from cutlayer.wire import Header, frame_length

OWN = "own"  # a tensor of the slot: of the head, of the tail or hosted
FREE = ""  # says nothing of the data

BATCH = {"last": FREE, "needs_gradient": FREE}
TOKENS = dict.fromkeys(("weight", "tokens", "label_tokens", "step_tokens"), "token_counts")
SHOWN = {
    "hidden": "activations",
    "mask": "activations",
    "positions": "activations",
    "labels": "labels",
    "samples": "sample_numbers",
}
SIZES = ("examples", "label_tokens", "steps_per_epoch", "evaluation_batches", "trainable")
PROOF = dict.fromkeys(("weights", "commitment", "digest", "key"), "hosted")

# By verb, what its answer may hold: tensors and values by name, each with the kind that it is of.
ANSWERS: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "set_up": ({}, dict.fromkeys(SIZES, "sizes")),
    "sketch": ({"sketch": "sketches"}, {}),
    "histogram": ({}, {"category/*": "sketches"}),
    "features": (dict.fromkeys(("hidden", "mask", "positions", "labels"), "features"), {"category/*": "features"}),
    "head_forward": (SHOWN, {**BATCH, **TOKENS}),
    "tail_step": ({"hidden": "gradients"}, {"last": FREE, "loss": "evaluation", "correct": "evaluation", **TOKENS}),
    "head_backward": ({}, {"last": FREE, "loss": "losses", **TOKENS}),
    "probe": ({**SHOWN, "plus.*": "activations", "minus.*": "activations"}, {**BATCH, **TOKENS}),
    "probed": ({}, {}),
    "grad_norm": ({}, {"squared_norm": "gradient_norms"}),
    "update": ({}, {}),
    "move": ({"*": OWN}, {}),
    "importance": ({"importance": "gradient_norms"}, {}),
    "begin_stage": ({}, {}),
    "end_stage": ({"*": OWN}, PROOF),
    "get_state": ({"*": OWN}, {"version": FREE}),
    "set_state": ({}, {}),
    "abort": ({}, {}),
}
PEERS = dict.fromkeys(("hidden", "mask", "positions", "labels"), "peers")
PEERS_SAY = dict.fromkeys(
    ("last", "needs_gradient", "loss", "correct", "update", "graph", "head_weight", *TOKENS), "peers"
)  # fmt: skip
HOST_VERBS = ("host_forward", "host_backward", "host_tail_step")  # work in the steps of others
TRUNK_VERBS = ("host_get", "host_put", "host_update", "host_norm")  # about what is trained here for others
ANSWERS = {
    **ANSWERS, **dict.fromkeys(HOST_VERBS, (PEERS, PEERS_SAY)),
    "host_get": ({"*": "hosted"}, {"version": FREE}),
    "host_put": ({}, {}),
    "host_update": ({}, {"version": FREE}),
    "host_norm": ({}, {"squared_norm": "gradient_norms"}),
}  # fmt: skip
BEGINNINGS = ("head_forward", "probe")  # show a batch


@dataclass(frozen=True)
class Held:
    """What a client's party holds at the moment."""

    head: frozenset[str]  # names of trained tensors
    tail: frozenset[str]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # all of the slot that may be told or given
    has_tail: bool
    evaluations: int  # batches


def held_by(party: ClientParty) -> Held:
    """What a party holds."""
    return Held(
        frozenset(party.head.names),
        frozenset(party.tail.names if party.tail is not None else ()),
        {
            name: (tuple(one.shape), one.dtype)
            for name, one in party.slot.params.items()
            if not name.startswith(PRIVATE)
        },
        party.tail is not None,
        len(party.evaluation) + len(party.validation),
    )


def is_training(asked: Header) -> bool:
    """Whether a request is none of those of an evaluation. To look around (``probe``) is to train."""
    return asked.verb not in ("head_forward", "tail_step", *HOST_VERBS) or bool(asked.values.get("graph"))


def kinds_of(asked: Header, header: Header, tensors: Sequence[Tensor], held: Held) -> dict[str, int]:
    """The kinds of what an answer holds, with the bytes of their tensors.

    Raises:
        PolicyRefused: it holds what no answer to such a request may.
    """
    found: dict[str, int] = {}
    known, values = ANSWERS[asked.verb]
    for name, tensor in zip(header.names, tensors, strict=True):
        kind = _like(name, known)
        if kind == OWN:
            kind = _owner(name, held, asked.verb)
        if kind is None:
            raise PolicyRefused("verbs", f"the answer to '{asked.verb}' holds the tensor '{name}', which it may not.")
        found[kind] = found.get(kind, 0) + tensor.numel() * tensor.element_size()
    for name in header.values:
        kind = _like(name, values)
        if kind is None:
            raise PolicyRefused("verbs", f"the answer to '{asked.verb}' tells '{name}', which it may not.")
        echoed = name == "loss" and asked.verb == "head_backward" and not held.has_tail  # the server told it
        if kind and not echoed:
            found.setdefault(kind, 0)
    if not is_training(asked):
        found.setdefault("evaluation", 0)
    return found


def _owner(name: str, held: Held, verb: str) -> str | None:
    """The kind of a tensor of the slot."""
    own = parameter_of(name)
    if own in held.head or (verb == "move" and own not in held.tail):  # it has left the head already
        return "head_adapter"
    if own in held.tail:
        return "tail_adapter"
    return "hosted" if own in held.tensors else None


def _like(name: str, known: Mapping[str, str]) -> str | None:
    """What is said of a name, or of a pattern that it is like; None if nothing is."""
    if name in known:
        return known[name]
    return next((kind for pattern, kind in known.items() if fnmatch.fnmatchcase(name, pattern)), None)


def length_of(header: Header, tensors: Sequence[Tensor]) -> int:
    """The bytes of an answer's frame."""
    return frame_length(header, [t.shape for t in tensors], [t.dtype for t in tensors])
