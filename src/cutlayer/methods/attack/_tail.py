"""Labels of a text through a tail with blocks, where positions meet: a shortlist, then one position after another.

The gradient of a text's loss at what entered the tail is ``s (P - sum_t A(t, y_t))``: ``P`` what it would be without
labels, ``A(t, c)`` the gradient of the logit of ``c`` at ``t``, ``s`` the loss's scale. So given all other labels, the
one at ``t`` is that whose ``A`` leaves the least. Shapes: L positions, H hidden size, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutlayer.audit.public import PublicModel

SILENT = 1e-12  # a squared gradient so small, in parts of the largest, is of a position without a label
SWEEPS = 2  # over all positions, at most


class Linear:
    """The gradient at the tail's input as a linear map of its labels, at states [L,H] that stay.

    ``without`` [L,H] is the gradient of a text's summed loss without labels, ``predicted`` [L,V] what the tail says.
    """

    def __init__(self, public: PublicModel, start: int, hidden: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # differentiated twice, which other kernels cannot
            self._entering = hidden.detach().to(public.base.device).float()[None].requires_grad_(True)
            self._logits = public.run_tail(start, self._entering)
            self._probe = torch.zeros_like(self._logits, requires_grad=True)
            (self._back,) = torch.autograd.grad(self._logits, self._entering, self._probe, create_graph=True)
            total = torch.logsumexp(self._logits, -1).sum()
        self.without = torch.autograd.grad(total, self._entering, retain_graph=True)[0][0].detach()
        self.predicted = self._logits.detach()[0].softmax(-1)
        self.shape = self._logits.shape[1:]

    def of(self, labels: Tensor) -> Tensor:
        """What labels [L,V], one of V or soft, take off it, [L,H]."""
        return torch.autograd.grad(self._logits, self._entering, labels[None], retain_graph=True)[0][0].detach()

    def along(self, direction: Tensor) -> Tensor:
        """How the logits [L,V] change along directions [L,H]."""
        return torch.autograd.grad(self._back, self._probe, direction[None], retain_graph=True)[0][0].detach()


def likely(public: PublicModel, start: int, hidden: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The tokens [L,K] whose logits rise most where the states [L,H] that enter the tail go against the gradient."""
    tail = Linear(public, start, hidden)
    along = tail.along(-(gradient / gradient.abs().max().clamp_min(1e-30)).to(tail.without))
    return along.topk(min(count, along.shape[-1]), dim=-1).indices


def speaks(gradient: Tensor) -> Tensor:
    """Where a gradient [L,H] is not zero."""
    size = gradient.square().sum(-1)
    return size > SILENT * size.max().clamp_min(1e-30)


def descended(public: PublicModel, start: int, hidden: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The labels [L] of a text whose gradient through the public tail is nearest to the one that was read.

    Args:
        public: the base model.
        start: the tail's first block.
        hidden: what enters it, [L,H].
        gradient: what was read there, [L,H].
        count: candidates at each position.
    """
    listed = likely(public, start, hidden, gradient, count)
    length, count = listed.shape
    wanted = gradient.to(public.base.device).float().flatten()
    with torch.enable_grad():
        entering = hidden.detach().to(public.base.device).float().repeat(count, 1, 1).requires_grad_(True)
        logits = public.run_tail(start, entering)  # K copies, so that a pass back gives all candidates of a position
    places, copies = torch.arange(length, device=logits.device), torch.arange(count, device=logits.device)

    def back(what: Tensor) -> Tensor:
        return torch.autograd.grad(what, entering, retain_graph=True)[0].flatten(1)  # [K,L*H]

    picked = torch.zeros(length, dtype=torch.int64, device=logits.device)
    made = back((torch.logsumexp(logits[0], -1) - logits[0, places, listed[:, 0]]).sum())[0]
    for _ in range(SWEEPS):
        number = (made @ wanted / wanted.square().sum()).clamp_min(1e-12)  # 1/s, by least squares
        before = picked.clone()
        for at in range(length):
            parts = back(logits[copies, at, listed[at]].sum())
            left = made + parts[picked[at]] - number * wanted
            picked[at] = (left - parts).square().sum(-1).argmin()
            made = left + number * wanted - parts[picked[at]]
        if torch.equal(picked, before):
            break
    return listed.gather(1, picked[:, None])[:, 0].cpu()
