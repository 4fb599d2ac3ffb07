"""``engine: ray`` with the trunk in actors: stages and replicas, and the numbers of a run in one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import cutlayer
from apart import Apart
from cutlayer import staging
from cutlayer.errors import ConfigError, CutlayerError, NonFinite, TrunkGone
from cutlayer.links import stages
from cutlayer.models.standins import Skip
from cutlayer.stretch import Stretch
from rays import Killer, made, same
from spine import TWO, U, adapter, equal, model, often, resumed
from test_joining import Noted
from tiny import write_rows

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
STAGES = {"name": "ray", "clients_per_actor": 2, "trunk_stages": 2}
BOTH = {**STAGES, "trunk_replicas": 2}
DROPOUT = {"name": "lora", "rank": 2, "dropout": 0.3}


class _Reference:
    """The reply to a call that was made at once."""

    def __init__(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._future: Future[Any] = Future()
        try:
            given = [one.future().result() if isinstance(one, _Reference) else one for one in arguments]
            self._future.set_result(call(*given))
        except Exception as error:
            self._future.set_exception(error)

    def future(self) -> Future[Any]:
        return self._future


class _Handle:
    """An actor that lives in this process."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        if name == "__ray_ready__":
            return SimpleNamespace(remote=lambda: _Reference(lambda: True, ()))
        return SimpleNamespace(remote=lambda *arguments: _Reference(getattr(self.actor, name), arguments))


class Inside:
    """What stands for Ray: its actors are in this process, so that all but Ray itself can be tried in a second."""

    def __init__(self) -> None:
        self.made: list[_Handle] = []
        self.cpus = self.free = 8.0
        self.busy = 0  # looks at which nobody has begun
        self.module = ModuleType("ray")
        self.module.__spec__ = ray.__spec__
        for name, value in {
            "remote": self._remote, "is_initialized": lambda: True, "kill": lambda _: None,
            "get": lambda reference: reference.future().result(),
            "get_runtime_context": lambda: SimpleNamespace(gcs_address=""),
            "nodes": lambda: [{"Alive": True, "Resources": {"CPU": self.cpus}}], "wait": self._wait,
            "cluster_resources": lambda: {"CPU": self.cpus}, "available_resources": lambda: {"CPU": self.free},
        }.items():  # fmt: skip
            setattr(self.module, name, value)

    def _remote(self, kind: Any) -> Any:
        def make(*arguments: Any) -> _Handle:
            self.made.append(_Handle(kind(*arguments)))
            return self.made[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def _wait(self, waited: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert num_returns == len(waited)
        assert timeout > 0, "it is not waited for without a word"
        if not self.busy:
            return waited, []
        self.busy -= 1
        return waited[1:], waited[:1]

    @property
    def stretches(self) -> list[Stretch]:
        """The trunk's actors."""
        return [handle.actor for handle in self.made if isinstance(handle.actor, Stretch)]


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    found = Inside()
    monkeypatch.setitem(sys.modules, "ray", found.module)
    return found


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    """A Ray that is here already; many runs share its start."""
    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=8)
    yield
    ray.shutdown()


def in_groups(intra: str) -> dict[str, Any]:
    return {"name": "gsfl", "groups": [["ann"], ["bob"]], "intra": intra}


QUICK: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (TWO, {**BOTH, "trunk_stages": 3}, {"framework": "sfl-v1", "peft": DROPOUT}),
    (U, STAGES, {"framework": "sfl-v2", "max_grad_norm": 0.1, "gradient_accumulation": 2}),
]


@pytest.mark.parametrize(("partition", "engine", "changes"), often(QUICK, QUICK[1]), ids=["sfl-v1", "sfl-v2"])
def test_a_trunk_in_actors_changes_no_number(
    partition: dict[str, Any], engine: dict[str, Any], changes: dict[str, Any], tmp_path: Path, inside: Inside
) -> None:
    run = Apart(tmp_path, partition=partition, eval_every=1, **changes)
    one = cutlayer.train(run.simulated, out=tmp_path / "one")
    two = cutlayer.train({**run.simulated, "engine": engine}, out=tmp_path / "two")
    same(one, two)
    assert len(inside.stretches) == engine["trunk_stages"] * engine.get("trunk_replicas", 1)


