"""The public base model as an adversary runs it: the head up to a cut, the tail above one, without any adapter.

It is loaded anew from its checkpoint, so nothing of a client's can be in it. Shapes: B rows, T positions, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cutlayer.models.families import Anatomy
from cutlayer.models.loading import load_model
from cutlayer.models.segment import Base, Segment
from cutlayer.seeds import derive


@dataclass(frozen=True)
class PublicModel:
    """A base model that everybody can load.

    Args:
        base: the whole of it, frozen.
        task: ``causal`` or ``classification``.
    """

    base: Base
    task: str = "causal"

    @property
    def model(self) -> Any:
        """The Transformers model; whole, whatever segment ran last."""
        self.base.install(None)
        return self.base.model

    @cached_property
    def embedding(self) -> Tensor:
        """The input embeddings [V,H]."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight.detach().float()

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return len(self.embedding)

    @property
    def longest(self) -> int:
        """How many positions it has."""
        return int(getattr(self.base.model.config, "max_position_embeddings", None) or 1 << 20)

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return self.base.anatomy.num_blocks

    def head(self, blocks: int) -> Segment:
        """The embedding and the first blocks."""
        return self.base.segment("head", range(blocks), bottom=True)

    def middle(self, start: int, stop: int) -> Segment:
        """Blocks ``[start, stop)``."""
        return self.base.segment("trunk", range(start, stop))

    def tail(self, start: int) -> Segment:
        """The blocks from ``start`` on, the norm and the head."""
        return self.base.segment("tail", range(start, self.num_blocks), top=True)

    def run_head(self, blocks: int, input_ids: Tensor) -> Tensor:
        """Hidden states [B,T,H] of tokens [B,T] without padding, as the head at that cut gives them."""
        with torch.no_grad():
            hidden: Tensor = self.head(blocks).forward({}, input_ids=input_ids.to(self.base.device))
        return hidden.float()

    def run_tail(self, start: int, hidden: Tensor) -> Tensor:
        """Logits [B,T,V] of hidden states [B,T,H] that enter block ``start``; on the graph, if there is one."""
        logits: Tensor = self.tail(start).forward({}, hidden=hidden).logits
        return logits.float()


def load_public(
    model: str, *, task: str = "causal", precision: str = "float32", device: str = "cpu",
    labels: Sequence[str] | None = None, seed: int = 0,
) -> PublicModel:  # fmt: skip
    """The base model of a run, from its checkpoint.

    A classifier's head that the checkpoint lacks is drawn from the run's seed, which the server has, too.
    """
    loaded, anatomy = load_model(model, task=task, precision=precision, device=device, labels=labels, seed=seed)
    return PublicModel(Base(loaded, anatomy), task)


def copied(public: PublicModel) -> PublicModel:
    """A copy that may be trained."""
    return PublicModel(Base(copy.deepcopy(public.model), public.base.anatomy), public.task)


def reinitialised(public: PublicModel, seed: int) -> PublicModel:
    """The same architecture with weights drawn anew: what an attack has that knows no weights.

    Each tensor is drawn with the spread of the one that it stands for, so that the sizes of hidden states stay.
    """
    model = copy.deepcopy(public.model)
    with torch.no_grad():
        drawn: set[int] = set()
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if id(parameter) in drawn or parameter.dim() < 2:  # norms and biases are no secret, and tied once only
                continue
            drawn.add(id(parameter))
            generator = torch.Generator().manual_seed(derive("another seed than any pretraining's", seed, number, name))
            value = torch.randn(parameter.shape, generator=generator) * parameter.float().std().cpu()
            parameter.copy_(value.to(parameter))
    anatomy: Anatomy = public.base.anatomy
    return PublicModel(Base(model, anatomy), public.task)
