"""``mi-regularization``: its KL, its start, and what lambda does to the code, to an inverter and to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from cutlayer.defense import Sends
from cutlayer.errors import ConfigError
from cutlayer.methods.defense.mi_regularization import Bottleneck, divergence
from cutlayer.parties.client import ClientParty
from cutlayer.parties.defending import Passing
from cutlayer.wire import Header
from defending import client, inverted, trained, whole_batch
from spine import MOSTLY_U, TWO, U, adapter, equal, losses, resumed

NAME = "mi-regularization"


def test_the_penalty_is_the_kl_of_the_library() -> None:
    draw = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 7, 16, generator=draw)
    deviation = torch.rand(4, 7, 16, generator=draw) + 0.01
    expected = kl_divergence(Normal(mean, deviation), Normal(torch.zeros(()), torch.ones(())))
    assert torch.allclose(divergence(mean, deviation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_at_first_it_is_nearly_the_identity(scale: float) -> None:
    made, hidden = Bottleneck(24, scale, 0.3), 0.3 * torch.randn(3, 5, 24)
    with torch.no_grad():
        mean, deviation = made.code(hidden)
    torch.testing.assert_close(made.decode(mean), hidden)
    assert float(mean.std()) == pytest.approx(min(1.0, 1.0 / scale**0.5), rel=0.1)
    assert float(deviation.max()) < 0.021


@pytest.mark.parametrize("position", ["head", "tail"])
def test_it_begins_with_the_undefended_loss(position: str, tmp_path: Path) -> None:
    """Within 1 percent, with lambda 0; and evaluation has the noise, too."""
    plain = trained(tmp_path / "plain", [], steps=1)
    same = trained(tmp_path / "same", [{"name": NAME, "strength": 0.0, "position": position}], steps=1)
    assert losses(same.out)[0][1] == pytest.approx(losses(plain.out)[0][1], rel=0.01)
    before = [one.summary["eval"]["before"]["loss"] for one in (plain, same)]
    assert before[0] != before[1]
    assert before[1] == pytest.approx(before[0], rel=0.01)
    assert same.summary["bytes"] == plain.summary["bytes"]


@MOSTLY_U
def test_it_goes_on_exactly_where_it_was(partition: dict[str, Any], tmp_path: Path) -> None:
    made = trained(tmp_path, [{"name": NAME, "ramp": 4}], partition=partition, steps=4, checkpoint_every=1)
    kept = adapter(made.out)
    assert equal(adapter(resumed(made.out).out), kept)


def test_before_the_tail_there_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the tail at the client"):
        trained(tmp_path, [{"name": NAME, "position": "tail"}], partition=TWO)


def test_lambda_grows_over_the_ramp(tmp_path: Path) -> None:
    party = client(tmp_path, [{"name": NAME, "strength": 1.0, "ramp": 4}])
    assert party.defending is not None
    hidden, told = torch.randn(2, 6, 32, requires_grad=True), []
    for version in (0, 1, 3, 9):
        assert party.defending.aside is not None
        party.defending.aside.version = version
        penalty = party.defending.penalty(hidden, Passing(0, 0, True, whole_batch(2, 6)), torch.ones(2, 6, 32))
        assert penalty is not None
        told.append(float(penalty))
    assert [one / told[-1] for one in told] == pytest.approx([0.25, 0.5, 1.0, 1.0])


def after(root: Path, strength: float, steps: int, lr: float = 3e-2) -> tuple[float, float, float]:
    """After training: the KL, what an inverter trained through the defense with its noise reads, and the loss."""
    defense = {"name": NAME, "strength": strength, "lr": lr}
    made = trained(
        root, [defense], steps=steps, optimizer={"name": "adamw", "lr": 1e-3}, gradient_accumulation=1,
        checkpoint_every=steps,
    )  # fmt: skip
    party: ClientParty = client(root / "again", [defense])
    assert party.defending is not None
    assert party.defending.aside is not None
    (state,) = sorted((made.out / "checkpoints").glob("*/defense-client-0.safetensors"))[-1:]
    party.defending.aside.put({n: t for n, t in load_file(state).items() if not n.startswith("optimizer/")})
    batch = whole_batch(60, 12, seed=3)
    with torch.no_grad():
        hidden = party.defending.ground.look(batch.input_ids)
        shown = party.defending.shown(hidden, Passing(0, 0, False, batch)).flatten(0, 1)
        (own,) = party.defending.defenses
        told = float(own.divergence(hidden, torch.ones_like(batch.input_ids, dtype=torch.bool)))  # type: ignore[attr-defined]
    tokens, half = batch.input_ids.flatten(), len(shown) // 2
    read = inverted(shown[:half], tokens[:half], shown[half:], tokens[half:])
    return told, read, made.summary["eval"]["after"]["loss"]


def test_more_lambda_less_in_the_code(tmp_path: Path) -> None:
    """The KL falls; at the largest an inverter reads 20 points less, and the loss rises."""
    least, most = after(tmp_path / "least", 1e-4, 80, 0.1), after(tmp_path / "most", 1.0, 80, 0.1)
    print("KL a number, tokens read, loss:", least, most)
    assert most[0] < least[0]
    assert most[1] < least[1] - 0.2
    assert most[2] > least[2]


@pytest.mark.slow
def test_the_sweep_of_the_catalogue(tmp_path: Path) -> None:
    found = [after(tmp_path / str(strength), strength, 300) for strength in (1e-4, 1e-2, 1.0)]
    print("KL a number, tokens read, loss:", *found)
    assert found[0][0] > found[1][0] > found[2][0]


def test_the_server_is_told_that_a_gradient_is_wanted(tmp_path: Path) -> None:
    """Also where nothing else below the cut is trained."""
    party = client(tmp_path, [NAME], partition={**U, "head_blocks": 0})
    ask = Header("head_forward", "control", "head_forward", "server", "c", "c", values={"graph": True})
    told, _ = party.handle(ask, [])
    assert told.values["needs_gradient"] is True


def test_noise_on_what_it_has_learned_claims_nothing(tmp_path: Path) -> None:
    """The bottleneck is trained on raw texts, though no block of the client's is: noise behind it covers one text."""
    noise, cold = {"name": "dp-forward", "epsilon": 8.0, "clip": 1.0}, {**U, "head_blocks": 0}
    for defense, claims in (([noise], True), ([NAME, noise], False)):
        party = client(tmp_path / str(claims), defense, partition=cold)
        assert party.defending is not None
        told = party.defending.told(Sends(1, 0))[-1]
        assert (told["epsilon"] is not None) is claims, told
    assert "trained on raw texts" in told["why"]
