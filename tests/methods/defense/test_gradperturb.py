"""``gradperturb``: unbiased, private by its density, and what is still read of the labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from attacking import record, scored, view
from cutlayer.accounting import laplace_epsilon
from cutlayer.defense import Sends, Shown
from cutlayer.errors import ConfigError
from cutlayer.noise import Noise
from cutlayer.registry import create
from defending import defending, trained, whole_batch
from spine import TWO, U, losses, model

NAME = "gradperturb"


def about(key: object = 0) -> Shown:
    """A step's own noise."""

    def noise(covers: Any = ()) -> Noise:
        return Noise(b"secret", key, covers=covers)

    return Shown("send_gradients", whole_batch(1, 2), True, 1.0, noise, lambda row: noise())


def test_the_mean_of_many_draws_is_the_true_gradient() -> None:
    """For labels among the candidates."""
    made = create("defense", NAME, {"epsilon": 2.0, "candidates": 4})
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -9.0, -9.0]])
    draws = 10_000
    labels = torch.full((draws,), 1)
    found = made.coefficients(logits.expand(draws, -1), labels, about())
    true = logits.softmax(-1) - torch.nn.functional.one_hot(torch.tensor([1]), 6)
    error = found.std(0) / draws**0.5
    assert ((found.mean(0) - true[0]).abs() <= 3.5 * error + 1e-6).all()
    assert float(found[:, :4].var(0).mean()) == pytest.approx(2 * (2 / 2.0) ** 2, rel=0.05)
    assert (found[:, 4:] == true[0, 4:]).all(), "outside the candidates there is no noise, and no label"


def test_the_density_ratio_of_two_labels_is_at_most_epsilon() -> None:
    """The law of the release, at what was drawn: Laplace of scale 2 / epsilon around either one-hot."""
    epsilon, classes, draws = 1.5, 5, 2000
    made = create("defense", NAME, {"epsilon": epsilon})
    logits = torch.zeros(draws, classes)
    shown = logits.softmax(-1) - made.coefficients(logits, torch.full((draws,), 2), about())
    one, other = (torch.nn.functional.one_hot(torch.tensor(label), classes) for label in (2, 4))
    ratio = ((shown - other).abs() - (shown - one).abs()).sum(-1) * epsilon / 2
    assert float(ratio.abs().max()) <= epsilon + 1e-5
    assert float(ratio.max()) > 0.9 * epsilon, "the bound is reached"
    assert stats.kstest(((shown - one) * epsilon / 2).flatten().numpy(), stats.laplace().cdf).pvalue > 0.01


@pytest.mark.parametrize(("epsilon", "auc"), [(0.1, 0.525), (0.5, 0.621), (1.0, 0.724), (5.0, 0.988)])
def test_two_classes_are_told_apart_as_well_as_theory_says(epsilon: float, auc: float) -> None:
    made = create("defense", NAME, {"epsilon": epsilon})
    labels = torch.arange(4000) % 2
    logits = torch.zeros(4000, 2)
    found = made.coefficients(logits, labels, about())
    assert torch.allclose(found.sum(-1), torch.zeros(4000), atol=1e-5), "along the line between the two"
    score = roc_auc_score(labels.numpy(), -found[:, 1].numpy())
    assert score == pytest.approx(auc, abs=0.03)
    assert auc == pytest.approx(1 - math.exp(-epsilon) * (1 + epsilon / 2) / 2, abs=1e-3)


def test_a_label_that_is_no_candidate_leaves_no_trace() -> None:
    made = create("defense", NAME, {"epsilon": 1e6, "candidates": 2})
    logits = torch.tensor([[3.0, 2.0, 0.0, 0.0]]).expand(1000, -1)
    found = logits.softmax(-1) - made.coefficients(logits, torch.full((1000,), 3), about())
    assert torch.allclose(found[:, 2:], torch.zeros(1000, 2))
    share = float((found[:, 0] > 0.5).float().mean())
    assert share == pytest.approx(0.5, abs=0.06), "a uniform draw of the candidates in its place"


def test_without_noise_it_is_the_undefended_run(tmp_path: Path) -> None:
    """A huge epsilon, and all tokens candidates."""
    plain = trained(tmp_path / "a", [])
    same = trained(tmp_path / "b", [{"name": NAME, "epsilon": 1e9, "candidates": 10_000}])
    for (_, one), (_, other) in zip(losses(plain.out), losses(same.out), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_labels_are_read_less_with_more_noise(tmp_path: Path) -> None:
    attack, recovered = create("attack", "label-solve", {}), []
    for epsilon in (None, 100.0, 1.0):
        defense = [] if epsilon is None else [{"name": NAME, "epsilon": epsilon, "candidates": 64}]
        found = record(model(), tmp_path / str(epsilon), partition={**U, "tail_blocks": 0}, defense=defense)
        recovered.append(scored(found, attack, view(found, attack)).token_recovery)
    assert recovered[0] > 0.99
    assert recovered == sorted(recovered, reverse=True)
    assert recovered[-1] < 0.2


def test_what_is_spent(tmp_path: Path) -> None:
    (told,) = defending(tmp_path, [{"name": NAME, "epsilon": 0.5}]).told(Sends(4, 9))
    assert told["epsilon"] == pytest.approx(laplace_epsilon(2.0, 4, 1e-9))
    assert 0.5 < told["epsilon"] <= 2.0
    assert (told["protects"], told["releases"], told["kind"]) == ("labels", 4, "local")
    assert "activations of step 3" in told["not_covered"]
    with pytest.raises(ConfigError, match="needs the labels at the client"):
        trained(tmp_path / "x", [NAME], partition=TWO)
