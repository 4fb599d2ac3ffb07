"""A run from Python: keywords set keys, a bar where somebody looks, and a result that may be moved."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import cutlayer
from cutlayer.errors import ConfigError
from cutlayer.report import progress as module
from cutlayer.report.progress import Quiet, RichProgress, reporter
from spine import model
from tiny import text_rows, write_rows


class Screen(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(model()), "data": {"train": str(write_rows(tmp_path / "rows.jsonl", text_rows(8)))}, "clients": 2,
        "partition": {"name": "two-part-split", "head_blocks": 1}, "batch_size": 2, "rounds": 1, "device": "cpu",
    }  # fmt: skip


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []
        self.total = 0

    def start(self, total_steps: int) -> None:
        self.total = total_steps

    def update(self, record: Mapping[str, Any]) -> None:
        self.steps.append(record["client"])

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stop(self) -> None: ...


def test_keywords_set_keys_and_dotted_ones_inner_keys(config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.json"  # JSON is YAML
    file.write_text(json.dumps(config))
    told = Told()
    result = cutlayer.train(
        file, out=tmp_path / "out", progress=told, rounds=3, clients=1, optimizer={"name": "sgd", "lr": 0.1},
        **{"peft.rank": 2, "framework.local_steps": 2},
    )  # fmt: skip
    said = (result.out / "run.yaml").read_text()
    assert all(text in said for text in ("rounds: 3", "rank: 2", "local_steps: 2", "name: sgd"))
    assert result.summary["steps"] == {"client-0": 6}
    assert told.steps == ["client-0"] * told.total
    assert told.total == 6
    assert told.notes[0] == f"output folder: {tmp_path / 'out'}"
    with pytest.raises(ConfigError, match="Did you mean 'rounds'"):
        cutlayer.train(file, out=tmp_path / "other", ronds=2)


def test_a_bar_is_shown_in_a_terminal_and_nothing_elsewhere(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a log with colours is no terminal
    monkeypatch.setenv("TERM", "xterm")
    disable_progress_bar()  # Transformers' own, of loading
    cutlayer.train(config, out=tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    cutlayer.train(config, out=tmp_path / "bar")
    shown = screen.getvalue()
    assert "2/2" in shown
    for said in ("loss ", "tokens/s", "kB sent", "output folder: "):
        assert said in shown
    before = len(shown)
    cutlayer.train(config, out=tmp_path / "none", progress=False)
    assert len(screen.getvalue()) == before
    assert capsys.readouterr().out == ""
    enable_progress_bar()


def test_who_is_told_what(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told()
    assert reporter(told) is told
    assert isinstance(reporter(False), Quiet)
    assert isinstance(reporter(None), Quiet)
    asked = reporter(True)
    assert isinstance(asked, RichProgress)
    asked.note("to standard error")
    assert capsys.readouterr() == ("", "to standard error\n")
    monkeypatch.setattr(sys, "stderr", Screen())
    assert isinstance(reporter(None), RichProgress)
    monkeypatch.setattr(sys, "stderr", None)  # pythonw has none
    assert isinstance(reporter(None), Quiet)


def test_in_a_notebook_there_is_a_bar_or_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (None, "a module"):
        monkeypatch.setattr(module, "find_spec", lambda name, there=there: there)
        console = Console(force_jupyter=True, file=io.StringIO())
        monkeypatch.setattr(console, "_render_buffer", lambda buffer: "")
        shown = RichProgress(console)
        monkeypatch.setattr(module.Progress, "start", lambda self: None)
        monkeypatch.setattr(module.Progress, "stop", lambda self: None)
        shown.start(3)
        assert (shown._bar is not None) == (there is not None)
        shown.stop()


def test_the_summary_names_the_result_within_the_folder(config: dict[str, Any], tmp_path: Path) -> None:
    for peft, name in (("lora", "adapter"), ("full", "model")):
        result = cutlayer.train(config, out=tmp_path / peft, peft=peft)
        assert result.adapter == tmp_path / peft / name
        shutil.move(tmp_path / peft, tmp_path / "moved" / peft)
        moved = tmp_path / "moved" / peft
        summary = json.loads((moved / "summary.json").read_text())
        assert summary["adapter"] == name
        assert list((moved / summary["adapter"]).glob("*.safetensors"))
        assert cutlayer.train(resume=moved).adapter == moved / name


def test_the_result_is_on_the_disk_before_the_summary_says_so(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of the adapter and its folder are synced under their last name before summary.json gets its own."""
    synced: list[Path] = []
    at_the_end: list[set[Path]] = []
    fsync, replace = os.fsync, Path.replace

    def syncing(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replacing(path: Path, target: Path) -> Path:
        if Path(target).name == "summary.json":
            at_the_end.append({*synced})
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    out = cutlayer.train(config, out=tmp_path / "out").out
    (before,) = at_the_end
    draft = out / ".adapter.draft"
    assert {draft / file.name for file in (out / "adapter").iterdir()} <= before
    assert {draft, out} <= before
    assert synced.index(draft / "adapter_model.safetensors") < len(synced) - 1 - synced[::-1].index(out)
    assert synced[-1] == out  # and the summary's name after it
