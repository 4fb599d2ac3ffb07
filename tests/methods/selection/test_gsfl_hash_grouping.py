"""The row's check: hashes tell cosines, planted domains are found, the server sees b bits, and own groups pay."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arranged import DOMAINS, domain_rows, kill_and_resume, output, told, two_domains
from cutlayer.arrangement import Speed
from cutlayer.driver import Run
from cutlayer.registry import create
from cutlayer.sketches import Sketch, hash_similarity, hashed
from cutlayer.wire import read_frames
from spine import TWO, U, adapter, caught, equal, losses, model, often, train  # noqa: F401
from unsplit import text_batches

NAME = "gsfl-hash-grouping"


@pytest.mark.parametrize(("flip", "least"), [(0.0, 0.95), (0.1, 0.9)])
def test_a_hashes_tell_the_cosine(flip: float, least: float) -> None:
    """128 pairs whose cosines span -1 to 1."""
    draw, sketch = np.random.default_rng(0), Sketch("hash", bits=256, flip=flip)
    true, found = [], []
    for cosine in np.linspace(-1, 1, 128):
        a, noise = draw.standard_normal((2, 64))
        a /= np.linalg.norm(a)
        aside = noise - (noise @ a) * a
        b = cosine * a + np.sqrt(1 - cosine**2) * aside / np.linalg.norm(aside)
        bits = [np.unpackbits(hashed(v, sketch, shared=5, own=own)) * 2.0 - 1 for v, own in ((a, 1), (b, 2))]
        true.append(cosine)
        found.append(hash_similarity(*bits, flip=flip))
    assert np.corrcoef(true, found)[0, 1] > least
    assert abs(np.mean(np.array(found) - true)) < 0.05  # the flips are taken out again


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_b_planted_domains_are_found_with_flips(family: str, tmp_path: Path, caught: list[Run]) -> None:
    clients = two_domains(6, rows=24)
    selection = {"name": NAME, "flip": 0.1, "groups": 2}
    framework = {"name": "gsfl", "groups": "selection"}
    train(model(family), tmp_path / "out", clients, framework=framework, selection=selection, rounds=1)
    groups = [set(group.members) for group in caught[0].arrangement.groups]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [set(group["members"]) for group in summary["arrangement"]["groups"]] == groups
    assert groups == [{"c0", "c2", "c4"}, {"c1", "c3", "c5"}]


def test_b_groups_allow_for_the_flips() -> None:
    """By hand: 16 of 50 bits differ, a mean product of 0.36: what flips of 0.2 make of 1, (1 - 0.4)^2.

    Without flips it is a cosine of cos(0.32 pi) = 0.54, and a distance above the threshold of 0.3.
    """
    given = told({"a": [1] * 50, "b": [1] * 34 + [-1] * 16})
    for flip, count in ((0.2, 1), (0.0, 2)):
        assert len(create("selection", NAME, {"flip": flip}).arrange(0, given, None).groups) == count


def test_c_the_server_sees_so_many_bits_of_a_device(tmp_path: Path) -> None:
    clients = two_domains(4)
    lengths = {}
    for bits in (64, 256):
        wire = tmp_path / f"wire{bits}"
        train(
            model(), tmp_path / f"out{bits}", clients, framework={"name": "gsfl", "groups": "selection"}, rounds=1,
            selection={"name": NAME, "bits": bits, "groups": 2}, record_wire=str(wire),
        )  # fmt: skip
        frames = [(line, tensors) for line, _, tensors in read_frames(wire) if line["kind"] == "sketch"]
        assert [line["sender"] for line, _ in frames] == list(clients)
        assert all((line["shapes"], line["dtypes"]) == ([[bits // 8]], ["uint8"]) for line, _ in frames)
        assert len({line["length"] for line, _ in frames}) == 1
        lengths[bits] = frames[0][0]["length"]
    assert lengths[256] - lengths[64] == (256 - 64) // 8


def test_d_a_group_of_its_own_kind_has_the_lower_held_out_loss(
    tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss of each group's model on its members' own domains, at a round's end, right before the merge over all."""
    clients = two_domains(4, rows=6)
    held_out = [text_batches(model(), domain_rows(d, 12, seed=99 + d), size=12)[0] for d in range(len(DOMAINS))]
    found: list[float] = []
    merge = Run.merge

    async def seen(self: Run, names: Any, **options: Any) -> None:
        found.append(float(np.mean([float(output(self, c, held_out[int(c[1]) % 2]).loss) for c in names])))
        await merge(self, names, **options)

    monkeypatch.setattr(Run, "merge", seen)
    common: dict[str, Any] = {"rounds": 1, "peft": "full", "optimizer": {"name": "adamw", "lr": 1e-2}}
    framework = {"name": "gsfl", "groups": "selection", "intra": "psl", "local_steps": 8}
    train(model(), tmp_path / "hash", clients, framework=framework, selection={"name": NAME, "groups": 2}, **common)
    framework |= {"groups": [["c0", "c1"], ["c2", "c3"]]}  # of equal sizes, as a draw may give
    train(model(), tmp_path / "random", clients, framework=framework, **common)
    hash_grouped, drawn = found
    assert hash_grouped < drawn - 0.05