UNEQUAL = [{"head_blocks": 1}, {"head_blocks": 2}]
CUTS = {"name": "splitft-cut-rank", "rank": 8, "cut_rank": 4}
TIMED = {"profile": ["laptop", "phone+4g"]}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (BOTH, {"framework": "sfl-v1", "peft": DROPOUT, "gradient_accumulation": 2, "max_grad_norm": 0.1}),
    (BOTH, {"framework": {"name": "sfl-v1", "moments": "keep"}, "optimizer": {"name": "sgd", "lr": 0.01}}),
    (BOTH, {"framework": {"name": "sfl-v1", "moments": "reset"}, "gradient_checkpointing": True, "peft": DROPOUT}),
    (BOTH, {"framework": {"name": "sfl-v1", "local_steps": 2}, "cuts": UNEQUAL, "max_grad_norm": 0.05}),
    (BOTH, {"framework": "sfl-v1", "cuts": UNEQUAL, "peft": CUTS, "aggregator": "lora-products"}),
    (BOTH, {"framework": in_groups("sequential"), "optimizer": {"name": "nadam", "lr": 0.01, "schedule": "cosine"}}),
    (BOTH, {"framework": in_groups("psl"), "max_grad_norm": 0.05}),
    (BOTH, {"framework": "hsfl"}),
    (BOTH, {"framework": "async-sfl", "aggregator": "dt-asfl", **TIMED}),
    (BOTH, {"framework": "sfl-v1", "profile": "laptop", "profiles": {"server": {"flops": 1e12, "workers": 2}}}),
    (BOTH, {"framework": "sfl-v1", "peft": "full", "model": "gpt2"}),
    (BOTH, {"framework": "sfl-v1", "cuts": [{}, {"leaves": 3}], "availability": 0.7, "rounds": 5}),
    (STAGES, {"framework": "sequential-sl", "peft": DROPOUT}),
    (STAGES, {"framework": "sfl-v2", "profile": "laptop", "exchange": "splitfrozen"}),
    (STAGES, {"framework": "sfl-v2", "model": "opt"}),
    (STAGES, {"framework": "psl", "cuts": UNEQUAL, "max_grad_norm": 0.05}),
    (STAGES, {"framework": {"name": "psl", "joint": "concatenate"}, "peft": DROPOUT}),
    (STAGES, {"framework": {"name": "p-sl"}}),
    (STAGES, {"framework": "sfl-v1", "mixing": "minibatch-sfl"}),
    (STAGES, {"framework": "sfl-v1", "mixing": "three-tier-sl"}),
]
MODELS = {"gpt2": {"n_layer": 4}, "opt": {"num_hidden_layers": 4, "dropout": 0.2}}
AHEAD = {"name": "two-part-split", "head_blocks": 2}
TWO_PART: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (BOTH, {"framework": "multisfl"}),
    (BOTH, {"framework": "sfl-v1", "planner": {"name": "capability-cut", "every": 0}, "partition": AHEAD, **TIMED}),
    ({"name": "ray", "trunk_replicas": 2}, {"framework": "sfl-v1", "exchange": "mu-splitfed"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "engine", "changes"),
    [(p, *case) for case in CASES for p in (TWO, U)] + [(TWO, *case) for case in TWO_PART],
    ids=lambda value: str(value)[:70],
)
def test_every_framework_is_the_same(
    partition: dict[str, Any], engine: dict[str, Any], changes: dict[str, Any], tmp_path: Path, inside: Inside
) -> None:
    cuts = changes.get("cuts", [{}, {}])
    changes = {key: value for key, value in changes.items() if key != "cuts"}
    if "model" in changes:
        changes["model"] = str(model(changes["model"], **MODELS[changes["model"]]))
    run = Apart(tmp_path, **{"partition": partition, "eval_every": 1, **changes})
    tree = {**run.simulated, "clients": [a | b for a, b in zip(run.simulated["clients"], cuts, strict=True)]}
    one = cutlayer.train(tree, out=tmp_path / "one")
    same(one, cutlayer.train({**tree, "engine": engine}, out=tmp_path / "two"))


