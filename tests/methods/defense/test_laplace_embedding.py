"""``laplace-embedding``: its noise, its bound, its epsilon, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from cutlayer.defense import Sends
from cutlayer.errors import ConfigError
from defending import defending, passing, trained, whole_batch
from spine import U, adapter, equal, losses

COLD = {**U, "head_blocks": 0}
NAME = "laplace-embedding"


def test_without_noise_nothing_changes(tmp_path: Path) -> None:
    plain, same = trained(tmp_path / "a", []), trained(tmp_path / "b", [{"name": NAME, "noise": 0}])
    assert losses(plain.out) == losses(same.out)
    assert equal(adapter(plain.out), adapter(same.out))


def test_the_noise_has_its_law(tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": NAME, "noise": 0.3}])
    (defense,) = made.defenses
    hidden = torch.randn(32, 24, 32)
    left = (made.shown(hidden, passing(whole_batch(32, 24))) - hidden).flatten().numpy()
    assert left.std() == pytest.approx(defense.scale * 2**0.5, rel=0.02)
    assert stats.kstest(left / defense.scale, stats.laplace().cdf).pvalue > 0.01


@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_one_release_is_the_closed_form(epsilon: float, tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": NAME, "epsilon": epsilon}], partition=COLD)
    (defense,) = made.defenses
    assert defense.scale == pytest.approx(2 * defense.most / epsilon)
    (told,) = made.told(Sends(1, 0))
    assert told["epsilon"] == pytest.approx(epsilon, abs=1e-6)
    assert told["delta"] == 0.0
    (more,) = made.told(Sends(4, 0))
    assert epsilon < more["epsilon"] <= 4 * epsilon


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e10])
def test_two_texts_are_never_further_apart_than_the_sensitivity(size: float, tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": NAME, "noise": 0.0, "clip": 0.5}])
    (defense,) = made.defenses
    one = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1)) * size
    batch = passing(whole_batch(3, 8))
    apart = (made.shown(one, batch) - made.shown(-one, batch)).abs().sum((1, 2))
    assert (apart <= 2 * defense.most * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("options", "why"),
    [({"noise": 1.0}, "not cut to a norm"), ({"decimals": 1}, "rounding"), ({"noise": 0.0, "clip": 1.0}, "no noise")],
)
def test_no_epsilon_is_told_that_does_not_hold(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    (told,) = defending(tmp_path, [{"name": NAME, **options}], partition=COLD).told(Sends(1, 1))
    assert told["epsilon"] is None
    assert why in told["why"]


def test_rounding_rounds_and_lets_the_gradient_pass(tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": NAME, "decimals": 1}])
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    shown = made.shown(hidden, passing(whole_batch(2, 5)))
    torch.testing.assert_close(shown, hidden.round(decimals=1))
    (found,) = torch.autograd.grad(shown.sum(), [hidden])
    assert torch.equal(found, torch.ones_like(hidden))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    for options in ({}, {"noise": 1.0, "epsilon": 1.0}):
        with pytest.raises(ConfigError, match="give one of epsilon, noise and decimals"):
            defending(tmp_path, [{"name": NAME, **options}])
