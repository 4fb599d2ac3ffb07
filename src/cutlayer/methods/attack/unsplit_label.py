"""UnSplit's label inference: of all labels the one whose gradient through a surrogate tail is nearest to what was read.

Erdogan et al., UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label Inference Attacks Against Split
Learning, WPES 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from cutlayer.audit.messages import Exchange
from cutlayer.audit.norms import squared_lengths
from cutlayer.audit.public import PublicModel, copied
from cutlayer.audit.scores import MISSING, Guesses
from cutlayer.audit.softmax import Top
from cutlayer.audit.spans import spans_of
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.methods.attack._tail import descended, speaks
from cutlayer.registry import method
from cutlayer.threat import Threat

AT_ONCE = 1 << 24  # numbers [L,V] that are made at once


@method(
    "attack",
    paper="Erdogan et al., arXiv:2108.09033",
    needs=[
        "a U-shaped split of a model whose base weights are public (surrogate: random needs the architecture alone)"
    ],
)
@dataclass
class UnsplitLabel(Attack):
    """Try every label on a surrogate tail, and keep the one whose gradient is nearest to that of step 7.

    Published with a surrogate of random weights, trained along on the labels that were found (``surrogate: random``,
    ``lr``), for a tail of one layer and a few classes. Ours: the public tail as the surrogate; of a language model
    whose tail is the norm and the head all labels of a position at once in closed form; with blocks in the tail
    ``shortlist`` labels a position, exchanged one position after another. The loss's scale is fitted.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations", "return_activations", "send_gradients"), knows=("architecture", "weights"),
        target="labels", tail_at="client",
    )  # fmt: skip
    surrogate: Literal["public", "random"] = "public"
    distance: Literal["square", "cosine"] = "square"  # cosine needs no scale
    shortlist: Annotated[int, Field(ge=2)] = 20  # labels that are tried at a position, where the tail has blocks
    lr: Annotated[float, Field(ge=0)] = 0.0  # of the surrogate, a step of SGD on each micro-batch; 0: it stays

    def prepare(self, view: View) -> None:
        """Nothing is learned before."""

    def finish(self, view: View) -> Guesses:
        """The labels of all micro-batches that were read."""
        public = (view if self.surrogate == "public" else view.with_other_weights()).public
        if self.lr:
            public = copied(public)
        tokens = {}
        for one in view.exchanges:
            label = self._classes if public.task == "classification" else self._tokens
            tokens[one.key] = label(public, view.tail_start, one)
            if self.lr:
                _learn(public, view.tail_start, one, tokens[one.key], self.lr)
        return Guesses(tokens)

    def _classes(self, public: PublicModel, start: int, one: Exchange) -> Tensor:
        """The class [B,1] of each row of a classifier, by the gradient of the whole row."""
        hidden, gradient = one.hidden("return_activations"), one.hidden("send_gradients")
        with torch.enable_grad():
            entering = hidden.to(public.base.device).requires_grad_(True)
            said = _logits(public, start, entering, one).log_softmax(-1)
            tried = [
                torch.autograd.grad(-said[:, label].sum(), entering, retain_graph=True)[0].flatten(1).cpu()
                for label in range(said.shape[1])
            ]
        made, wanted = torch.stack(tried, 1), gradient.flatten(1)  # [B,K,T*H], [B,T*H]
        inner = (made * wanted[:, None]).sum(-1)
        return self._nearest(made.square().sum(-1), inner, wanted.square().sum(-1))[:, None]

    def _tokens(self, public: PublicModel, start: int, one: Exchange) -> Tensor:
        """The label of each position [B,T] of a language model; ``MISSING`` where there is none."""
        hidden, gradient = one.hidden("return_activations"), one.hidden("send_gradients")
        found = torch.full(hidden.shape[:2], MISSING, dtype=torch.int64)
        spans = spans_of(hidden, one.about)
        if start < public.num_blocks:
            for span in spans:
                states, wanted = span.of(hidden), span.of(gradient)
                if bool((wanted != 0).any()):
                    found[span.row, span.start : span.stop] = descended(public, start, states, wanted, self.shortlist)
            return found
        states = torch.cat([span.of(hidden) for span in spans])
        wanted = torch.cat([span.of(gradient) for span in spans])
        said = torch.full((len(states),), MISSING)
        there = speaks(wanted)
        if bool((wanted != 0).any()):
            said[there] = self._solved(public, states[there], wanted[there])
        for span, part in zip(spans, torch.split(said, [len(span) for span in spans]), strict=True):
            found[span.row, span.start : span.stop] = part
        return found

    def _solved(self, public: PublicModel, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The labels [L] at states [L,H] that enter the norm: all tokens are tried."""
        size = max(1, AT_ONCE // public.vocabulary)
        found = []
        for states, read in zip(torch.split(hidden, size), torch.split(gradient, size), strict=True):
            top = Top(public, states)
            wanted, without = read.to(top.hidden), top.predicted()
            lengths = squared_lengths(public, top.hidden.detach(), top.logits.detach())
            if lengths is not None:  # of the gradient that each token would give, and its product with what was read
                squares = without.square().sum(-1, keepdim=True) - 2 * top.along(without) + lengths
                inner = (without * wanted).sum(-1, keepdim=True) - top.along(wanted)
                found.append(self._nearest(squares, inner, wanted.square().sum(-1)).cpu())
                continue
            listed = top.likely(-wanted, self.shortlist)
            made = top.parts(without, listed)
            inner = (made * wanted[:, None]).sum(-1)
            at = self._nearest(made.square().sum(-1), inner, wanted.square().sum(-1))
            found.append(listed.gather(1, at[:, None])[:, 0].cpu())
        return torch.cat(found)

    def _nearest(self, squares: Tensor, inner: Tensor, wanted: Tensor) -> Tensor:
        """Which of K gradients is nearest, at each of L positions.

        Args:
            squares: the squared length [L,K] of each.
            inner: its product [L,K] with what was read.
            wanted: the squared length [L] of what was read.
        """
        cosine = inner / (squares.clamp_min(1e-30) * wanted[:, None].clamp_min(1e-30)).sqrt()
        best = cosine.argmax(1)
        if self.distance == "cosine":
            return best
        at = best[:, None]
        scales = inner.gather(1, at)[:, 0] / wanted.clamp_min(1e-30)  # one over the loss's, which all positions share
        alike = cosine.gather(1, at)[:, 0]
        sure = (alike >= alike.median()) & (scales > 0)
        scale = scales[sure].median() if bool(sure.any()) else scales.new_ones(())
        return (squares - 2 * scale * inner).argmin(1)


def _logits(public: PublicModel, start: int, hidden: Tensor, one: Exchange) -> Tensor:
    """What the tail makes of hidden states [B,T,H]: logits [B,T,V], of a classifier [B,K]."""
    mask = one.about.get("mask")
    told = None if mask is None else mask.to(hidden.device)
    logits: Tensor = public.tail(start).forward({}, hidden=hidden, attention_mask=told).logits
    return logits.float()


def _learn(public: PublicModel, start: int, one: Exchange, labels: Tensor, lr: float) -> None:
    """A step of SGD of the surrogate tail on the labels [B,1] or [B,T] that were found."""
    anatomy = public.base.anatomy
    own = {
        name: parameter
        for name, parameter in public.model.named_parameters()
        if (owner := anatomy.owner(name)) == "top" or (isinstance(owner, int) and owner >= start)
    }
    with torch.enable_grad():
        for parameter in own.values():
            parameter.requires_grad_(True)
        logits = _logits(public, start, one.hidden("return_activations").to(public.base.device), one)
        said = logits if logits.dim() == 3 else logits[:, None]
        loss = functional.cross_entropy(said.flatten(0, 1), labels.flatten().to(said.device), ignore_index=MISSING)
        grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    with torch.no_grad():
        for parameter, grad in zip(own.values(), grads, strict=True):
            parameter.requires_grad_(False)
            if grad is not None:
                parameter -= lr * grad