@pytest.mark.parametrize(
    ("intra", "partition"),
    often(product(("sequential", "psl", "sfl-v2"), (TWO, U)), ("psl", TWO)),
)
def test_its_groups_train_as_the_same_groups_from_a_list(
    intra: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    clients = two_domains(4)
    framework: dict[str, Any] = {"name": "gsfl", "groups": "selection", "intra": intra, "local_steps": 2}
    common = {"partition": partition, "rounds": 3, "optimizer": {"name": "adamw", "lr": 1e-2, "schedule": "linear"}}
    train(model(), tmp_path / "one", clients, framework=framework, selection={"name": NAME, "groups": 2}, **common)
    framework |= {"groups": [list(group.members) for group in caught[0].arrangement.groups]}
    assert len(framework["groups"]) == 2
    train(model(), tmp_path / "two", clients, framework=framework, **common)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert equal(adapter(tmp_path / "one"), adapter(tmp_path / "two"))


def test_the_server_has_a_trunk_for_each_group_and_no_more(tmp_path: Path, caught: list[Run]) -> None:
    train(
        model(), tmp_path / "out", two_domains(4), framework={"name": "gsfl", "groups": "selection"}, rounds=1,
        selection={"name": NAME, "groups": 3},
    )  # fmt: skip
    assert set(caught[0].parts.server.slots) == {"group-0", "group-1", "group-2"}


def test_groups_that_change_lose_nothing(tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """At rate nothing all models stay what they were, whatever groups come; at another, all begin a round alike."""
    from cutlayer.methods.selection import gsfl_hash_grouping as module

    plan = iter([[0, 0, 0, 0], [0, 1, 2, 2], [0, 0, 1, 0]] * 4)
    monkeypatch.setattr(module, "agglomerated", lambda *_, **__: np.array(next(plan)))
    selection = {"name": NAME, "refresh": 1}
    for intra in ("sequential", "psl"):
        framework = {"name": "gsfl", "groups": "selection", "intra": intra}
        common = {"framework": framework, "selection": selection, "rounds": 3}
        train(model(), tmp_path / f"{intra}0", two_domains(4), optimizer={"name": "sgd", "lr": 0.0}, **common)
        start = adapter(tmp_path / f"{intra}0", "adapter_initial")
        assert equal(adapter(tmp_path / f"{intra}0"), start)
        starts: list[Any] = []
        step = Run.step

        async def seen(self: Run, client: str, __step: Any = step, __starts: list[Any] = starts, **options: Any) -> Any:
            if self.framework.intra == "psl":  # type: ignore[attr-defined]
                __starts.append((self.counters.rounds, {n: t.clone() for n, t in self.state(client).items()}))
            return await __step(self, client, **options)

        monkeypatch.setattr(Run, "step", seen)
        train(model(), tmp_path / f"{intra}1", two_domains(4), **common)
        monkeypatch.setattr(Run, "step", step)
        assert len(caught[-1].arrangement.groups) == 2
        for number in range(3):
            first, *others = [state for of, state in starts if of == number] or [{}]
            assert all(equal(first, other) for other in others)


def test_groups_are_cut_to_size_by_speed_and_the_quickest_goes_first() -> None:
    same = np.ones(16)
    speeds = {f"c{i}": Speed(own=float(own)) for i, own in enumerate((5, 1, 4, 2, 3))}
    given = told(dict.fromkeys(speeds, same), speeds=speeds)
    made = create("selection", NAME, {"size": 3}).arrange(0, given, None)
    assert [group.members for group in made.groups] == [("c1", "c3"), ("c4", "c2", "c0")]


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    framework = {"name": "gsfl", "groups": "selection"}
    kill_and_resume(
        model(), tmp_path, two_domains(4), framework=framework, selection={"name": NAME, "groups": 2, "refresh": 2}
    )
