"""A quick inverter: which tokens a hidden state may come from. Shapes: N states, H hidden size, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.audit.public import PublicModel

LENGTH = 128  # of the texts of random tokens that it is fitted on
TIMES = 8  # each token stands in them, if the vocabulary is small
MOST = 1 << 18  # tokens that are run for it, unless that would be less than each token once
SHRUNK = 1e-4  # of the mean variance, added to each coordinate's
AT_ONCE = 32


@dataclass(frozen=True)
class Means:
    """The mean state of each token, and the nearest of them in the metric of what is not the token's (LDA).

    ``means`` [V,H], ``precision`` [H,H] of the states around their tokens' means.
    """

    means: Tensor
    precision: Tensor

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self.means)

    def nearest(self, hidden: Tensor, count: int) -> Tensor:
        """The ``count`` tokens [N,count] that states [N,H] most look like, the nearest first."""
        turned = self.means @ self.precision
        distance = (turned * self.means).sum(1)[None] - 2 * hidden @ turned.T  # but for what all tokens share
        return distance.topk(min(count, self.vocabulary), dim=-1, largest=False).indices


def fit_means(public: PublicModel, blocks: int, generator: torch.Generator) -> Means:
    """Fit it on what the public head makes of random tokens: no text is needed."""
    vocabulary = public.vocabulary
    times = max(1, min(TIMES, MOST // vocabulary))
    tokens = torch.cat([torch.randperm(vocabulary, generator=generator) for _ in range(times)])
    length = min(LENGTH, public.longest)
    more = -len(tokens) % length
    texts = torch.cat([tokens, tokens[:more]]).view(-1, length)
    seen = torch.zeros(vocabulary)
    shown = [public.run_head(blocks, part).cpu() for part in torch.split(texts, AT_ONCE)]
    width = shown[0].shape[-1]
    total = torch.zeros(vocabulary, width)
    for part, states in zip(torch.split(texts, AT_ONCE), shown, strict=True):
        total.index_add_(0, part.flatten(), states.flatten(0, 1))
        seen.index_add_(0, part.flatten(), torch.ones(part.numel()))
    means = total / seen[:, None]
    scatter, size = torch.zeros(width, width, dtype=torch.float64), 0
    for part, states in zip(torch.split(texts, AT_ONCE), shown, strict=True):
        around = (states - means[part]).flatten(0, 1).double()
        scatter += around.T @ around
        size += len(around)
    covariance = scatter / size
    floor = SHRUNK * max(float(covariance.diagonal().mean()), 1e-12)
    precision = torch.linalg.inv(covariance + floor * torch.eye(width, dtype=torch.float64)).float()
    return Means(means, precision)
