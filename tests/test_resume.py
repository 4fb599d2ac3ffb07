"""Exact resume: killed at any moment, a run that is taken up again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from crash import Forge
from cutlayer.wire import read_frames
from spine import often
from tiny import make_model, text_rows, write_rows

MEASURED = ("seconds", "tokens_per_second", "peak_memory", "parties")  # clocks and memory
FINAL = ("adapter", "model")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_model(tmp_path_factory.mktemp(family), family, num_hidden_layers=3)
        return made[family]

    return make


BASE: dict[str, Any] = {
    "data": {"eval_fraction": 0.1, "max_length": 32},
    "clients": 3,
    "partition": {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 1},
    "framework": {"name": "sfl-v2", "participation": 0.6, "local_steps": 2},
    "peft": {"name": "lora", "rank": 2, "dropout": 0.2},
    "optimizer": {"name": "adamw", "lr": 0.01, "schedule": "cosine", "warmup": 3},
    "batch_size": 2,
    "gradient_accumulation": 2,
    "rounds": 4,
    "eval_every": 2,
    "checkpoint_every": 2,
}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
VARIANTS: dict[str, dict[str, Any]] = {
    "sfl-v2": BASE,
    "sequential": {
        **BASE, "framework": {"name": "sequential-sl", "local_steps": 2, "order": "random"}, "optimizer": SGD,
    },
    "sequential-reset": {
        **BASE, "framework": {"name": "sequential-sl", "optimizer_state": "reset", "participation": 0.5},
    },
    "full-tied": {**BASE, "model": "llama-tied", "peft": "full"},
    "full-tied-two-part": {
        **BASE, "model": "llama-tied", "peft": "full", "partition": {"name": "two-part-split", "head_blocks": 2},
    },
    "two-part": {**BASE, "partition": {"name": "two-part-split", "head_blocks": 2}, "max_grad_norm": 0.5},
    "profile": {**BASE, "profile": "laptop", "max_grad_norm": 0.5},
    "turns-of-clients": {**BASE, "framework": {"name": "sfl-v2", "local_steps": 2, "interleave": "client"}},
    "no-evaluation": {**BASE, "data": {"max_length": 32}, "eval_every": None},
    "early-stop": {
        **BASE, "rounds": 12, "eval_every": 1, "early_stop": {"patience": 4, "min_delta": 9.0}, "checkpoint_every": 3,
    },
    "epochs": {
        **{k: v for k, v in BASE.items() if k != "rounds"}, "epochs": 2,
        "framework": {"name": "sfl-v2", "local_steps": 3}, "checkpoint_every": 1,
    },
    "packed-left-adafactor": {
        **BASE, "data": {**BASE["data"], "packing": True, "padding_side": "left"},
        "optimizer": {"name": "adafactor", "lr": 0.01},
    },
    "asgd": {**BASE, "optimizer": {"name": "asgd", "lr": 0.01}},
}  # fmt: skip


@dataclass
class Case:
    """One run that can be started again and again, each time in folders of its own."""

    forge: Forge
    root: Path
    config: dict[str, Any]
    model: Path
    count: int = 0

    def new(self) -> tuple[Path, list[str | Path]]:
        """A folder with the run's file, and the command that starts it there."""
        self.count += 1
        folder = self.root / f"{self.count}"
        folder.mkdir()
        write_rows(folder / "rows.jsonl", text_rows(23, seed=1))
        config = {**self.config, "model": str(self.model), "device": "cpu", "record_wire": "wire"}
        config["data"] = {**config["data"], "train": "rows.jsonl"}
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        return folder, ["train", "run.yaml", "--out", "out"]

    def undisturbed(self) -> dict[str, Any]:
        folder, command = self.new()
        ended = self.forge.run(*command, cwd=folder)
        assert ended.code == 0, ended.err
        found = ending(folder)
        found["events"] = ended.events
        return found


