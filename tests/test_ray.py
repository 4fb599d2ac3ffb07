"""``engine: ray``: clients in actors, and the same losses, weights and bytes as with all in one process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.nn import Parameter

import cutlayer
from apart import Apart, steps
from cutlayer import cluster
from cutlayer.contracts import IGNORE, Example
from cutlayer.crew import packed, unpacked
from cutlayer.errors import ConfigError, CutlayerError, Gone
from cutlayer.links.ray import ActorLink, in_one_piece
from cutlayer.models.slots import Slot
from cutlayer.wire import Header, Meter, encode, read_frames
from rays import Killer, made, same
from spine import TWO, U, adapter, equal, model, resumed
from test_joining import Noted
from tiny import write_rows

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
TWO_IN_ONE = {"name": "ray", "clients_per_actor": 2}


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    """A Ray that is here already, as in a user's own program; many runs share its start."""
    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    yield
    ray.shutdown()


def frames(folder: Path) -> list[Any]:
    """What crossed, whoever was first."""
    found = [(str(header), [t.tolist() for t in tensors]) for _, header, tensors in read_frames(folder)]
    return sorted(found, key=str)


def test_clients_in_actors_change_no_number(tmp_path: Path) -> None:
    """A Ray that is started by one option; two clients share an actor; each frame has the same content."""
    run = Apart(tmp_path, framework="sfl-v2", rounds=2, eval_every=1)
    one = cutlayer.train({**run.simulated, "record_wire": str(tmp_path / "wire-1")}, out=tmp_path / "one")
    tree = {**run.simulated, "record_wire": str(tmp_path / "wire-2"), "engine": "ray"}
    two = cutlayer.train(tree, out=tmp_path / "two", **{"engine.clients_per_actor": 2})
    same(one, two)
    assert frames(tmp_path / "wire-1") == frames(tmp_path / "wire-2")
    assert one.summary["parties"] == two.summary["parties"], "the memory of clients was measured at them"
    assert not ray.is_initialized()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sfl-v1", {}),
    ("sequential-sl", {}),
    ("psl", {}),
    ("sfl-v2", {"max_grad_norm": 0.1, "gradient_accumulation": 2}),
    ("p-sl", {"engine": TWO_IN_ONE}),
    ("hsfl", {}),
    ("multisfl", {"engine": TWO_IN_ONE}),
    ("sfl-v1", {"peft": "full", "engine": TWO_IN_ONE}),
    ("sfl-v1", {"mixing": "minibatch-sfl"}),
    ("async-sfl", {"profile": ["laptop", "phone+4g"], "aggregator": "dt-asfl"}),
    ("sfl-v2", {"profile": "laptop", "exchange": "splitfrozen", "engine": TWO_IN_ONE}),
]


