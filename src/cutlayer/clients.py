"""A client of a run, with its data and its defenses; and what these have spent in a simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cutlayer import registry
from cutlayer.agreed import AgreedSecret
from cutlayer.build import Data, task_of
from cutlayer.config import RunConfig
from cutlayer.defense import Ground, Sends
from cutlayer.models.loading import load_tokenizer
from cutlayer.models.segment import Base, Segment
from cutlayer.models.slots import PRIVATE, Slot
from cutlayer.parties.client import ClientParty, secret_of
from cutlayer.parties.defending import Defending
from cutlayer.schedule import batches_of, chunks, told_of
from cutlayer.seeds import derive
from cutlayer.telling import teller_of
from cutlayer.values import Batch, Example, Layout

if TYPE_CHECKING:
    from cutlayer.driver import Run

MOVES = "the planner moves the cut, so that messages left under more than one setting"


def client_party(
    config: RunConfig, base: Base, data: Data, kept: Mapping[str, Sequence[Example]], name: str, *, head: Segment,
    tail: Segment | None, slot: Slot, frozen: bool, secret: bytes | None = None, agreed: AgreedSecret | None = None,
) -> ClientParty:  # fmt: skip
    """A client with its data; ``kept`` are the examples that it validates with."""
    told = told_of(config, data, name)
    own = secret or secret_of(config.seed, name)
    defending = defending_of(config, head=head, tail=tail, frozen=frozen, secret=own)

    def makers(what: str, rows: Sequence[Example]) -> list[Callable[[], Batch]]:
        parts = chunks(rows, config.batch_size)
        if defending is None:
            return [partial(data.collate, part) for part in parts]
        return defending.evaluated(parts, data.collate, what=what)

    return ClientParty(
        name,
        head=head,
        tail=tail,
        slot=slot,
        batches=batches_of(config, data, name),
        evaluation=makers("evaluation", data.evaluation),
        validation=makers("validation", kept.get(name, [])),
        sizes={"examples": told.examples, "label_tokens": told.label_tokens},
        seed=config.seed,
        teller=teller_of(config, base, data, name, secret=secret, agreed=agreed),
        frozen={n: base.initial[n] for n in head.names} if frozen else None,
        secret=own,
        defending=defending,
    )


def private_names(config: RunConfig, tail: Segment | None) -> list[str]:
    """The names of what a client trains that never leaves it: of a second tail, where a defense has one."""
    if tail is None or not any(registry.load("defense", spec.name).two_tails for spec in config.defense):
        return []
    return [PRIVATE + name for name in tail.names]


def defending_of(
    config: RunConfig, *, head: Segment, tail: Segment | None, frozen: bool, secret: bytes
) -> Defending | None:
    """A client's defenses; None where the run has none.

    Args:
        config: the run.
        head: the client's segment with the embedding.
        tail: the one with the norm and the head, if it is the client's.
        frozen: the client's head is not trained.
        secret: of this client alone.
    """
    if not config.defense:
        return None
    base, task = head.base, task_of(config)
    specials = _specials(config.model, len(base.embedding))

    made = [registry.create("defense", spec.name, spec.options) for spec in config.defense]

    def ground(head: Segment) -> Ground:
        return Ground(
            _layout(head, tail), task, config.data.max_length, head_trained=bool(head.names) and not frozen,
            tail_trained=tail is not None and bool(tail.names), embedding=lambda: base.embedding, look=_looking(head),
            pull=None if tail is None else _pulling(tail, config.seed),
            guess=None if tail is None else _guessing(head, tail), tokens_of=partial(_tokens_of, config.model),
            measured=None if tail is None else _measuring(head, tail, frozen, config.seed),
            trunk_trained=cache(partial(_trained_outside, config, _layout(head, tail))),
            classes=0 if base.anatomy.causal else int(base.model.config.num_labels),
            specials=specials, seed=config.seed, packed=config.data.packing,
            learned=any(one.learning for one in made),
        )  # fmt: skip

    return Defending(made, ground(head), secret, [spec.name for spec in config.defense], ground)


def _layout(head: Segment, tail: Segment | None) -> Layout:
    """What a client holds, and of the others that it is theirs."""
    first, blocks = len(head.blocks), head.base.anatomy.num_blocks
    if tail is None:
        return Layout(head.blocks, range(first, first), range(first, blocks), tail_at_client=False)
    return Layout(head.blocks, range(first, tail.blocks.start), tail.blocks, tail_at_client=True)


def _looking(head: Segment) -> Callable[[Tensor], Tensor]:
    """The head's forward pass with the weights that everybody has: those of the run's begin."""

    def look(input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = head.forward(head.base.initial, input_ids=input_ids.to(head.base.device))
        return hidden

    return look


def _pulling(tail: Segment, seed: int) -> Callable[[Tensor], Tensor]:
    """The backward pass of the tail with the weights that everybody has, for labels that are drawn."""
    base = tail.base

    def pull(hidden: Tensor) -> Tensor:
        rows, length = hidden.shape[:2]
        generator = torch.Generator().manual_seed(derive("public labels", seed))
        entering = hidden.to(base.device, next(base.model.parameters()).dtype).detach().requires_grad_()
        if base.anatomy.causal:
            labels = torch.randint(base.model.config.vocab_size, (rows, length), generator=generator)
        else:
            labels = torch.randint(base.model.config.num_labels, (rows,), generator=generator)
        with torch.enable_grad():
            loss = tail.forward(base.initial, hidden=entering, labels=labels.to(base.device)).loss
            with tail.entered(base.initial):
                (found,) = torch.autograd.grad(
                    loss * (rows * (length - 1) if base.anatomy.causal else rows), [entering]
                )
        return found

    return pull


def _guessing(head: Segment, tail: Segment) -> Callable[[Tensor], Tensor]:
    """The public head and tail as a model of their own."""
    look = _looking(head)

    def guess(input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = tail.forward(tail.base.initial, hidden=look(input_ids)).logits
        return logits.float()

    return guess


def _measuring(head: Segment, tail: Segment, frozen: bool, seed: int) -> Callable[[Tensor], Tensor]:
    """The norms of single texts' gradients by the weights that everybody has, for labels that are drawn."""
    base = head.base
    names = [*([] if frozen else head.names), *tail.names]
    wanted = list({id(base.initial[name]): base.initial[name] for name in names}.values())

    def measured(input_ids: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive("public labels", seed))
        return torch.tensor([one(ids[None].to(base.device), generator) for ids in input_ids])

    def one(ids: Tensor, generator: torch.Generator) -> float:
        if base.anatomy.causal:
            labels = torch.randint(base.model.config.vocab_size, ids.shape, generator=generator)
        else:
            labels = torch.randint(base.model.config.num_labels, ids.shape[:1], generator=generator)
        with torch.enable_grad():
            hidden = head.forward(base.initial, input_ids=ids)
            entering = hidden.detach().requires_grad_()
            loss = tail.forward(base.initial, hidden=entering, labels=labels.to(base.device)).loss
            loss = loss * (ids.shape[1] - 1 if base.anatomy.causal else 1)
            with tail.entered(base.initial):
                found = torch.autograd.grad(loss, [entering, *wanted], allow_unused=True)
            with head.entered(base.initial):
                pulled = (
                    torch.autograd.grad(hidden, wanted, found[0], allow_unused=True) if hidden.requires_grad else []
                )
        sums = [sum(g for g in pair if g is not None) for pair in zip(found[1:], pulled or found[1:], strict=True)]
        return float(torch.stack([g.double().square().sum() for g in sums if isinstance(g, Tensor)]).sum().sqrt())

    return measured


