"""``marvell``: the best noise for its power, what is then told apart, and what it does in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize

from attacking import direction_auc, norm_auc
from cutlayer.defense import Sends
from cutlayer.errors import ConfigError, MethodError
from cutlayer.methods.defense._two_classes import moments
from cutlayer.methods.defense.marvell import best_variances
from cutlayer.noise import Noise
from cutlayer.registry import create
from defending import defending, frames, passing, run_of, trained, two_gaussians, whole_batch
from spine import TWO, U, model, often
from tiny import text_rows, write_rows

NAME = "marvell"
WORDS = [f"w{number}" for number in range(3, 30)]
CASES = [(0.5, (1.0, 0.5), 64), (0.2, (0.4, 0.9), 64), (0.5, (0.7, 0.7), 8), (0.1, (0.3, 0.0), 5)]


def noise(key: object = 0) -> Noise:
    return Noise(b"secret", key)


def sum_kl(examples: torch.Tensor, first: torch.Tensor, line: torch.Tensor) -> float:
    """The sum of both divergences of the Gaussians that have these examples' moments along a line and across it."""
    along = examples.double() @ line.double()
    across = examples.double() - along[:, None] * line.double()
    size, found = examples.shape[1], []
    for mask in (first, ~first):
        rest = (across[mask] - across[mask].mean(0)).square().sum(1).mean() / max(1, size - 1)
        found.append((along[mask].mean(), along[mask].var(), rest))
    (m1, a1, b1), (m0, a0, b0) = found
    gap = (m1 - m0) ** 2
    return float(((a0 + gap) / a1 + (a1 + gap) / a0 - 2 + (size - 1) * (b1 / b0 + b0 / b1 - 2)) / 2)


@pytest.mark.parametrize(("share", "spread", "size"), CASES)
@pytest.mark.parametrize("power", [0.5, 20.0])
def test_no_other_noise_of_its_power_does_better(
    share: float, spread: tuple[float, float], size: int, power: float
) -> None:
    """The paper's problem in all four variances, by another solver."""
    found = best_variances(share, spread, size, power)
    (a1, a0), (b1, b0) = found.along, found.across
    assert a1 >= b1 >= 0
    assert a0 >= b0 >= 0
    spent = share * (a1 + (size - 1) * b1) + (1 - share) * (a0 + (size - 1) * b0)
    assert spent == pytest.approx(power, rel=1e-6)

    def cost(x: Any) -> float:
        l11, l21, l10, l20 = x
        one, other, rest1, rest0 = l11 + spread[0], l10 + spread[1], l21 + spread[0], l20 + spread[1]
        if min(rest1, rest0) <= 0:
            return 1e9
        return ((other + 1) / one + (one + 1) / other + (size - 1) * (rest1 / rest0 + rest0 / rest1)) / 2 - size

    def left(x: Any) -> float:
        return power - (share * (x[0] + (size - 1) * x[1]) + (1 - share) * (x[2] + (size - 1) * x[3]))

    each = power / size
    limits = [
        {"type": "ineq", "fun": left}, {"type": "ineq", "fun": lambda x: x[0] - x[1]},
        {"type": "ineq", "fun": lambda x: x[2] - x[3]},
    ]  # fmt: skip
    starts = [[each] * 4, [power / 2, 1e-3 * each, power / 2, each / 2], [power / 2, each / 2, power / 2, 1e-3 * each]]
    other = [
        minimize(cost, start, bounds=[(1e-9, None)] * 4, constraints=limits, method="SLSQP", options={"maxiter": 500})
        for start in starts
    ]
    best = min(float(one.fun) for one in other if left(one.x) > -1e-6 * power)
    assert found.sum_kl <= best * 1.001 + 1e-6
    assert cost([a1, b1, a0, b0]) == pytest.approx(found.sum_kl, rel=1e-6, abs=1e-9)
    assert 0.0 in (b1, b0), "only the class that is less spread gets noise across"