def ending(folder: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way."""
    out, wire = folder / "out", folder / "wire"
    final = next(out / name for name in FINAL if (out / name).is_dir())
    weights = {file.name: load_file(file) for file in sorted(final.glob("*.safetensors"))}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["seconds"] = sorted(line["seconds"])
    summary = {k: v for k, v in json.loads((out / "summary.json").read_text()).items() if k not in MEASURED}
    summary["model"] = ""
    for _ in read_frames(wire):
        pass
    assert sum(summary["bytes"].values()) == (wire / "frames.bin").stat().st_size
    return {
        "weights": weights,
        "initial": {f.name: f.read_bytes() for f in (out / "adapter_initial").glob("*.safetensors")},
        "metrics": lines,
        "summary": summary,
        "frames": (wire / "frames.bin").read_bytes(),
        "index": (wire / "frames.jsonl").read_text(),
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


def same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Assert that two endings are equal, the most telling part first."""
    assert got["metrics"] == wanted["metrics"]
    assert got["weights"].keys() == wanted["weights"].keys()
    for file, tensors in wanted["weights"].items():
        assert tensors
        assert got["weights"][file].keys() == tensors.keys()
        assert all(torch.equal(got["weights"][file][name], tensor) for name, tensor in tensors.items())
    assert got["summary"] == wanted["summary"]
    assert got["index"] == wanted["index"]
    assert got["frames"] == wanted["frames"]
    assert got["initial"] == wanted["initial"]
    assert got["files"] == wanted["files"]


@pytest.fixture(scope="module")
def cases(
    forge: Forge, model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Case, dict[str, Any]]]:
    """By a variant's name: its case, and how it ends undisturbed (run once)."""
    made: dict[str, tuple[Case, dict[str, Any]]] = {}

    def make(name: str) -> tuple[Case, dict[str, Any]]:
        if name not in made:
            config = dict(VARIANTS[name])
            case = Case(forge, tmp_path_factory.mktemp(name), config, model_of(config.pop("model", "llama")))
            made[name] = case, case.undisturbed()
        return made[name]

    return make


def kill_and_resume(case: Case, wanted: dict[str, Any], tmp_path: Path, *kills: dict[str, Any]) -> None:
    """Start, kill (at each of ``kills`` once, resuming between), resume from another folder, and compare."""
    folder, command = case.new()
    resume = ["train", "--resume", folder / "out"]
    began = folder / "out" / "run.yaml"  # one that dies before it is there is started again
    for kill in kills:
        again = began.exists()
        ended = case.forge.run(*(resume if again else command), cwd=tmp_path if again else folder, **kill)
        if ended.code == 0 and "after" in kill:
            continue  # it was quicker
        assert ended.code == -9, (kill, ended.code, ended.err)
    again = began.exists()
    ended = case.forge.run(*(resume if again else command), cwd=tmp_path if again else folder)
    assert ended.code == 0, ended.err
    same(ending(folder), wanted)


MOMENTS: list[tuple[str, int, str]] = [
    ("replace", 1, "kill"),  # run.yaml, complete but for its name
    ("prepare_data", 1, "kill"),
    ("step", 3, "kill"),  # before the first checkpoint
    ("save_file", 2, "half"),  # in the first checkpoint
    ("rename", 2, "kill"),  # ... complete but for its name
    ("update", 21, "kill"),  # in the middle of a step of round 3
    ("frame", 140, "kill"),
    ("flush", 2, "torn"),
    ("save_file", 9, "half"),
    ("save_adapter", 2, "kill"),  # the result
    ("summarize", 1, "kill"),
]


OFTEN = [
    ("save_file", 2, "half"),
    ("rename", 2, "kill"),
    ("update", 21, "kill"),
    ("flush", 2, "torn"),
    ("save_adapter", 2, "kill"),
]


@pytest.mark.parametrize(("event", "number", "act"), often(MOMENTS, *OFTEN), ids=lambda v: str(v))
def test_killed_at(event: str, number: int, act: str, cases: Any, tmp_path: Path) -> None:
    """Each kind of moment once, in the run with the most that could go wrong."""
    kill_and_resume(*cases("sfl-v2"), tmp_path, {"at": (event, number), "act": act})


@pytest.mark.parametrize("last", often([[], [{"at": ("flush", 1), "act": "torn"}]], []), ids=["twice", "three times"])
def test_killed_twice(last: list[dict[str, Any]], cases: Any, tmp_path: Path) -> None:
    """Once between checkpoints, and the resumed process again while it writes the next one."""
    half = {"at": ("save_file", 3), "act": "half"}
    kill_and_resume(*cases("sfl-v2"), tmp_path, {"at": ("step", 11)}, half, *last)


