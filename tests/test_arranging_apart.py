"""Selections with sketches between processes: groups, clusters and choices, with the numbers of the run in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cutlayer
from apart import Apart, steps
from arranged import two_domains
from spine import TWO, U, often
from test_network import both

KINDS = {"two-part": TWO, "u-shape": U}
ALLOWED = "may_leave: {sketches: true, error_texts: true}\n"
LINEAR = {"name": "adamw", "lr": 0.01, "schedule": "linear"}
GROUPED = {"name": "gsfl", "groups": "selection", "local_steps": 2}
SPEEDS = [
    {"name": f"c{i}", "profile": {"flops": 1e6 * (1 + 3 * i), "up_mbps": 10, "down_mbps": 10, "rtt_ms": 5}}
    for i in range(3)
]
CASES: dict[str, dict[str, Any]] = {
    "unlike-groups": {
        "framework": {**GROUPED, "intra": "psl"}, "clients": SPEEDS,
        "selection": {"name": "parallelsfl", "sketch": "tokens", "place_top": "server", "size": 2},
    },
    "unlike-groups-in-turn": {
        "framework": GROUPED, "selection": {"name": "parallelsfl", "sketch": "lengths", "place_top": "server", "size": 2},
    },
    "clusters": {
        "framework": {"name": "sfl-v1", "local_steps": 2},
        "selection": {"name": "csfl", "sketch": "tokens", "threshold": 0.1, "refresh": 2},
    },
    "clusters-in-turn": {
        "framework": "sfl-v2", "selection": {"name": "csfl", "sketch": "features", "threshold": 0.1}, "data": {"eval": ""},
    },
    "one-cluster": {"framework": "sfl-v2", "selection": {"name": "csfl", "sketch": "lengths", "threshold": 1.9}},
    "choices": {"framework": "sfl-v1", "selection": {"name": "pairingfl-selection", "sketch": "tokens"}, "rounds": 5},
}  # fmt: skip


def arranged(root: Path, case: str, kind: str, **changes: Any) -> Apart:
    """A run of three clients of two domains, which follow a selection."""
    about = {"optimizer": LINEAR, "rounds": 4, "eval_every": 1, **CASES[case], **changes}
    run = Apart(root / "apart", two_domains(3), partition=KINDS[kind], **about)
    (root / "policy.yaml").write_text(ALLOWED)
    return run


@pytest.mark.parametrize(
    ("case", "kind"), often([(case, kind) for case in CASES for kind in KINDS], ("unlike-groups", "u-shape"))
)
def test_an_arrangement_between_processes_changes_no_number(case: str, kind: str, tmp_path: Path) -> None:
    run = arranged(tmp_path, case, kind)
    summary, alone = both(run, tmp_path / "one", "--policy", str(tmp_path / "policy.yaml"))
    assert summary["arrangement"] == json.loads(json.dumps(alone["arrangement"]))
    if "groups" in case:
        assert len(summary["arrangement"]["groups"]) == 2
