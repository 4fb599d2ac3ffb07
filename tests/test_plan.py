"""``cutlayer plan``: the cuts that a run then begins with, from the data and a configuration without weights."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.main import app
from cutlayer.driver import Run
from cutlayer.errors import MethodError
from cutlayer.run import dry_run, plan
from spine import TWO, U, caught, model, train  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(6, seed=i, longest=6 + 4 * i) for i, name in enumerate(("slow", "middle", "fast"))}
SPEEDS = {name: {"flops": 1e9 * 2**i, "up_mbps": 1000, "down_mbps": 1000} for i, name in enumerate(ROWS)}


def without_weights(folder: Path, place: Path) -> Path:
    """A copy of a model's folder that has its configuration and its tokenizer only."""
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    return place


@pytest.mark.parametrize("task", ["causal", "classification"])
def test_the_plan_is_what_the_run_begins_with(task: str, tmp_path: Path, caught: list[Run]) -> None:
    """Cuts, step times and memory; and who holds what is by these cuts."""
    folder = model(num_hidden_layers=6) if task == "causal" else model("distilbert", n_layers=6, num_labels=3)
    more: dict[str, Any] = {"partition": U} if task == "causal" else {
        "partition": TWO, "data": {"format": "classification"},
    }  # fmt: skip
    planner = {"name": "capability-cut", "every": 0}
    train(folder, tmp_path / "out", ROWS, framework="sfl-v1", planner=planner, profiles=SPEEDS, rounds=1, **more)
    bare = without_weights(folder, tmp_path / "bare")
    told = plan(tmp_path / "out" / "run.yaml", {"model": str(bare)}).summary
    layouts, costs = caught[0].parts.layouts, caught[0].parts.costs
    assert len({len(layout.head) for layout in layouts.values()}) > 1
    for name, layout in layouts.items():
        assert told["cuts"][name] == {
            "head_blocks": len(layout.head),
            "tail_blocks": 1 if task == "causal" else 0,
            "bounds": [1, 4 if task == "causal" else 5],
            "step_seconds": sum(vars(costs.stages(layout, name)).values()),
            "memory_bytes": costs.memory(layout, name),
        }
        last = len(layout.head) - 1
        assert told["parties"][name]["blocks"].startswith("embeddings, block" + (f"s 0-{last}" if last else " 0"))


def run_file(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(without_weights(model(), tmp_path / "bare")), "data": {"train": str(tmp_path / "no.jsonl")},
        "partition": TWO, "rounds": 1, **changes,
    }  # fmt: skip


def test_without_a_planner_it_is_the_dry_run_and_reads_no_data(tmp_path: Path) -> None:
    (tmp_path / "no.jsonl").write_text("this is no row")
    given = run_file(tmp_path)
    assert plan(given).summary == dry_run(given).summary


def test_a_planner_that_cannot_plan_says_so(tmp_path: Path) -> None:
    (tmp_path / "no.jsonl").write_text('{"text": "w3 w4"}\n' * 9)
    with pytest.raises(MethodError, match="the run has no profiles"):
        plan(run_file(tmp_path, framework="sfl-v1", planner="capability-cut"))


def test_the_command_shows_cuts_times_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w3 w4"}\n' * 9)
    given = run_file(tmp_path, data={"train": str(tmp_path / "rows.jsonl")}, framework="sfl-v1")
    words = [f"{key}={value}".replace("'", "") for key, value in given.items()]
    with pytest.raises(SystemExit) as end:
        app(["plan", *words, "planner={name: splitft-adaptive-cut, cut: 1}", "profile=laptop+dsl"])
    out = capsys.readouterr().out
    assert not end.value.code
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
    (row,) = [row for row in rows if row[0] == "client-2" and len(row) == 6]
    assert row[1:4] == ["1", "1-1", "0"]  # the budget is the median's time at the first cut
    assert row[4].endswith(" s")
    assert row[5].endswith("B")
    assert "bytes of one step of one client" in out
    assert "sets the cuts once the data are read" not in out
