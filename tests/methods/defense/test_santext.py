"""``santext``: its chances, its bound, and the tokens that SanText+ hides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutlayer.defense import Sends
from cutlayer.errors import MethodError
from cutlayer.registry import create
from sanitising import fits, frequencies, made, odds, sanitised, share, toy

NAME = "santext"


def chances(embedding: Tensor, epsilon: float, hidden: Tensor) -> Tensor:
    """P [V,V] as the paper has it; only hidden tokens come out."""
    apart = torch.cdist(embedding.double(), embedding.double(), compute_mode="donot_use_mm_for_euclid_dist")
    weights = torch.exp(-epsilon / 2 * apart) * hidden
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("token", [2, 17, 49])
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_frequencies_are_the_papers(token: int, epsilon: float) -> None:
    ground = toy(50)
    hidden = torch.arange(50) >= 2
    expected = chances(ground.embedding(), epsilon, hidden)[token]
    assert fits(frequencies(made(NAME, ground, epsilon=epsilon), token), expected) > 0.01


@pytest.mark.parametrize("epsilon", [0.3, 2.0, 20.0])
def test_two_tokens_have_outputs_whose_odds_keep_to_the_bound(epsilon: float) -> None:
    ground = toy(52)
    defense = made(NAME, ground, epsilon=epsilon)
    tokens = torch.arange(2, 52)
    weights = defense._weights(defense._vocabulary.distances(tokens), defense.rate)
    shares = (weights / weights.sum(1, keepdim=True))[:, 2:]
    torch.testing.assert_close(
        shares, chances(ground.embedding(), epsilon, torch.arange(52) >= 2)[2:, 2:], atol=1e-9, rtol=1e-6
    )
    points = ground.embedding()[2:].double()
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    assert float((odds(shares) - epsilon * apart).max()) <= 1e-6
    assert float((odds(shares) / (epsilon * apart).clamp(min=1e-9)).max()) > 0.5


def test_more_stays_the_larger_epsilon_is() -> None:
    ground, rows = toy(50), [list(range(2, 50)) * 20]
    stays = [share(rows, sanitised(made(NAME, ground, epsilon=epsilon), rows)) for epsilon in (0.1, 1, 4, 16, 64)]
    assert stays == sorted(stays)
    assert stays[0] < 0.1 < 0.9 < stays[-1]


def test_santext_plus_hides_rare_tokens_and_replaces_a_part_of_the_others() -> None:
    """The last tokens of the vocabulary count as rare."""
    ground = toy(52)
    defense = made(NAME, ground, epsilon=2.0, sensitive=0.6, replaced=0.2)
    assert defense.hidden.nonzero().flatten().tolist() == list(range(22, 52))
    expected = chances(ground.embedding(), 2.0, torch.arange(52) >= 22)
    assert fits(frequencies(defense, 40), expected[40]) > 0.01
    common = 0.2 * expected[5]
    common[5] = 0.8
    assert fits(frequencies(defense, 5), common) > 0.01
    told = defense.spent(ground, Sends(1, 0))
    assert told.neighbours.startswith("one sensitive token")
    assert "not among the rarest 60%" in told.not_covered
    assert (told.kind, told.epsilon) == ("metric", 2.0)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MethodError, match="epsilon and unchanged are both given"):
        create("defense", NAME, {"epsilon": 1.0, "unchanged": 0.5})
    with pytest.raises(MethodError, match="Give sensitive, too"):
        create("defense", NAME, {"replaced": 0.5})
