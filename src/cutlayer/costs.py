"""The cost model: what a step costs in FLOP, seconds and bytes. Planners minimise it, the virtual clock replays it.

Source: ``cost_model`` in the catalogue (methods/system_level.toml), named here by section. Per token throughout, as a
cut moves work between parties but not tokens. T is the padded length of a row, H the hidden size, V the vocabulary.

A planner needs: ``shape_of`` (the model, without its weights), ``Training`` (what is trained), ``Work`` (FLOP as
cumulative tables), ``profiles.Profile`` (speeds), ``memory``, and a composition of ``Stages`` into a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from cutlayer.profiles import Profile, profile_from
from cutlayer.shapes import BlockShape, ModelShape, shape_of

__all__ = [
    "BlockShape",
    "Memory",
    "ModelShape",
    "Profile",
    "Stages",
    "Training",
    "Work",
    "leg_seconds",
    "memory",
    "profile_from",
    "queue_finish",
    "queue_step",
    "seconds",
    "sequential_step",
    "shape_of",
    "two_part_stages",
]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of one number, by a run's ``precision``
OPTIMIZER_BYTES = {"adamw": 8, "adam": 8, "sgd": 0, "momentum": 4}  # of state per trained parameter, in fp32


@dataclass(frozen=True)
class Training:
    """What is trained: all weights (``full``), or LoRA of ``rank`` on ``targets``, or nothing (rank 0).

    ``targets`` are ends of module paths, or "all-linear", as in PEFT. ``blocks`` limits the adapters to some blocks
    (None: all). ``head`` says that the final norm and LM head or classifier are trained beside adapters.
    """

    full: bool = False
    rank: int = 0
    targets: Sequence[str] | Literal["all-linear"] = "all-linear"
    blocks: range | None = None
    head: bool = False

    def trains(self, block: int) -> bool:
        """Whether a block has trainable weights."""
        return self.full or (self.rank > 0 and (self.blocks is None or block in self.blocks))

    def adapter_params(self, shape: ModelShape, blocks: range) -> int:
        """LoRA parameters of ``blocks``: rank * (inputs + outputs) for each adapted map (section 3, Theta)."""
        if self.full:
            return 0
        maps = (one for block in blocks if self.trains(block) for one in shape.blocks[block].maps)
        return sum(self.rank * (i + o) for name, i, o in maps if self._targets(name))

    def _targets(self, name: str) -> bool:
        return self.targets == "all-linear" or any(name == end or name.endswith("." + end) for end in self.targets)


class Work:
    """FLOP per token of any run of blocks, for rows of ``length`` tokens (section 2); a moved cut costs O(1).

    ``causal_kernel`` halves the attention term, for a kernel that skips what a causal mask hides; eager attention and
    most masked kernels compute the full square. Sliding windows are counted in full. The optimizer, norms, activation
    functions and rotary angles are left out: they are no matrix products, and small beside those.
    """

    def __init__(
        self, shape: ModelShape, *, length: int, training: Training | None = None, causal_kernel: bool = False
    ) -> None:
        training = training or Training()
        self._training = training
        self._head = 2.0 * shape.active_head / (length if shape.head_per_row else 1)
        attention = 4.0 * length * shape.heads * shape.head_dim / (2 if causal_kernel else 1)  # QK' and PV
        lora = [2.0 * training.adapter_params(shape, range(b, b + 1)) for b in range(shape.num_blocks)]
        dense = [2.0 * block.active for block in shape.blocks]
        # Backward: both operands of the two attention products are activations, so they cost twice; a frozen weight
        # costs one product (the gradient of its input), a trained one a second (its own).
        twice = 2 if training.full else 1
        self._forward = tuple(accumulate((d + attention + a for d, a in zip(dense, lora, strict=True)), initial=0.0))
        self._backward = tuple(
            accumulate((twice * d + 2 * attention + 2 * a for d, a in zip(dense, lora, strict=True)), initial=0.0)
        )

    def forward(self, blocks: range, *, lm_head: bool = False) -> float:
        """FLOP per token of the forward of ``blocks``, and of the LM head or classifier if ``lm_head``."""
        return self._forward[blocks.stop] - self._forward[blocks.start] + (self._head if lm_head else 0.0)

    def backward(self, blocks: range, *, lm_head: bool = False, input_gradient: bool) -> float:
        """FLOP per token of the backward; ``input_gradient``: someone below needs the gradient of the input.

        Without, it ends at the lowest trainable block, and is 0 where nothing is trained. That block is counted whole,
        though what lies below its lowest adapter is not computed: an upper bound by at most one block.
        """
        lowest = blocks.start if input_gradient else next((b for b in blocks if self._training.trains(b)), blocks.stop)
        flop = self._backward[blocks.stop] - self._backward[lowest]
        if lm_head:
            flop += self._head * (self._training.full or self._training.head)
            flop += self._head * (input_gradient or lowest < blocks.stop)
        return flop


def seconds(flop: float, profile: Profile) -> float:
    """How long ``flop`` take on a device, in seconds."""
    return flop / profile.flops


def leg_seconds(num_bytes: float, bit_per_s: float, rtt: float) -> float:
    """How long one message takes, in seconds: half a round trip and its bits (section 4)."""
    return rtt / 2 + 8 * num_bytes / bit_per_s


@dataclass(frozen=True)
class Memory:
    """Bytes that a party holds (section 9). A server with n resident clients holds ``frozen + n * per_client``."""

    frozen: int
    trained: int
    activations: int
    logits: int

    @property
    def per_client(self) -> int:
        """All but the frozen weights."""
        return self.trained + self.activations + self.logits

    @property
    def total(self) -> int:
        """For one client."""
        return self.frozen + self.per_client


def memory(
    shape: ModelShape,
    *,
    blocks: range,
    training: Training,
    tokens: int,
    length: int,
    embedding: bool = False,
    lm_head: bool = False,
    precision: str = "float32",
    optimizer: str = "adamw",
    checkpointing: bool = False,
    eager: bool = False,
    backward: bool = True,
) -> Memory:
    """An estimate of what a party holds at the peak of a step of ``tokens`` (rows * ``length``).

    Trained weights: themselves and their gradient in fp32, and the optimizer's state. Saved activations of one block
    and token: 2 * (outputs of all linear maps) numbers. That is 18 H for GPT-2, where Korthikanti et al. 2022
    (arXiv:2205.05198) count 17 H; eager attention adds 2 * heads * T (scores and their softmax). Within 5 percent of
    what a tiny Llama saves; models that write their activation function out in Python (GPT-2) save 1.7 times as much,
    and experts of a mixture are not counted. With gradient checkpointing: H a block, and one block in full while it is
    recomputed. ``backward`` False (a forward-only client) saves nothing. Logits: 3 fp32 copies (logits, log-softmax,
    gradient) for each position that the head reads.
    """
    size = BYTES[precision]
    weights = sum(shape.blocks[b].params for b in blocks)
    if embedding:
        weights += shape.params_embedding - (shape.shared if lm_head else 0)
    if lm_head:
        weights += shape.params_head
    opened = weights if training.full else shape.params_head if training.head and lm_head else 0
    adapters = training.adapter_params(shape, blocks)
    scores = 2 * shape.heads * length if eager else 0
    saved = [2 * sum(outputs for *_, outputs in shape.blocks[b].maps) + scores for b in blocks] if backward else []
    numbers = shape.hidden * len(saved) + max(saved) if checkpointing and saved else sum(saved)
    positions = math.ceil(tokens / length) if shape.head_per_row else tokens
    return Memory(
        frozen=(weights - opened) * size,
        trained=(opened + adapters) * (4 + 4 + OPTIMIZER_BYTES[optimizer]),
        activations=numbers * tokens * size,
        logits=3 * positions * shape.outputs * 4 if lm_head else 0,
    )


@dataclass(frozen=True)
class Stages:
    """Seconds of one step of one client in the two-part split (section 5): a, up, s, dn, z."""

    forward: float
    up: float
    server: float
    down: float
    backward: float

    @property
    def release(self) -> float:
        """When its activations are at the server."""
        return self.forward + self.up

    @property
    def delivery(self) -> float:
        """From the end of the server's work to the end of the client's."""
        return self.down + self.backward


def two_part_stages(
    work: Work,
    shape: ModelShape,
    *,
    cut: int,
    tokens: int,
    up_bytes: int,
    down_bytes: int | None,
    client: Profile,
    server: Profile,
) -> Stages:
    """The stages of a step of ``tokens`` whose first ``cut`` blocks are the client's.

    ``down_bytes`` None: no gradient comes back, and the client does no backward.
    """
    head, trunk = range(cut), range(cut, shape.num_blocks)
    returns = down_bytes is not None
    at_server = work.forward(trunk, lm_head=True) + work.backward(trunk, lm_head=True, input_gradient=returns)
    return Stages(
        forward=seconds(tokens * work.forward(head), client),
        up=leg_seconds(up_bytes, client.up, client.rtt),
        server=seconds(tokens * at_server, server),
        down=0.0 if down_bytes is None else leg_seconds(down_bytes, client.down, client.rtt),
        backward=seconds(tokens * work.backward(head, input_gradient=False), client) if returns else 0.0,
    )


def sequential_step(stages: Sequence[Stages]) -> float:
    """Seconds of a step of sequential SL: one client after the other (section 6)."""
    return sum(one.release + one.server + one.delivery for one in stages)


def queue_finish(stages: Sequence[Stages]) -> tuple[float, ...]:
    """When the server ends each client's work, as a single queue in the given order (SFL-V2, section 6).

    C_1 = head_1 + s_1; C_k = max(C_(k-1), head_k) + s_k, in seconds from the step's begin.
    """
    ends = accumulate(stages, lambda before, one: max(before, one.release) + one.server, initial=0.0)
    return tuple(ends)[1:]


def queue_step(stages: Sequence[Stages]) -> float:
    """Seconds of a step whose server is a single queue in the given order: max of C_k + q_k (section 6)."""
    return max(end + one.delivery for end, one in zip(queue_finish(stages), stages, strict=True))
