"""Search the tokens of a causal head one position at a time, through the public weights.

Ours: neither the survey nor a paper that we know has it. A causal head's hidden state at position t depends on the
tokens up to t only. So an adversary that has the tokens before t tries those that may stand at t, runs each through the
public head, and keeps the one whose hidden state is nearest to what it read. Nothing is learned, and no text is needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cutlayer.audit.inverter import Means, fit_means
from cutlayer.audit.messages import Exchange
from cutlayer.audit.prefixes import Prefixes
from cutlayer.audit.scores import MISSING, Guesses
from cutlayer.audit.spans import Span, spans_of
from cutlayer.audit.threat import Threat
from cutlayer.audit.view import View
from cutlayer.contracts import Attack
from cutlayer.registry import method

FEW = 4  # candidates that are tried first
MORE = 8  # times the shortlist is tried where nothing of it fits
CLEAR = 0.1  # a candidate so much nearer than the next is taken without a look at others
STRAY = 4.0  # a residual so many times the usual one makes the search look through the whole vocabulary
EXACT = 1e-7  # mean squared residual, in parts of the signal's, below which nothing is left to correct
GOOD = 0.75  # of the positions are used to correct
ENOUGH = 16  # positions to correct by
DRAWN = 0.03  # how much a correction is drawn towards none, in parts of the states' own variance
NOISE = 1e-3  # mean squared residual, in parts of the signal's, from which on it is noise
AT_MOST = 0.1  # of all positions are looked for in the whole vocabulary


@dataclass(frozen=True)
class _Text:
    """A private text: where it stands, and its hidden states [L,H]."""

    exchange: Exchange
    span: Span
    hidden: Tensor


@dataclass
class _Pass:
    """How candidates are compared in one pass over the texts; shapes as of one state, [H] and [H,H].

    ``matrix`` and ``offset`` correct what the public head gives towards what the client's own, which has been trained
    meanwhile, gives. ``precision`` is the inverse covariance of what is left (noise, and drift that no matrix has); in
    its metric states are compared. None of them in the first pass. ``prior``: the language model's opinion counts.
    """

    matrix: Tensor | None = None
    offset: Tensor | None = None
    precision: Tensor | None = None
    prior: bool = False

    def corrected(self, states: Tensor) -> Tensor:
        """States [...,H] of the public head as the client's would be."""
        if self.matrix is None or self.offset is None:
            return states
        return states @ self.matrix + self.offset

    def costs(self, states: Tensor, seen: Tensor) -> Tensor:
        """How far corrected states [N,K,H] are from what was read, [N,H]: minus the log-likelihood, but for a constant.

        In the first pass, where no noise is known, the mean square.
        """
        apart = states - seen[:, None]
        if self.precision is None:
            return apart.square().mean(-1)
        return (apart @ self.precision * apart).sum(-1) / 2


@dataclass
class _Found:
    """What a pass gave, over all positions: the guessed tokens by text, what was read and what the public head gives
    with the guesses, both [P,H]; for how many the whole vocabulary was tried; and how it compared."""

    tokens: list[list[int]]
    observed: Tensor
    predicted: Tensor
    whole: int

    how: _Pass

    @property
    def residual(self) -> float:
        """The mean squared residual of a coordinate (the median over positions)."""
        return float(self._left().median())

    def good(self) -> Tensor:
        """The positions [P] that fit best: three of four."""
        left = self._left()
        return left <= left.quantile(GOOD)

    def _left(self) -> Tensor:
        return (self.observed - self.how.corrected(self.predicted)).square().mean(-1)


