"""``nopeek``: the correlation itself, its weight, and what it does to a head that is trained wholly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.errors import MethodError
from cutlayer.methods.defense._dcor import squared_correlation, unbiased_correlation
from cutlayer.registry import create
from defending import client, head_states, inverted, trained, whole_batch
from spine import MOSTLY_U, U, adapter, equal, losses, model

NAME = "nopeek"
HEAD = {**U, "head_blocks": 2}


def test_the_correlation_of_known_samples() -> None:
    """Identical: 1. Independent: the unbiased form is near 0, the plain one grows with the dimension (0.78 of 192)."""
    draw = torch.Generator().manual_seed(0)
    x, z = (torch.randn(512, 192, generator=draw, dtype=torch.float64) for _ in range(2))
    assert float(squared_correlation(x, x)) == pytest.approx(1.0, abs=1e-6)
    assert float(unbiased_correlation(x, x)) == pytest.approx(1.0, abs=1e-6)
    assert abs(float(unbiased_correlation(x, z))) < 0.05
    assert float(squared_correlation(x, z).sqrt()) == pytest.approx(0.78, abs=0.01)
    few = [torch.randn(2000, 8, generator=draw, dtype=torch.float64) for _ in range(2)]
    assert float(squared_correlation(*few).sqrt()) == pytest.approx(0.12, abs=0.015)


def test_its_gradient_is_that_of_finite_differences_and_finite_where_points_are_the_same() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(9, 3, generator=draw, dtype=torch.float64)
    z = torch.randn(9, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: squared_correlation(x, z), [z])
    same = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(squared_correlation(x[:6], same), [same])
    assert slope.isfinite().all()


@MOSTLY_U
def test_with_no_weight_it_changes_no_bit(partition: dict[str, Any], tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", [], partition=partition)
    for number, options in enumerate(({"rho": 0.0}, {"rho": None, "alpha": 0.0})):
        same = trained(tmp_path / str(number), [{"name": NAME, **options}], partition=partition)
        assert losses(same.out) == losses(plain.out)
        assert equal(adapter(same.out), adapter(plain.out))
    other = trained(tmp_path / "other", [NAME], partition=partition)
    assert not equal(adapter(other.out), adapter(plain.out))
    assert other.summary["bytes"] == plain.summary["bytes"]
    assert other.summary["privacy"]["client-0"][0]["epsilon"] is None


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_its_gradient_has_the_part_of_the_norm_that_it_was_given(weight: float, tmp_path: Path) -> None:
    """Also of a micro-batch that is a quarter of its step."""
    from cutlayer.parties.defending import Passing

    made = client(tmp_path, [{"name": NAME, "rho": 0.3}]).defending
    assert made is not None
    hidden = torch.randn(2, 12, 32, requires_grad=True)
    came = torch.randn(2, 12, 32) * weight
    penalty = made.penalty(hidden, Passing(0, 0, True, whole_batch(2, 12), weight), came)
    assert penalty is not None
    (slope,) = torch.autograd.grad(penalty, [hidden])
    assert float(slope.norm()) == pytest.approx(0.3 * float(came.norm()), rel=1e-4)


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="give one of rho and alpha"):
        create("defense", NAME, {"alpha": 1.0})
    with pytest.raises(MethodError, match="needs something to train in the client's head"):
        trained(tmp_path, [NAME], partition={**U, "head_blocks": 0})


def lowered(root: Path, rho: float, steps: int) -> tuple[float, float, float]:
    """Of two blocks that are trained wholly: the unbiased correlation, what a fresh inverter reads, the loss."""
    made = trained(
        root, [{"name": NAME, "rho": rho}] if rho else [], steps=steps, peft="full", partition=HEAD,
        optimizer={"name": "adamw", "lr": 1e-3}, gradient_accumulation=1,
    )  # fmt: skip
    ids = whole_batch(40, 12, seed=5).input_ids
    table = model(num_hidden_layers=4)
    states = head_states(made.out / "model", 2, ids).flatten(0, 1)
    inputs = head_states(table, 0, ids).flatten(0, 1)
    half = len(states) // 2
    read = inverted(states[:half], ids.flatten()[:half], states[half:], ids.flatten()[half:])
    return float(unbiased_correlation(inputs, states)), read, made.summary["eval"]["after"]["loss"]


def test_a_head_that_is_trained_wholly_shows_less(tmp_path: Path) -> None:
    """With rho 0.5 the unbiased correlation falls by more than 30 percent."""
    plain, defended = lowered(tmp_path / "plain", 0.0, 60), lowered(tmp_path / "defended", 0.5, 60)
    print("correlation, tokens read, loss:", plain, defended)
    assert defended[0] < 0.7 * plain[0]


@pytest.mark.slow
def test_the_more_weight_the_less_correlation(tmp_path: Path) -> None:
    found = [lowered(tmp_path / str(rho), rho, 120) for rho in (0.0, 0.05, 0.5)]
    print("correlation, tokens read, loss:", *found)
    assert found[2][0] < found[1][0] < found[0][0]
