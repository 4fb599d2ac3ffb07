"""Prove on a model that split equals unsplit: the same batch through the uncut model and through the cut one.

The cut side is not a shortcut: it runs the parties, the step and the wire of a real run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cutlayer import registry
from cutlayer.clock import VirtualClock
from cutlayer.contracts import SERVER, SHARED, Batch, Example, How, Layout
from cutlayer.data.batches import Batches
from cutlayer.errors import CutlayerError, MethodError, ModelError, NotExact
from cutlayer.links.local import Carrier, ClientEnd, LocalLink, Queues, Station
from cutlayer.models.families import Anatomy
from cutlayer.models.loading import device_named, load_model
from cutlayer.models.segment import Base, Segment
from cutlayer.models.slots import Slot
from cutlayer.parties.client import ClientParty
from cutlayer.parties.hops import ServerTail, TrunkHop
from cutlayer.parties.trunk import Place, TrunkParty
from cutlayer.seeds import derive
from cutlayer.step import split_step
from cutlayer.wire import Meter

LOOKS_AHEAD = 1e-6  # of the largest logit; a model that does not look ahead gives what comes later a weight of 0
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
ROWS = 3
LARGE = 2_000_000_000  # parameters; from here on a run compares with the uncut model only where it is told to


@dataclass(frozen=True)
class Comparison:
    """One cut: who holds how many blocks, and the largest absolute differences from the uncut model."""

    partition: str
    head_blocks: int
    trunk_blocks: int
    tail_blocks: int
    loss: float
    logits: float
    gradients: float
    tolerance: float

    @property
    def largest(self) -> float:
        """The largest of the three differences."""
        return max(self.loss, self.logits, self.gradients)

    @property
    def passed(self) -> bool:
        """Whether all are within the tolerance (a NaN is not)."""
        return self.largest <= self.tolerance

    @property
    def exact(self) -> bool:
        """Whether there is no difference at all."""
        return self.largest == 0.0


def verify(
    model: str,
    *,
    cut: int | None = None,
    tail: int | None = None,
    partition: str | None = None,
    precision: str = "float32",
    attn_implementation: str | None = None,
    tokens: int = 16,
    task: str = "causal",
    device: str = "auto",
) -> list[Comparison]:
    """Compare cuts of a model with the uncut model, with LoRA on all linear layers and a padded random batch.

    Args:
        model: a folder or Hub name.
        cut: blocks of the head; None tries several.
        tail: blocks of the tail (U-shape); None tries several.
        partition: only this one; None tries both.
        precision: as in a run file.
        attn_implementation: as in a run file.
        tokens: the length of the longest row.
        task: ``causal`` or ``classification``.
        device: ``auto`` is CUDA when there is one.

    Raises:
        ModelError: the model cannot be loaded or cut.
        MethodError: the cut does not fit.
    """
    device = device_named(device)
    if tail is not None and partition == "two-part-split":
        raise MethodError("--tail goes with the U-shape: the two-part split leaves the tail with the server.")
    loaded, anatomy = load_model(
        model, task=task, precision=precision, attn_implementation=attn_implementation, device=device
    )
    count = anatomy.num_blocks
    cuts: list[tuple[str, Layout]] = []
    for name in [partition] if partition else registry.names("partition"):
        two = name == "two-part-split"
        for k in [cut] if cut is not None else _some(count, two):
            for m in [0] if two else [tail] if tail is not None else sorted({0, max(0, min(1, count - k - 1))}):
                options = {"head_blocks": k} if two else {"head_blocks": k, "tail_blocks": m}
                cuts.append((name, registry.create("partition", name, options).layout(count)))
    base = registry.create("peft", "lora", {"rank": 4}).prepare(loaded, anatomy, task=task, seed=0)
    return [compare(base, name, layout, tokens=tokens, tolerance=TOLERANCES[precision]) for name, layout in cuts]


def _some(count: int, two: bool) -> list[int]:
    """Cuts to try: the ends and the middle."""
    most = count if two else count - 1
    return sorted({0, min(1, most), most // 2, most})


def refuse_unasked(model: Any, anatomy: Anatomy, *, when: str) -> None:
    """Refuse a large model of an unknown family that the run does not ask to compare; no weight is needed for that.

    Raises:
        ModelError: it is one.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if when == "auto" and not anatomy.exact and count >= LARGE:
        raise ModelError(
            f"A model of type '{model.config.model_type}' is not known to be cut exactly, and with {count / 1e9:.1f} "
            f"billion parameters (the limit is {LARGE / 1e9:g}) it is not compared with the uncut model unasked. Set "
            "verify: always, and the run begins with that comparison, on a few tokens."
        )


