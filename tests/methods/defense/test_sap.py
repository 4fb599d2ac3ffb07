"""``sap``: which tokens contribute, what less noise on them is worth, and what it gives away."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from attacking import told_by
from cutlayer.defense import Sends
from cutlayer.errors import ConfigError, MethodError
from cutlayer.methods.defense.sap import prompt_and_class, scores
from cutlayer.parties.defending import Defending
from cutlayer.values import Batch, Example
from defending import client, defending, passing, whole_batch
from spine import model
from tiny import VOCAB, write_rows

NAME = "sap"
DECISIVE = (4, 5, 6, 7, 8)  # 5 % of the words: an odd one makes a text of one class, an even one of the other
COLD = {"name": "u-shaped-split", "head_blocks": 0, "tail_blocks": 0}


def decided(count: int, *, seed: int, last: bool = False) -> list[dict[str, Any]]:
    """Texts of ten words, one of which (the last) decides the class."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words = [draw.randrange(9, VOCAB) for _ in range(10)]
        word = words[9 if last else draw.randrange(10)] = draw.choice(DECISIVE)
        rows.append({"text": " ".join(f"w{number}" for number in words), "label": word % 2})
    return rows


def run(root: Path, *, train: int = 96, **changes: Any) -> dict[str, Any]:
    """A run of a classifier that must find them."""
    root.mkdir(parents=True, exist_ok=True)
    data = {
        "train": str(write_rows(root / "a.jsonl", decided(train, seed=1))), "format": "classification",
        "eval": str(write_rows(root / "b.jsonl", decided(64, seed=2))), "max_length": 16,
    }  # fmt: skip
    return {"model": str(model("bert")), "data": data, "partition": COLD, "gradient_accumulation": 1, **changes}


def even(radius: float, kappa: float, part: float) -> float:
    """The radius for tokens that do not contribute, so that the mean over all positions is this."""
    return radius / (1 - part + part / kappa)


def test_the_score() -> None:
    """By hand: a token in texts of one class only, one in all, one that is rare."""
    texts = [([7, 8], 0), ([7, 8, 7], 0), ([8], 1), ([8, 9], 1)]
    found = scores(texts)
    ln = [float(torch.log1p(torch.tensor(float(n)))) for n in range(5)]
    assert found == {7: pytest.approx(ln[2]), 8: pytest.approx(0.0), 9: pytest.approx(ln[1])}
    assert prompt_and_class(Example([5, 6, 7, 8], [-100, -100, 7, 8])) == ([5, 6], 7)
    assert prompt_and_class(Example([5, 6], None, 1)) == ([5, 6], 1)


def test_the_words_that_decide_contribute(tmp_path: Path) -> None:
    made = client(tmp_path / "a", [{"name": NAME, "share": 0.055}], **run(tmp_path / "a", train=320))
    assert made.defending is not None
    assert made.defending.defenses[0].contributing == set(DECISIVE)
    kept = client(
        tmp_path / "b", [{"name": NAME, "share": 0.055, "sensitive": ["w4"]}], **run(tmp_path / "b", train=320)
    )
    assert kept.defending is not None
    assert 4 not in kept.defending.defenses[0].contributing
    assert len(kept.defending.defenses[0].contributing) == 5


def test_the_noise_has_its_length(tmp_path: Path) -> None:
    """Gamma(H) of either mean, in a uniform direction; states are cut first, and padding is nothing."""
    made = client(tmp_path, [{"name": NAME, "kappa": 4.0, "radius": 0.5}], **run(tmp_path)).defending
    assert made is not None
    (defense,) = made.defenses
    batch = whole_batch(64, 12, vocabulary=30)
    states = torch.randn(64, 12, 32) * 100
    left = made.shown(states, passing(batch)) - states * (defense.most / states.norm(dim=-1, keepdim=True))
    lengths, needed = left.norm(dim=-1), torch.isin(batch.input_ids, torch.tensor(sorted(defense.contributing)))
    for mask, mean in ((needed, defense.length / 4), (~needed, defense.length)):
        assert float(lengths[mask].mean()) == pytest.approx(mean, rel=0.05)
        assert float(lengths[mask].std()) == pytest.approx(mean / 32**0.5, rel=0.2)
    directions = (left / lengths[..., None]).flatten(0, 1)
    assert float(directions.mean(0).norm()) < 0.1
    mask = torch.ones(64, 12, dtype=torch.int64)
    mask[:, 8:] = 0
    padded = made.shown(states, passing(type(batch)(batch.input_ids, mask, None, batch.labels, 1, 1)))
    assert not padded[:, 8:].any()


