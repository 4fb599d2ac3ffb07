"""``label-dp-rr``: how often labels are kept, what that guarantees, and what an attack on them still knows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from dp_accounting import RandomizedResponseDpEvent
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation

from attacking import record, scored, view
from cutlayer.defense import Sends
from cutlayer.errors import ConfigError
from cutlayer.methods.defense._flips import flipped, kept_with, with_prior
from cutlayer.noise import Noise
from cutlayer.registry import create
from defending import client, defending, run_of, trained
from spine import TWO, U, model
from tiny import write_rows

NAME = "label-dp-rr"
DRAWS = 20_000


def noise(key: object = 0) -> Noise:
    return Noise(b"secret", key)


@pytest.mark.parametrize(("epsilon", "classes"), [(0.5, 2), (2.0, 4), (6.0, 50)])
def test_the_channel(epsilon: float, classes: int) -> None:
    """Kept as often as the formula says, else any other alike; the log-ratio of two labels is epsilon."""
    labels = torch.full((DRAWS,), 1)
    counts = torch.bincount(flipped(labels, classes, epsilon, noise()), minlength=classes) / DRAWS
    keep = math.exp(epsilon) / (math.exp(epsilon) + classes - 1)
    assert keep == pytest.approx(kept_with(epsilon, classes))
    assert float(counts[1]) == pytest.approx(keep, abs=3 * (keep * (1 - keep) / DRAWS) ** 0.5)
    others = torch.cat([counts[:1], counts[2:]])
    each = (1 - keep) / (classes - 1)
    assert float((others - each).abs().max()) <= 4 * (each / DRAWS) ** 0.5 + 1e-9
    assert math.log(keep / each) == pytest.approx(epsilon)
    event: DpEvent = RandomizedResponseDpEvent(classes / (math.exp(epsilon) + classes - 1), classes)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_ONE).compose(event)
    assert accountant.get_epsilon(1e-9) == pytest.approx(epsilon, abs=2e-3)


def test_with_a_prior_the_channel_is_bounded_too() -> None:
    """Any two labels of a vocabulary, by the shares of many draws; few candidates where the prior is sure."""
    epsilon = 1.0
    prior = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05])
    shares = []
    for label in range(5):
        found = with_prior(torch.full((DRAWS,), label), prior.expand(DRAWS, -1), epsilon, 1024, noise(label))
        shares.append(torch.bincount(found, minlength=5) / DRAWS)
    table = torch.stack(shares)
    used = (table > 0).any(0)
    logs = table[:, used].log()
    assert float((logs.max(0).values - logs.min(0).values).max()) <= epsilon + 0.15, "but for the error of the draws"
    best = max(range(1, 6), key=lambda k: kept_with(epsilon, k) * float(prior.topk(k).values.sum()))
    assert int(used.sum()) == best
    sure = with_prior(torch.tensor([3]), torch.tensor([[1.0, 0.0, 0.0, 0.0]]), epsilon, 1024, noise())
    assert sure.tolist() == [0], "a label that the prior knows is not looked at"


def test_labels_are_flipped_once_and_inputs_never(tmp_path: Path) -> None:
    defended, plain = client(tmp_path / "a", [{"name": NAME, "epsilon": 2.0}]), client(tmp_path / "b", [])
    epoch = plain.batches.steps_per_epoch
    changed = 0
    for row in range(len(plain.batches.examples)):
        first, again = (defended.batches._example(row, number) for number in (0, 1))
        true = plain.batches.examples[row]
        assert first == again, "the same in the second epoch"
        assert first.input_ids == true.input_ids
        changed += sum(a != b for a, b in zip(first.labels or [], true.labels or [], strict=True))
    assert changed > 0
    assert epoch >= 1
    evaluated = defended.evaluation[0]().labels
    assert torch.equal(evaluated, plain.evaluation[0]().labels), "at home it is scored by the truth"


def test_a_classifier_is_trained_with_flipped_classes(tmp_path: Path) -> None:
    rows = [{"text": f"w{n} w{n + 1}", "label": n % 3} for n in range(60)]
    data = {
        "train": str(write_rows(tmp_path / "rows.jsonl", rows)), "format": "classification", "max_length": 24,
        "classes": ["a", "b", "c"],
    }  # fmt: skip
    party = client(tmp_path / "a", [{"name": NAME, "epsilon": 1.0}], data=data, partition=TWO)
    kept = [party.batches._example(n, 0).label == party.batches.examples[n].label for n in range(60)]
    assert sum(kept) / 60 == pytest.approx(kept_with(1.0, 3), abs=0.2)


def test_an_attack_reads_the_flipped_labels_and_the_loss_pays(tmp_path: Path) -> None:
    attack, recovered, losses = create("attack", "label-solve", {}), [], []
    for epsilon in (None, 8.0, 0.5):
        defense = [] if epsilon is None else [{"name": NAME, "epsilon": epsilon, "most": 64}]
        root = tmp_path / str(epsilon)
        found = record(model(), root, partition={**U, "tail_blocks": 0}, defense=defense)
        recovered.append(scored(found, attack, view(found, attack)).token_recovery)
        done = trained(root / "longer", defense, partition={**U, "tail_blocks": 0}, steps=12)
        losses.append(done.summary["eval"]["after"]["loss"])
    assert recovered[0] > 0.99
    assert recovered == sorted(recovered, reverse=True)
    assert recovered[-1] < 0.3
    assert losses[0] < losses[-1]


def test_what_is_spent(tmp_path: Path) -> None:
    (told,) = defending(tmp_path, [{"name": NAME, "epsilon": 3.0}]).told(Sends(20, 5))
    assert (told["epsilon"], told["delta"], told["releases"]) == (3.0, 0.0, 1), "a label that is reused is one release"
    assert "the inputs" in told["not_covered"]
    with pytest.raises(ConfigError, match="needs the client's tail for its prior"):
        trained(tmp_path / "x", [NAME], partition=TWO)
    data = run_of(tmp_path / "left", [])["data"]
    with pytest.raises(ConfigError, match="a row's first label has padding"):
        trained(tmp_path / "y", [NAME], data={**data, "padding_side": "left"})