@pytest.mark.parametrize(("share", "error"), [(0.5, 0.4), (0.2, 0.25)])
def test_two_gaussians_are_as_alike_as_was_asked(share: float, error: float) -> None:
    """By what the noised gradients are; below noise in all directions of the same power; and so are the attacks."""
    made = create("defense", NAME, {"error": error})
    examples, first, line = two_gaussians(50_000, 64, share=share)
    shown = made.noised(examples, first, noise())
    direction, spread, part, gap = moments(examples, first)
    wanted = (2 - 4 * error) ** 2
    power = float((shown - examples).square().sum(1).mean())
    expected = best_variances(part, (spread[0] / gap, spread[1] / gap), 64, power / gap).sum_kl
    got = sum_kl(shown, first, direction)
    assert got == pytest.approx(expected, rel=0.1)
    assert expected <= wanted * 1.02
    even = examples + noise(1).normal(examples) * (power / 64) ** 0.5
    assert got < sum_kl(even, first, direction)
    variation = wanted**0.5 / 2
    bound = 0.5 + variation - variation**2 / 2 + 0.03
    assert norm_auc(shown, first) <= bound
    assert direction_auc(shown, first, direction) <= bound
    assert direction_auc(examples, first, line) > 0.98 > bound


def test_without_power_nothing_is_hidden() -> None:
    examples, first, line = two_gaussians(4000, 64)
    plain = direction_auc(examples, first, line), norm_auc(examples, first)
    assert torch.equal(create("defense", NAME, {"power": 0.0}).noised(examples, first, noise()), examples)
    little = create("defense", NAME, {"power": 1e-9}).noised(examples, first, noise())
    assert (direction_auc(little, first, line), norm_auc(little, first)) == pytest.approx(plain, abs=1e-4)
    with pytest.raises(MethodError, match="error and power are both given"):
        create("defense", NAME, {"power": 1.0, "error": 0.4})


def test_equal_means_and_classes_without_spread() -> None:
    made = create("defense", NAME, {})
    first = torch.tensor([True, True, False, False])
    same = torch.ones(4, 8)
    assert torch.equal(made.noised(same, first, noise()), same), "there is nothing to hide"
    apart = torch.where(first[:, None], 1.0, -1.0).expand(4, 8)
    shown = made.noised(apart, first, noise())
    assert shown.isfinite().all()
    assert not torch.equal(shown, apart)
    beside = shown - shown.mean(1, keepdim=True)
    assert float(beside.abs().max()) < 1e-4, "all noise is along the line between the two"


def classes(root: Path, **changes: Any) -> dict[str, Any]:
    """A run of a classifier of two classes, its batches of all rows."""
    root.mkdir(parents=True, exist_ok=True)
    data = {
        "train": str(write_rows(root / "texts.jsonl", text_rows(48, seed=4))), "format": "classification",
        "max_length": 24,
    }  # fmt: skip
    return {"model": str(model("bert")), "data": data, "batch_size": 24, "gradient_accumulation": 1, **changes}


def seen(root: Path, defense: list[Any], **changes: Any) -> torch.Tensor:
    """All gradients [B,T,H] of step 7 of a run, of which each batch has the rows in file order."""
    trained(root, defense, record_wire=str(root / "wire"), **changes)
    found = [t["hidden"] for h, t in frames(root / "wire") if h.step_name == "send_gradients"]
    assert found
    return found[0]


@pytest.mark.parametrize("tail", often([0, 1], 1))
def test_a_classifiers_gradients(tail: int, tmp_path: Path) -> None:
    """Without it the direction of the gradient gives each text's class away."""
    run = {**classes(tmp_path), "partition": {**U, "tail_blocks": tail}}
    run["data"]["shuffle"] = False
    first = torch.arange(24) % 2 == 1
    plain = seen(tmp_path / "plain", [], **run).flatten(1)
    line, _, _, _ = moments(plain, first)
    hidden = seen(tmp_path / "noisy", [{"name": NAME, "error": 0.45}], **run).flatten(1)
    assert direction_auc(plain, first, line) == 1.0
    assert direction_auc(hidden, first, line) < 0.85, "24 rows are few: the bound is 0.6 for many"
    assert not torch.equal(hidden, plain)


