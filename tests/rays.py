"""What the tests of ``engine: ray`` share."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from apart import Noted, steps
from spine import adapter, equal

SAME = ("bytes", "bytes_up", "bytes_down", "frames", "steps", "lost", "virtual_seconds", "eval")


def same(one: Any, two: Any) -> None:
    """Both runs have the same losses, weights and bytes."""
    assert steps(one.out) == steps(two.out)
    for key in SAME:
        assert one.summary[key] == two.summary[key], key
    if one.adapter.name == "model":
        files = [next(result.adapter.glob("*.safetensors")).read_bytes() for result in (one, two)]
        assert files[0] == files[1]
        return
    for name in ("adapter", *(f"adapters/{client}" for client in one.summary.get("adapters", ()))):
        assert equal(adapter(one.out, name), adapter(two.out, name)), name


def made(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The actors that a module makes from now on."""
    found: list[Any] = []
    original = module._actor
    monkeypatch.setattr(module, "_actor", lambda *a, **b: found.append(original(*a, **b)) or found[-1])
    return found


class Killer(Noted):
    """A reporter that kills an actor, once, at the first step of a round."""

    def __init__(self, actors: list[Any], number: int, which: int = 0) -> None:
        super().__init__()
        self.actors, self.number, self.which, self.done = actors, number, which, False

    def update(self, record: dict[str, Any]) -> None:
        import ray

        if record["round"] == self.number and not self.done:
            self.done = True
            ray.kill(self.actors[self.which].handle)
