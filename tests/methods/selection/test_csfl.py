"""The row's check: planted groups are found, each cluster's model fits its own data better, and one model is sfl-v1."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arranged import accuracy, kill_and_resume, labelled_rows, told, two_domains
from cutlayer.arrangement import Arrangement, Group
from cutlayer.driver import Run
from cutlayer.errors import MethodError
from cutlayer.parties.federated import FederatedServer
from cutlayer.registry import create
from spine import TWO, U, adapter, caught, equal, lines, losses, model, often, train  # noqa: F401
from unsplit import text_batches

CLASSES = {"format": "classification"}


def csfl(**options: Any) -> Any:
    return create("selection", "csfl", {"sketch": "labels", **options})


def mixes(*groups: tuple[float, ...], each: int = 4) -> dict[str, tuple[float, ...]]:
    """Clients of each group in turn, with a little noise of their own."""
    draw = np.random.default_rng(0)
    found = {}
    for number in range(each * len(groups)):
        mix = np.array(groups[number % len(groups)]) + 0.02 * draw.random(len(groups[0]))
        found[f"c{number}"] = tuple(mix / mix.sum())
    return found


def test_a_planted_groups_are_found_and_equal_clients_share_a_model() -> None:
    found = csfl().arrange(0, told(mixes((0.5, 0.5, 0, 0), (0, 0, 0.5, 0.5))), None)
    assert {c: int(c[1]) % 2 for c in found.clusters} == {c: int(n[-1]) for c, n in found.clusters.items()}
    assert found.noted["apart"] == 1.0
    assert found.noted["unlikeness"] > 0.9
    alike = csfl().arrange(0, told(mixes((0.25, 0.25, 0.25, 0.25), each=8)), None)
    assert alike == Arrangement(noted=alike.noted)
    assert alike.noted["unlikeness"] < 0.01


def test_the_silhouette_finds_the_number_and_the_option_sets_it() -> None:
    three = told(mixes((1, 0, 0), (0, 1, 0), (0, 0, 1), each=4))
    assert len(set(csfl().arrange(0, three, None).clusters.values())) == 3
    assert len(set(csfl(clusters=2).arrange(0, three, None).clusters.values())) == 2
    same = told(dict.fromkeys("abc", (0.5, 0.5)))
    assert not csfl(clusters=2).arrange(0, same, None).clusters  # there are no two unlike ones


def test_the_mode_changes_only_past_the_band() -> None:
    selection = csfl(threshold=0.3, band=0.05)

    def apart(cosine: float, before: Arrangement | None) -> Arrangement:
        """Two clusters whose means have this cosine."""
        angle = np.arccos(cosine)
        given = {f"{n}{i}": (np.cos(a), np.sin(a)) for n, a in (("a", 0.0), ("b", angle)) for i in range(2)}
        return selection.arrange(1, told(given), before)  # type: ignore[no-any-return]

    one, two = apart(0.8, None), apart(0.5, None)
    assert (bool(one.clusters), bool(two.clusters)) == (False, True)
    assert not apart(0.68, one).clusters  # 0.32: past the threshold, not past the band
    assert apart(0.68, None).clusters
    assert apart(0.72, two).clusters  # 0.28
    assert not apart(0.76, two).clusters


def test_what_was_arranged_is_said() -> None:
    groups = (Group(("a", "b"), "a"), Group(("c",)))
    assert Arrangement(groups).said() == "groups: a, b (trunk at a); c"
    assert Arrangement(clusters={"a": "y", "b": "x", "c": "y"}).said() == "clusters with a model each: b; a, c"
    assert Arrangement().said() == "one model for all clients"
    assert Arrangement(chosen=("a",)).said() == ""
    every = Arrangement(groups, {"a": "y"}, 0.5, ("a",), (("a", "c"),), {"a": 2}, {"a": 1.0}, {"apart": 1.0})
    assert Arrangement.from_json(json.loads(json.dumps(every.to_json()))) == every


def test_clusters_keep_their_names() -> None:
    before = Arrangement(clusters={"a": "cluster-1", "b": "cluster-1", "c": "cluster-0"}, noted={"apart": 1.0})
    now = csfl(clusters=3).arrange(1, told({"a": (1, 0, 0), "b": (1, 0, 0), "c": (0, 1, 0), "d": (0, 0, 1)}), before)
    assert now.clusters == {"a": "cluster-1", "b": "cluster-1", "c": "cluster-0", "d": "cluster-2"}


def test_b_each_cluster_s_model_fits_its_own_clients_better(tmp_path: Path, caught: list[Run]) -> None:
    """Two groups with two classes each, and texts that tell nothing: who trains apart learns its own classes."""
    labels = {f"c{i}": [0, 1] * 3 if i % 2 == 0 else [2, 3] * 3 for i in range(4)}
    rows = {c: labelled_rows(own, seed=i, telling=0.0) for i, (c, own) in enumerate(labels.items())}
    found = {}
    for name, selection in (("apart", {"name": "csfl", "sketch": "labels"}), ("one", "all")):
        train(
            model("distilbert", num_labels=4), tmp_path / name, rows, data=CLASSES, partition=TWO, framework="sfl-v1",
            rounds=4, selection=selection, optimizer={"name": "adamw", "lr": 1e-2}, batch_size=6,
        )  # fmt: skip
        held_out = {
            c: text_batches(
                model("distilbert", num_labels=4),
                labelled_rows(own * 4, seed=50 + i, telling=0.0),
                size=24,
                label=True,
            )
            for i, (c, own) in enumerate(labels.items())
        }
        found[name] = np.mean([accuracy(caught[-1], c, batch) for c, (batch,) in held_out.items()])
    assert found["apart"] > found["one"] + 0.05
    clusters = caught[0].arrangement.clusters
    assert len(set(clusters.values())) == 2
    for c in rows:
        same = [o for o in rows if clusters[o] == clusters[c]]
        assert all(equal(caught[0].state(c), caught[0].state(other)) for other in same)
    assert not equal(caught[0].state("c0"), caught[0].state("c1"))
    assert sorted(p.name for p in (tmp_path / "apart" / "adapters").iterdir()) == list(rows)


@pytest.mark.parametrize(
    ("framework", "partition"), often(product(("sfl-v1", "sfl-v2"), (TWO, U)), ("sfl-v1", U), ("sfl-v2", TWO))
)
def test_b_with_one_model_for_all_it_is_the_framework_itself(
    framework: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    rows = two_domains(3)
    common = {
        "partition": partition, "rounds": 3, "framework": {"name": framework, "participation": 0.6},
        "optimizer": {"name": "adamw", "lr": 1e-2, "schedule": "linear"},
    }  # fmt: skip
    selection = {"name": "csfl", "sketch": "tokens", "threshold": 2.0, "band": 0.0}
    train(model(), tmp_path / "one", rows, selection=selection, **common)
    train(model(), tmp_path / "two", rows, **common)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert equal(adapter(tmp_path / "one"), adapter(tmp_path / "two"))
    moved = [{k: v for k, v in run.meter.by_step.items() if k != "partition"} for run in caught]
    assert moved[0] == moved[1]


@pytest.mark.parametrize(
    "framework",
    often([{"name": "sfl-v1"}, {"name": "sfl-v2", "order": "listed"}], {"name": "sfl-v2", "order": "listed"}),
    ids=["v1", "v2"],
)
def test_clusters_train_as_runs_of_their_own(framework: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """Each cluster's model is that of a run that has only its clients."""
    rows = two_domains(4)
    common = {"framework": framework, "rounds": 3, "optimizer": {"name": "adamw", "lr": 1e-2, "schedule": "linear"}}
    train(model(), tmp_path / "all", rows, selection={"name": "csfl", "sketch": "tokens"}, **common)
    for number in (0, 1):
        few = {c: r for c, r in rows.items() if int(c[1]) % 2 == number}
        train(model(), tmp_path / f"few{number}", few, **common)
        for c in few:
            assert equal(adapter(tmp_path / "all" / "adapters", c), adapter(tmp_path / f"few{number}"))
    if framework["name"] == "sfl-v2":
        assert set(caught[0].parts.server.slots) == {"cluster-0", "cluster-1"}


