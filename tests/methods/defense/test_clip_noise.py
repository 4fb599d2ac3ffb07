"""``clip-noise``: its bound, its noise, its epsilon, and the labels that are still found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attacking import record, scored, view
from cutlayer.accounting import gaussian_epsilon
from cutlayer.contracts import Batch
from cutlayer.defense import Sends
from cutlayer.errors import MethodError
from cutlayer.registry import create
from defending import defending, passing, trained, whole_batch
from spine import U, adapter, equal, losses, model

NAME = "clip-noise"
COLD = {"name": "u-shaped-split", "head_blocks": 0, "tail_blocks": 0}  # nothing of the client's is trained


def test_without_norm_and_noise_nothing_changes(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", [])
    same = trained(tmp_path / "b", [{"name": NAME, "clip": None, "multiplier": 0}])
    assert losses(plain.out) == losses(same.out)
    assert equal(adapter(plain.out), adapter(same.out))
    with pytest.raises(MethodError, match="clip is null, and the noise is in parts of it"):
        create("defense", NAME, {"clip": None})


@pytest.mark.parametrize(("noise", "order"), [("gaussian", 2.0), ("laplace", 1.0)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e10])
def test_two_gradients_are_never_further_apart_than_the_sensitivity(
    size: float, noise: str, order: float, tmp_path: Path
) -> None:
    """Of the sum over a text's labels, whatever part of the batch's mean it is."""
    made = defending(tmp_path, [{"name": NAME, "multiplier": 0.0, "noise": noise}])
    (defense,) = made.defenses
    one = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1)) * size
    batch = passing(whole_batch(3, 8))
    apart = (made.shown_gradient(one, batch) - made.shown_gradient(-one, batch)) * batch.batch.label_tokens
    assert (torch.linalg.vector_norm(apart.flatten(1), order, dim=1) <= 2 * defense.most * (1 + 1e-4)).all()


def test_a_texts_norm_does_not_depend_on_the_others_in_its_batch(tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": NAME, "multiplier": 0.0, "clip": 1e-3}])
    rows = torch.randn(4, 6, 32)
    together = made.shown_gradient(rows / 20, passing(whole_batch(4, 6))) * 20  # 4 rows of 5 labels
    ids = torch.ones(1, 6, dtype=torch.int64)
    alone = made.shown_gradient(rows[:1] / 5, passing(Batch(ids, None, None, ids, 6, 5))) * 5
    assert torch.allclose(together[:1], alone, rtol=1e-5)


def test_the_noise_has_its_size(tmp_path: Path) -> None:
    made = defending(tmp_path, [{"name": NAME, "multiplier": 0.7}])
    (defense,) = made.defenses
    batch = passing(whole_batch(32, 24))
    left = made.shown_gradient(torch.zeros(32, 24, 32), batch) * batch.batch.label_tokens
    assert float(left.std()) == pytest.approx(0.7 * 2 * defense.most, rel=0.02)


def test_epsilon_is_of_the_steps_and_only_where_nothing_is_trained(tmp_path: Path) -> None:
    (told,) = defending(tmp_path / "a", [{"name": NAME, "multiplier": 2.0}], partition=COLD).told(Sends(10, 3))
    assert told["epsilon"] == pytest.approx(gaussian_epsilon(2.0, 10, 1e-5), rel=0.01)
    assert (told["releases"], told["protects"]) == (10, "labels"), "an evaluation shows no gradient"
    (told,) = defending(tmp_path / "b", [{"name": NAME}], partition={**COLD, "tail_blocks": 1}).told(Sends(10, 3))
    assert told["epsilon"] is None
    assert "the client's tail is trained" in told["why"]


def test_labels_are_found_less_with_more_noise_and_the_run_pays(tmp_path: Path) -> None:
    attack, recovered = create("attack", "label-solve", {}), []
    for multiplier in (None, 0.03, 0.1, 1.0):
        defense = [] if multiplier is None else [{"name": NAME, "multiplier": multiplier}]
        found = record(model(), tmp_path / str(multiplier), partition={**U, "tail_blocks": 0}, defense=defense)
        recovered.append(scored(found, attack, view(found, attack)).token_recovery)
    assert recovered[0] > 0.99
    assert recovered == sorted(recovered, reverse=True)
    assert recovered[-1] < 0.1 < recovered[1]
