"""What is said before a run begins of what its server can read, and the run that a client can audit by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from apart import Apart
from cutlayer.audit import known
from cutlayer.audit.known import measured, warnings
from cutlayer.audit.own import own_run
from cutlayer.cli.main import app
from cutlayer.config import load_config
from defending import run_of
from spine import TWO, U
from tiny import text_rows

LINES = [
    {"model": "a", "cut": 1, "tail": 0, "attack": "causal-search", "first": 1.0, "last": 0.93},
    {"model": "a", "cut": 1, "tail": 0, "attack": "label-solve", "first": 1.0, "last": 0.99},
    {"model": "a", "cut": 2, "tail": 1, "attack": "causal-search", "first": 1.0, "last": 0.2},
    {"model": "a", "cut": 2, "tail": 1, "attack": "label-solve", "first": 0.998, "last": 0.996},
]  # fmt: skip


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "measured", lambda: LINES)


def said(root: Path, defense: Any = (), **changes: Any) -> str:
    return " ".join(warnings(load_config(run_of(root, defense, **changes)), 4, command="cutlayer audit X"))


def test_what_comes_with_the_package_is_what_the_benchmark_writes() -> None:
    found = measured()
    assert {"causal-search", "label-solve"} == {one["attack"] for one in found}
    assert all(set(one) == set(LINES[0]) and 0 <= one["first"] <= 1 for one in found)


@pytest.mark.usefixtures("lines")
def test_a_known_leak_is_said_with_its_number_and_a_command(tmp_path: Path) -> None:
    words = said(tmp_path)
    assert "with 1 head blocks an attack got back 93 to 100 % of the tokens (docs/results/leakage.md)." in words
    assert "with 1 tail blocks, an attack got back 100 % of the tokens." in words
    assert words.endswith("measure what can be read: cutlayer audit X")
    assert "The labels, which are the text, are sent to the server" in said(tmp_path, partition=TWO)


@pytest.mark.usefixtures("lines")
def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    """Where too little came back, where nothing was measured, and what a defense is about."""
    assert "head blocks" not in said(tmp_path, partition={**U, "head_blocks": 2})
    assert said(tmp_path, partition={**U, "head_blocks": 0, "tail_blocks": 2}) == ""
    assert "head blocks" not in said(tmp_path, ["dp-forward"])
    assert "tail blocks" not in said(tmp_path, ["clip-noise"])
    assert said(tmp_path, ["dp-forward", "clip-noise"]) == ""


@pytest.mark.usefixtures("lines")
def test_train_says_it_and_an_audit_does_not(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run_of(tmp_path, []), "steps": 1}))
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")])
    words = " ".join(done.output.split())
    assert done.exit_code == 0, words
    assert "the server can read the text" in words
    assert f"cutlayer audit {tmp_path}/out/run.yaml --out {tmp_path}/out-audit" in words
    call = ["audit", f"{tmp_path}/out/run.yaml", "--out", f"{tmp_path}/out-audit", "--budget", "quick"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "the server can read the text" not in " ".join(done.output.split())


EXCHANGES: list[tuple[Any, dict[str, Any], str]] = [
    ({"name": "splitfrozen", "cache": True}, U, "sfl-v2"),
    ({"name": "splitfrozen", "cache": True}, TWO, "sfl-v2"),
    ({"name": "mu-splitfed", "perturbations": 2}, TWO, "sfl-v1"),
]


@pytest.mark.parametrize(("exchange", "partition", "framework"), EXCHANGES, ids=["frozen-u", "frozen", "looking"])
def test_what_a_client_audits_has_the_exchange_of_the_run(
    exchange: Any, partition: Any, framework: str, tmp_path: Path
) -> None:
    tree = run_of(tmp_path, [], exchange=exchange, partition=partition, framework=framework, gradient_accumulation=1)
    config = load_config(tree)
    own = own_run(config, 4, config.client_names[0], model=config.model, data=str(config.data.train), held_out=None)
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump({**own, "steps": 2}))
    assert load_config(str(tmp_path / "audit.yaml")).exchange == config.exchange
    call = ["audit", str(tmp_path / "audit.yaml"), "--out", str(tmp_path / "audit"), "--budget", "quick"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "audit/audit.json").read_text())


def test_who_joins_is_told_and_can_measure_it_with_her_own_text(tmp_path: Path) -> None:
    """The run that is written down has her cut and her defenses, and can be audited."""
    rows = {"ann": text_rows(6, seed=1), "bob": text_rows(4, seed=2)}
    run = Apart(tmp_path / "apart", rows, rounds=1, clients=[{"name": "ann", "head_blocks": 2}, {"name": "bob"}])
    server = run.serve()
    run.ended({**{name: run.join(name) for name in run.files}, "server": server})
    words = " ".join(run.said("ann").split())
    assert "the server can read the text: with 2 head blocks" in words
    assert f"cutlayer audit {run.root}/ann/audit.yaml --out {run.root}/ann/audit" in words
    call = ["audit", f"{run.root}/ann/audit.yaml", "--out", f"{run.root}/ann/audit", "--budget", "quick"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    found = json.loads((run.root / "ann/audit/audit.json").read_text())
    assert {row["attack"] for row in found} >= {"causal-search", "label-solve"}
    assert "causal-search" in done.output
    config = load_config(str(run.root / "ann/audit.yaml"))
    assert config.partition.options["head_blocks"] == 2
    assert config.client_names == ["ann"]
