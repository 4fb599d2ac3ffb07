"""Samples with one label each: the one position of a row at which its label is predicted, over all of a run.

Shapes: B rows, T positions, H hidden size, N samples, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutlayer.audit.messages import Exchange, Key
from cutlayer.audit.scores import MISSING, Guesses, Truth


@dataclass(frozen=True)
class Samples:
    """The samples of a run, in the order of the wire.

    ``sent`` [N,H] by step name is what crossed at the label's position; gradients are those of the sample's own loss.
    ``known`` [N] are the labels that the adversary was told (``MISSING`` elsewhere).
    """

    places: Sequence[tuple[Key, int]]
    sent: Mapping[str, Tensor]
    known: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def guesses(
        self, labels: Tensor | None = None, scores: Tensor | None = None, notes: Mapping[str, float] | None = None
    ) -> Guesses:
        """Guesses of labels [N] and scores [N], by micro-batch: [B,1] each."""
        return Guesses(
            {} if labels is None else self._by_batch(labels), {} if scores is None else self._by_batch(scores),
            notes or {},
        )  # fmt: skip

    def _by_batch(self, values: Tensor) -> dict[Key, Tensor]:
        found: dict[Key, list[Tensor]] = {}
        for (key, _), value in zip(self.places, values.detach().cpu(), strict=True):
            found.setdefault(key, []).append(value)
        return {key: torch.stack(those)[:, None] for key, those in found.items()}


def samples_of(
    exchanges: Sequence[Exchange], labelled: Mapping[Key, Tensor] | None, steps: Sequence[str]
) -> Samples:  # fmt: skip
    """The samples of exchanges of one position [B,1,H], with what crossed in some steps.

    The loss of an optimizer step is the mean over its rows, so its gradients are multiplied by how many it has.
    """
    rows: Counter[tuple[str, int]] = Counter()
    for one in exchanges:
        rows[one.client, one.step] += len(one.hidden(steps[0]))
    places, known = [], []
    sent: dict[str, list[Tensor]] = {step: [] for step in steps}
    for one in exchanges:
        count = len(one.hidden(steps[0]))
        places += [(one.key, row) for row in range(count)]
        told = None if labelled is None else labelled.get(one.key)
        known.append(torch.full((count,), MISSING) if told is None else told[:, 0])
        for step in steps:
            factor = rows[one.client, one.step] if step.endswith("gradients") else 1
            sent[step].append(one.hidden(step)[:, 0] * factor)
    return Samples(places, {step: torch.cat(those) for step, those in sent.items()}, torch.cat(known))


def at_label(one: Exchange, behind: int | None) -> Exchange:
    """Of what crossed [B,T,H] the position of each row at which its label is predicted, [B,1,H].

    Args:
        one: a micro-batch, with the mask if there is one.
        behind: so many real positions stand behind it; None: it is the first (of an encoder).
    """
    hidden = next(found["hidden"] for found in one.tensors.values() if "hidden" in found)
    count, length = hidden.shape[:2]
    at = torch.zeros(count, dtype=torch.int64)
    if behind is not None:
        mask = one.about.get("mask", torch.ones(count, length)).long()
        last = length - 1 - mask.flip(1).argmax(1)
        at = (last - behind).clamp_min(0)
    kept = {
        step: {"hidden": found["hidden"].gather(1, at[:, None, None].expand(-1, 1, found["hidden"].shape[-1]))}
        for step, found in one.tensors.items()
        if "hidden" in found
    }
    return replace(one, tensors=kept)


def of_rows(truth: Truth, ending: int | None) -> Truth:
    """The one label [B,1] of each row; ``ending`` is what every row ends with, which is no label of its own."""
    counts = truth.counts & (truth.tokens != ending) if ending is not None else truth.counts
    at = counts.long().argmax(1, keepdim=True)
    return Truth(truth.tokens.gather(1, at), counts.gather(1, at))


def told_of(truths: Mapping[Key, Truth], each: int, generator: torch.Generator) -> dict[Key, Tensor]:
    """The labels [B,1] of so many samples of each class, drawn at random; ``MISSING`` elsewhere."""
    places = [(key, row) for key, truth in truths.items() for row in range(len(truth.tokens)) if truth.counts[row, 0]]
    told = {key: torch.full_like(truth.tokens, MISSING) for key, truth in truths.items()}
    given: Counter[int] = Counter()
    for number in torch.randperm(len(places), generator=generator).tolist():
        key, row = places[number]
        label = int(truths[key].tokens[row, 0])
        if given[label] < each:
            given[label] += 1
            told[key][row] = label
    return told


def mixed(exchanges: Sequence[Exchange], generator: torch.Generator) -> list[Exchange]:
    """The same with what crossed for each sample given to another: a control in which nothing is whose it was."""
    sizes = [len(next(iter(one.tensors.values()))["hidden"]) for one in exchanges]
    order = torch.randperm(sum(sizes), generator=generator)
    steps = list(exchanges[0].tensors) if exchanges else []
    moved = {
        step: torch.split(torch.cat([one.tensors[step]["hidden"] for one in exchanges])[order], sizes) for step in steps
    }
    return [
        replace(one, tensors={step: {"hidden": moved[step][number]} for step in steps})
        for number, one in enumerate(exchanges)
    ]