def test_positions_of_a_language_model_are_examples(tmp_path: Path) -> None:
    """Those whose next token is of the sensitive words are the first class; what carries nothing stays so."""
    made = defending(tmp_path, [{"name": NAME, "power": 0.0, "sensitive": WORDS}])
    (defense,) = made.defenses
    batch = whole_batch(6, 8)
    gradient = torch.randn(6, 8, 32)
    gradient[:, -1] = 0
    taken: list[Any] = []
    original = defense.noised
    defense.noised = lambda *given: taken.append(given) or original(*given)  # type: ignore[method-assign]
    shown = made.shown_gradient(gradient, passing(batch))
    torch.testing.assert_close(shown, gradient)
    ((examples, first, _),) = taken
    assert len(examples) == 6 * 7
    assert torch.equal(first, (batch.input_ids[:, 1:] < 30).flatten())
    assert torch.equal(shown[:, -1], gradient[:, -1])


def test_a_batch_of_one_class_is_hidden_altogether(tmp_path: Path) -> None:
    """With the error that was asked for, whatever two gradients are in it: cut to a public norm, and noised."""
    made = defending(tmp_path, [{"name": NAME, "error": 0.4, "sensitive": ["w96"]}])
    (defense,) = made.defenses
    batch = passing(whole_batch(64, 8))
    gradient = torch.full((64, 8, 32), 1e-9)
    noised = made.shown_gradient(gradient, batch) * batch.batch.label_tokens
    scale = defense._secret.norm / 0.2533  # two Gaussians 2 * norm apart that differ by 0.2: ppf(0.6)
    assert float(noised.std()) == pytest.approx(scale, rel=0.02)
    huge = made.shown_gradient(gradient * 1e15, batch) * batch.batch.label_tokens
    assert float(huge.std()) == pytest.approx(scale, rel=0.05), "nor does a large one show"


@pytest.mark.slow
def test_what_it_costs_a_language_model(tmp_path: Path) -> None:
    """The loss falls, and less than without."""
    runs = {"plain": [], "noisy": [{"name": NAME, "sensitive": WORDS}]}
    losses = {
        name: trained(tmp_path / name, defense, steps=12).summary["eval"]["after"]["loss"]
        for name, defense in runs.items()
    }
    assert losses["plain"] < losses["noisy"]


def test_what_is_told_and_what_is_refused(tmp_path: Path) -> None:
    (told,) = defending(tmp_path / "a", [{"name": NAME, "sensitive": WORDS}]).told(Sends(4, 9))
    assert (told["kind"], told["epsilon"], told["releases"], told["protects"]) == ("empirical", None, 4, "labels")
    assert "error of 0.4" in told["mechanism"]
    assert "which token it is" in told["not_covered"]
    for name, defense, changes, words in (
        ("two", {"sensitive": WORDS}, {"partition": TWO}, "the client shows no gradient"),
        ("none", {}, {}, "needs the words that are to be kept secret"),
        ("both", {"sensitive": WORDS}, classes(tmp_path / "x"), "the secret of a classifier is its class"),
    ):
        with pytest.raises(ConfigError, match=words):
            trained(tmp_path / name, [{"name": NAME, **defense}], **changes)
    three = [{**row, "label": number % 3} for number, row in enumerate(text_rows(9))]
    run = classes(tmp_path / "y", model=str(model("bert", num_labels=3)))
    write_rows(Path(run["data"]["train"]), three)
    with pytest.raises(MethodError, match="there are 3"):
        trained(tmp_path / "three", [NAME], **run)
    assert run_of(tmp_path / "z", [NAME])["defense"] == [NAME]
