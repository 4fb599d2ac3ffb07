"""What a request to a client must look like, before anything is computed with it: its numbers and its tensors.

A server is another organisation's program. What it sends is read within bounds, so that a malformed request is refused
in words and does not end the client with an error of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from cutlayer.errors import PolicyRefused
from cutlayer.models.slots import parameter_of
from cutlayer.policy import Policy, Told
from cutlayer.wire import Header

# What keeps two processes together; no part of a step.
HOUSEKEEPING = ("begin", "hold", "keep", "retime", "lead", "abort", "finish")
MOST = 2**48  # of any whole number; sums of the steps of endless runs are below

# Values by name, whichever verb has them: whole numbers with the least that they may be, other numbers, and
# what is true or false.
WHOLE: Mapping[str, int] = {
    "round": 0, "updates": 0, "ahead": 0, "most": 0, "steps": 0, "head_blocks": 0, "tail_blocks": -1, "version": -1,
    "directions": 0, "number": 0, "bits": 1, "used": 0, "stage": 0, "stop": 0,
    "born": 0, "total": 0,
}  # fmt: skip
NUMBERS = ("loss", "head_weight", "trunk_weight", "scale", "rate", "mu", "strength")
WEIGHT = "weight/"  # before the name of a client whose gradients weigh so much
FLAGS = (
    "graph", "update", "trunk_update", "last", "needs_gradient", "cache", "tell_step_tokens", "copy", "optimizer",
    "reset", "again", "by_tensor",
)  # fmt: skip
PARTS = ("own", "hosted", "all")
NEEDS: Mapping[str, tuple[str, ...]] = {  # values without which a verb of housekeeping means nothing
    "begin": ("round", "updates"), "hold": ("round",), "keep": ("round",), "retime": ("ahead",),
    "lead": ("to",),
}  # fmt: skip
OPEN_BELOW = ("head_blocks",)  # how low it may be is the policy's own rule, which says more


def named(header: Header) -> str:
    """A request, in words."""
    if header.verb in HOUSEKEEPING:
        return f"'{header.verb}'"
    return f"'{header.verb}' of step {header.step}, micro-batch {header.micro}"


def check_values(header: Header) -> None:
    """Whether every value that this end would compute with is one that it can.

    Raises:
        PolicyRefused: by the rule ``told``.
    """
    for name, value in header.values.items():
        if isinstance(value, float) and not math.isfinite(value):
            _refuse(header, f"tells {name} {value}, which is not finite.")
        least = 0 if name.startswith("category/") else WHOLE.get(name)
        if least is not None:
            if type(value) is not int:
                _refuse(header, f"tells {name} {value!r}, which is no whole number.")
            if value > MOST or (value < least and name not in OPEN_BELOW):
                _refuse(header, f"tells {name} {value}; it must be between {least} and {MOST}.")
        elif (name in NUMBERS or name.startswith(WEIGHT)) and isinstance(value, str):
            _refuse(header, f"tells {name} '{value}', which is no number.")
        elif name in FLAGS and type(value) is not bool:
            _refuse(header, f"tells {name} {value!r}; it must be true or false.")
        elif name == "part" and value not in PARTS:
            _refuse(header, f"asks for the part {value!r}; there are: {', '.join(PARTS)}.")
    for name in NEEDS.get(header.verb, ()):
        if name not in header.values:
            _refuse(header, f"does not tell {name}.")


def check_tensors(header: Header, tensors: Sequence[Tensor], head: frozenset[str]) -> None:
    """Whether a request has the tensors that its verb is about, and none with values that are not finite.

    Args:
        header: the request.
        tensors: its own.
        head: the names of the head's trained tensors.

    Raises:
        PolicyRefused: by the rule ``finite``, or ``shape``.
    """
    found = dict(zip(header.names, tensors, strict=True))
    if len(found) != len(tensors):
        raise PolicyRefused("shape", f"{named(header)} brings two tensors of one name.")
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise PolicyRefused("finite", f"{named(header)} brings '{name}' with values that are not finite.")
    needed: Sequence[str] = ()
    if header.verb == "tail_step" or (header.verb == "head_backward" and header.kind == "gradient"):
        needed = ("hidden",)
    elif header.verb == "probed":
        needed = ("slopes",)
    elif header.verb == "features":
        needed = sorted(head)
    for name in needed:
        if name not in found:
            raise PolicyRefused("shape", f"{named(header)} lacks the tensor '{name}'.")
        if not found[name].is_floating_point():
            raise PolicyRefused(
                "shape", f"{named(header)} brings '{name}' as {found[name].dtype}, not as real numbers."
            )


def check_owned(
    header: Header, tensors: Sequence[Tensor], held: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Whether what came is of tensors that the client has, and fits them.

    Raises:
        PolicyRefused: by the rule ``owned``.
    """
    for name, tensor in zip(header.names, tensors, strict=True):
        own = held.get(parameter_of(name))
        if own is None:
            raise PolicyRefused("owned", f"{named(header)} brings '{name}', which is not of this client's part.")
        shape, dtype = own
        if name != parameter_of(name):  # the optimizer's state of it, which may be one number, or a row
            fits = tensor.is_floating_point() and tensor.numel() <= math.prod(shape)
        else:
            fits = tuple(tensor.shape) == shape and tensor.dtype == dtype
        if not fits:
            raise PolicyRefused(
                "owned",
                f"{named(header)} brings '{name}' as {list(tensor.shape)} {tensor.dtype}; this client has "
                f"{list(shape)} {dtype}.",
            )


