"""``dp-forward``: its calibration, its noise, its bound, and what an attacker who knows it still reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from attacking import record, scored, view
from cutlayer.accounting import gaussian_scale
from cutlayer.contracts import Batch
from cutlayer.defense import Sends
from cutlayer.methods.defense._rows import clipped, row_norms
from cutlayer.registry import create
from defending import defending, passing, whole_batch
from spine import U, model

COLD = {**U, "head_blocks": 0}  # nothing trained below step 3
HIDDEN = 32


def analytic(epsilon: float, delta: float, sensitivity: float) -> float:
    """The standard deviation of the analytic Gaussian mechanism, as the paper's Algorithm 1 has it."""

    def upper(v: float) -> float:
        return norm.cdf(math.sqrt(epsilon * v)) - math.exp(epsilon) * norm.cdf(-math.sqrt(epsilon * (v + 2)))

    def lower(u: float) -> float:
        return norm.cdf(-math.sqrt(epsilon * u)) - math.exp(epsilon) * norm.cdf(-math.sqrt(epsilon * (u + 2)))

    if delta >= norm.cdf(0) - math.exp(epsilon) * norm.cdf(-math.sqrt(2 * epsilon)):
        v = brentq(lambda v: upper(v) - delta, 0, 1e6)
        a = math.sqrt(1 + v / 2) - math.sqrt(v / 2)
    else:
        u = brentq(lambda u: lower(u) - delta, 0, 1e6)
        a = math.sqrt(1 + u / 2) + math.sqrt(u / 2)
    return a * sensitivity / math.sqrt(2 * epsilon)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_the_calibration_is_the_papers(epsilon: float, tmp_path: Path) -> None:
    assert gaussian_scale(epsilon, 1e-5) == pytest.approx(analytic(epsilon, 1e-5, 1.0), abs=1e-4)
    made = defending(tmp_path, [{"name": "dp-forward", "epsilon": epsilon}], partition=COLD)
    (defense,) = made.defenses
    assert defense.scale == pytest.approx(analytic(epsilon, 1e-5, 2 * defense.most), rel=1e-4)
    (told,) = made.told(Sends(1, 0))
    assert told["epsilon"] == pytest.approx(epsilon, abs=1e-3)
    assert (told["sensitivity"], told["scale"]) == (2 * defense.most, defense.scale)


