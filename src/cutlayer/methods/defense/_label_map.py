"""Secret labels: classes shown as pseudo-labels, several of a class, whose meaning only their owner knows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelMap:
    """A secret map from classes to pseudo-labels. ``classes[p]`` is the class that owns pseudo-label p.

    With one pseudo-label a class, who clusters the gradients of the label side finds the classes, only not their
    names. With several there are more clusters than classes, and nothing says which belong together.
    """

    classes: tuple[int, ...]

    @classmethod
    def drawn(cls, counts: Sequence[int], secret: bytes) -> LabelMap:
        """A map in which class c owns ``counts[c]`` pseudo-labels, shuffled by a secret of the owner.

        Raises:
            ValueError: a class would own none.
        """
        if not counts or min(counts) < 1:
            raise ValueError(f"each class needs a pseudo-label of its own, but the counts are {list(counts)}")
        owners = np.repeat(np.arange(len(counts)), counts)
        draw = np.random.default_rng(list(hashlib.sha256(b"labels" + secret).digest()))
        return cls(tuple(draw.permutation(owners).tolist()))

    def hide(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """For each class of ``labels`` [B] one of its pseudo-labels, drawn anew each time."""
        owners = torch.tensor(self.classes)
        owned = (owners[None, :] == labels.cpu()[:, None]).float()  # [B,P]
        drawn = torch.multinomial(owned, 1, generator=generator)[:, 0]
        return drawn.to(labels)

    def reveal(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the classes [B,C] from logits of the pseudo-labels [B,P]: theirs are summed."""
        owners = torch.tensor(self.classes, device=logits.device)
        each = logits.float().log_softmax(-1)
        return torch.stack([each[:, owners == c].logsumexp(-1) for c in range(int(owners.max()) + 1)], dim=-1)
