"""Every run file of the repository loads, and makes a step on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

import cutlayer
from cutlayer import registry
from cutlayer.config import load_config
from spine import often
from tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
RUNS = sorted([*ROOT.glob("runs/**/*.yaml"), *ROOT.glob("demo/*.yaml")])
OFTEN = (  # in the default suite; of the others' methods each has tests of its own
    "async-sfl-safsl-window", "capability-cut-two-part", "hsplitlora", "minibatch-sfl-two-part", "multisfl-u-shaped",
    "pairingfl-selection", "psl-concatenated", "quickstart", "ringsfl-u-shaped", "run", "sequential-sl-two-part",
    "splitfed-v2", "splitfrozen", "splitft", "splitlora",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=8)


def test_there_is_a_run_for_every_framework_and_partition() -> None:
    configs = [load_config(path) for path in RUNS]
    pairs = {(config.framework.name, config.partition.name) for config in configs}
    every = {(f, p) for f in registry.names("framework") for p in registry.names("partition")}
    assert pairs == every - {("ringsfl", "two-part-split")}  # which is refused
    assert len(RUNS) >= 7
    assert len(list(ROOT.glob("**/runs/papers/*.yaml"))) >= 1


@pytest.mark.parametrize(
    "path", often(RUNS, *(path for path in RUNS if path.stem in OFTEN)), ids=lambda path: path.stem
)
def test_run_makes_a_step(path: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = load_config(path)
    kind, _ = config.length
    held_out = (path.parent / str(config.data.eval)).resolve()  # a few of its rows will do
    few = tmp_path / held_out.name
    few.write_text("".join(held_out.read_text().splitlines(keepends=True)[:6]))
    short = {kind: 1, "eval_every": None, "checkpoint_every": 1, "data.eval": str(few)}
    if "local_steps" in registry.option_fields(registry.load("framework", config.framework.name)):
        short["framework.local_steps"] = 1
    elif "intervals" in config.framework.options:
        short["framework.intervals"] = [1, 1, 1]
    every = config.build("framework").eligible(0, config.client_names)
    result = cutlayer.train(path, out=tmp_path / "out", model=str(tiny_model), **short)
    made = {c: n for c, n in result.summary["steps"].items() if n}
    if config.selection.name == "pairingfl-selection":  # whom it chooses follows from the data
        every = list(made)
        assert len(every) == len(config.client_names) // 2
    if config.build("framework").asynchronous:
        assert sorted(made) == sorted(every)
    else:
        assert made == dict.fromkeys(every, 1)
    assert math.isfinite(result.summary["eval"]["after"]["loss"])
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["client"] for line in lines} == set(every)


@pytest.mark.parametrize("path", sorted(ROOT.glob("runs/papers/*.yaml")), ids=lambda path: path.stem)
def test_a_paper_says_what_is_ours(path: Path) -> None:
    """The source and the rule are in the head, and values that no paper on other models can have are marked."""
    text = path.read_text()
    assert "# From the paper:" in text
    assert "# Ours:" in text
    assert "arXiv:" in text
    for line in text.splitlines():
        if line.startswith(("model:", "optimizer:", "rounds:", "steps:", "epochs:", "clients:", "batch_size:")):
            assert "# ours" in line or "# paper" in line, line
    assert yaml.safe_load(text)["framework"]["name"] in registry.names("framework")
