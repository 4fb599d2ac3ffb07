"""The row's check: unlike workers together, steps that end together, minibatch-SFL's numbers, what mixing gives."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

import joint
from arranged import accuracy, kill_and_resume, labelled_rows, told, two_domains
from cutlayer.arrangement import Speed, Told
from cutlayer.driver import Run
from cutlayer.methods.selection._mixes import divergence, mean_mix
from cutlayer.methods.selection._workers import Builder, Cluster
from cutlayer.registry import create
from cutlayer.wire import read_frames
from spine import PARTITIONS, TWO, adapter, caught, equal, lines, losses, model, often, train  # noqa: F401
from tiny import text_rows
from unsplit import text_batches

GROUPED = {"name": "gsfl", "groups": "selection", "intra": "psl"}


def workers(seed: int, *, count: int = 20, middle: float = 0.05) -> Told:
    """Workers with two of ten classes each, and speeds and links that differ by up to ten."""
    draw = np.random.default_rng(seed)
    sketches, speeds = {}, {}
    for number in range(count):
        mix = np.zeros(10)
        mix[draw.choice(10, 2, replace=False)] = 0.5
        sketches[f"w{number:02}"] = mix
        speed = float(draw.uniform(1, 10))
        speeds[f"w{number:02}"] = Speed(
            own=1 / speed, middle=middle / speed,
            up=1e8 * float(draw.uniform(1, 5)), down=1e8 * float(draw.uniform(1, 5)), upload=0.05, upload_middle=0.1,
        )  # fmt: skip
    return told(sketches, speeds=speeds, local_steps=8, step_bytes=10**6)


def built(given: Told, **options: Any) -> Builder:
    made: Builder = create("selection", "parallelsfl", {"sketch": "labels", **options}).builder(given)
    return made


def sum_of(builder: Builder, clusters: list[Cluster]) -> float:
    return sum(builder.utility(cluster.clients) for cluster in clusters)


def mean_divergence(builder: Builder, groups: list[list[str]]) -> float:
    return float(np.mean([builder.mix(group) for group in groups]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{}, {"need_mbps": 50.0, "size": None}, {"waits": 0.0}], ids=str)
def test_a_clusters_mix_and_keep_the_limits(seed: int, options: dict[str, Any]) -> None:
    given = workers(seed)
    builder = built(given, **options)
    clusters = builder.grown(seed)
    groups = [list(cluster.clients) for cluster in clusters]
    before, mixed = sum_of(builder, clusters), mean_divergence(builder, groups)
    names = list(given.everybody)
    draw = np.random.default_rng(seed)
    random = []
    for _ in range(20):
        order = draw.permutation(names).tolist()
        cut = np.cumsum([0, *map(len, groups)])
        random.append(mean_divergence(builder, [order[a:b] for a, b in pairwise(cut)]))
    assert len(groups) > 1
    assert mixed < np.mean(random)
    kept = [builder.bearable(group) for group in groups]
    tuned = builder.tuned(clusters)
    assert sum_of(builder, tuned) <= before + 1e-12
    assert sorted(client for cluster in tuned for client in cluster.clients) == names
    for cluster, was in zip(tuned, kept, strict=True):
        top = builder.workers[cluster.top]
        if was:
            assert builder.bearable(cluster.clients)
            assert len(cluster.clients) * top.top <= max(builder.workers[c].bottom for c in cluster.clients)
            if "need_mbps" in options:
                assert (len(cluster.clients) - 1) * 50e6 <= top.ingress
        elif options.get("size", 5) is not None:  # a leftover may exceed the size, and nothing else
            assert len(cluster.clients) > 5
    if options.get("waits") == 0.0:
        assert mean_divergence(builder, [cluster.clients for cluster in tuned]) <= mixed + 1e-12


def test_the_divergence_is_that_of_the_book() -> None:
    assert divergence(np.array([0.5, 0.5]), np.array([0.25, 0.75])) == pytest.approx(
        0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    )
    assert divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))
    assert mean_mix({"a": np.array([1.0, 0]), "b": np.array([0, 1.0])}, ["a", "b"]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_b_clusters_end_closer_together_with_their_own_steps(seed: int) -> None:
    builder = built(workers(seed))
    clusters = builder.tuned(builder.grown(seed))
    slowest = np.array([max(builder.times(cluster.clients)) for cluster in clusters])
    sent = np.array([builder._sent(cluster) for cluster in clusters])
    steps = np.array(builder.steps(clusters, 32))
    assert steps.max() == 32
    assert np.ptp(steps * slowest + sent) < np.ptp(32 * slowest + sent)
    assert np.ptp(steps * slowest + sent) <= slowest.max() + 1e-9  # one more step of the slowest would be too many


def test_b_rounds_of_the_clusters_end_closer_together_on_the_clock(tmp_path: Path, caught: list[Run]) -> None:
    """Four quick and four slow clients with one kind of data, clusters of equals in speed; the last step of each."""
    rows = {f"c{i}": text_rows(3, seed=i, shortest=8, longest=8) for i in range(4)}
    quick = {"up_mbps": 1e4, "down_mbps": 1e4, "rtt_ms": 0}
    profiles = {c: {"flops": 1e9 if c in ("c0", "c1") else 5e8, **quick} for c in rows}
    spread, given = {}, {}
    original = type(create("selection", "parallelsfl", {"sketch": "tokens"})).arrange
    for name in ("own", "equal"):

        def arrange(self: Any, *args: Any, __name: str = name) -> Any:
            from dataclasses import replace

            made = original(self, *args)
            groups = tuple(type(made.groups[0])(pair, pair[0]) for pair in (("c0", "c1"), ("c2", "c3")))
            steps = made.steps
            if __name == "equal":
                steps = dict.fromkeys(steps, 6)
            else:
                builder = self.builder(args[1])
                counts = builder.steps([Cluster(list(g.members)) for g in groups], 6)
                steps = {c: n for g, n in zip(groups, counts, strict=True) for c in g.members}
            return replace(made, groups=groups, steps=steps)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(create("selection", "parallelsfl", {"sketch": "tokens"})), "arrange", arrange)
            train(
                model(), tmp_path / name, rows, framework={**GROUPED, "local_steps": 6}, rounds=1, profiles=profiles,
                selection={"name": "parallelsfl", "sketch": "tokens"}, partition=TWO, data={"max_length": 9},
            )  # fmt: skip
        ended = {line["client"]: line["virtual_time"] for line in lines(tmp_path / name)}
        spread[name] = max(ended.values()) - min(ended.values())
        given[name] = dict(caught[-1].counters.steps)
    assert given["equal"] == dict.fromkeys(rows, 6)
    assert given["own"] == {"c0": 6, "c1": 6, "c2": 3, "c3": 3}
    assert spread["own"] < 0.5 * spread["equal"]


def minibatch_sfl(folder: Path, start: Path, batches: dict[str, list[Any]], rounds: int, steps: int) -> dict[str, Any]:
    """The reference: one trunk moved by the mean gradient, a head for each client; heads averaged after each round."""
    models = {client: joint.load(folder, start) for client in batches}
    first, *_ = models.values()
    named = {c: {n: p for n, p in m.named_parameters() if p.requires_grad} for c, m in models.items()}
    head = {name for name in named[next(iter(models))] if ".layers.0." in name}
    optimizers = {c: torch.optim.SGD(named[c].values(), lr=joint.LR) for c in models}
    done = 0
    for _ in range(rounds):
        for _ in range(steps):
            for client, made in models.items():
                made(**batches[client][done % len(batches[client])]).loss.backward()
            for name in named[next(iter(models))]:
                if name not in head:
                    mean = sum(named[c][name].grad for c in models) / len(models)
                    for c in models:
                        named[c][name].grad = mean.clone()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            done += 1
        with torch.no_grad():
            for name in head:
                mean = sum(named[c][name] for c in models) / len(models)
                for c in models:
                    named[c][name].copy_(mean)
    return get_peft_model_state_dict(first)


@pytest.mark.parametrize("place_top", often(["worker", "server"], "worker"))
def test_c_one_cluster_is_minibatch_sfl(place_top: str, tmp_path: Path, caught: list[Run]) -> None:
    rows = {name: text_rows(6, seed=i) for i, name in enumerate(("ann", "bob", "cid"))}
    out = tmp_path / "out"
    framework = {**GROUPED, "local_steps": 3, "weight_by": "uniform"}
    selection = {"name": "parallelsfl", "sketch": "tokens", "place_top": place_top}
    common = {"partition": TWO, "rounds": 2, "optimizer": {"name": "sgd", "lr": joint.LR}}
    train(model(), out, rows, framework=framework, selection=selection, **common)
    batches = {n: text_batches(model(), r, size=3) for n, r in rows.items()}
    reference = minibatch_sfl(model(), out / "adapter_initial", batches, rounds=2, steps=3)
    found = adapter(out)
    assert found.keys() == reference.keys()
    assert max(float((found[n] - reference[n]).abs().max()) for n in found) <= 1e-6
    train(model(), tmp_path / "listed", rows, framework={**framework, "groups": 1}, **common)
    assert equal(found, adapter(tmp_path / "listed"))  # wherever the trunk is, the same bits
    assert losses(out) == losses(tmp_path / "listed")
    (group,) = caught[0].arrangement.groups
    assert group.host == ("ann" if place_top == "worker" else None)


@PARTITIONS
def test_hidden_states_stay_in_the_cluster(partition: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """The server sees models, sketches and control; a top's own batch crosses nothing."""
    wire, rows = tmp_path / "wire", two_domains(4)
    train(
        model(), tmp_path / "out", rows, partition=partition, framework={**GROUPED, "local_steps": 2}, rounds=2,
        selection={"name": "parallelsfl", "sketch": "tokens", "size": 2}, record_wire=str(wire),
    )  # fmt: skip
    hosts = {c: g.host for g in caught[0].arrangement.groups for c in g.members}
    at_server, between = set(), set()
    for line, _, _ in read_frames(wire):
        assert line["sender"] != line["receiver"]
        if "server" in (line["sender"], line["receiver"]):
            at_server.add(line["kind"])
        else:
            between.add(line["kind"])
            pair = {line["sender"], line["receiver"]}
            assert len({hosts[c] for c in pair}) == 1
            assert pair & set(hosts.values())
    assert at_server == {"control", "ack", "state", "sketch"}
    assert between == {"activations", "gradient"}
    assert set(caught[0].parts.parties) == {"server", *hosts.values()}
    assert not caught[0].parts.server.slots


