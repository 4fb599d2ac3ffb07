"""``custext``: its groups, its chances, its bound, and how it stands to SanText."""

from __future__ import annotations

import math

import pytest
import torch

import sanitising
from cutlayer.defense import Sends
from cutlayer.errors import MethodError
from cutlayer.methods.defense._tokens import vocabulary_of
from cutlayer.methods.defense.custext import _groups
from cutlayer.registry import create
from sanitising import fits, frequencies, made, odds, sanitised, share, toy

NAME = "custext"


def plain_groups(embedding: torch.Tensor, size: int) -> list[list[int]]:
    """The greedy groups, the slow way; the first two tokens are special."""
    left, found = list(range(2, len(embedding))), []
    while left:
        first = left[0]
        apart = {token: float((embedding[token].double() - embedding[first].double()).norm()) for token in left}
        found.append(sorted(sorted(left, key=lambda token: apart[token])[:size]))
        left = [token for token in left if token not in found[-1]]
    return found


@pytest.mark.parametrize("ahead", [1, 3, 64])
def test_groups_take_the_earliest_token_left_and_those_nearest_to_it(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cutlayer.methods.defense.custext.AHEAD", ahead)
    _groups.cache_clear()
    ground = toy(53)
    groups, group_of = _groups(vocabulary_of(ground), 8)
    found = [sorted(t for t in group if t >= 0) for group in groups.tolist()]
    assert found == plain_groups(ground.embedding(), 8)
    assert len(found[-1]) == 51 % 8
    assert group_of[:2].tolist() == [-1, -1]
    assert all(group_of[token] == number for number, group in enumerate(found) for token in group)


def chances(ground: sanitising.Ground, epsilon: float, size: int) -> torch.Tensor:
    """Chances [V,V] as the paper has them."""
    embedding = ground.embedding().double()
    found = torch.zeros(len(embedding), len(embedding), dtype=torch.float64)
    for group in plain_groups(ground.embedding(), size):
        for token in group:
            apart = (embedding[group] - embedding[token]).norm(dim=1)
            worth = -(apart - apart.min()) / (apart.max() - apart.min())
            found[token, group] = torch.softmax(epsilon * worth / 2, 0)
    return found


@pytest.mark.parametrize("token", [2, 30, 51])
def test_frequencies_are_the_papers(token: int) -> None:
    ground = toy(52)
    assert fits(frequencies(made(NAME, ground, epsilon=3.0, size=8), token), chances(ground, 3.0, 8)[token]) > 0.01


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 12.0])
def test_two_tokens_of_a_group_have_outputs_whose_odds_keep_to_epsilon(epsilon: float) -> None:
    ground = toy(52)
    defense = made(NAME, ground, epsilon=epsilon, size=8)
    outputs, scores = defense._scores(torch.arange(2, 52))
    each = torch.softmax(defense.rate / 2 * scores, 1)
    shares = torch.zeros(50, 52, dtype=torch.float64).scatter_add(1, outputs.clamp(min=0), each)
    torch.testing.assert_close(shares, chances(ground, epsilon, 8)[2:])
    worst = odds(shares)
    same = torch.isfinite(worst)
    assert 50 < int(same.sum()) < 50 * 50, "tokens of two groups have no output in common"
    assert float(worst[same].max()) <= epsilon + 1e-9
    assert float(worst[same].max()) > epsilon / 2


def test_the_floor_is_told_and_a_share_below_it_is_refused() -> None:
    ground = toy(52)
    told = made(NAME, ground, epsilon=1e-3, size=5).spent(ground, Sends(1, 0))
    assert "a chance of 1 in 5 or more" in told.mechanism
    assert "which group each token is of" in told.not_covered
    rows = [list(range(2, 52)) * 40]
    assert share(rows, sanitised(made(NAME, ground, epsilon=1e-3, size=5), rows)) == pytest.approx(0.2, abs=0.03)
    with pytest.raises(MethodError, match=r"of groups of 20 at least 0\.05 stays"):
        create("defense", NAME, {"unchanged": 0.02})


def test_candidates_of_its_own_promise_nothing() -> None:
    ground = toy(52)
    defense = made(NAME, ground, epsilon=1.0, size=6, sets="own")
    embedding = ground.embedding().double()
    counts = frequencies(defense, 30, 2_000)
    apart = (embedding[2:] - embedding[30]).norm(dim=1)
    assert set(counts.nonzero()[0].tolist()) == set((apart.topk(6, largest=False).indices + 2).tolist())
    told = defense.spent(ground, Sends(1, 0))
    assert (told.kind, told.epsilon) == ("empirical", None)
    assert "candidates of its own" in told.why


@pytest.mark.slow
@pytest.mark.parametrize("stays", [0.7, 0.3])
def test_where_as_much_stays_the_model_pays_less_than_for_santext(
    stays: float, record_property: pytest.RecordProperty
) -> None:
    """Of real text as much stays by both. What is read is told beside it."""
    rows, ground = sanitising.real_texts(), sanitising.real_ground()
    losses = {}
    for name in (NAME, "santext"):
        defense, fed = sanitising.at_share(name, ground, rows, stays)
        losses[name] = sanitising.loss(fed)
        read = sanitising.share(rows, sanitising.informed(defense, fed))
        record_property(f"{name} {stays}", (losses[name], read))
        print(name, stays, "rate", defense.rate, "loss", losses[name], "informed", read)
    assert losses[NAME] < losses["santext"]
    assert math.isfinite(losses["santext"])