def test_the_noise_has_its_size_and_shape(tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": "dp-forward", "noise": 0.3, "clip": None}])
    (defense,) = made.defenses
    hidden = torch.randn(16, 24, HIDDEN)
    left = (made.shown(hidden, passing(whole_batch(16, 24))) - hidden) / defense.scale
    assert float(left.std()) == pytest.approx(1.0, abs=0.02)
    assert abs(float(left.mean())) < 0.03
    assert abs(float(torch.corrcoef(left.flatten(0, 1).T).fill_diagonal_(0).abs().max())) < 0.25
    assert float(left.pow(4).mean()) == pytest.approx(3.0, abs=0.2), "as of a Gaussian"


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e12])
def test_two_texts_are_never_further_apart_than_the_sensitivity(size: float, tmp_path: Path) -> None:
    """Whatever is in them: padded rows, opposite directions, huge and tiny states."""
    made = defending(tmp_path, [{"name": "dp-forward", "noise": 0.0, "clip": 0.7}])
    (defense,) = made.defenses
    one = torch.randn(4, 9, HIDDEN, generator=torch.Generator().manual_seed(1)) * size
    ids, mask = torch.ones(4, 9, dtype=torch.int64), torch.ones(4, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = Batch(ids, mask, None, ids, 32, 28)
    shown, other = made.shown(one, passing(batch)), made.shown(-one, passing(batch))
    apart = torch.linalg.vector_norm((shown - other).flatten(1), dim=1)
    assert (apart <= 2 * defense.most * (1 + 1e-5)).all()
    if size > 1:
        torch.testing.assert_close(apart, torch.full((4,), 2 * defense.most))
    assert torch.equal(shown[1, 5:], torch.zeros(4, HIDDEN))


def test_releases_add_up_to_less_than_their_sum(tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": "dp-forward", "epsilon": 2}], partition=COLD)
    spent = [made.told(Sends(times, 2))[0] for times in (1, 10)]
    assert [one["releases"] for one in spent] == [2, 10], "a text that is evaluated leaves at each evaluation"
    assert 2.0 < spent[0]["epsilon"] < spent[1]["epsilon"] < 20.0


@pytest.mark.parametrize(
    ("options", "partition", "why"),
    [
        ({"epsilon": 8}, U, "the client's head is trained on raw texts"),
        ({"noise": 0.5, "clip": None}, COLD, "not cut to a norm"),
        ({"noise": 0.0}, COLD, "there is no noise"),
    ],
)
def test_no_epsilon_is_told_that_does_not_hold(
    options: dict[str, Any], partition: dict[str, Any], why: str, tmp_path: Path
) -> None:
    (told,) = defending(tmp_path, [{"name": "dp-forward", **options}], partition=partition).told(Sends(1, 1))
    assert (told["epsilon"], told["delta"], told["kind"]) == (None, None, "empirical")
    assert why in told["why"]


def test_the_noise_that_is_set_by_hand_has_an_epsilon(tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": "dp-forward", "noise": 3.0, "clip": 0.1}], partition=COLD)
    (defense,), (told,) = made.defenses, made.told(Sends(1, 1))
    assert analytic(told["epsilon"], 1e-5, 2 * defense.most) == pytest.approx(defense.scale, rel=1e-3)


def test_a_projection_shrinks_the_noise(tmp_path: Path) -> None:
    """What is left of a text, squared, is the noise in the kept directions and the part of it that was dropped."""
    keep, rows, length = 4, 64, 24
    hidden = torch.randn(rows, length, HIDDEN) * torch.linspace(0.1, 2, HIDDEN)
    errors = {}
    for project in (None, keep):
        made = defending(
            tmp_path / str(project), [{"name": "dp-forward", "epsilon": 8, "clip": 1e4, "project": project}]
        )
        (defense,) = made.defenses
        left = made.shown(hidden, passing(whole_batch(rows, length))) - hidden
        noise = defense.scale**2 * length * (project or HIDDEN)
        dropped = 0.0
        if project:
            basis = defense._basis
            dropped = float((hidden - hidden @ basis @ basis.T).square().sum((1, 2)).mean())
        errors[project] = float(left.square().sum((1, 2)).mean())
        assert errors[project] == pytest.approx(noise + dropped, rel=0.05)
    assert errors[None] / errors[keep] > HIDDEN / keep, "less noise, and its clip is of fewer directions"


def test_an_attacker_reads_next_to_nothing_where_plain_training_shows_all(tmp_path: Path) -> None:
    attack = create("attack", "causal-search", {})
    found = {}
    for name, defense in (("plain", []), ("noisy", [{"name": "dp-forward", "epsilon": 8}])):
        seen = record(model(), tmp_path / name, partition=U, defense=defense)
        found[name] = scored(seen, attack, view(seen, attack))
    assert found["plain"].token_recovery == 1.0
    assert found["noisy"].token_recovery <= found["noisy"].constant + 0.05


def test_rows_are_cut_at_their_real_positions() -> None:
    values = torch.ones(2, 3, 4)
    real = torch.tensor([[True, True, False], [True, True, True]])
    assert row_norms(values, real).tolist() == pytest.approx([8**0.5, 12**0.5])
    cut = clipped(values, real, 1.0)
    assert row_norms(cut, torch.ones(2, 3, dtype=torch.bool)).tolist() == pytest.approx([1.0, 1.0])
    assert torch.equal(clipped(values, real, 1e9)[0, :2], values[0, :2])