def check_unknown_family(base: Base, layout: Layout, *, when: str) -> None:
    """Compare with the uncut model where the family is not known to be exact (``when`` is ``always``: any model).

    Raises:
        NotExact: the cut model computes something else.
    """
    kind, known = base.model.config.model_type, base.anatomy.exact
    if known and when == "auto":
        return
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    found = compare(base, "the run's cut", layout, tokens=8, tolerance=TOLERANCES[dtype])
    if not found.passed:
        first = "is known to be cut exactly, but" if known else "is not known to be cut exactly, and"
        raise NotExact(
            f"A model of type '{kind}' {first} it is not: the cut model differs from the uncut one by "
            f"{found.largest:.3g} (loss {found.loss:.3g}, logits {found.logits:.3g}, gradients {found.gradients:.3g}; "
            f"allowed: {found.tolerance:g}). It would not be this model that is trained.",
            found.largest,
        )


def compare(base: Base, name: str, layout: Layout, *, tokens: int, tolerance: float) -> Comparison:
    """One micro-batch through the uncut and the cut model, with the same random adapter values."""
    params = _random_params(base)
    whole = Segment(base, "whole", range(base.anatomy.num_blocks), bottom=True, top=True)
    seen: list[Tensor] = []
    where = "uncut"
    try:
        batch = _random_batch(base, tokens)
        loss, logits, gradients = _uncut(whole, params, batch)
        if not base.anatomy.exact:
            _refuse_looking_ahead(whole, params, batch)
        where = "cut"
        cut_loss, cut_gradients = _cut(base, layout, params, batch, seen.append)
    except CutlayerError:
        raise
    except Exception as error:  # whatever the model's own code says to inputs that it does not expect
        said = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        kind = f"A model of type '{base.model.config.model_type}'"
        if where == "uncut":
            raise ModelError(
                f"{kind} fails on a small batch even uncut ({said}), so the cut model has nothing to be compared with."
            ) from error
        raise ModelError(
            f"{kind} got through a small batch uncut, but failed on it when cut ({said}). This family cannot be cut."
        ) from error
    base.bind(base.initial)
    base.install(None)
    return Comparison(
        name, len(layout.head), len(layout.trunk if layout.tail_at_client else layout.tail),
        len(layout.tail) if layout.tail_at_client else 0,
        abs(loss - cut_loss), _difference({"": logits}, {"": seen[0]}), _difference(gradients, cut_gradients),
        tolerance,
    )  # fmt: skip


def _random_params(base: Base) -> dict[str, Parameter]:
    """Adapter values away from zero, or half of the gradients would be."""
    made: dict[int, Parameter] = {}
    out = {}
    for name, parameter in base.initial.items():
        if id(parameter) not in made:
            source = torch.Generator().manual_seed(derive("verify", name))
            noise = torch.randn(parameter.shape, generator=source).to(parameter.device, parameter.dtype) * 0.02
            made[id(parameter)] = Parameter(parameter.detach() + noise, requires_grad=True)
        out[name] = made[id(parameter)]
    return out


