"""Replay of features: what a branch has not seen lately, how much of it is asked for, and a stop that trains on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cutlayer.contracts import IGNORE, SERVER, How, Parcel

Rows = dict[str, Tensor]  # ``hidden`` [R,T,H], ``labels``, and ``mask`` and ``positions`` where there are any
ASIDE = 1_000_000  # added to the micro-batch's number, so that what is trained beside a batch has a key of its own


@dataclass
class Memory:
    """What MultiSFL remembers: label counts by client, each branch's history of them, and the replay ratio's state."""

    ratio: float
    norm: float | None = None  # the last federated gradient norm
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # of every client, by category
    history: dict[str, dict[str, float]] = field(default_factory=dict)  # of every branch: discounted sums of shares

    def saw(self, branch: str, client: str, gamma: float) -> None:
        """Discount a branch's history, and add the shares of the client that trains it."""
        old, counts = self.history.get(branch, {}), self.counts[client]
        total = sum(counts.values())
        self.history[branch] = {
            name: gamma * old.get(name, 0.0) + counts.get(name, 0) / total for name in sorted({*old, *counts})
        }

    def quotas(self, branch: str, budget: int) -> dict[str, int]:
        """How many rows of each category a branch lacks most, ``budget`` in all; none without a history or a lack."""
        history = self.history.get(branch, {})
        names = sorted({name for counts in self.counts.values() for name in counts})
        total = sum(history.values())
        if not total or not names:
            return {}
        score = {name: history.get(name, 0.0) / total for name in names}
        mean = sum(score.values()) / len(names)
        return shared_out(budget, {name: max(0.0, mean - score[name]) for name in names})

    def adapt(self, norm: float, lowest: float, highest: float) -> None:
        """Follow the federated gradient norm: the ratio rises and falls with it, by at most a fifth a round."""
        if self.norm:
            change = max(-0.2, min(0.2, (norm - self.norm) / self.norm))
            self.ratio = max(lowest, min(highest, self.ratio * (1 + change)))
        self.norm = norm


def shared_out(budget: int, weights: Mapping[str, float]) -> dict[str, int]:
    """``budget`` in proportion to ``weights``, in whole numbers of that sum: largest remainders first."""
    total = sum(weights.values())
    if total <= 0 or budget < 1:
        return {}
    exact = {name: budget * weight / total for name, weight in weights.items() if weight > 0}
    given = {name: int(value) for name, value in exact.items()}
    left = budget - sum(given.values())
    for name in sorted(exact, key=lambda name: (given[name] - exact[name], name))[:left]:
        given[name] += 1
    return {name: count for name, count in given.items() if count}


def dealt_over(replies: Sequence[Rows], steps: int, spread: str) -> list[list[Rows]]:
    """The rows of each of ``steps`` steps: dealt one by one (``even``), or all to the first."""
    parts: list[list[Rows]] = [[] for _ in range(steps)]
    if spread == "first":
        parts[0] = list(replies)
        return parts
    dealt = 0
    for rows in replies:
        count = len(rows["hidden"])
        for step in range(steps):
            mine = [row for row in range(count) if (dealt + row) % steps == step]
            if mine:
                parts[step].append({name: tensor[mine] for name, tensor in rows.items()})
        dealt += count
    return parts


def counted(rows: Rows) -> int:
    """The positions that the loss of these rows averages over."""
    labels = rows["labels"]
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != IGNORE).sum())


async def train_aside(stop: Any, parcel: Parcel, how: How, rows: Rows, weight: float, number: int) -> None:
    """A trunk's step on rows beside those of ``parcel``: its gradient, times ``weight``, joins that of the batch."""
    header = parcel.header
    told = {"last": False, "needs_gradient": False, "weight": 1.0, "label_tokens": counted(rows), "tokens": 0}
    beside = header.but(
        sender=SERVER, micro=header.micro + ASIDE * (number + 1), values={**header.values, **told}, names=tuple(rows)
    )
    aside = replace(how, trunk_update=False, trunk_weight=how.trunk_weight * weight)
    await stop.tail_step(Parcel(beside, list(rows.values())), aside)


class Replay:
    """The server's tail with features of idle clients beside a client's own rows, and a measure of the gradient.

    The joint loss is the mean over all label tokens, own and replayed. The client gets the gradient of its own rows
    only; the features are data, so nothing goes back to who sent them.
    """

    def __init__(self, stop: Any, slot: Any, rows: Sequence[Rows]) -> None:
        self.stop, self.slot, self.rows = stop, slot, rows
        self.replayed = sum(map(counted, rows))
        self.squared = 0.0  # the squared norm of the trunk's gradient in this step

    async def leave(self, client: str) -> None:
        """Nothing waits here."""
        await self.stop.leave(client)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """The tail's step on a micro-batch; beside the last one, on the replayed rows."""
        values = parcel.header.values
        last, tokens, weight = bool(values["last"]), int(values["label_tokens"]), float(values["weight"])
        own = round(tokens / weight) if weight else tokens  # of all micro-batches of the step
        total = own + self.replayed
        if last:
            for number, rows in enumerate(self.rows):
                await train_aside(self.stop, parcel, how, rows, counted(rows) / total if total else 0.0, number)
        share = own / total if total else 1.0
        out: Parcel = await self.stop.tail_step(
            parcel, replace(how, trunk_update=False, trunk_weight=how.trunk_weight * share)
        )
        if last:
            self.squared = self.slot.squared_norm()
            if how.trunk_update:
                self.slot.update()
        header, tensors = out.open()
        return Parcel(
            header,
            [
                tensor * share if name == "hidden" else tensor
                for name, tensor in zip(header.names, tensors, strict=True)
            ],
        )


def blended(mine: Mapping[str, Tensor], master: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) of one's own and alpha of the master's, of what the master has; exact at 0, at 1 and where equal."""
    return {name: torch.lerp(mine[name], tensor.to(mine[name]), alpha) for name, tensor in master.items()}