def _trained_outside(config: RunConfig, layout: Layout) -> bool:
    """Whether a run trains something that the client does not hold."""
    from cutlayer.preflight import check_model

    _, model, anatomy = check_model(config)
    whole = config.build("peft").prepare(model, anatomy, task=task_of(config), seed=config.seed)
    owners = {whole.owner(name) for name in whole.initial}
    return any(owner in layout.trunk or (owner == "top" and not layout.tail_at_client) for owner in owners)


def _tokens_of(model: str, text: str) -> Sequence[int]:
    found: Sequence[int] = load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]
    return found


@lru_cache(maxsize=8)
def _specials(model: str, rows: int) -> tuple[int, ...]:
    """Tokens with a task of their own, of chat templates too, and those rows of an embedding that are of no token."""
    tokenizer = load_tokenizer(model)
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(sorted({*tokenizer.all_special_ids, *marked, *range(len(tokenizer), rows)}))


def privacy(run: Run) -> dict[str, list[dict[str, Any]]]:
    """What the defenses of each client of a simulation have spent so far; clients elsewhere write down their own.

    Steps that are made again after a crash are the same messages with the same noise, so that they count once. Each
    client is counted as if it made every evaluation.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    if run.parts.begun is None:
        return found
    frozen = bool(run.config.build("exchange").frozen_head)
    for name, party in run.parts.clients.items():
        defending = party.defending  # None also of what stands for a client in an actor
        if defending is None:
            defending = defending_of(
                run.config, head=party.head, tail=party.tail, frozen=frozen, secret=b"none is made"
            )
        if defending is not None:
            epoch = batches_of(run.config, run.parts.begun.data, name).steps_per_epoch
            sends = Sends(math.ceil(run.counters.steps.get(name, 0) / epoch), len(run.counters.evaluations))
            found[name] = defending.told(sends, MOVES if run.config.planner is not None else "")
    return found