@pytest.mark.parametrize("name", often([n for n in VARIANTS if n != "sfl-v2"], "sequential", "full-tied-two-part"))
def test_every_kind_of_run(name: str, cases: Any, tmp_path: Path) -> None:
    """Other frameworks, partitions, optimizers and data, killed after the first checkpoint."""
    case, wanted = cases(name)
    steps = [i for i, event in enumerate(wanted["events"]) if event == "step"]
    first = wanted["events"].index("save_file")
    later = [i for i in steps if i > first]
    assert later, "killed after the first checkpoint"
    kill_and_resume(case, wanted, tmp_path, {"index": later[min(2, len(later) - 1)]})


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_killed_everywhere(name: str, cases: Any, tmp_path: Path) -> None:
    """Every event of a run, one after another."""
    case, wanted = cases(name)
    for index in range(len(wanted["events"])):
        kill_and_resume(case, wanted, tmp_path, {"index": index})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_killed_at_random_times(seed: int, cases: Any, tmp_path: Path) -> None:
    draw = random.Random(seed)
    case, wanted = cases("sfl-v2")
    kill_and_resume(case, wanted, tmp_path, *({"after": draw.uniform(0.05, 3.0)} for _ in range(draw.randint(1, 3))))


def test_the_command_itself(cases: Any, tmp_path: Path) -> None:
    """Nothing of this depends on the test's own process: ``python -m``-like, killed from outside."""
    case, wanted = cases("sfl-v2")
    folder, command = case.new()
    program = [sys.executable, "-c", "from cutlayer.cli.main import main; main()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*program, *map(str, command)], cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "output folder: out\n"
    process.stdout.readline()  # the evaluation before
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (folder / "out" / "summary.json").exists()
    ended = case.forge.run("train", "--resume", folder / "out", cwd=tmp_path)
    assert ended.code == 0, ended.err
    same(ending(folder), wanted)


@pytest.fixture(scope="module")
def started(cases: Any) -> tuple[Case, Path]:
    """A run that was killed after its first checkpoint; who changes it puts it back."""
    case, _ = cases("sfl-v2")
    folder, command = case.new()
    assert case.forge.run(*command, cwd=folder, at=("step", 11)).code == -9
    return case, folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_says_so_and_stays(cases: Any, tmp_path: Path) -> None:
    case, _ = cases("sfl-v2")
    folder, command = case.new()
    assert case.forge.run(*command, cwd=folder).code == 0
    before = contents(folder)
    ended = case.forge.run("train", "--resume", folder / "out", cwd=tmp_path)
    assert ended.code == 0
    assert "is complete" in ended.out
    assert contents(folder) == before
    (folder / "out" / "summary.json").write_text("{")
    case.forge.run("train", "--resume", folder / "out").refused("summary.json", "--resume")


def test_other_data_are_refused(started: Any) -> None:
    case, folder = started
    before = contents(folder / "out")
    rows = (folder / "rows.jsonl").read_text()
    write_rows(folder / "rows.jsonl", text_rows(23, seed=2))
    case.forge.run("train", "--resume", folder / "out").refused("belongs to another run: its data differ", "--out")
    assert contents(folder / "out") == before
    (folder / "rows.jsonl").write_text(rows)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("seed: 0", "seed: 1", "seed"), ("lr: 0.01", "lr: 0.02", "optimizer"), ("rounds: 4", "rounds: 6", "rounds")],
)
def test_an_edited_run_file_is_refused(old: str, new: str, named: str, started: Any) -> None:
    case, folder = started
    file = folder / "out" / "run.yaml"
    before = file.read_text()
    assert old in before
    file.write_text(before.replace(old, new))
    case.forge.run("train", "--resume", folder / "out").refused("belongs to another run", f"differ ({named})")
    file.write_text(before)


@pytest.mark.parametrize("name", ["out/metrics.jsonl", "wire/frames.bin", "wire/frames.jsonl"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_record_that_lacks_its_beginning_is_refused(name: str, gone: bool, started: Any) -> None:
    """Going on would leave a file with a hole in it."""
    case, folder = started
    before = (folder / name).read_bytes()
    if gone:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, 100)
    case.forge.run("train", "--resume", folder / "out").refused(Path(name).name, "checkpoint")
    (folder / name).write_bytes(before)


def test_after_every_refusal_it_still_ends_the_same(started: Any, cases: Any, tmp_path: Path) -> None:
    case, folder = started
    assert case.forge.run("train", "--resume", folder / "out", cwd=tmp_path).code == 0
    same(ending(folder), cases("sfl-v2")[1])


def test_there_is_no_run_to_resume(forge: Forge, tmp_path: Path) -> None:
    forge.run("train", "--resume", tmp_path / "nowhere").refused("no run to resume", "nowhere")
    forge.run("train", "--resume", tmp_path).refused("no run.yaml")