@pytest.mark.slow
@pytest.mark.parametrize("partition", [TWO, U], ids=["two-part", "u-shape"])
@pytest.mark.parametrize(("framework", "changes"), CASES, ids=str)
def test_every_framework_is_the_same_in_actors(
    framework: str, changes: dict[str, Any], partition: dict[str, Any], tmp_path: Path, here: None
) -> None:
    changes = {"engine": "ray", **changes}
    run = Apart(tmp_path, framework=framework, partition=partition, eval_every=1, **changes)
    one = cutlayer.train({**run.simulated, "engine": "local"}, out=tmp_path / "one")
    same_kind = "model" if changes.get("peft") == "full" else "adapter"
    two = cutlayer.train(run.simulated, out=tmp_path / "two")
    assert two.adapter.name == same_kind
    if same_kind == "model":
        files = [next(result.adapter.glob("*.safetensors")) for result in (one, two)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert steps(one.out) == steps(two.out)
    else:
        same(one, two)


@pytest.mark.slow
def test_defenses_in_actors(tmp_path: Path, here: None) -> None:
    """The noise of a simulated client is the same wherever it is, and so is what was spent."""
    run = Apart(tmp_path, defense=[{"name": "dp-forward", "noise": 0.5}, "clip-noise"], eval_every=1)
    one = cutlayer.train(run.simulated, out=tmp_path / "one")
    two = cutlayer.train({**run.simulated, "engine": TWO_IN_ONE}, out=tmp_path / "two")
    same(one, two)
    assert one.summary["privacy"] == two.summary["privacy"]
    assert set(two.summary["privacy"]) == set(run.files)


@pytest.mark.slow
def test_other_runs(tmp_path: Path, here: None) -> None:
    """Moving cuts, classes, packing, unequal cuts, clients that come and go: one base for all in an actor."""
    run = Apart(tmp_path)
    cut = {"partition": {"name": "two-part-split", "head_blocks": 2}, "profile": ["laptop", "phone+4g"], "rounds": 4}
    texts = [{"text": f"a text of {'good' if n % 2 else 'bad'} words {n}", "label": n % 2} for n in range(12)]
    classes = {"train": str(write_rows(tmp_path / "classes.jsonl", texts)), "format": "classification"}
    unequal = [{**client, "head_blocks": 1 + n} for n, client in enumerate(run.simulated["clients"])]
    goings = [{**client, "leaves": 2} if n else client for n, client in enumerate(run.simulated["clients"])]
    cases: dict[str, dict[str, Any]] = {
        "planner": {"framework": "sfl-v1", "planner": {"name": "capability-cut", "every": 1}, **cut},
        "classes": {
            "data": {**classes, "eval_fraction": 0.25, "max_length": 64},
            "clients": 2,
            "model": str(model("bert", num_hidden_layers=4)),
        },
        "packing": {"data": {**run.simulated["data"], "packing": True}},
        "unequal": {"clients": unequal, "framework": "sfl-v1"},
        "goings": {"clients": goings, "framework": "sfl-v2", "availability": 0.7, "rounds": 5},
    }
    for name, changes in cases.items():
        tree = {**run.simulated, **changes}
        one = cutlayer.train(tree, out=tmp_path / f"{name}-1")
        two = cutlayer.train({**tree, "engine": TWO_IN_ONE}, out=tmp_path / f"{name}-2")
        same(one, two)
        assert one.summary.get("cuts") == two.summary.get("cuts")


@pytest.mark.slow
def test_a_run_goes_on_with_either_engine(tmp_path: Path, here: None) -> None:
    """A checkpoint has everything that the actors hold, and is the one of the local engine."""
    run = Apart(tmp_path, framework="sfl-v1", rounds=3)
    one = cutlayer.train(run.simulated, out=tmp_path / "one")
    two = cutlayer.train({**run.simulated, "engine": TWO_IN_ONE}, out=tmp_path / "two")
    same(one, two)
    before = adapter(one.out)
    assert equal(before, adapter(resumed(two.out).out))
    text = (two.out / "run.yaml").read_text()
    assert "name: ray" in text
    tree = yaml.safe_load(text)
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    (two.out / "run.yaml").write_text(head + yaml.safe_dump({**tree, "engine": "local"}))
    assert equal(before, adapter(resumed(two.out).out))


def test_a_mirror_forgets_the_moments_that_its_client_has_forgotten() -> None:
    """As after a reset of the optimizer, before its next step."""
    slot = Slot("ann", {"w": Parameter(torch.ones(3))}, lambda params: torch.optim.AdamW(params, lr=0.1))
    slot.add({"w": torch.ones(3)}, key=("ann", 0, 0))
    slot.update()
    assert "optimizer/w/exp_avg" in slot.get(optimizer=True)
    told = Header("partition", "state", "", "ann", "server", "ann", values={"version": 5, "saved": 7}, names=("w",))
    came: Future[Any] = Future()
    came.set_result(in_one_piece(encode(told, [torch.full((3,), 2.0)])))
    mirror: Any = SimpleNamespace(name="ann", slot=slot, watch=SimpleNamespace(saved=0))
    reference = SimpleNamespace(future=lambda: came)
    queues: Any = None
    link = ActorLink(mirror, lambda *_: reference, lambda error: error, meter=Meter(), queues=queues)
    asyncio.run(link.keep(1))
    assert slot.get(optimizer=True).keys() == {"w"}
    assert (slot.params["w"].tolist(), slot.version, mirror.watch.saved) == ([2.0] * 3, 5, 7)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The actors of the runs of a test."""
    return made(cluster, monkeypatch)


@pytest.mark.slow
def test_an_actor_that_dies_changes_nothing(tmp_path: Path, here: None, actors: list[Any]) -> None:
    run = Apart(tmp_path, framework="sfl-v2", rounds=4, engine="ray")
    killer = Killer(actors, 2)
    two = cutlayer.train(run.simulated, out=tmp_path / "two", progress=killer)
    said = next(note for note in killer.words if "has died" in note)
    assert "'ann' is gone" in said
    assert "All go back" in said
    assert "going on after round 2" in killer.words
    same(cutlayer.train({**run.simulated, "engine": "local"}, out=tmp_path / "one"), two)


@pytest.mark.slow
def test_an_actor_that_dies_before_a_checkpoint_ends_the_run(tmp_path: Path, here: None, actors: list[Any]) -> None:
    run = Apart(tmp_path, framework="sfl-v2", rounds=4, engine=TWO_IN_ONE)
    with pytest.raises(Gone, match=r"'ann' is gone: the actor that it was in \(with bob\) has died"):
        cutlayer.train(run.simulated, out=tmp_path / "two", progress=Killer(actors, 0))
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_errors_at_an_actor_are_told_in_words(tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Apart(tmp_path, engine="ray")
    monkeypatch.setattr(cluster, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(CutlayerError, match=f"An actor has torch {torch.__version__.split('+')[0]}"):
        cutlayer.train(run.simulated, out=tmp_path / "one")
    monkeypatch.undo()
    tree = {**run.simulated, "engine": {"name": "ray", "num_gpus": 64}, "device": "auto"}
    with pytest.raises(ConfigError, match="and no node of the cluster has that"):
        cutlayer.train(tree, out=tmp_path / "one")
    with pytest.raises(ConfigError, match=r"makes 2 actors\. Each actor wants 2 CPUs, and this machine has room for 1"):
        cutlayer.train(
            {**run.simulated, "engine": {"name": "ray", "num_cpus": 2, "clients_per_actor": 1}}, out=tmp_path / "one"
        )
    assert not (tmp_path / "one").exists()


class _Leaves(Noted):
    """Somebody else's actor, which goes when it is said that it is waited for."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def note(self, text: str) -> None:
        super().note(text)
        if "have not begun" in text:
            ray.kill(self.other)


@pytest.mark.slow
def test_a_busy_cluster_is_waited_for_in_words(tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is taken by others; when it is free, the run begins, and is the same."""
    monkeypatch.setattr(cluster, "LOOK", 1.0)

    class Other:
        def here(self) -> bool:
            return True

    other = ray.remote(Other).options(num_cpus=2).remote()
    assert ray.get(other.here.remote())
    run, noted = Apart(tmp_path, framework="sfl-v2", rounds=1), _Leaves(other)
    one = cutlayer.train(run.simulated, out=tmp_path / "one")
    two = cutlayer.train({**run.simulated, "engine": "ray"}, out=tmp_path / "two", progress=noted)
    same(one, two)
    assert any("of the cluster's 2, of which 0 are free." in words for words in noted.words), noted.words


@pytest.mark.slow
def test_an_address(tmp_path: Path, here: None) -> None:
    """The command line joins the cluster that runs."""
    run = Apart(tmp_path)
    file = tmp_path / "simulated.yaml"
    file.write_text(json.dumps(run.simulated, indent=1))
    command = [sys.executable, "-m", "cutlayer", "train", str(file), "engine=ray", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "engine.address=auto"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert equal(adapter(tmp_path / "out"), adapter(cutlayer.train(run.simulated, out=tmp_path / "one").out))
    assert ray.is_initialized(), "it is not ours to end"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "no Ray cluster answers at '127.0.0.1:9'"),
        ("ray://head:10001", "Write HOST:PORT"),
        ("x", "Write"),
    ],
)
def test_an_address_without_a_cluster(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        cutlayer.train(
            {**Apart(tmp_path).simulated, "engine": {"name": "ray", "address": address}}, out=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"framework": "ringsfl"}, "runs blocks for"),
    ({"fails": 0.5}, "sets a client back"),
    ({"peft": "hsplitlora", "aggregator": "lora-products"}, "cannot change ranks"),
    ({"device": "cuda"}, "the actors of engine 'ray' get no GPU"),
    ({"engine": {"name": "local", "num_gpus": 1}}, "engine is 'local', which has no such option"),
]


@pytest.mark.parametrize(
    ("changes", "said"), REFUSED, ids=lambda value: next(iter(value)) if type(value) is dict else ""
)
def test_what_cannot_be_in_actors_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = Apart(tmp_path)
    with pytest.raises(ConfigError, match=said):
        cutlayer.train({**run.simulated, "engine": "ray", **changes}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else original(name, *a))
    with pytest.raises(ConfigError, match=r"pip install 'cutlayer\[ray\]'"):
        cutlayer.train({**Apart(tmp_path).simulated, "engine": "ray"}, out=tmp_path / "out")


def test_examples_come_as_they_were() -> None:
    groups = {
        "train/a": [Example([1, 2, 3], [IGNORE, 2, 3]), Example([4], [IGNORE], None, [0])],
        "train/b": [Example([7, 8], None, 1), Example([9], None, 0)],
        "kept/a": [],
    }
    assert unpacked(packed(groups)) == groups


@pytest.mark.parametrize(
    ("clients", "size", "expected"), [(5, 2, [1, 2, 2]), (4, 2, [2, 2]), (3, 9, [3]), (3, 1, [1, 1, 1])]
)
def test_clients_are_dealt_evenly(clients: int, size: int, expected: list[int]) -> None:
    names = [str(number) for number in range(clients)]
    crews = cluster.dealt(names, size)
    assert [len(crew) for crew in crews] == expected
    assert [name for crew in crews for name in crew] == names