def states(*values: float) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.tensor([value])} for value in values]


def test_c_one_model_again_is_the_mean_weighted_by_data() -> None:
    server = FederatedServer(create("aggregator", "fedavg"), {"a": 1.0, "b": 2.0, "c": 5.0})
    server.begin({"w": torch.zeros(1)}, {})
    a, b, c = states(3.0, 6.0, 9.0)
    assert server.merge({"a": a, "b": b}, cluster="cluster-0")["w"].item() == 5.0
    assert server.merge({"c": c}, cluster="cluster-1")["w"].item() == 9.0
    assert server.before == {}
    server.rejoin({"a": "cluster-0", "b": "cluster-0", "c": "cluster-1"})
    assert server.before["w"].item() == pytest.approx((5.0 * 3 + 9.0 * 5) / 8)
    assert server.apart == {}


def test_a_pull_mixes_in_the_mean_over_all() -> None:
    server = FederatedServer(create("aggregator", "fedavg"), {"a": 1.0, "b": 3.0})
    clusters = {"a": "cluster-0", "b": "cluster-1"}
    for client, state in zip("ab", states(0.0, 8.0), strict=True):
        server.merge({client: state}, cluster=clusters[client])
    pulled = server.pulled(clusters, ["cluster-0", "cluster-1"], 0.25)
    assert [pulled[name]["w"].item() for name in ("cluster-0", "cluster-1")] == [0.25 * 6, 0.75 * 8 + 0.25 * 6]
    assert csfl(pull_below=2.0).arrange(0, told(mixes((1, 0), (0, 1))), None).pull == pytest.approx(0.5, abs=0.02)


def test_a_pull_between_unequal_ranks_is_refused() -> None:
    server = FederatedServer(create("aggregator", "fedavg"), {"a": 1.0, "b": 3.0})
    for client, rank in (("a", 2), ("b", 3)):
        server.merge({client: {"w": torch.ones(rank)}}, cluster=client)
    with pytest.raises(MethodError, match="gives 'w' unequal shapes in different clusters"):
        server.pulled({"a": "a", "b": "b"}, ["a", "b"], 0.5)


