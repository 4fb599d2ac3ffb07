"""Runs whose wire is recorded, and attacks on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

import cutlayer
from cutlayer.audit.messages import Exchange
from cutlayer.audit.public import load_public
from cutlayer.audit.recording import Recording, limited, recorded
from cutlayer.audit.scores import Score
from cutlayer.audit.truths import WHOLE, promised, read_by, truths_of
from cutlayer.audit.truths import scored as scored_of
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
    return scored_of(attack.finish(seen), seen, found)


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


def class_rows(count: int, shares: Sequence[float], *, seed: int = 0, told: float = 0.5) -> list[dict[str, Any]]:
    """Rows of one label each, as classes and as completions of one word; ``told`` of a text's words are its class's."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        (label,) = draw.choices(range(len(shares)), shares)
        words = [
            f"w{20 + 8 * label + draw.randrange(8)}" if draw.random() < told else f"w{draw.randrange(3, 20)}"
            for _ in range(draw.randint(6, 12))
        ]
        rows.append(
            {"text": " ".join(words), "label": label, "prompt": " ".join(words), "completion": f" w{84 + label}"}
        )
    return rows


def record_classes(
    folder: Path, root: Path, rows: list[dict[str, Any]], *, kind: str = "classification", **changes: Any
) -> Recording:
    """A run on such rows, as a classifier or (``prompt-completion``) as a language model, all of it recorded."""
    root.mkdir(parents=True, exist_ok=True)
    data = {
        "train": str(write_rows(root / "classes.jsonl", rows)),
        "format": kind,
        "max_length": 24,
        "append_eos": False,
    }
    partition = {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 0}
    return record(folder, root, **{"data": data, "partition": partition, **changes})


def class_view(found: Recording, attack: Attack, steps: range | None = None, *, labelled: int | None = None) -> View:
    """What the adversary of an attack on classes has of some steps, or of all."""
    layout, threat = found.layouts[found.config.client_names[0]], attack.threat
    read = [one for one in read_by(found, threat)[WHOLE] if steps is None or one.step in steps]
    told = promised(found, read, threat if labelled is None else replace(threat, labelled=labelled))
    return View(threat, read, layout, found.config.seed, _classes=found.classes, _labelled=told)


def with_gradients(seen: View, change: Callable[[torch.Tensor, torch.Generator], torch.Tensor]) -> View:
    """The view with other gradients [B,1,H]; what is drawn is drawn from the generator."""
    generator = torch.Generator().manual_seed(11)

    def changed(one: Exchange) -> Exchange:
        sent = {"hidden": change(one.hidden("send_gradients"), generator)}
        return replace(one, tensors={**one.tensors, "send_gradients": sent})

    return replace(seen, exchanges=[changed(one) for one in seen.exchanges])


def truth(found: Recording, seen: View) -> torch.Tensor:
    """The label of each sample [N] of such a view."""
    truths = truths_of(found, seen.exchanges, seen.threat)
    return torch.cat([truths[one.key].tokens[:, 0] for one in seen.exchanges])


def said(attack: Attack, seen: View) -> torch.Tensor:
    """What an attack says of each sample [N] of such a view."""
    guesses = attack.finish(seen)
    return torch.cat([guesses.tokens[one.key][:, 0] for one in seen.exchanges])