def _random_batch(base: Base, tokens: int) -> Batch:
    config, causal = base.model.config, base.anatomy.causal
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (ROWS, tokens), generator=source)
    pad = getattr(config, "pad_token_id", None)  # CodeGen's configuration has no such key
    if pad is not None:  # some models take a padding token inside a row for padding
        ids = torch.where(ids == pad, (ids + 1) % config.vocab_size, ids)
    mask = torch.ones_like(ids)
    for row, length in enumerate((tokens, max(2, tokens // 2), max(2, tokens - 1))):
        mask[row, length:] = 0
    ids = torch.where(mask.bool(), ids, torch.full_like(ids, pad or 0))
    if causal:
        labels = torch.where(mask.bool(), ids, torch.full_like(ids, -100))
        counted = int((labels[:, 1:] != -100).sum())
    else:
        labels = torch.arange(ROWS) % config.num_labels
        counted = ROWS
    return Batch(ids, mask, None, labels, int(mask.sum()), counted)


def _refuse_looking_ahead(whole: Segment, params: Mapping[str, Parameter], batch: Batch) -> None:
    """Refuse a model for text whose positions see what comes after them.

    Raises:
        ModelError: a change of the last token changes what is said before it.
    """
    if not whole.base.anatomy.causal:
        return
    device = whole.base.device
    other = batch.input_ids[:1].clone()
    other[0, -1] = other[0, 0] if other[0, 0] != other[0, -1] else other[0, 1]
    with torch.no_grad():
        said = [
            whole.forward(params, input_ids=ids.to(device)).logits[0, :-1].float()
            for ids in (batch.input_ids[:1], other)
        ]
    if float((said[0] - said[1]).abs().max()) > LOOKS_AHEAD * float(said[0].abs().max()):
        raise ModelError(
            f"A model of type '{whole.base.model.config.model_type}' is an encoder: each position sees its own label, "
            "so it cannot learn to predict text. Use data.format: classification with it."
        )


def _uncut(whole: Segment, params: Mapping[str, Parameter], batch: Batch) -> tuple[float, Tensor, dict[str, Tensor]]:
    device = whole.base.device
    output = whole.forward(
        params, input_ids=batch.input_ids.to(device), attention_mask=_on(batch.attention_mask, device),
        labels=batch.labels.to(device),
    )  # fmt: skip
    output.loss.backward()
    gradients = {n: p.grad for n, p in params.items() if p.grad is not None}
    for parameter in params.values():
        parameter.grad = None
    return float(output.loss.detach()), output.logits.detach(), gradients


def _on(tensor: Tensor | None, device: Any) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


class _Keep(torch.optim.SGD):
    """An optimizer that updates nothing and keeps what it was given."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.0)
        self.kept: list[Tensor | None] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the gradients."""
        self.kept = [p.grad for group in self.param_groups for p in group["params"]]


def _cut(
    base: Base, layout: Layout, params: Mapping[str, Parameter], batch: Batch, show: Callable[[Tensor], None]
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a real step; ``show`` gets the logits."""
    head = Segment(base, "head", layout.head, bottom=True)
    tail = Segment(base, "tail", layout.tail, top=True)
    middle = Segment(base, "trunk", layout.trunk) if layout.tail_at_client else tail
    ours = [*head.names, *(tail.names if layout.tail_at_client else [])]
    client_slot = Slot("client", {n: params[n] for n in ours}, _Keep)
    trunk_slot = Slot("shared", {n: params[n] for n in middle.names}, _Keep)
    client = ClientParty(
        "client",
        head=head,
        tail=tail if layout.tail_at_client else None,
        slot=client_slot,
        batches=_one(batch),
        sizes={},
        seed=0,
    )
    trunk = TrunkParty(SERVER, {SHARED: trunk_slot}, seed=0)
    clock, meter = VirtualClock(), Meter()
    queues = Queues(clock, {})
    end = ClientEnd("client", LocalLink(client, meter=meter, queues=queues))
    at_server = (trunk, Place(middle, SHARED), Station(SERVER, queues), Carrier(meter, queues))
    hook = base.model.register_forward_hook(lambda module, inputs, output: show(output.logits.detach()))
    base.model.eval()
    original, base.train = base.train, lambda mode: None  # type: ignore[method-assign]  # no dropout: the uncut side has none
    try:
        if layout.tail_at_client:
            route: tuple[Sequence[Any], Any] = ([TrunkHop(*at_server)], end)
        else:
            route = ([], ServerTail(*at_server))
        result = clock.run(split_step(end, route[0], route[1], step=0, micro=0, how=How()))
    finally:
        hook.remove()
        base.train = original  # type: ignore[method-assign]
    gradients: dict[str, Tensor] = {}
    for slot in (client_slot, trunk_slot):
        if isinstance(slot.optimizer, _Keep):
            kept = zip(slot.get(), slot.optimizer.kept, strict=True)
            gradients |= {name: grad for name, grad in kept if grad is not None}
    return result.loss, gradients


def _one(batch: Batch) -> Batches:
    """A schedule of this one batch."""
    return Batches(
        [Example([0])], batch_size=1, accumulation=1, seed=0, client="client", shuffle=False, collate=lambda _: batch
    )


def _difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The largest absolute difference; a tensor that only one side has counts with all its size."""
    worst = 0.0
    for name in left.keys() | right.keys():
        if name in left and name in right:
            gap = (left[name].float() - right[name].float()).abs().max()
        else:
            gap = (left if name in left else right)[name].float().abs().max()
        worst = max(worst, float(gap)) if not gap.isnan() else float("nan")
    return worst
