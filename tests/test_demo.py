"""The demo, short: the run on the committed model and data, and what is shown at its end. Whole: see the slow test."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cutlayer
from cutlayer.config import load_config

DEMO = Path(__file__).resolve().parents[1] / "demo"


def test_demo_run_is_what_it_promises() -> None:
    config = load_config(DEMO / "run.yaml")
    assert config.partition.name == "u-shaped-split"
    assert config.framework.name == "sfl-v2"
    assert config.peft.name == "lora"
    assert config.client_names == ["clinic-a", "clinic-b", "clinic-c"]
    assert config.data.division.name == "by-column"


def test_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "valid.jsonl"
    few.write_text("".join((DEMO / "data/valid.jsonl").read_text().splitlines(keepends=True)[:6]))
    short = {"framework.local_steps": 2, "rounds": 1, "eval_every": None, "data.eval": str(few)}
    result = cutlayer.train(DEMO / "run.yaml", out=tmp_path / "out", **short)
    summary = result.summary
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert {"clinic-a", "clinic-b", "clinic-c", "server"} == set(summary["parties"])
    rows = [json.loads(line)["clinic"] for line in (DEMO / "data/train.jsonl").read_text().splitlines()]
    assert set(rows) == {"clinic-a", "clinic-b", "clinic-c"}

    spec = importlib.util.spec_from_file_location("show", DEMO / "show.py")
    assert spec
    assert spec.loader
    show = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(show)
    capsys.readouterr()
    show.show(tmp_path / "out", 0)
    said = capsys.readouterr().out
    for title in ("the prompt", "before, the base model", "after, the tuned model", "the clinic itself"):
        assert f"--- {title}" in said
    assert "Splitting alone does not hide the text" in said
    assert str(tmp_path / "out" / "adapter") in said


@pytest.mark.slow
def test_whole_demo(tmp_path: Path) -> None:
    """As ``make demo`` runs it."""
    out = tmp_path / "demo"
    program = Path(sys.executable).with_name("cutlayer")
    done = subprocess.run(
        [program, "train", DEMO / "run.yaml", "--out", out], capture_output=True, text=True, check=True
    )
    for part in ("who held what", "what crossed the wire", "perplexity", f"Result: {out / 'adapter'}"):
        assert part in done.stdout
    evaluation = json.loads((out / "summary.json").read_text())["eval"]
    assert evaluation["before"]["loss"] > 6
    assert evaluation["after"]["loss"] < 1
