"""``dchi-embedding``: its noise, its bound on a toy vocabulary, and that the nearest token is the nearest."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from cutlayer.errors import MethodError
from cutlayer.methods.defense._tokens import Vocabulary, displacement
from cutlayer.noise import Noise
from cutlayer.registry import create
from sanitising import made, sanitised, toy

NAME = "dchi-embedding"
WIDTH = 48


def test_the_noise_is_long_as_a_gamma_and_points_anywhere() -> None:
    count, eta = 20_000, 3.0
    moved = displacement(torch.zeros(count, WIDTH, dtype=torch.float64), Noise(b"s", "law")) / eta
    lengths = moved.norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(WIDTH / eta, rel=0.02)
    assert stats.kstest(lengths.numpy() * eta, stats.gamma(WIDTH).cdf).pvalue > 0.01
    directions = moved / lengths[:, None]
    assert float(directions.mean(0).abs().max()) < 5 / math.sqrt(count * WIDTH)
    assert abs(float(torch.corrcoef(torch.stack([lengths[:-1], lengths[1:]]))[0, 1])) < 5 / math.sqrt(count)
    covariance = directions.T @ directions / count * WIDTH
    assert float((covariance - torch.eye(WIDTH)).abs().max()) < 0.06


def test_the_nearest_token_is_the_nearest_and_not_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces in which distances are made."""
    table = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 50)[:, None]
    points = torch.randn(70, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    apart = (table.double()[None] - points[:, None]).norm(dim=-1)
    apart[:, [4, 7]] = torch.inf
    assert not torch.equal(apart.argmin(1), (points @ table.double().T).argmax(1))
    for size in (1 << 20, 130, 1):
        monkeypatch.setattr("cutlayer.methods.defense._tokens.AT_ONCE", size)
        assert torch.equal(Vocabulary(table, (4, 7)).nearest(points), apart.argmin(1))


def test_two_tokens_have_outputs_whose_odds_keep_to_the_bound() -> None:
    """Counted, so that the bound gets three standard errors of the two counts."""
    eta, draws = 2.0, 40_000
    ground = toy(12, 3)
    defense = made(NAME, ground, eta=eta)
    embedding = ground.embedding().double()
    counts = torch.stack(
        [torch.bincount(torch.tensor(sanitised(defense, [[t] * draws])[0]), minlength=12) for t in range(2, 12)]
    ).double()
    apart = torch.cdist(embedding[2:], embedding[2:])
    tight = 0.0
    for x in range(10):
        for other in range(10):
            for y in range(2, 12):
                a, b = counts[x, y], counts[other, y]
                if min(a, b) < 100:
                    continue
                slack = 3 * math.sqrt(1 / a + 1 / b)
                assert float((a / b).log()) <= eta * float(apart[x, other]) + slack
                tight = max(tight, float((a / b).log()) / (eta * float(apart[x, other]) + slack) if x != other else 0)
    assert tight > 0.4, "a bound that is far from anything proves nothing"


def test_the_size_from_which_a_token_stays_is_right() -> None:
    """The share that is told, against tokens that are drawn with a secret."""
    ground = toy(60)
    for eta in (3.0, 10.0, 30.0):
        defense = made(NAME, ground, eta=eta)
        rows = [list(range(2, 60)) * 100]
        same = torch.tensor(sanitised(defense, rows)) == torch.tensor(rows)
        assert float(same.double().mean()) == pytest.approx(defense.stay, abs=0.06)
    assert made(NAME, ground, eta=1e6).stay == 1.0


def test_two_strengths_are_refused() -> None:
    with pytest.raises(MethodError, match="eta and unchanged are both given"):
        create("defense", NAME, {"eta": 1.0, "unchanged": 0.5})
