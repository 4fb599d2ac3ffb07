"""``projpert``: how alike two classes become, and how little it moves for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from attacking import direction_auc, norm_auc
from cutlayer.defense import Sends
from cutlayer.errors import ConfigError
from cutlayer.methods.defense._two_classes import moments
from cutlayer.methods.defense.projpert import apart, least_part
from cutlayer.noise import Noise
from cutlayer.registry import create
from defending import defending, frames, passing, trained, two_gaussians, whole_batch
from spine import TWO, U, model, often
from tiny import text_rows, write_rows

NAME = "projpert"
WORDS = [f"w{number}" for number in range(3, 30)]
SHAPES: list[dict[str, Any]] = [
    {"share": 0.5, "spreads": (1.0, 1.0)}, {"share": 0.2, "spreads": (1.0, 0.5)}, {"share": 0.5, "spreads": (0.4, 1.2)},
]  # fmt: skip


def noise(key: object = 0) -> Noise:
    return Noise(b"secret", key)


def attacked(examples: torch.Tensor, first: torch.Tensor, line: torch.Tensor) -> float:
    """The better of the attacks by direction and by length."""
    return max(direction_auc(examples, first, line), norm_auc(examples, first))


def test_the_variation_of_two_distributions() -> None:
    """Of Gaussians, by their quantiles, as the closed form has it."""
    levels = (np.arange(1000) + 0.5) / 1000
    one = norm.ppf(levels)
    for shift in (0.0, 0.5, 2.0):
        wanted = 2 * norm.cdf(shift / 2**0.5 / np.hypot(1, 0.1)) - 1  # by rank; the variation is less
        assert apart(one, one + shift, 0.1) == pytest.approx(wanted, abs=5e-3)
    assert apart(one, one * 3, 0.1) > 0.4, "equal by rank, but not alike"
    assert apart(one, one + 50, 0.1) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("advantage", [0.1, 0.5])
def test_the_way_that_is_gone_is_the_smallest(advantage: float) -> None:
    levels = (np.arange(500) + 0.5) / 500
    one, other = norm.ppf(levels) + 2, norm.ppf(levels) * 0.7
    middle = 0.3 * one + 0.7 * other
    part = least_part(one, other, middle, 0.1, advantage)
    at = apart((1 - part) * one + part * middle, (1 - part) * other + part * middle, 0.1)
    assert 0 < part < 1
    assert at == pytest.approx(advantage, abs=1e-3)
    assert least_part(one, one + 1e-3, one, 0.1, advantage) == 0.0, "those that are alike stay where they are"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("advantage", [0.1, 0.3])
def test_attacks_find_no_more_than_was_asked(shape: dict[str, Any], advantage: float) -> None:
    examples, first, line = two_gaussians(6000, 64, **shape)
    shown = create("defense", NAME, {"advantage": advantage}).moved(examples, first, noise())
    direction = moments(examples, first)[0]
    assert attacked(examples, first, line) > 0.95
    for along in (line, direction):
        assert direction_auc(shown, first, along) <= (1 + advantage) / 2 + 0.05
    assert norm_auc(shown, first) <= (1 + advantage) / 2 + 0.05


@pytest.mark.parametrize("shape", often(SHAPES, SHAPES[1]), ids=str)
def test_it_moves_less_than_noise_that_hides_as_much(shape: dict[str, Any]) -> None:
    """Than marvell, and than Gaussian noise in all directions, each tuned to the same attacks."""
    examples, first, _ = two_gaussians(3000, 64, **shape)
    line = moments(examples, first)[0]
    shown = create("defense", NAME, {}).moved(examples, first, noise())
    wanted, moved = attacked(shown, first, line), float((shown - examples).square().sum(1).mean())

    def by_marvell(power: float) -> torch.Tensor:
        found: torch.Tensor = create("defense", "marvell", {"power": power}).noised(examples, first, noise(1))
        return found

    def by_noise(power: float) -> torch.Tensor:
        return examples + noise(1).normal(examples) * (power * 16 / 64) ** 0.5

    for way in (by_marvell, by_noise):

        def too_much(power: float, way: Any = way) -> float:
            return attacked(way(power), first, line) - wanted

        power = float(brentq(too_much, 1e-3, 1e6, rtol=0.02, xtol=1e-3))
        assert moved < 0.9 * float((way(power) - examples).square().sum(1).mean())


def test_what_differs_beside_the_line_is_moved_too() -> None:
    """Classes with one mean along the line, whose lengths tell them apart."""
    examples, first, _ = two_gaussians(4000, 64, spreads=(2.0, 0.5), gap=0.5)
    shown = create("defense", NAME, {"advantage": 0.1}).moved(examples, first, noise())
    assert norm_auc(examples, first) > 0.99
    assert norm_auc(shown, first) <= 0.6
    assert shown.isfinite().all()


def test_equal_gradients_stay() -> None:
    made, same = create("defense", NAME, {}), torch.ones(6, 4)
    first = torch.tensor([True, True, True, False, False, False])
    assert torch.equal(made.moved(same, first, noise()), same)
    tied = torch.where(first[:, None], 1.0, -1.0).expand(6, 4)
    shown = made.moved(tied, first, noise())
    assert shown.isfinite().all()
    assert not torch.equal(shown, tied)


def test_in_a_run_of_a_classifier(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", text_rows(48, seed=4))
    run = {
        "model": str(model("bert")), "batch_size": 48, "gradient_accumulation": 1, "partition": U,
        "data": {"train": str(rows), "format": "classification", "max_length": 24, "shuffle": False},
    }  # fmt: skip
    found = {}
    for name, defense in (("plain", []), ("moved", [{"name": NAME, "advantage": 0.1}])):
        trained(tmp_path / name, defense, record_wire=str(tmp_path / f"{name}-wire"), **run)
        shown = [t["hidden"] for h, t in frames(tmp_path / f"{name}-wire") if h.step_name == "send_gradients"]
        found[name] = shown[0].flatten(1)
    first = torch.arange(48) % 2 == 1
    line = moments(found["plain"], first)[0]
    assert direction_auc(found["plain"], first, line) == 1.0
    assert direction_auc(found["moved"], first, line) < 0.75, "48 texts are few"
    assert not found["moved"][found["plain"].eq(0).all(-1)].any()


def test_what_is_told_and_what_is_refused(tmp_path: Path) -> None:
    made = defending(tmp_path / "a", [{"name": NAME, "sensitive": WORDS}])
    (told,) = made.told(Sends(4, 9))
    assert (told["kind"], told["epsilon"], told["releases"], told["protects"]) == ("empirical", None, 4, "labels")
    assert "0.2 in total variation" in told["mechanism"]
    gradient, batch = torch.randn(6, 8, 32), passing(whole_batch(6, 8))
    again = defending(tmp_path / "b", [{"name": NAME, "sensitive": WORDS}])
    assert torch.equal(made.shown_gradient(gradient, batch), again.shown_gradient(gradient, batch)), "as after a crash"
    assert torch.equal(made.shown(gradient, batch), gradient), "activations pass"
    with pytest.raises(ConfigError, match="the client shows no gradient"):
        trained(tmp_path / "two", [{"name": NAME, "sensitive": WORDS}], partition=TWO)
    with pytest.raises(ConfigError, match="needs the words that are to be kept secret"):
        trained(tmp_path / "none", [NAME])
