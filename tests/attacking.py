"""Runs whose wire is recorded, and attacks on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import cutlayer
from cutlayer.audit.public import load_public
from cutlayer.audit.recording import Recording, limited, recorded
from cutlayer.audit.scores import Score, Truth, score
from cutlayer.audit.view import View, view_of
from cutlayer.config import load_config
from cutlayer.contracts import Attack
from tiny import text_rows, write_rows


def tree(model: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A short run of one client, with the wire recorded in ``root/frames``."""
    root.mkdir(parents=True, exist_ok=True)
    rows = write_rows(root / "rows.jsonl", text_rows(12))
    return {
        "model": str(model), "data": {"train": str(rows), "format": "text", "max_length": 24}, "clients": 1,
        "peft": {"name": "lora", "rank": 2, "alpha": 4}, "batch_size": 3, "steps": 1, "device": "cpu",
        "optimizer": {"name": "adamw", "lr": 1e-3}, "record_wire": str(root / "frames"), **changes,
    }  # fmt: skip


def record(model: Path, root: Path, **changes: Any) -> Recording:
    """Make such a run."""
    run = tree(model, root, **changes)
    cutlayer.train(run, out=root / "out", progress=False)
    return recorded(load_config(run), root / "frames")


def view(found: Recording, attack: Attack, *, rows: int = 6, last: bool = False) -> View:
    """What the attack's adversary has of the first step, or of the last one."""
    seen = view_of(
        attack.threat, found.read(), layout=found.layouts[found.config.client_names[0]],
        public=load_public(found.config.model, task=found.task), auxiliary=None,
    )  # fmt: skip
    step = max(one.step for one in seen.exchanges) if last else 0
    return replace(seen, exchanges=limited([one for one in seen.exchanges if one.step == step], rows))


def scored(found: Recording, attack: Attack, seen: View) -> Score:
    """How much of the truth the attack gets back."""
    truths = {}
    for one in seen.exchanges:
        whole = found.truth(one.key, attack.threat.target)
        count = len(next(iter(one.tensors.values()))["hidden"])
        truths[one.key] = Truth(whole.tokens[:count], whole.counts[:count])
    return score(attack.finish(seen), truths, found.tokenizer.decode)


def told_by(scores: Tensor, first: Tensor) -> float:
    """How well scores [N] tell two classes [N] apart, whichever is larger: the area under the curve."""
    area = float(roc_auc_score(first.cpu().numpy(), scores.detach().cpu().numpy()))
    return max(area, 1 - area)


def norm_auc(gradients: Tensor, first: Tensor) -> float:
    """What the lengths of gradients [N,D] tell of their classes [N]."""
    return told_by(torch.linalg.vector_norm(gradients, dim=1), first)


def direction_auc(gradients: Tensor, first: Tensor, line: Tensor) -> float:
    """What they tell who knows a direction [D], such as that between the classes' means: by cosine, and by length."""
    along = gradients @ line
    return max(
        told_by(along, first), told_by(along / torch.linalg.vector_norm(gradients, dim=1).clamp(min=1e-30), first)
    )


class Hijack:
    """A server that pulls hidden states to where it knows what they mean (feature-space hijacking, adapted).

    It does not know the client's head, but how often tokens come. Its own codes for them are what the client's states
    [B,T,H] are to be distributed as: it returns the gradient by which a kernel tells the two apart (in place of the
    discriminator of the published attack, which has to be trained), and reads each state as the nearest code.
    """

    def __init__(self, shares: Tensor, width: int, *, seed: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._shares, self._width = shares, width
        self._codes = torch.randn(len(shares), width, generator=self._draw)

    def read(self, states: Tensor) -> Tensor:
        """Which token [B,T] each state is taken for."""
        return torch.cdist(states.flatten(0, 1), self._codes).argmin(1).reshape(states.shape[:2])

    def pull(self, states: Tensor) -> Tensor:
        """The gradient [B,T,H], of length 1."""
        own = states.flatten(0, 1).clone().requires_grad_()
        wanted = self._codes[torch.multinomial(self._shares, 400, replacement=True, generator=self._draw)]
        apart = self._near(own, own.detach()).mean(1) - self._near(own, wanted).mean(1)
        (found,) = torch.autograd.grad(apart.sum(), [own])
        return (found / found.norm()).reshape(states.shape)

    def _near(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(one, other).square() / (2 * self._width))