@pytest.mark.slow
def test_other_data(tmp_path: Path, inside: Inside) -> None:
    """Classes, whose new head is at the top stage, and packed rows."""
    texts = [{"text": f"a text of {'good' if n % 2 else 'bad'} words {n}", "label": n % 2} for n in range(12)]
    classes = {"train": str(write_rows(tmp_path / "classes.jsonl", texts)), "format": "classification"}
    run = Apart(tmp_path, framework="sfl-v1", partition=TWO)
    cases: dict[str, dict[str, Any]] = {
        "classes": {
            "data": {**classes, "eval_fraction": 0.25, "max_length": 64}, "clients": 2,
            "model": str(model("bert", num_hidden_layers=4)),
        },
        "packing": {"data": {**run.simulated["data"], "packing": True}},
    }  # fmt: skip
    for name, changes in cases.items():
        one = cutlayer.train({**run.simulated, **changes}, out=tmp_path / f"{name}-1")
        two = cutlayer.train({**run.simulated, **changes, "engine": BOTH}, out=tmp_path / f"{name}-2")
        same(one, two)


def test_a_stage_has_its_blocks_and_no_others(tmp_path: Path, inside: Inside) -> None:
    """Two replicas with the same frozen weights; the slots are dealt over them."""
    run = Apart(tmp_path, framework="sfl-v1", partition=TWO, rounds=1)
    cutlayer.train({**run.simulated, "engine": BOTH}, out=tmp_path / "out")
    found = []
    for stretch in inside.stretches:
        blocks = stretch.base.block_list(range(4))
        own = [number for number, block in enumerate(blocks) if not isinstance(block, Skip)]
        names = {name for name, _ in stretch.base.model.named_parameters()}
        assert not any("embed_tokens" in name for name in names)
        found.append((own, "lm_head.weight" in names, list(stretch._parties["server"].slots)))
    lower, upper = ([1], False), ([2, 3], True)
    assert found == [(*lower, ["ann"]), (*upper, ["ann"]), (*lower, ["bob"]), (*upper, ["bob"])]