def read(made: Defending, kappa: float, radius: float) -> tuple[float, float, float]:
    """What an embedding's nearest row gives back of tokens that do not contribute, and that do; and how well the
    distance to it tells which these are."""
    (defense,) = made.defenses
    defense.kappa, defense.length = kappa, radius * defense.length / defense.radius
    defense.radius = radius
    batch = whole_batch(96, 12, vocabulary=VOCAB)
    clean = [
        made.ground.look(torch.arange(VOCAB)[:, None].expand(VOCAB, 12))[:, at] for at in range(12)
    ]  # of each place, all words
    shown = made.shown(made.ground.look(batch.input_ids), passing(batch))
    apart = torch.stack([torch.cdist(shown[:, at], rows) for at, rows in enumerate(clean)], dim=1)
    right = apart.argmin(-1) == batch.input_ids
    needed = torch.isin(batch.input_ids, torch.tensor(sorted(defense.contributing)))
    return (
        float(right[~needed].float().mean()),
        float(right[needed].float().mean()),
        told_by(-apart.amin(-1).flatten(), needed.flatten()),
    )


def test_what_it_hides_and_what_it_gives_away(tmp_path: Path) -> None:
    """At the same mean length: tokens that do not contribute are hidden as well, those that do worse, and it shows."""
    made = client(tmp_path, [{"name": NAME, "share": 0.055, "clip": None}], **run(tmp_path, train=320)).defending
    assert made is not None
    part = len(DECISIVE) / VOCAB
    for radius in (2.0, 4.0):
        others, needed, _ = read(made, 2.0, even(radius, 2.0, part))
        plain, same, _ = read(made, 1.0, radius)
        assert others == pytest.approx(plain, abs=0.05)
        assert needed > same + 0.1
        assert plain < 0.95
    _, _, seen = read(made, 2.0, 0.5)
    assert seen > 0.95, "who contributes is seen from how far a row is moved"


def learned(made: Defending, kappa: float, radius: float) -> float:
    """The loss, on new texts, of a small network that learns the next token from what is shown of the last one."""
    (defense,) = made.defenses
    defense.kappa, defense.length = kappa, radius * defense.length / defense.radius
    defense.radius = radius
    told, batches = [], []
    for seed, count in ((3, 600), (4, 300)):
        rows = decided(count, seed=seed, last=True)
        ids = torch.tensor([[int(word[1:]) for word in row["text"].split()] for row in rows])
        shown = made.shown(made.ground.look(ids), passing(Batch(ids, None, None, ids, ids.numel(), 1)))
        batches.append(shown / defense.length)
        told.append(torch.tensor([row["label"] for row in rows]))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    best = 9.0
    for _ in range(120):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(batches[0][:, -1]), told[0]).backward()
        optimizer.step()
        with torch.no_grad():
            best = min(best, float(torch.nn.functional.cross_entropy(net(batches[1][:, -1]), told[1])))
    return best


def test_at_the_same_mean_length_the_task_is_learned_better(tmp_path: Path) -> None:
    """As of a language model whose next token is decided by the last one, which is of 5 % of the vocabulary."""
    made = client(tmp_path, [{"name": NAME, "share": 0.055, "clip": None}], **run(tmp_path, train=320)).defending
    assert made is not None
    plain = learned(made, 1.0, 3.0)
    less = learned(made, 5.0, even(3.0, 5.0, 0.1))
    assert less < plain / 2, "0.53 and 0.11; where any one word of ten decides, with a radius of 1, 0.64 and 0.61"


def test_nothing_is_claimed_and_what_is_refused(tmp_path: Path) -> None:
    made = client(tmp_path / "a", [{"name": NAME, "share": 0.055}], **run(tmp_path / "a")).defending
    assert made is not None
    (told,) = made.told(Sends(2, 3))
    assert (told["kind"], told["epsilon"], told["protects"], told["releases"]) == ("empirical", None, "inputs", 3)
    assert "2 times less on 5 of" in told["mechanism"]
    with pytest.raises(MethodError, match="needs a head that is not trained"):
        client(tmp_path / "b", [NAME], **{**run(tmp_path / "b"), "partition": {**COLD, "head_blocks": 1}})
    with pytest.raises(ConfigError, match=r"data\.format is text"):
        defending(tmp_path / "c", [NAME])
