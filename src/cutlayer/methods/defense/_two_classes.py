"""Gradients of two classes, of which nobody is to learn which is which: a batch's examples, and a batch of one class.

Of a classifier an example is a text, of a language model a position, whose class is whether the token that it predicts
is one of a set. Shapes: B rows, T positions, H hidden size, N examples of size D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from scipy.stats import norm
from torch import Tensor

from cutlayer.defense import Ground, Privacy, Sends, Shown
from cutlayer.errors import MethodError
from cutlayer.methods.defense._claims import uncovered
from cutlayer.methods.defense._rows import public_states
from cutlayer.noise import Noise

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

FEWEST = 2  # examples of each class that a batch must have, or nothing can be said of the two
Changed = Callable[[Tensor, Tensor, Noise], Tensor]  # gradients [N,D] of classes [N], and what they become


@dataclass(frozen=True)
class Secret:
    """Which labels are of the first of two classes, and what a gradient's size is in public.

    Args:
        causal: whether it is of a language model's labels.
        tokens: those of the first class, of a language model.
        norm: the median norm of an example's gradient, over random tokens and labels.
    """

    causal: bool
    tokens: Tensor
    norm: float

    def shown(self, gradient: Tensor, about: Shown, advantage: float, changed: Changed) -> Tensor:
        """A gradient [B,T,H] whose examples were changed, or, if one class has too few, were hidden altogether.

        Args:
            gradient: the true one.
            about: the micro-batch.
            advantage: by how much the two classes may differ, in total variation.
            changed: what is made of the examples of both.
        """
        values = (gradient.float() * about.to_sum).masked_fill(~about.real.to(gradient.device)[..., None], 0.0)
        examples, first, put = self._examples(values, about)
        noise = about.noise(covers=[examples, first])
        if min(int(first.sum()), int((~first).sum())) >= FEWEST:
            found = put(changed(examples, first, noise))
        else:
            found = put(hidden_in_noise(examples, self.norm, advantage, noise))
        found = found.masked_fill(~about.real.to(found.device)[..., None], 0.0)
        return (found / about.to_sum).to(gradient.dtype)

    def _examples(self, values: Tensor, about: Shown) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The examples [N,D] in values [B,T,H], which [N] are of the first class, and what puts them back."""
        carries = values.ne(0).any(-1)  # [B,T]: where nothing is, as at padding, nothing is hidden
        labels = about.batch.labels.to(values.device)
        if self.causal:
            after = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -1)], dim=1)
            return values[carries], torch.isin(after[carries], self.tokens.to(values.device)), _into(values, carries)
        everywhere = carries.any(0).expand_as(carries)
        return values[everywhere].reshape(len(values), -1), labels == 1, _into(values, everywhere)


def _into(values: Tensor, where: Tensor) -> Callable[[Tensor], Tensor]:
    def put(examples: Tensor) -> Tensor:
        found = torch.zeros_like(values)
        found[where] = examples.reshape(-1, values.shape[-1])
        return found

    return put


def secret_of(ground: Ground, sensitive: Sequence[str]) -> Secret:
    """The secret of a run's labels.

    Args:
        ground: what is public.
        sensitive: words, of a language model; all tokens that they are made of are.

    Raises:
        MethodError: a classifier has more than two classes.
    """
    causal = ground.task == "causal"
    if not causal and ground.classes != 2:
        raise MethodError(
            f"The defense hides which of two classes a text is of, but there are {ground.classes}. Take gradperturb, "
            "label-dp-rr or clip-noise."
        )
    tokens = {token for word in sensitive for token in (*ground.tokens_of(word), *ground.tokens_of(f" {word}"))}
    assert ground.pull is not None, "refused in the two-part split"
    norms = []
    for states in public_states(ground):
        gradients = ground.pull(states).float()
        rows = gradients.flatten(0, 1) if causal else gradients.flatten(1)
        norms.append(torch.linalg.vector_norm(rows[rows.ne(0).any(-1)], dim=1))
    return Secret(causal, torch.tensor(sorted(tokens), dtype=torch.int64), float(torch.cat(norms).median()))


def moments(examples: Tensor, first: Tensor) -> tuple[Tensor, tuple[float, float], float, float]:
    """Of gradients [N,D] the direction [D] between the classes' means, the mean variance of a number in either class,
    the share of the first class, and the squared distance of the means."""
    one, other = examples[first].double(), examples[~first].double()
    between = one.mean(0) - other.mean(0)
    gap = float(between.square().sum())
    line = (between / max(gap, 1e-300) ** 0.5).to(examples.dtype)
    spread = tuple(float(part.var(0, correction=0).mean()) for part in (one, other))
    return line, (spread[0], spread[1]), float(first.double().mean()), gap


def hidden_in_noise(examples: Tensor, most: float, advantage: float, noise: Noise) -> Tensor:
    """Examples [N,D] cut to a norm, with Gaussian noise under which any two differ by so much in total variation."""
    norms = torch.linalg.vector_norm(examples, dim=1, keepdim=True).clamp(min=1e-30)
    scale = most / float(norm.ppf((1 + advantage) / 2))
    found: Tensor = examples * (most / norms).clamp(max=1.0) + scale * noise.normal(examples)
    return found


def problems_of(config: RunConfig, sensitive: Sequence[str]) -> Iterator[str]:
    """What of a run does not fit two classes, a sentence each."""
    if config.partition.name == "two-part-split":
        yield "has nothing to do: in the two-part split the client shows no gradient. Take a u-shaped-split"
    classifies = config.data.format == "classification"
    if classifies and sensitive:
        yield "has sensitive words, but the secret of a classifier is its class. Leave sensitive out"
    if not classifies and not sensitive:
        yield "needs the words that are to be kept secret: sensitive: [word, ...]"
    if classifies and config.data.classes is not None and len(config.data.classes) != 2:
        yield f"hides which of two classes a text is of, but data.classes has {len(config.data.classes)}"


def nothing_counted(ground: Ground, sends: Sends, mechanism: str, why: str) -> Privacy:
    """What a defense of two classes says of itself: no epsilon, and why."""
    what = "a text's class" if ground.task != "causal" else "whether the next token is one of the sensitive ones"
    return Privacy(
        mechanism, "empirical", "labels", what, sends.training, None, None, why,
        not_covered=f"{'' if ground.task != 'causal' else 'which token it is; '}{uncovered('send_gradients', ground)}",
    )  # fmt: skip
