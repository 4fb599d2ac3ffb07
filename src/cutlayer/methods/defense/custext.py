"""CusText: each token is replaced within a small group of like tokens by the exponential mechanism.

Chen et al., A Customized Text Sanitization Mechanism with Differential Privacy, Findings of ACL 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cutlayer.contracts import Defense, Example
from cutlayer.defense import Ground, Privacy, Sends
from cutlayer.methods.defense._tokens import (
    AT_ONCE,
    USUAL,
    Labels,
    Mode,
    Texts,
    Vocabulary,
    doubt,
    kept_words,
    label_problems,
    open_still,
    releases_of,
    strength_for,
    vocabulary_of,
)
from cutlayer.noise import Noise
from cutlayer.registry import method
from cutlayer.threat import Target

if TYPE_CHECKING:
    from cutlayer.config import RunConfig

AHEAD = 64  # tokens whose distances are made at once while groups are formed
RANGE = (1e-3, 1e3)  # of epsilon, in which it is sought


@method("defense", paper="Chen et al., Findings of ACL 2023, arXiv:2207.01193")
@dataclass
class Custext(Defense):
    """Replace each token by one of its own group of like tokens, nearer ones more often (CusText).

    Every token belongs to one group, whose first member is the earliest of the vocabulary that was left and whose
    others are those nearest to it. Within a group the exponential mechanism draws by distance, scaled to [-1,0] for
    each token: of two tokens of a group each output's odds differ by at most exp(epsilon). Who knows the groups, which
    are public, sees the group of each token, and guesses the token itself with a chance of at least 1 / ``size``. With
    ``sets: own`` (the paper's aggressive mapping) each token draws from its own nearest ones, and nothing holds between
    tokens. Ours: the order of the vocabulary stands for frequencies, as counts of private text would tell of it;
    ``unchanged`` sets epsilon so that this share of public random tokens stays; numbers and stop words are tokens as
    any other.
    """

    protects: ClassVar[tuple[Target, ...]] = ("inputs", "labels")
    epsilon: Annotated[float, Field(gt=0)] | None = None  # of one replacement, within a group
    unchanged: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # share of random tokens that stay; 0.5 without epsilon
    )
    size: Annotated[int, Field(ge=2)] = 20  # tokens of a group
    sets: Literal["groups", "own"] = "groups"  # groups that are shared, or each token's own nearest (no guarantee)
    labels: Labels = "sanitised"  # of a language model: those of the new text, or the true ones (U-shape only)
    mode: Mode = "once"  # a text is replaced once, or anew in each epoch, which adds up

    rate: float = field(init=False, default=0.0, compare=False)  # epsilon, as it is used
    stay: float = field(init=False, default=0.0, compare=False)  # the share of public random tokens that stay
    _vocabulary: Vocabulary = field(init=False, repr=False, compare=False)
    _texts: Texts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.epsilon is not None and self.unchanged is not None:
            raise ValueError("epsilon and unchanged are both given; keep one")
        if self.unchanged is not None and self.unchanged * self.size < 1:
            raise ValueError(
                f"unchanged is {self.unchanged:g}, but of groups of {self.size} at least {1 / self.size:g} stays, as "
                "even without any preference a token is drawn for itself. Give larger groups (size)"
            )

    @property
    def fresh(self) -> bool:
        """Whether each epoch has texts of its own."""
        return self.mode == "fresh"

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Labels that are sent must not be the text that is hidden."""
        yield from label_problems(config, self.labels)

    def prepare(self, ground: Ground) -> None:
        """Form the groups, and set epsilon by public random tokens."""
        self._vocabulary = vocabulary = vocabulary_of(ground)
        self._texts = Texts(vocabulary, keep=not self.fresh)
        sample = vocabulary.sample(ground.seed)
        outputs, scores = self._scores(sample)
        itself = outputs == sample[:, None]

        def stays(rate: float) -> float:
            return float(torch.softmax(rate / 2 * scores, 1)[itself].mean())

        self.rate = self.epsilon or strength_for(self.unchanged or USUAL, stays, *RANGE)
        self.stay = stays(self.rate)

    def _scores(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens [N] may become [N,size] and how well it fits, in [-1,0]; -infinity where there are fewer."""
        few = max(1, AT_ONCE // (self.size * self._vocabulary.embedding.shape[1]))
        outputs, scores = zip(*map(self._scores_of, torch.split(tokens, few)), strict=True)
        return torch.cat(outputs), torch.cat(scores)

    def _scores_of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        vocabulary = self._vocabulary
        if self.sets == "groups":
            groups, group_of = _groups(vocabulary, self.size)
            outputs = groups[group_of[tokens.to(groups.device)]]
        else:
            size = min(self.size, len(vocabulary.open))
            near = [part.topk(size, largest=False) for part in map(vocabulary.distances, vocabulary.parts(tokens))]
            outputs = torch.cat([part.indices for part in near])
        there = outputs >= 0
        apart = vocabulary.points(outputs.clamp(min=0)) - vocabulary.points(tokens)[:, None]
        distances = apart.norm(dim=-1)
        nearest = distances.masked_fill(~there, torch.inf).amin(1, keepdim=True)
        furthest = distances.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
        scores = -(distances - nearest) / (furthest - nearest).clamp(min=1e-300)
        return outputs, scores.masked_fill(~there, -torch.inf)

    def example(self, example: Example, noise: Noise) -> Example:
        """The example with its tokens replaced."""
        return self._texts.changed(example, noise, self.labels, self._replaced)

    def _replaced(self, tokens: Tensor, noise: Noise) -> Tensor:
        outputs, scores = self._scores(tokens)
        chosen = noise.choice(torch.softmax(self.rate / 2 * scores, 1))
        return outputs.gather(1, chosen[:, None])[:, 0]

    def spent(self, ground: Ground, sends: Sends) -> Privacy:
        """epsilon for each version of a text that left; only of tokens of one group."""
        why, releases = doubt(ground, self.labels), releases_of(self.mode, sends)
        if self.sets == "own":
            why = "each token has candidates of its own (sets: own), which tell of it"
        floor = f"whoever knows the candidates guesses with a chance of 1 in {self.size} or more"
        return Privacy(
            f"token drawn from {self.size} like ones, epsilon {self.rate:.4g} ({kept_words(self.stay)}; {floor})",
            "empirical" if why else "local", "inputs", "one token, replaced by another of its group", releases,
            None if why else self.rate * releases, None if why else 0.0, why,
            not_covered=f"which group each token is of; {open_still(ground, self.labels)}",
        )  # fmt: skip


@lru_cache(maxsize=4)
def _groups(vocabulary: Vocabulary, size: int) -> tuple[Tensor, Tensor]:
    """The groups [G,size] of a vocabulary, -1 where one has fewer, and the group [V] of each token."""
    free = ~vocabulary.fixed.cpu()
    group_of = torch.full((len(vocabulary),), -1)
    groups: list[Tensor] = []
    start = 0  # all tokens before it have a group
    while free.any():
        # Distances of the next few at once; some of them come into a group of one before, and are not needed.
        ahead = start + free[start:].nonzero().flatten()[:AHEAD]
        distances = vocabulary.squares(vocabulary.points(ahead)).cpu()
        for first, row in zip(ahead.tolist(), distances, strict=True):
            if not free[first]:
                continue
            row[first] = -1.0
            row[~free] = torch.inf
            members = row.topk(min(size, int(free.sum())), largest=False).indices
            group_of[members] = len(groups)
            free[members] = False
            groups.append(torch.nn.functional.pad(members, (0, size - len(members)), value=-1))
        start = int(ahead[-1]) + 1
    device = vocabulary.embedding.device
    return torch.stack(groups).to(device), group_of.to(device)