def test_clusters_are_averaged_by_members_times_steps(
    tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cutlayer.arrangement import Arrangement, Group

    cls = type(create("selection", "parallelsfl", {"sketch": "tokens"}))
    groups = (Group(("c0", "c1"), "c0"), Group(("c2",), "c2"))
    steps = {"c0": 1, "c1": 1, "c2": 3}
    monkeypatch.setattr(
        cls, "arrange", lambda *_: Arrangement(groups, steps=steps, weights={k: float(v) for k, v in steps.items()})
    )
    seen: list[tuple[dict[str, Any], Any]] = []
    merge = Run.merge

    async def merged(self: Run, clients: Any, **options: Any) -> None:
        before = {c: {n: t.clone() for n, t in self.state(c).items()} for c in clients}
        await merge(self, clients, **options)
        seen.append((before, {n: t.clone() for n, t in self.state("c1").items()}))

    monkeypatch.setattr(Run, "merge", merged)
    selection = {"name": "parallelsfl", "sketch": "tokens"}
    rows = {c: r[: 3 * (i + 1)] for i, (c, r) in enumerate(two_domains(3, rows=9).items())}
    train(model(), tmp_path / "out", rows, framework={**GROUPED, "local_steps": 3}, selection=selection, rounds=1)
    ((before, after),) = seen
    for name, tensor in after.items():
        expected = sum(before[c][name].double() * steps[c] for c in steps) / 5
        assert torch.allclose(tensor.double(), expected, atol=1e-7)
    assert caught[0].counters.steps == steps


@pytest.mark.parametrize("seed", often(range(3), 0))
def test_d_mixed_clusters_beat_groups_of_one_label(seed: int, tmp_path: Path, caught: list[Run]) -> None:
    """Balanced accuracy, one of two classes a client: 0.76, 0.85, 0.75 against 0.57, 0.80, 0.55 in three seeds."""
    folder = model("distilbert")
    labels = {"c0": 0, "c1": 0, "c2": 1, "c3": 1}
    rows = {c: labelled_rows([own] * 6, seed=10 * seed + i, telling=0.6) for i, (c, own) in enumerate(labels.items())}
    held_out = text_batches(folder, labelled_rows([0, 1] * 64, seed=90 + seed, telling=0.6), size=128, label=True)[0]
    common: dict[str, Any] = {
        "partition": TWO, "data": {"format": "classification"}, "rounds": 2, "seed": seed, "batch_size": 6,
        "optimizer": {"name": "adamw", "lr": 5e-3}, "peft": "full",
    }  # fmt: skip
    framework = {**GROUPED, "local_steps": 8}
    selection = {"name": "parallelsfl", "sketch": "labels", "size": 2}
    train(folder, tmp_path / "mixed", rows, framework=framework, selection=selection, **common)
    homogeneous = {**framework, "groups": [["c0", "c1"], ["c2", "c3"]]}
    train(folder, tmp_path / "alike", rows, framework=homogeneous, **common)
    mixed, alike = (accuracy(run, "c0", held_out) for run in caught)
    assert [sorted(labels[c] for c in g.members) for g in caught[0].arrangement.groups] == [[0, 1], [0, 1]]
    assert mixed > alike


def test_a_host_s_clipping_and_accumulation_work(tmp_path: Path) -> None:
    """A top worker's own part and its group's trunk are two slots: clipped and accumulated as at a server."""
    rows = two_domains(3, rows=6)
    common = {
        "max_grad_norm": 0.05,
        "gradient_accumulation": 2,
        "rounds": 2,
        "framework": {**GROUPED, "local_steps": 2},
    }
    for place_top in ("worker", "server"):
        selection = {"name": "parallelsfl", "sketch": "tokens", "place_top": place_top}
        train(model(), tmp_path / place_top, rows, selection=selection, **common)
    assert losses(tmp_path / "worker") == losses(tmp_path / "server")
    assert equal(adapter(tmp_path / "worker"), adapter(tmp_path / "server"))


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    selection = {"name": "parallelsfl", "sketch": "tokens", "size": 2}
    profiles = {f"c{i}": {"flops": 1e9 * (1 + i), "up_mbps": 10, "down_mbps": 10, "rtt_ms": 5} for i in range(4)}
    kill_and_resume(
        model(), tmp_path, two_domains(4), framework={**GROUPED, "local_steps": 2}, selection=selection,
        profiles=profiles, optimizer={"name": "adamw", "lr": 1e-2, "schedule": "linear"},
    )  # fmt: skip
