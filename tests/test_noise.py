"""A client's private randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cutlayer.noise import Noise

SECRET = b"of this client"


def test_the_same_message_gets_the_same_noise_and_any_other_gets_other() -> None:
    like = torch.zeros(3, 5)
    values = torch.arange(15.0).reshape(3, 5)

    def drawn(*purpose: object, secret: bytes = SECRET, covers: torch.Tensor = values) -> torch.Tensor:
        return Noise(secret, *purpose, covers=[covers]).normal(like)

    first = drawn("a", 1)
    assert torch.equal(first, drawn("a", 1))
    nudged = values.clone()
    nudged[2, 4] = float(np.nextafter(np.float32(14), np.float32(15)))
    others = [
        drawn("a", 2), drawn("a", 1, secret=b"of another"), drawn("a", 1, covers=nudged),
        drawn("a", 1, covers=values.reshape(5, 3)), drawn("a", 1, covers=values.to(torch.float64)),
    ]  # fmt: skip
    for other in others:
        assert not torch.equal(first, other)
        assert abs(float(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1])) < 0.9
    one = Noise(SECRET, "a")
    assert not torch.equal(one.normal(like), one.normal(like)), "a stream goes on"


def test_keys_have_256_bits() -> None:
    """A generator that starts from 32 bits could be tried out by whoever guesses the text."""
    keys = {Noise(SECRET, number).key for number in range(200)}
    assert len(keys) == 200
    assert all(len(key) == 32 for key in keys)


@pytest.mark.parametrize(
    ("draw", "law"),
    [
        (lambda noise, like: noise.normal(like), stats.norm()),
        (lambda noise, like: noise.laplace(like), stats.laplace()),
        (lambda noise, like: torch.from_numpy(noise.uniform(like.numel())), stats.uniform()),
        (lambda noise, like: torch.from_numpy(noise.gamma(7.5, like.numel())), stats.gamma(7.5)),
    ],
    ids=["normal", "laplace", "uniform", "gamma"],
)
def test_distributions(draw: object, law: object) -> None:
    found = draw(Noise(SECRET, "law"), torch.zeros(40_001)).numpy()  # type: ignore[operator]
    assert stats.kstest(found, law.cdf).pvalue > 0.01  # type: ignore[attr-defined]
    assert np.isfinite(found).all()
    halves = np.corrcoef(found[:20_000], found[20_000:40_000])[0, 1]
    assert abs(halves) < 4 / np.sqrt(20_000)


def test_choices_are_as_often_as_their_share_and_nothing_impossible_is_chosen() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    found = Noise(SECRET, "choice").choice(shares.expand(20_000, -1))
    counts = torch.bincount(found, minlength=5)
    assert counts[1] == counts[4] == 0
    assert stats.chisquare(counts[[0, 2, 3]].numpy(), (shares[[0, 2, 3]] * 20_000).numpy()).pvalue > 0.01
