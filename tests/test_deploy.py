"""``deploy/`` and its page: what they name exists, and they agree with each other."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cutlayer.cli.main import app
from cutlayer.draining import DRAIN, Paused
from cutlayer.measures import COUNTERS, GAUGES
from cutlayer.run import Interrupted

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
ELSEWHERE = {  # of the server itself, and of the process
    "info", "process_peak_memory_bytes", "draining", "certificate_end_seconds", "sessions", "refused_sessions_total",
    "gpu_memory_bytes",
}  # fmt: skip
KNOWN = {name for name, _, _ in GAUGES} | {f"{name}_total" for name, _, _ in COUNTERS} | ELSEWHERE


def options(words: list[str]) -> dict[str, Any]:
    """What ``cutlayer WORDS`` would be called with; unknown options are refused."""
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    parameters: dict[str, Any] = command.make_context(words[0], words[1:]).params
    return parameters


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment, method-assign]
    found.read_string((DEPLOY / "cutlayer.service").read_text())
    return found


def container() -> dict[str, list[str]]:
    """By instruction, its arguments in order; lines that go on are joined."""
    found: dict[str, list[str]] = {}
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            found.setdefault(word, []).append(rest.strip())
    return found


def test_unit_and_container_serve_with_options_that_exist() -> None:
    program, *words = shlex.split(unit()["Service"]["ExecStart"])
    assert program.endswith("/bin/cutlayer")
    there = options(words)
    entry, command = (json.loads(container()[word][0]) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["cutlayer"]
    assert options(command) == there, "both serve in the same way"
    assert there["status"].startswith("127.0.0.1:")
    assert there["log_format"] == "json"
    assert there["drain"] == DRAIN == options(["serve", "r.yaml", "--bind", "h:1", "--out", "o"])["drain"]
    with pytest.raises(Exception, match="No such option"):
        options([*words, "--no-such-option"])


def test_the_unit_waits_for_the_drain_and_knows_its_exit_codes() -> None:
    service = unit()["Service"]
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) >= options(shlex.split(service["ExecStart"])[1:])["drain"] + 45
    assert service["Restart"] == "on-failure"
    codes = [str(Paused.code), str(Interrupted.code)]
    assert service["SuccessExitStatus"].split() == codes
    for code in ("0", "2", *codes):
        assert f"| {code} | " in PAGE, code
    out = str(options(shlex.split(service["ExecStart"])[1:])["out"])
    assert out.startswith(service["ReadWritePaths"] + "/")
    assert service["ReadWritePaths"] == f"/var/lib/{service['StateDirectory']}"
    assert service["ProtectSystem"] == "strict"
    assert service["NoNewPrivileges"] == "yes"
    assert service["CapabilityBoundingSet"] == ""


def test_the_container_copies_what_is_there_and_does_not_run_as_root() -> None:
    found = container()
    for words in found["COPY"]:
        for name in words.split()[:-1]:
            assert (ROOT / name).exists(), name
    assert found["USER"] == ["cutlayer"]
    assert "useradd --system" in found["RUN"][0]
    assert "-c constraints.txt" in found["RUN"][1]
    check = json.loads(found["HEALTHCHECK"][0].partition("CMD ")[2])
    compile(check[2], "healthcheck", "exec")
    assert options(json.loads(found["CMD"][0]))["status"] in check[2]


def test_alerts_ask_for_metrics_that_there_are() -> None:
    rules = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
    asked = {name for rule in rules for name in re.findall(r"cutlayer_(\w+)", rule["expr"])}
    assert len(asked) >= 5
    assert asked <= KNOWN
    states = {state for rule in rules for state in re.findall(r'state="(\w+)"', rule["expr"])}
    assert states == {"training", "waiting"}
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    status = options(shlex.split(unit()["Service"]["ExecStart"])[1:])["status"]
    assert job["static_configs"][0]["targets"] == [status]
    assert prometheus["rule_files"] == ["alerts.yml"]
    assert all(f'job="{job["job_name"]}"' in rule["expr"] for rule in rules if rule["expr"].startswith("up"))


def test_every_metric_is_documented_and_every_documented_one_is_there() -> None:
    table = PAGE.partition("| metric, each begins")[2].partition("\n\n")[0]
    told = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert told == KNOWN


def test_every_reason_of_a_refusal_is_documented() -> None:
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    given = {"protocol", "other", "later", *re.findall(r'Refused\([^"]*(?:"[^"]*"[^"()]*)*?reason="(\w+)"', source)}
    given |= set(re.findall(r'^\s+reason="(\w+)",$', source, re.MULTILINE))
    row = next(line for line in PAGE.splitlines() if line.startswith("| `sessions`"))
    assert given == set(re.findall(r"`(\w+)`", row.split("|")[2])) - {"reason"}
