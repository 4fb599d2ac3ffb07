"""``engine: ray`` with the trunk in actors: stages and replicas, and the numbers of a run in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import cutlayer
from apart import Apart, steps
from cutlayer.errors import ConfigError
from spine import TWO, U, adapter, equal

ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
SAME = ("bytes", "bytes_up", "bytes_down", "frames", "steps", "lost", "virtual_seconds", "eval")
THREE = {"ann": 7, "bob": 4, "cyd": 5}


def same(one: Any, two: Any) -> None:
    """Both runs have the same losses, weights and bytes."""
    assert steps(one.out) == steps(two.out)
    for key in SAME:
        assert one.summary[key] == two.summary[key], key
    for name in ("adapter", *(f"adapters/{client}" for client in one.summary.get("adapters", ()))):
        assert equal(adapter(one.out, name), adapter(two.out, name)), name


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

    def __init__(self, actor: Any, asked: list[tuple[str, str]]) -> None:
        self._actor, self._asked = actor, asked

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> _Reference:
            self._asked.append((type(self._actor).__name__, name))
            return _Reference(getattr(self._actor, name), arguments)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What stands for Ray: its actors are in this process, so that the rest can be tried in a second; their calls."""
    asked: list[tuple[str, str]] = []

    def remote(kind: Any) -> Any:
        made = SimpleNamespace(remote=lambda *arguments: _Handle(kind(*arguments), asked))
        return SimpleNamespace(options=lambda **_: made)

    fake = ModuleType("ray")
    fake.__spec__ = ray.__spec__
    room = [{"Alive": True, "Resources": {"CPU": 8.0}}]
    for name, value in {
        "remote": remote, "nodes": lambda: room, "is_initialized": lambda: True, "kill": lambda _: None,
        "get": lambda reference: reference.future().result(),
        "get_runtime_context": lambda: SimpleNamespace(gcs_address=""),
    }.items():  # fmt: skip
        setattr(fake, name, value)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return asked


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sfl-v1", {"trunk_stages": 2, "trunk_replicas": 2}, {}),
    ("sfl-v2", {"trunk_stages": 2}, {"max_grad_norm": 0.1, "gradient_accumulation": 2}),
]


@pytest.mark.parametrize("partition", [TWO, U], ids=["two-part", "u-shape"])
@pytest.mark.parametrize(("framework", "engine", "changes"), CASES, ids=str)
def test_a_trunk_in_actors_changes_no_number(
    framework: str, engine: dict[str, Any], changes: dict[str, Any], partition: dict[str, Any], tmp_path: Path,
    inside: list[tuple[str, str]],
) -> None:  # fmt: skip
    run = Apart(tmp_path, framework=framework, partition=partition, eval_every=1, **changes)
    one = cutlayer.train(run.simulated, out=tmp_path / "one")
    two = cutlayer.train({**run.simulated, "engine": {"name": "ray", **engine}}, out=tmp_path / "two")
    same(one, two)
    assert inside.count(("Stretch", "open")) == engine["trunk_stages"] * engine.get("trunk_replicas", 1)
