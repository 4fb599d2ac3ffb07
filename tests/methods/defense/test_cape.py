"""``cape``: its worths, its chances, its bound with fixed levels and without, and what the context is good for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cutlayer
import sanitising
from cutlayer.defense import Sends
from cutlayer.errors import ConfigError
from cutlayer.methods.defense.cape import levels_of
from defending import defending, run_of
from sanitising import fits, made, odds, sanitised, toy
from spine import TWO

NAME = "cape"


def worths(ground: sanitising.Ground, token: int, before: int) -> torch.Tensor:
    """What the tokens are worth [V], one by one."""
    embedding = ground.embedding().double()
    assert ground.guess is not None
    fit = ground.guess(torch.tensor([[before]]))[0, 0].double()
    apart = (embedding - embedding[token]).norm(dim=1)
    low, high, most = fit[2:].min(), fit[2:].max(), apart[2:].max()
    return ((fit - low) / (high - low)).clamp(0, 1) ** 0.5 * (1 - apart / most).clamp(min=0)


def plain(worth: torch.Tensor, epsilon: float, buckets: int, *, strict: bool) -> torch.Tensor:
    """Chances [V] of tokens from 2 on, bucket by bucket."""
    found = torch.zeros(len(worth), dtype=torch.float64)
    free = worth[2:]
    low, high = (0.0, 1.0) if strict else (float(free.min()), float(free.max()))
    at = ((free - low) / ((high - low) / buckets)).long().clamp(max=buckets - 1)
    for bucket in at.unique():
        inside = at == bucket
        value = (float(bucket) + 0.5) / buckets if strict else float(free[inside].mean())
        odds = torch.exp(torch.tensor(epsilon * value / 2, dtype=torch.float64))
        found[2:][inside] = odds if strict else odds / inside.sum()
    return found / found.sum()


@pytest.mark.parametrize("strict", [True, False])
def test_chances_are_those_of_the_rule(strict: bool) -> None:
    ground = toy(52)
    defense = made(NAME, ground, epsilon=8.0, buckets=10, strict=strict)
    for token, before in ((2, 9), (30, 40), (51, 2)):
        worth = defense.worths(torch.tensor([token]), torch.tensor([[before]]))[0]
        torch.testing.assert_close(worth[2:], worths(ground, token, before)[2:], atol=1e-6, rtol=1e-4)
        found = levels_of(worth[None], 10, strict=strict).chances(8.0)[0]
        torch.testing.assert_close(found, plain(worth, 8.0, 10, strict=strict))
        assert float(found.sum()) == pytest.approx(1.0)


def test_frequencies_follow_the_context_as_it_was_replaced() -> None:
    ground = toy(30)
    defense = made(NAME, ground, epsilon=10.0, buckets=10)
    defense.context = 1
    found = torch.tensor(sanitised(defense, [[5, 17] * 2_000])[0]).view(-1, 2)
    first = int(torch.bincount(found[:, 0]).argmax())
    chosen = found[found[:, 0] == first][:, 1]
    assert len(chosen) > 100
    chances = plain(worths(ground, 17, first), 10.0, 10, strict=True)
    assert fits(torch.bincount(chosen, minlength=30).numpy(), chances) > 0.01
    other = plain(worths(ground, 17, 5 if first != 5 else 6), 10.0, 10, strict=True)
    assert float((other - chances).abs().max()) > 0.005, "or the test would not tell"


def test_with_fixed_levels_the_odds_keep_to_epsilon_and_the_papers_do_not() -> None:
    """Over all pairs of tokens after the same context; 40 words, epsilon 4, 10 levels."""
    ground, worst = toy(42), {}
    for strict in (True, False):
        defense = made(NAME, ground, epsilon=4.0, buckets=10, strict=strict)
        tokens = torch.arange(2, 42)
        found = 0.0
        for before in range(2, 42):
            worth = defense.worths(tokens, torch.full((40, 1), before))
            shares = levels_of(worth, 10, strict=strict).chances(4.0)[:, 2:]
            found = max(found, float(odds(shares).max()))
        worst[strict] = found
        told = defense.spent(ground, Sends(1, 0))
        assert (told.kind, told.epsilon) == (("local", 4.0) if strict else ("empirical", None))
    print("worst log-ratio: fixed levels", worst[True], "the paper's", worst[False])
    assert 1.0 < worst[True] <= 4.0
    assert worst[False] > 4.0
    assert "sizes of the levels" in told.why


def test_it_needs_a_language_models_head(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which the server holds in the two-part split"):
        cutlayer.train(run_of(tmp_path, [NAME], partition=TWO), out=tmp_path / "out")
    (defense,) = defending(tmp_path / "u", [NAME]).defenses
    assert defense.worths(torch.tensor([5, 7]), torch.tensor([[5, 6, 7], [7, 6, 5]])).shape == (2, 97)


@pytest.mark.slow
@pytest.mark.parametrize("stays", [0.7, 0.3])
def test_where_as_much_stays_the_model_pays_less_than_for_santext(stays: float) -> None:
    rows, ground = sanitising.real_texts(count=4, length=64), sanitising.real_ground()
    losses = {}
    for name in (NAME, "santext"):
        defense, fed = sanitising.at_share(name, ground, rows, stays)
        losses[name] = sanitising.loss(fed)
        print(name, stays, "rate", defense.rate, "loss", losses[name])
    assert losses[NAME] < losses["santext"]