@method("attack", needs=["a causal language model whose base weights are public"])
@dataclass
class CausalSearch(Attack):
    """Search the client's tokens one position at a time through the public head (ours; the strongest on inputs).

    ``shortlist``: candidates at a position, by the mean state of each token among random ones; where none of them fits,
    the whole vocabulary is tried. ``prior``: the language model's own opinion counts too (``auto``: where there is
    noise). ``passes``: after the first, the drift of the client's head from the public one is corrected by an affine
    map that is fitted on what was found.
    """

    threat: ClassVar[Threat] = Threat(
        reads=("send_activations",), knows=("architecture", "weights"), target="inputs", causal=True
    )
    shortlist: int = 64
    prior: Literal["auto", "on", "off"] = "auto"
    passes: int = 2

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise ValueError(f"shortlist is {self.shortlist}; it must be 1 or more")
        if self.passes < 1:
            raise ValueError(f"passes is {self.passes}; it must be 1 or more")

    def finish(self, view: View) -> Guesses:
        """The tokens of all micro-batches that were read."""
        texts = [
            _Text(one, span, span.of(one.hidden("send_activations")))
            for one in view.exchanges
            for span in spans_of(one.hidden("send_activations"), one.about)
        ]
        inverter = fit_means(view.public, view.cut, view.generator("inverter"))
        how = _Pass()
        found = self._search(view, texts, inverter, how)
        for _ in range(self.passes - 1):
            better = self._improved(found, how)
            if better is None:
                break
            how, found = better, self._search(view, texts, inverter, better)
        notes = {"residual": found.residual / max(float(found.observed.square().mean()), 1e-30)}
        return Guesses(_placed(texts, found.tokens, view.exchanges), notes={**notes, "whole": float(found.whole)})

    def _improved(self, found: _Found, how: _Pass) -> _Pass | None:
        """How to compare in the next pass; None: the last one left nothing to correct."""
        signal = float(found.observed.square().mean())
        if found.residual < EXACT * signal:
            return None
        good = found.good()
        if int(good.sum()) < ENOUGH:
            return None
        matrix, offset = _affine(found.predicted[good], found.observed[good])
        left = found.observed[good] - (found.predicted[good] @ matrix + offset)
        noisy = self.prior == "on" or (self.prior == "auto" and float(left.square().mean()) > NOISE * signal)
        return _Pass(matrix, offset, _precision(left), noisy)

    def _search(self, view: View, texts: Sequence[_Text], inverter: Means, how: _Pass) -> _Found:
        """One pass over all texts, the longest first; those that have ended drop out."""
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n].span))
        tokens: list[list[int]] = [[] for _ in texts]
        head = Prefixes(view.public, view.cut, len(texts))
        model = Prefixes(view.public, None, len(texts)) if how.prior else None
        opinion: Tensor | None = None
        observed, predicted, whole = [], [], 0
        usual = _Usual(EXACT * float(torch.cat([text.hidden for text in texts]).square().mean()) if texts else 0.0)
        positions = sum(len(text.span) for text in texts)
        for place in range(len(texts[order[0]].span) if order else 0):
            going = [n for n in order if len(texts[n].span) > place]
            order = going
            head.keep(len(going))
            if model is not None:
                model.keep(len(going))
                opinion = None if opinion is None else opinion[: len(going)]
            seen = torch.stack([texts[n].hidden[place] for n in going])
            best, shown, looked = self._position(
                head, inverter, seen, how, opinion, usual, allowed=whole < AT_MOST * positions
            )
            whole += looked
            head.append(best)
            opinion = model.append(best) if model is not None else None
            observed.append(seen)
            predicted.append(shown)
            for n, token in zip(going, best.tolist(), strict=True):
                tokens[n].append(token)
        return _Found(tokens, torch.cat(observed), torch.cat(predicted), whole, how)

    def _position(
        self, head: Prefixes, inverter: Means, seen: Tensor, how: _Pass, opinion: Tensor | None, usual: _Usual, *,
        allowed: bool,
    ) -> tuple[Tensor, Tensor, int]:  # fmt: skip
        """The best token [N] at a position where ``seen`` [N,H] was read, the state that the public head gives with it
        [N,H], and for how many texts the whole vocabulary was tried."""
        count = self.shortlist
        listed = inverter.nearest(seen, MORE * count if opinion is None else count)
        if opinion is not None:
            listed = torch.cat([listed, opinion.topk(min(count, inverter.vocabulary)).indices], 1)
        # A few first: mostly one of them is much nearer than the others.
        stages = [FEW, count, MORE * count] if opinion is None else [2 * count]
        states = head.try_(listed[:, : stages[0]])
        costs = how.costs(how.corrected(states), seen)
        for before, stage in itertools.pairwise(stages):
            if not bool(usual.strays(costs.amin(1)).any()) or before >= listed.shape[1]:
                break
            more = head.try_(listed[:, before:stage])
            states = torch.cat([states, more], 1)
            costs = torch.cat([costs, how.costs(how.corrected(more), seen)], 1)
        listed = listed[:, : states.shape[1]]
        if opinion is not None:
            costs = costs - opinion.gather(1, listed)
        at, rows = costs.argmin(1), torch.arange(len(seen))
        best, shown, cost = listed[rows, at], states[rows, at], costs[rows, at]
        lost = usual.strays(cost) & ~_clear(costs) if allowed and opinion is None else torch.zeros(len(seen)).bool()
        for row in lost.nonzero().flatten().tolist():
            everything = torch.arange(inverter.vocabulary)
            states = head.only(row).try_(everything[None])
            found = how.costs(how.corrected(states), seen[row : row + 1])[0]
            choice = int(found.argmin())
            best[row], shown[row], cost[row] = choice, states[0, choice], found[choice]
        usual.add(cost)
        return best, shown, int(lost.sum())


