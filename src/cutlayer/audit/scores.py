"""Guesses against the truth: token recovery, ROUGE-L, AUC, and the constant prediction that anybody can make."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import roc_auc_score
from torch import Tensor

from cutlayer.audit.messages import Key
from cutlayer.contracts import IGNORE, Batch

MISSING = -1  # a guess that an attack did not make


@dataclass(frozen=True)
class Guesses:
    """What an attack says was private, by micro-batch.

    ``tokens`` [B,T]: the token that stands at each position (of an attack on labels: the label of each position, which
    in a causal model is the next token), ``MISSING`` where it says nothing. ``scores``, of the same shape: higher where
    the rarer of two labels is more likely. ``notes``: what it found out besides, for the report.
    """

    tokens: Mapping[Key, Tensor] = field(default_factory=dict)
    scores: Mapping[Key, Tensor] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Truth:
    """The private tokens of a micro-batch, and where they count: both [B,T]."""

    tokens: Tensor
    counts: Tensor


def truth_of(batch: Batch, target: str) -> Truth:
    """What a guess is compared with.

    Of ``inputs`` every real token counts. Of ``labels`` the positions count whose loss is trained: the label of
    position t is the token at t + 1; of a classifier it is the row's class, [B,1].
    """
    if batch.labels.dim() == 1:
        labels = batch.labels[:, None] if target == "labels" else batch.input_ids
    elif target == "labels":
        labels = torch.full_like(batch.labels, IGNORE)
        labels[:, :-1] = batch.labels[:, 1:]
    else:
        labels = batch.input_ids
    if target == "labels":
        return Truth(labels, labels != IGNORE)
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return Truth(labels, real.bool())


@dataclass(frozen=True)
class Score:
    """How much came back.

    ``token_recovery``: the share of positions that were right; ``rouge_l``: the mean F-measure over rows;
    ``constant``: the token recovery of the best constant prediction; ``positions``: how many were scored; ``auc``: of
    its scores, against which of two labels it is.
    """

    token_recovery: float
    rouge_l: float
    constant: float
    positions: int
    examples: Sequence[tuple[str, str]] = ()
    auc: float | None = None


def score(
    guesses: Guesses, truths: Mapping[Key, Truth], decode: Callable[[Sequence[int]], str], *, examples: int = 3,
    positive: int | None = None,
) -> Score:  # fmt: skip
    """Score guesses of tokens; what an attack said nothing about counts as wrong.

    Args:
        guesses: of an attack.
        truths: by micro-batch; all of them count.
        decode: makes text of token ids.
        examples: of how many rows to give the true text beside the guessed one.
        positive: the label that higher scores stand for; None: there are not two.
    """
    right = total = 0
    pairs: list[tuple[str, str]] = []
    counted: Counter[int] = Counter()
    for key, truth in truths.items():
        guess = guesses.tokens.get(key)
        guess = torch.full_like(truth.tokens, MISSING) if guess is None else guess.cpu()
        assert guess.shape == truth.tokens.shape
        right += int((guess.eq(truth.tokens) & truth.counts).sum())
        total += int(truth.counts.sum())
        for row in range(len(truth.tokens)):
            there = truth.counts[row]
            true, said = truth.tokens[row][there].tolist(), guess[row][there].tolist()
            counted.update(true)
            if true:
                pairs.append((decode(true), decode([token for token in said if token != MISSING])))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(true, said)["rougeL"].fmeasure for true, said in pairs]
    most = counted.most_common(1)[0][1] if counted else 0
    ranked = _auc(guesses, truths, positive) if guesses.scores and positive is not None else None
    return Score(
        right / max(1, total), sum(rouge) / max(1, len(rouge)), most / max(1, total), total, pairs[:examples], ranked
    )


def _auc(guesses: Guesses, truths: Mapping[Key, Truth], positive: int) -> float:
    """Of the scores of what counts."""
    scores, right = [], []
    for key, truth in truths.items():
        scores += guesses.scores[key].cpu()[truth.counts].tolist()
        right += (truth.tokens == positive)[truth.counts].tolist()
    return auc(scores, right)


def auc(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """The area under the ROC curve; 0.5 where all truths are the same."""
    return float(roc_auc_score(truths, scores)) if len(set(truths)) > 1 else 0.5


def auc_error(positives: float, negatives: float) -> float:
    """The standard error of an AUC of 0.5 with so many of each kind."""
    m, n = positives, negatives
    return math.sqrt((m + n + 1) / (12 * m * n))
