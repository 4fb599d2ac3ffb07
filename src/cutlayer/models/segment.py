"""One frozen base in memory, and the segments that parties run on it.

A ``Base`` is a Hugging Face model (whole or one party's part) with adapters injected. A ``Segment`` is a run of its
blocks, with or without the embedding below and the norm and head above. To run a segment, the base is *rebound*: the
blocks of others become pass-throughs, and the Parameters of the slot that is being served are put into the modules, by
reference. Nothing is copied, so any number of simulated parties share one base; a further client costs its own
adapter and optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.masking_utils import create_causal_mask

from cutlayer.models.families import MASKED_BY_US, Anatomy
from cutlayer.models.standins import Skip, stand_in

Params = Mapping[str, Parameter]
Seed = int | tuple[Tensor, ...]  # for all generators, or their states: the processor's, and the accelerator's if any


class Base:
    """A model with its trainable parameters found and every place remembered where one is bound.

    ``initial`` maps the name of each trainable parameter (the model's own name, with absolute block numbers) to the
    Parameter it had after injection: the values that every slot starts from.
    """

    def __init__(self, model: Any, anatomy: Anatomy, *, peft_model: Any = None) -> None:
        self.model = model
        self.peft_model = peft_model
        self.anatomy = anatomy
        self.device = next(model.parameters()).device
        self.initial: dict[str, Parameter] = {}
        self._sites: dict[str, tuple[nn.Module, str]] = {}
        self._table: Any = None  # as in a part without the embedding
        for path, module in model.named_modules(remove_duplicate=False):
            if path == anatomy.embedding:
                self._table = module
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    name = f"{path}.{leaf}"
                    self.initial[name] = parameter
                    self._sites[name] = (module, leaf)
        self._blocks: list[nn.Module] = list(model.get_submodule(anatomy.blocks))
        below, above = set(anatomy.below), set(anatomy.above)
        self._around = {path: _child(model, path) for path in below | above}
        self._stand_ins = {p: stand_in(k) for p, k in {**anatomy.below, **anatomy.above}.items()}
        self._installed: Segment | None = None
        self._segments: dict[tuple[str, range, bool, bool], Segment] = {}
        self._training = True  # as PEFT leaves its dropout
        self.train(False)

    @property
    def tied(self) -> bool:
        """Whether the LM head reads the embedding's matrix."""
        head = self.model.get_output_embeddings() if self.anatomy.causal else None
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    @cached_property
    def embedding(self) -> Tensor:
        """The input embeddings [V,H] that the run begins with, whatever trained copy is bound now; shared, to read."""
        table = self._table
        assert table is not None, "asked of a part without the embedding"
        first = next((self.initial[n] for n, (module, _) in self._sites.items() if module is table), table.weight)
        return first.detach()

    def owner(self, name: str) -> int | str:
        """Whose a parameter is: a block's number, ``"bottom"`` or ``"top"``."""
        return self.anatomy.owner(name)

    def segment(self, name: str, blocks: range, *, bottom: bool = False, top: bool = False) -> Segment:
        """The segment of these blocks; one object for all who run it."""
        key = (name, blocks, bottom, top)
        if key not in self._segments:
            self._segments[key] = Segment(self, name, blocks, bottom=bottom, top=top)
        return self._segments[key]

    def block_list(self, blocks: range) -> nn.ModuleList:
        """The model's blocks with all but ``blocks`` replaced by pass-throughs, at their own numbers."""
        skip = self.anatomy.tuples
        return nn.ModuleList(b if i in blocks else Skip(b, as_tuple=skip) for i, b in enumerate(self._blocks))

    def block(self, number: int) -> nn.Module:
        """Block ``number``."""
        return self._blocks[number]

    def train(self, mode: bool) -> None:
        """Dropout on or off; does nothing where it already is so (walking a large model costs milliseconds)."""
        if mode != self._training:
            # All blocks, also those that the segment now installed leaves out: a segment that is entered later must
            # not keep the mode of an evaluation (or of a training step) before it.
            for module in (self.model, *self._blocks, *self._around.values()):
                if module is not None:
                    module.train(mode)
            self._training = mode

    def bind(self, params: Params) -> None:
        """Put ``params`` into their modules, by reference."""
        for name, parameter in params.items():
            module, leaf = self._sites[name]
            module._parameters[leaf] = parameter

    def install(self, segment: Segment | None) -> None:
        """Give the model the shape of ``segment``; None is the whole model."""
        if self._installed is segment:
            return
        anatomy = self.anatomy
        without = set()
        if segment is not None:
            without |= set() if segment.bottom else set(anatomy.below)
            without |= set() if segment.top else set(anatomy.above)
        for path, original in self._around.items():
            _set_child(self.model, path, self._stand_ins[path] if path in without else original)
        blocks = nn.ModuleList(self._blocks) if segment is None else segment.blocks_list
        _set_child(self.model, anatomy.blocks, blocks)
        self._installed = segment


class Segment:
    """Blocks ``blocks`` of a base; ``bottom`` has the embedding, ``top`` the norm and head (and the loss).

    ``name`` is ``head``, ``trunk`` or ``tail``: it seeds the segment's dropout and stands in errors.
    """

    def __init__(self, base: Base, name: str, blocks: range, *, bottom: bool = False, top: bool = False) -> None:
        self.base = base
        self.name = name
        self.blocks = blocks
        self.bottom = bottom
        self.top = top
        self.blocks_list = base.block_list(blocks)
        self.names = [n for n in base.initial if self.owns(base.owner(n))]

    def owns(self, owner: int | str) -> bool:
        """Whether a parameter of that owner lies in this segment."""
        if isinstance(owner, int):
            return owner in self.blocks
        return self.bottom if owner == "bottom" else self.top

    @contextmanager
    def entered(self, params: Params) -> Iterator[None]:
        """The base has this segment's shape and these Parameters inside; needed for a forward AND for its backward.

        (A backward with gradient checkpointing runs the forward again, and must meet the same Parameters.)
        """
        self.base.install(self)
        self.base.bind({name: params[name] for name in self.names})
        yield

    def forward(
        self,
        params: Params,
        *,
        input_ids: Tensor | None = None,
        hidden: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        seed: Seed | None = None,
    ) -> Any:
        """Run the segment.

        Args:
            params: the slot's Parameters; this segment's names are bound.
            input_ids: [B,T], for the bottom segment.
            hidden: [B,T,H], for the others.
            attention_mask: [B,T] or None.
            position_ids: [B,T] or None; without a mask they say where packed examples begin.
            labels: [B,T] or [B]; only the top computes a loss.
            seed: where dropout is on, the generator's seed (or state) at the entry of this segment; None is evaluation.

        Returns:
            Hidden states [B,T,H]; of the top segment the model's own output, with ``loss`` and ``logits``.
        """
        base = self.base
        base.train(seed is not None)
        inputs: dict[str, Any] = {"attention_mask": attention_mask}
        if input_ids is not None:
            inputs["input_ids"] = input_ids
        else:
            inputs["inputs_embeds"] = hidden
        if base.anatomy.causal:
            inputs["use_cache"] = False
            inputs["position_ids"] = position_ids
            if attention_mask is None and position_ids is not None and base.model.config.model_type in MASKED_BY_US:
                entering = base.model.get_input_embeddings().weight if hidden is None else hidden
                inputs["attention_mask"] = packed_mask(base.model.config, position_ids, dtype=entering.dtype)
        with self.entered(params), self._seeded(seed):
            if self.top:
                return base.model(**inputs, labels=labels)
            return base.model.base_model(**inputs)[0]

    @contextmanager
    def left(self) -> Iterator[list[Tensor]]:
        """Gives a list that holds, once a forward pass has left this segment, the generators' states there.

        That is where the next block would be entered: some models draw a number between two blocks.
        """
        states: list[Tensor] = []

        def note(*_: Any) -> None:
            states[:] = [torch.get_rng_state()]
            if self.base.device.type == "cuda":
                states.append(torch.cuda.get_rng_state(self.base.device))

        hook = self.blocks_list[self.blocks.stop].register_forward_pre_hook(note)
        try:
            yield states
        finally:
            hook.remove()

    @contextmanager
    def _seeded(self, seed: Seed | None) -> Iterator[None]:
        """Seed at the segment's entry.

        That is the first owned block, not the call: some models draw a number for each block that they pass, and an
        unsplit reference reseeds exactly there.
        """
        if seed is None:
            yield
            return
        if self.bottom or not len(self.blocks):
            self._seed(seed)
            yield
            return
        first = self.base.block(self.blocks[0])
        hook = first.register_forward_pre_hook(lambda *_: self._seed(seed))
        try:
            yield
        finally:
            hook.remove()

    def _seed(self, seed: Seed) -> None:
        if isinstance(seed, int):
            set_seed(seed, self.base.device)
            return
        torch.set_rng_state(seed[0])
        if len(seed) > 1:
            torch.cuda.set_rng_state(seed[1], self.base.device)


def set_seed(seed: int, device: torch.device) -> None:
    """``torch.manual_seed`` for what draws on ``device``.

    That call also reaches for every accelerator, which takes milliseconds where there is none.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def packed_mask(config: Any, position_ids: Tensor, *, dtype: torch.dtype) -> Any:
    """The causal mask that keeps packed examples apart, made by Transformers from ``position_ids`` [B,T].

    It is of the kind that the model's attention takes: booleans or (eager) what is added to the scores, [B,1,T,T]; None
    where nothing is packed, or where the attention reads the positions itself.
    """
    like = torch.empty(*position_ids.shape, 0, dtype=dtype, device=position_ids.device)
    return create_causal_mask(config, like, attention_mask=None, past_key_values=None, position_ids=position_ids)


def _child(model: nn.Module, path: str) -> nn.Module | None:
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent)._modules[leaf]


def _set_child(model: nn.Module, path: str, child: nn.Module | None) -> None:
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = child