class _Usual:
    """The costs of tokens that were taken, to know which are unusual.

    Args:
        floor: costs below it are rounding.
    """

    def __init__(self, floor: float) -> None:
        self.floor = floor
        self._taken: list[float] = []

    def add(self, costs: Tensor) -> None:
        """More of them [N]."""
        self._taken += costs.tolist()

    def strays(self, costs: Tensor) -> Tensor:
        """Which of these [N] are far from the usual ones; while nothing is known to be usual, all but rounding."""
        usual = STRAY * float(torch.tensor(self._taken).median()) if self._taken else 0.0
        return costs > max(usual, self.floor)


def _clear(costs: Tensor) -> Tensor:
    """Which rows of [N,K] have a candidate that is much nearer than all others."""
    if costs.shape[1] < 2:
        return torch.zeros(len(costs), dtype=torch.bool)
    two = costs.topk(2, largest=False).values
    found: Tensor = two[:, 0] <= CLEAR * two[:, 1]
    return found


def _affine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix [H,H] and the offset [H] that take ``x`` [P,H] nearest to ``y``, drawn towards taking x as it is."""
    middle_x, middle_y = x.double().mean(0), y.double().mean(0)
    around = x.double() - middle_x
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    gram = around.T @ around
    ridge = DRAWN * float(gram.diagonal().mean())
    change = torch.linalg.solve(gram + ridge * eye, around.T @ (y.double() - middle_y - around))
    matrix = eye + change
    return matrix.float(), (middle_y - middle_x @ matrix).float()


def _precision(left: Tensor) -> Tensor:
    """The inverse covariance [H,H] of residuals [P,H], drawn towards that of noise that is alike in all coordinates."""
    covariance = left.double().T @ left.double() / len(left)
    eye = torch.eye(left.shape[1], dtype=torch.float64)
    alike = max(float(covariance.diagonal().mean()), 1e-30) * eye
    share = min(1.0, left.shape[1] / len(left))  # few residuals say little of a covariance
    found: Tensor = torch.linalg.inv((1 - share) * covariance + share * alike + 1e-6 * alike).float()
    return found


def _placed(
    texts: Sequence[_Text], tokens: Sequence[Sequence[int]], exchanges: Sequence[Exchange]
) -> Mapping[tuple[str, int, int], Tensor]:
    """The tokens of texts where they stand in their batches."""
    found = {
        one.key: torch.full(one.hidden("send_activations").shape[:2], MISSING, dtype=torch.int64) for one in exchanges
    }
    for text, guessed in zip(texts, tokens, strict=True):
        span = text.span
        found[text.exchange.key][span.row, span.start : span.stop] = torch.tensor(guessed)
    return found
