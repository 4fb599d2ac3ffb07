"""The gradient of the softmax loss below the norm and the head, and which labels explain it.

The gradient of one position's loss at what enters the norm is ``s J^T W^T (p - e_y)``: ``J`` the norm's Jacobian, ``W``
[V,H] the head, ``p`` the prediction, ``y`` the label, ``s`` the loss's scale (one over the counted positions). With the
public norm and head everything but ``y`` and ``s`` is known. Shapes: L positions, H hidden size, V vocabulary, K
candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, gmres
from torch import Tensor

from cutlayer.audit.public import PublicModel

TOLERANCE, RESTART, MOST_ROUNDS = 1e-5, 40, 5
UNEXPLAINED = 1e-3  # a share of the gradient from which on more labels are tried


class Top:
    """The public norm and head at states ``hidden`` [L,H] that enter the norm."""

    def __init__(self, public: PublicModel, hidden: Tensor) -> None:
        self.public = public
        self.hidden = hidden.detach().to(public.base.device).float().requires_grad_(True)
        with torch.enable_grad():
            self.logits = public.run_tail(public.num_blocks, self.hidden[None])[0]  # [L,V]
        self._total = torch.logsumexp(self.logits, -1).sum()

    def predicted(self) -> Tensor:
        """What the gradient would be without a label: ``J^T W^T p`` [L,H]."""
        return torch.autograd.grad(self._total, self.hidden, retain_graph=True)[0].detach()

    def of_labels(self, labels: Tensor) -> Tensor:
        """What labels [L] take off it: ``J^T W_y`` [L,H]. Positions do not meet in the norm and the head."""
        chosen = self.logits.gather(1, labels[:, None]).sum()
        return torch.autograd.grad(chosen, self.hidden, retain_graph=True)[0].detach()

    def parts(self, without: Tensor, listed: Tensor) -> Tensor:
        """The gradients [L,K,H], but for their scale, that labels [L,K] would give."""
        return torch.stack([without - self.of_labels(listed[:, k]) for k in range(listed.shape[1])], 1)

    def likely(self, direction: Tensor, count: int) -> Tensor:
        """Labels [L,2*count] that are listed for a direction [L,H] of theirs.

        Half of them are those whose logits rise most along it, half those that rise most for the length of their rows.
        """
        along = self.along(direction)
        rows: Tensor = self.public.model.get_output_embeddings().weight.detach().float()
        count = min(count, along.shape[1])
        lists = [scores.topk(count, dim=1).indices for scores in (along, along / rows.norm(dim=1).clamp_min(1e-6))]
        return torch.cat(lists, 1)

    def at(self, positions: Tensor) -> Top:
        """The same at some of the positions: booleans [L]."""
        return Top(self.public, self.hidden.detach()[positions])

    def along(self, direction: Tensor) -> Tensor:
        """How the logits change [L,V] along directions [L,H]: ``W J d``."""
        probe = torch.zeros_like(self.logits, requires_grad=True)
        back = torch.autograd.grad(self.logits, self.hidden, probe, create_graph=True)[0]
        return torch.autograd.grad(back, probe, direction.to(back), retain_graph=True)[0].detach()


def solved(top: Top, gradient: Tensor, shortlist: int) -> tuple[Tensor, Tensor, float]:
    """The labels [L] that explain a gradient [L,H] best, the share of it that they leave unexplained [L], and ``1/s``.

    Args:
        top: the norm and the head at these positions.
        gradient: what was read.
        shortlist: candidates at a position; eight times as many where none of them explains it.
    """
    without = top.predicted()
    listed = top.likely(-gradient, shortlist)
    parts = top.parts(without, listed)
    number = _number(parts, gradient)
    labels, left = _best(parts, listed, gradient, number)
    again = left > UNEXPLAINED
    if bool(again.any()):
        more = top.at(again)
        rest = without[again] - number * gradient[again]  # J^T W_y itself, if the number is right
        wider = more.likely(rest, 8 * shortlist)
        better, less = _best(more.parts(without[again], wider), wider, gradient[again], number)
        won = less < left[again]
        labels[again], left[again] = torch.where(won, better, labels[again]), torch.where(won, less, left[again])
    return labels, left, number


def _number(parts: Tensor, gradient: Tensor) -> float:
    """What the gradient [L,H] is to be multiplied by to be one of ``parts`` [L,K,H] at each position.

    It is the same at all positions, so: of each position's best candidate the number by least squares, and the median
    of those over the positions that are explained best.
    """
    size = gradient.square().sum(-1, keepdim=True).clamp_min(1e-30)
    own = (parts * gradient[:, None]).sum(-1) / size
    left = 1 - own.clamp_min(0).square() * size / parts.square().sum(-1).clamp_min(1e-30)  # 1 - cosine^2
    best = left.argmin(1, keepdim=True)
    least, numbers = left.gather(1, best)[:, 0], own.gather(1, best)[:, 0]
    sure = (least <= least.median()) & (numbers > 0)
    return float(numbers[sure].median()) if bool(sure.any()) else 1.0


def _best(parts: Tensor, listed: Tensor, gradient: Tensor, number: float) -> tuple[Tensor, Tensor]:
    """The candidate [L] of ``listed`` [L,K] that is nearest, and the share that it leaves unexplained [L]."""
    wanted = number * gradient
    apart = (parts - wanted[:, None]).square().sum(-1) / wanted.square().sum(-1, keepdim=True).clamp_min(1e-30)
    at = apart.argmin(1, keepdim=True)
    return listed.gather(1, at)[:, 0].clone(), apart.gather(1, at)[:, 0].clone()


def through_blocks(public: PublicModel, start: int, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out of the public tail's blocks [L,H], and the gradient there [L,H], of one text.

    Args:
        public: the base model.
        start: the tail's first block.
        hidden: what enters it, [L,H].
        gradient: the gradient there, [L,H]: the transposed Jacobian of the blocks times the one that is sought, which
            is found by GMRES, as the blocks are near the identity.
    """
    if start == public.num_blocks:
        return hidden, gradient
    entering = hidden.detach().to(public.base.device).float()[None].requires_grad_(True)
    with torch.enable_grad():
        out: Any = public.middle(start, public.num_blocks).forward({}, hidden=entering)
    scale = float(gradient.abs().max().clamp_min(1e-30))

    def back(flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        given = torch.from_numpy(flat.reshape(out.shape)).to(out)
        found: Tensor = torch.autograd.grad(out, entering, given, retain_graph=True)[0]
        return found.double().cpu().numpy().ravel()

    size = entering.numel()
    wanted = (gradient.double() / scale).cpu().numpy().ravel()
    solved, _ = gmres(
        LinearOperator((size, size), matvec=back, dtype=np.float64), wanted, x0=wanted, rtol=TOLERANCE,
        restart=RESTART, maxiter=MOST_ROUNDS,
    )  # fmt: skip
    return out.detach()[0], torch.from_numpy(solved).view(gradient.shape).float() * scale
