"""What the tests of parties, frameworks and links share: tiny models, runs with several clients, their innards."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cutlayer
from cutlayer.driver import Run
from tiny import make_model, write_rows

HOME = tempfile.TemporaryDirectory(prefix="cutlayer-tests-")
LR = 1e-2
TWO = {"name": "two-part-split", "head_blocks": 1}
U = {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 1}
PARTITIONS = pytest.mark.parametrize("partition", [TWO, U], ids=["two-part", "u-shape"])
MOSTLY_TWO = pytest.mark.parametrize(  # the other one in the slow suite
    "partition", [pytest.param(TWO, id="two-part"), pytest.param(U, id="u-shape", marks=pytest.mark.slow)]
)
MOSTLY_U = pytest.mark.parametrize(
    "partition", [pytest.param(TWO, id="two-part", marks=pytest.mark.slow), pytest.param(U, id="u-shape")]
)
Rows = Sequence[Mapping[str, Any]]


def adamw(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The optimizer of ``train``, as a reference makes it."""
    return torch.optim.AdamW(params, lr=LR)


def often(every: Iterable[Any], *chosen: Any) -> list[Any]:
    """For a sweep over values or tuples: ``chosen`` of ``every`` in the default suite, the others in the slow one."""
    cases = [case if isinstance(case, tuple) else (case,) for case in every]
    quick = [case if isinstance(case, tuple) else (case,) for case in chosen]
    assert all(case in cases for case in quick)
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def by_turns(name: str, values: Iterable[Any], ids: Sequence[str] | None = None) -> pytest.MarkDecorator:
    """A sweep of ``values`` by both partitions: in the default suite each with one of them, by turns from the U-shape
    on, in the slow one with both."""
    cases = []
    for number, value in enumerate(values):
        told = str(value) if ids is None else ids[number]
        for kind, partition in (("two-part", TWO), ("u-shape", U)):
            quick = (kind == "u-shape") == (number % 2 == 0)
            marks = () if quick else pytest.mark.slow
            cases.append(pytest.param(value, partition, id=f"{told}-{kind}" if told else kind, marks=marks))
    return pytest.mark.parametrize((name, "partition"), cases)


@lru_cache
def model(family: str = "llama", **options: Any) -> Path:
    """A random tiny model, made once a process."""
    return make_model(Path(tempfile.mkdtemp(dir=HOME.name)), family, **options)


def train(folder: Path, out: Path, clients: Mapping[str, Rows], **changes: Any) -> Any:
    """A run whose clients have these rows each, in file order."""
    out.parent.mkdir(parents=True, exist_ok=True)
    listed = [
        {"name": name, "data": str(write_rows(out.parent / f"{out.name}-{name}.jsonl", [dict(r) for r in rows]))}
        for name, rows in clients.items()
    ]
    cuts = changes.pop("cuts", {})  # of clients that have one of their own
    for client in listed:
        if client["name"] in cuts:
            client["head_blocks"] = cuts[client["name"]]
    for name, keys in changes.pop("goings", {}).items():  # joins, leaves, ... of clients
        next(client for client in listed if client["name"] == name).update(keys)
    given = changes.pop("profiles", {})  # of clients
    if others := changes.pop("profiles_of_others", {}):
        changes["profiles"] = others
    for client in listed:
        if client["name"] in given:
            client["profile"] = given[client["name"]]
    config: dict[str, Any] = {
        "model": str(folder),
        "data": {"format": "text", "shuffle": False, "max_length": 64, **changes.pop("data", {})},
        "clients": listed,
        "partition": U,
        "framework": "sequential-sl",
        "peft": {"name": "lora", "rank": 2, "alpha": 4},
        "optimizer": {"name": "adamw", "lr": LR},
        "batch_size": 3,
        "checkpoint_every": 1000,
        "rounds": 2,
        **changes,
    }
    if "steps" in changes or "epochs" in changes:
        del config["rounds"]
    return cutlayer.train(config, out=out)


def lines(out: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[str, float]]:
    """Client and loss of each step, in order."""
    return [(line["client"], line["loss"]) for line in lines(out)]


def adapter(out: Path, name: str = "adapter") -> dict[str, torch.Tensor]:
    """The adapter's tensors."""
    return load_file(out / name / "adapter_model.safetensors")


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """The same names with the same bits."""
    return left.keys() == right.keys() and len(left) > 0 and all(torch.equal(left[n], right[n]) for n in left)


def twin_of(whole: Path) -> Path:
    """A run's folder once more beside it, for ``resumed``; to make the same run twice takes longer."""
    return shutil.copytree(whole, whole.with_name("part"))


def resumed(out: Path) -> Any:
    """Go on with a run that ended as if it had been killed in its last round; what that gives."""
    kept = sorted((out / "checkpoints").iterdir())
    assert len(kept) > 1, "without an older checkpoint it would begin anew, and prove nothing"
    shutil.rmtree(kept[-1])
    for made in ("adapter", "adapters", "model", "models"):
        shutil.rmtree(out / made, ignore_errors=True)
    (out / "summary.json").unlink()
    return cutlayer.train(resume=out)


def block_of(name: str) -> int:
    """The block of an adapter's tensor."""
    found = re.search(r"\.(?:h|layers?)\.(\d+)\.", name)
    assert found, name
    return int(found[1])


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every ``Run`` that is made during the test."""
    runs: list[Any] = []
    original = Run.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        runs.append(self)

    monkeypatch.setattr(Run, "__init__", init)
    return runs