def test_slots_are_worked_on_at_once(tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second client's trunk is asked before anybody has waited for the first's."""
    events: list[str] = []
    answer, arrived = Stretch.answer, stages.arrived

    def noted(self: Stretch, request: Any, told: str) -> Any:
        if '"verb": "tail_step"' in told:
            events.append("asked")
        return answer(self, request, told)

    async def came(reference: Any) -> Any:
        found = await arrived(reference)
        events.append("came")
        return found

    monkeypatch.setattr(Stretch, "answer", noted)
    monkeypatch.setattr(stages, "arrived", came)
    tree = Apart(tmp_path, framework="sfl-v1", partition=TWO, rounds=1).simulated
    del tree["data"]["eval"]
    cutlayer.train({**tree, "engine": BOTH}, out=tmp_path / "out")
    assert events[:4] == ["asked", "asked", "came", "came"]


def test_a_stage_does_not_wait_for_those_above(
    tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """While the upper stage has one client's step, the lower one can begin that of another slot."""
    verbs: list[str] = []
    answer = Stretch.answer

    def noted(self: Stretch, request: Any, told: str) -> Any:
        if self is inside.stretches[0] and '"graph": true' in told:
            verbs.append(json.loads(told)["verb"])
        return answer(self, request, told)

    monkeypatch.setattr(Stretch, "answer", noted)
    run = Apart(tmp_path, framework="sfl-v1", partition=TWO, rounds=1)
    cutlayer.train({**run.simulated, "engine": STAGES}, out=tmp_path / "out")
    assert verbs == ["forward", "forward", "backward", "backward"]


def test_a_run_goes_on_with_either_engine(tmp_path: Path, inside: Inside) -> None:
    """A checkpoint has what the trunk's actors hold, the optimizers too."""
    run = Apart(tmp_path, framework="sfl-v1", rounds=2)
    one = cutlayer.train({**run.simulated, "engine": BOTH}, out=tmp_path / "one")
    before = adapter(one.out)
    text = (one.out / "run.yaml").read_text()
    start = text.index("engine:")
    stop = start + text[start:].index("profile:")
    (one.out / "run.yaml").write_text(text[:start] + "engine: local\n" + text[stop:])
    assert equal(before, adapter(resumed(one.out).out))


def test_mistakes_are_told_as_ever(tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer step that nobody waits for may fail, and the run hears of it."""
    run = Apart(tmp_path, framework="sfl-v2", partition=TWO, optimizer={"name": "sgd", "lr": 1e30})
    said = []
    for engine in ("local", STAGES):
        with pytest.raises(NonFinite) as caught:
            cutlayer.train({**run.simulated, "engine": engine}, out=tmp_path / "out")
        said.append(str(caught.value))
    assert said[0] == said[1]

    def broken(*_: Any, **__: Any) -> int:
        raise RuntimeError("no such update")

    monkeypatch.setattr("cutlayer.stretch.Slot.update", broken)
    tree = {**run.simulated, "engine": STAGES, "max_grad_norm": 1.0, "exchange": "splitfrozen"}
    with pytest.raises(RuntimeError, match="no such update"):
        cutlayer.train(tree, out=tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", inside.module)
    monkeypatch.setattr(staging, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(CutlayerError, match="An actor has torch"):
        cutlayer.train({**run.simulated, "engine": STAGES}, out=tmp_path / "out")


def test_a_machine_without_room_is_refused(tmp_path: Path, inside: Inside) -> None:
    """Ray would wait for ever."""
    run, out = Apart(tmp_path, framework="sfl-v1"), tmp_path / "out"
    inside.cpus = 3
    with pytest.raises(ConfigError, match="the trunk is in 4 actors that want 1 CPUs each, and this machine has no"):
        cutlayer.train({**run.simulated, "engine": BOTH}, out=out)
    inside.cpus = 4
    with pytest.raises(ConfigError, match=r"no node of the cluster has that, as the trunk is in 4 actors.*Lower"):
        cutlayer.train({**run.simulated, "engine": {**BOTH, "clients_per_actor": None}}, out=out)
    assert not out.exists()


@pytest.mark.parametrize("clients_per_actor", [None, 1])
def test_a_cluster_elsewhere_that_can_never_have_room_is_refused(
    clients_per_actor: int | None, tmp_path: Path, inside: Inside
) -> None:  # fmt: skip
    """An actor larger than each node, however many clients it is to have."""
    run, out = Apart(tmp_path, framework="sfl-v1"), tmp_path / "out"
    engine = {"name": "ray", "address": "auto", "clients_per_actor": clients_per_actor, "num_cpus": 9}
    with pytest.raises(ConfigError, match="Each actor wants 9 CPUs, and no node of the cluster has that"):
        cutlayer.train({**run.simulated, "engine": engine}, out=out)
    inside.cpus = 3
    with pytest.raises(
        ConfigError, match="the trunk is in 4 actors that want 1 CPUs each, and the cluster has no room"
    ):
        cutlayer.train({**run.simulated, "engine": {**BOTH, **engine, "num_cpus": 1}}, out=out)
    assert not out.exists()


def test_a_busy_cluster_is_waited_for_and_that_is_said(tmp_path: Path, inside: Inside) -> None:
    """Once for each state of things, with what is wanted and what there is."""
    run, noted = Apart(tmp_path, framework="sfl-v2", rounds=1), Noted()
    inside.cpus, inside.free, inside.busy = 2.0, 0.0, 3
    result = cutlayer.train({**run.simulated, "engine": "ray"}, out=tmp_path / "out", progress=noted)
    assert result.summary["rounds"] == 1
    said = [words for words in noted.words if "have not begun" in words]
    assert said == [
        "engine 'ray': 1 of 2 actors have not begun (ann). All together want 2 CPUs of the cluster's 2, of which 0 are "
        "free."
    ]


def test_a_cluster_that_must_grow_is_said(tmp_path: Path, inside: Inside) -> None:
    run, noted = Apart(tmp_path, framework="sfl-v2", rounds=1), Noted()
    inside.cpus, inside.free, inside.busy = 1.0, 1.0, 1
    engine = {"name": "ray", "address": "auto", "clients_per_actor": 1}
    cutlayer.train({**run.simulated, "engine": engine}, out=tmp_path / "out", progress=noted)
    assert any("That is more than there is: raise engine.clients_per_actor" in words for words in noted.words)


def test_as_many_actors_as_there_is_room_now(tmp_path: Path, inside: Inside) -> None:
    """What others have taken of a cluster is not counted on."""
    run, noted = Apart(tmp_path, framework="sfl-v2", rounds=1), Noted()
    inside.cpus, inside.free = 8.0, 1.5
    cutlayer.train({**run.simulated, "engine": "ray"}, out=tmp_path / "out", progress=noted)
    assert "engine 'ray': 2 clients in 1 actor" in noted.words


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"trunk_stages": 4}, {}, r"trunk_stages is 4, but the trunk has 2 blocks"),
    ({"trunk_replicas": 2}, {"framework": "sfl-v2"}, "'sfl-v2' has one trunk for all here"),
    ({"trunk_replicas": 3}, {"framework": "sfl-v1"}, "'sfl-v1' has 2 trunks here"),
    (
        {"trunk_stages": 1},
        {"planner": {"name": "capability-cut", "every": 1}, "partition": TWO, "framework": "sfl-v1", **TIMED},
        "planner 'capability-cut' moves cuts",
    ),
    (
        {"trunk_stages": 2},
        {"exchange": "mu-splitfed", "partition": TWO, "framework": "sfl-v1"},
        "'mu-splitfed' looks around in the trunk as a whole",
    ),
    ({"trunk_gpus": 1}, {"device": "auto"}, "the trunk is in no actor"),
    ({"trunk_stages": 1, "trunk_gpus": 1}, {}, "trunk_gpus reserves GPUs, but device is 'cpu'"),
    ({"name": "local", "trunk_stages": 2}, {}, "engine is 'local', which has no such option"),
]


@pytest.mark.parametrize(("engine", "changes", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused(
    engine: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:  # fmt: skip
    run = Apart(tmp_path, **changes)
    with pytest.raises(ConfigError, match=said):
        cutlayer.train({**run.simulated, "engine": {"name": "ray", **engine}}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("partition", [TWO, U], ids=["two-part", "u-shape"])
@pytest.mark.parametrize(
    ("framework", "engine"), [("sfl-v1", BOTH), ("sfl-v2", STAGES), (in_groups("psl"), BOTH)], ids=str
)
def test_ray_itself_changes_no_number(
    framework: Any, engine: dict[str, Any], partition: dict[str, Any], tmp_path: Path, here: None
) -> None:
    changes = {"framework": framework, "partition": partition, "peft": DROPOUT, "max_grad_norm": 0.1}
    run = Apart(tmp_path, eval_every=1, **changes)
    one = cutlayer.train(run.simulated, out=tmp_path / "one")
    same(one, cutlayer.train({**run.simulated, "engine": engine}, out=tmp_path / "two"))


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trunk's actors of the runs of a test."""
    return made(staging, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["first stage", "second stage"])
def test_an_actor_that_dies_changes_nothing(which: int, tmp_path: Path, here: None, actors: list[Any]) -> None:
    run = Apart(tmp_path, framework="sfl-v2", rounds=4, engine=STAGES)
    killer = Killer(actors, 2, which)
    two = cutlayer.train(run.simulated, out=tmp_path / "two", progress=killer)
    said = next(note for note in killer.words if "has died" in note)
    assert f"The actor with block {1 + which} of the trunk is gone: it has died." in said
    assert "All go back" in said
    assert "going on after round 2" in killer.words
    same(cutlayer.train({**run.simulated, "engine": "local"}, out=tmp_path / "one"), two)


@pytest.mark.slow
def test_an_actor_that_dies_before_a_checkpoint_ends_the_run(tmp_path: Path, here: None, actors: list[Any]) -> None:
    run = Apart(tmp_path, framework="sfl-v1", rounds=4, engine=BOTH)
    with pytest.raises(TrunkGone, match=r"The actor with block 2 of the trunk is gone: it has died"):
        cutlayer.train(run.simulated, out=tmp_path / "two", progress=Killer(actors, 0, 3))
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("what", "count", "expected"), [(range(1, 6), 2, ["1-2", "3-5"]), (range(4), 4, ["0-0", "1-1", "2-2", "3-3"])]
)
def test_blocks_are_cut_evenly(what: range, count: int, expected: list[str]) -> None:
    assert [f"{part.start}-{part.stop - 1}" for part in staging.cut(what, count)] == expected