@pytest.mark.parametrize("framework", often(["sfl-v1", "sfl-v2"], "sfl-v1"))
def test_modes_that_change_during_a_run(
    framework: str, tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apart, together, apart again with other members: each time all begin with what they should."""
    cluster = {"c0": "cluster-0", "c1": "cluster-1", "c2": "cluster-0", "c3": "cluster-1"}
    other = {"c0": "cluster-0", "c1": "cluster-1", "c2": "cluster-1", "c3": "cluster-2"}
    plan = [Arrangement(clusters=clusters, noted={"apart": 1.0}) for clusters in (cluster, {}, cluster, other)]
    monkeypatch.setattr(type(csfl()), "arrange", lambda self, number, *_: plan[number])
    began: list[tuple[int, str, dict[str, torch.Tensor]]] = []
    step = Run.step

    async def seen(self: Run, client: str, **options: Any) -> Any:
        if self.counters.rounds not in [number for number, _, _ in began]:
            began.extend((self.counters.rounds, c, {n: t.clone() for n, t in self.state(c).items()}) for c in cluster)
        return await step(self, client, **options)

    ends: dict[int, dict[str, dict[str, torch.Tensor]]] = {}
    merge = Run.merge

    async def merged(self: Run, clients: Any, **options: Any) -> None:
        await merge(self, clients, **options)
        ends[self.counters.rounds] = {c: {n: t.clone() for n, t in self.state(c).items()} for c in clients}

    monkeypatch.setattr(Run, "step", seen)
    monkeypatch.setattr(Run, "merge", merged)
    selection = {"name": "csfl", "sketch": "tokens", "refresh": 1}
    train(model(), tmp_path / "out", two_domains(4), framework=framework, selection=selection, rounds=4)
    start = {number: {c: state for n, c, state in reversed(began) if n == number} for number in range(4)}
    mean = {n: (ends[0]["c0"][n].double() + ends[0]["c1"][n].double()) / 2 for n in ends[0]["c0"]}
    for c in cluster:
        assert all(torch.allclose(start[1][c][n].double(), mean[n], atol=1e-7) for n in mean)
        assert equal(start[2][c], ends[1][c])  # clusters begin with the model of all
    assert not equal(ends[2]["c0"], ends[2]["c1"])
    assert equal(start[3]["c0"], ends[2]["c0"])
    assert equal(start[3]["c1"], ends[2]["c1"])
    assert equal(start[3]["c2"], ends[2]["c1"])  # went over to the other cluster
    mean = {n: (ends[2]["c0"][n].double() + ends[2]["c1"][n].double()) / 2 for n in mean}
    assert all(torch.allclose(start[3]["c3"][n].double(), mean[n], atol=1e-7) for n in mean)  # a cluster of its own


def test_who_was_not_drawn_takes_its_cluster_s_model(tmp_path: Path, caught: list[Run]) -> None:
    """At rate nothing no merge may move anything; at another, all of a cluster end alike."""
    framework = {"name": "sfl-v1", "participation": 0.5}
    common = {"framework": framework, "selection": {"name": "csfl", "sketch": "tokens", "pull_below": 1.0}, "rounds": 3}
    train(model(), tmp_path / "none", two_domains(4), optimizer={"name": "sgd", "lr": 0.0}, **common)
    start = adapter(tmp_path / "none", "adapter_initial")
    assert all(equal(adapter(tmp_path / "none" / "adapters", c), start) for c in two_domains(4))
    train(model(), tmp_path / "some", two_domains(4), **common)
    for left, right in (("c0", "c2"), ("c1", "c3")):
        assert equal(adapter(tmp_path / "some" / "adapters", left), adapter(tmp_path / "some" / "adapters", right))


def test_the_evaluation_is_the_mean_over_the_clients(tmp_path: Path, caught: list[Run]) -> None:
    from tiny import write_rows

    held_out = two_domains(2)["c0"]
    path = write_rows(tmp_path / "eval.jsonl", held_out)
    train(
        model(), tmp_path / "out", two_domains(4), framework="sfl-v1", rounds=2, eval_every=1,
        selection={"name": "csfl", "sketch": "tokens"}, data={"eval": str(path)}, batch_size=6,
    )  # fmt: skip
    (batch,) = text_batches(model(), held_out, size=6)
    from arranged import output

    expected = np.mean([float(output(caught[0], c, batch).loss) for c in two_domains(4)])
    assert caught[0].counters.evaluations[-1]["loss"] == pytest.approx(expected, abs=1e-5)
    assert len(lines(tmp_path / "out")) == 8


@pytest.mark.parametrize("framework", often(["sfl-v1", "sfl-v2"], "sfl-v2"))
def test_a_killed_run_goes_on_to_the_same_weights(framework: Any, tmp_path: Path) -> None:
    selection = {"name": "csfl", "sketch": "tokens", "pull_below": 1.0}
    framework = {"name": framework, "participation": 0.7}
    kill_and_resume(model(), tmp_path, two_domains(4), framework=framework, selection=selection)