def check_like(
    header: Header, tensors: Sequence[Tensor], shape: tuple[int, ...] | None, dtype: torch.dtype | None, directions: int
) -> None:
    """Whether what came fits what was shown: ``hidden`` its shape (and type, going forward), ``slopes`` its number.

    Raises:
        PolicyRefused: by the rule ``shape``.
    """
    for name, tensor in zip(header.names, tensors, strict=True):
        here, wanted = tuple(tensor.shape), (directions,) if name == "slopes" else shape
        if name not in ("hidden", "slopes") or wanted is None:
            continue
        if here != wanted:
            raise PolicyRefused("shape", f"{named(header)} brings {list(here)} where {list(wanted)} was shown.")
        if header.verb == "tail_step" and dtype is not None and tensor.dtype != dtype:
            raise PolicyRefused("shape", f"{named(header)} brings {tensor.dtype} where {dtype} was shown.")


def check_told(header: Header, policy: Policy) -> None:
    """Whether what a request tells is within the owner's bounds.

    Raises:
        PolicyRefused: by the rule that has the bound.
    """
    for name, value in header.values.items():
        for_others = name == "trunk_weight" or name.startswith(WEIGHT)
        rule = "head_weight" if for_others else name  # of what this client trains for others, the same
        bounds = getattr(policy.told, rule) if rule in Told.model_fields else None
        if bounds is not None and not bounds.allow(float(value)):
            raise PolicyRefused(f"told.{rule}", f"{named(header)} tells {name} {value}; allowed: {bounds}.")
    if header.verb in ("set_up", "move") and "head_blocks" in header.values:
        blocks = header.values["head_blocks"]
        if float(blocks) < policy.head_blocks:
            raise PolicyRefused(
                "head_blocks", f"the server gives {blocks} blocks; allowed: {policy.head_blocks} or more."
            )
    if header.verb == "set_up":
        _check_set_up(header, policy)
    if header.verb == "move" and not policy.may_leave.head_adapter:
        raise PolicyRefused(
            "may_leave.head_adapter", "blocks that move to the server take their trained tensors with them."
        )


def _check_set_up(header: Header, policy: Policy) -> None:
    allowed, most = policy.partitions, policy.most.steps
    partition = "two-part-split" if float(header.values.get("tail_blocks", 0)) < 0 else "u-shaped-split"
    if allowed is not None and partition not in allowed:
        raise PolicyRefused("partitions", f"the server sets up '{partition}'; allowed: {', '.join(allowed)}.")
    steps = float(header.values.get("steps", 0))
    if most is not None and steps > most:
        raise PolicyRefused("most.steps", f"the server plans {steps:g} steps; allowed: {most}.")


def _refuse(header: Header, said: str) -> NoReturn:
    raise PolicyRefused("told", f"{named(header)} {said}")
