"""Selections with sketches between processes: groups, clusters and choices, with the numbers of the run in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cutlayer
from apart import Apart, Trap, steps
from arranged import labelled_rows, two_domains
from cutlayer import telling
from cutlayer.agreed import load_secret, make_secret
from cutlayer.seeds import derive
from cutlayer.telling import agreed_number
from spine import TWO, U, model, often
from test_absence import simulated
from test_network import both

KINDS = {"two-part": TWO, "u-shape": U}
Joined = tuple[Apart, list[str]]
LINEAR = {"name": "adamw", "lr": 0.01, "schedule": "linear"}
GROUPED = {"name": "gsfl", "groups": "selection", "local_steps": 2}
HASHES = {"name": "gsfl-hash-grouping", "groups": 2, "bits": 64, "flip": 0.1}
SPEEDS = [
    {"name": f"c{i}", "profile": {"flops": 1e6 * (1 + 3 * i), "up_mbps": 10, "down_mbps": 10, "rtt_ms": 5}}
    for i in range(4)
]
UNLIKE = {"name": "parallelsfl", "sketch": "tokens", "place_top": "server", "size": 2}
CLASSES = {"model": "distilbert", "data": {"format": "classification", "classes": ["sad", "glad"]}}
CASES: dict[str, dict[str, Any]] = {
    "groups-at-their-speed": {"framework": {**GROUPED, "intra": "psl"}, "selection": UNLIKE, "clients": SPEEDS},
    "groups-in-turn": {"framework": GROUPED, "selection": {**UNLIKE, "sketch": "lengths"}},
    "groups-by-hashes": {"framework": GROUPED, "selection": HASHES, "data": {"eval": None}, "eval_every": None},
    "groups-anew": {
        "framework": {**GROUPED, "intra": "sfl-v2"}, "selection": {**HASHES, "refresh": 2}, "data": {"eval": None},
        "eval_every": None,
    },
    "clusters": {
        "framework": {"name": "sfl-v1", "local_steps": 2},
        "selection": {"name": "csfl", "sketch": "tokens", "threshold": 0.1, "refresh": 2},
    },
    "clusters-by-features": {
        "framework": "sfl-v2", "selection": {"name": "csfl", "sketch": "features", "threshold": 0.1, "noise": 0.01},
        "data": {"eval": None}, "eval_every": None,
    },
    "clusters-by-labels": {
        "framework": "sfl-v2", "selection": {"name": "csfl", "sketch": "labels", "threshold": 0.1}, **CLASSES,
    },
    "one-cluster": {"framework": "sfl-v2", "selection": {"name": "csfl", "sketch": "lengths", "threshold": 1.9}},
    "choices": {"framework": "psl", "selection": {"name": "pairingfl-selection", "sketch": "tokens"}, "rounds": 5},
}  # fmt: skip


FIRST = {"groups-at-their-speed": 1, "groups-anew": 2, "clusters": 2}  # of c1, its first step in round 1


def rows_of(case: str) -> dict[str, list[dict[str, Any]]]:
    if case == "clusters-by-labels":
        return {f"c{i}": labelled_rows([i % 2] * 6, seed=i, telling=0.5) for i in range(4)}
    return two_domains(4)


def arranged(root: Path, case: str, kind: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Joined:
    """A run of four clients of two kinds, which follow a selection, and how each of them joins.

    In the simulation the clients have the same secrets as those that join: that of all, and their own.
    """
    about = {"optimizer": LINEAR, "rounds": 4, "eval_every": 1, **CASES[case], **changes}
    if "model" in about:
        about["model"] = str(model(about["model"], num_hidden_layers=4))
    run = Apart(root / "apart", rows_of(case), partition=KINDS[kind], **about)
    (root / "policy.yaml").write_text("may_leave: {sketches: true}\n")
    make_secret(root / "agreed")
    shared = agreed_number(load_secret(root / "agreed"))
    for name in run.files:
        (run.root / name).mkdir()
        (run.root / name / "secret").write_text(name.encode().hex() * 16)
    own = {name: derive("secret of a client", (run.root / name / "secret").read_bytes().hex()) for name in run.files}
    monkeypatch.setattr(telling, "simulated_secrets", lambda seed, client: (shared, own[client]))
    secret = ["--secret", str(root / "agreed")] if CASES[case]["selection"]["name"] == HASHES["name"] else []
    return run, ["--policy", str(root / "policy.yaml"), *secret]


@pytest.mark.parametrize(
    ("case", "kind"), often([(case, kind) for case in CASES for kind in KINDS], ("groups-by-hashes", "u-shape"))
)
def test_an_arrangement_between_processes_changes_no_number(
    case: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, how = arranged(tmp_path, case, kind, monkeypatch)
    summary, alone = both(run, tmp_path / "one", *how)
    found = summary["arrangement"]
    assert found == json.loads(json.dumps(alone["arrangement"]))
    assert len(found["groups"]) == (2 if "groups" in case else 0)
    assert len(set(found["clusters"].values())) == (2 if "clusters" in case else 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST)
def test_killed_parties_find_their_groups_again(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes, slots and the ends of learning rates are those of the undisturbed run."""
    run, how = arranged(tmp_path, case, "u-shape", monkeypatch, rounds=12)
    server = run.serve()
    clients = {name: run.join(name, *how) for name in run.files}
    run.kill_after("c1", clients["c1"], 3)
    clients["c1"] = run.join("c1", *how)
    run.kill_after("server", server, 7)
    run.ended({**clients, "server": run.serve()})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert "going on after round" in run.said("c0")
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)
    assert run.same_state(alone.out)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST)
def test_a_lost_client_of_a_group_is_lost_to_the_round(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All go back to the begin of the round, which is made without it; then it is in its group again."""
    steady = {"name": "adamw", "lr": 0.01}  # a simulation knows beforehand who will be away, and how long rates go
    run, how = arranged(tmp_path, case, "u-shape", monkeypatch, rounds=5, optimizer=steady)
    back, names = tmp_path / "back", list(run.files)
    server = run.serve("--patience", "2")
    waits = {"c0": [Trap("keep", 2, "wait", str(back))], "c1": [Trap("tail_step", FIRST[case], "kill")]}
    clients = {name: run.join(name, *how, traps=waits.get(name, [])) for name in names}
    run.until("server", "Client 'c1' is gone")
    clients["c1"].wait()
    clients["c1"] = run.join("c1", *how)
    run.until("server", "client 'c1' is here", 2)
    back.touch()
    run.ended({**clients, "server": server})
    found = run.summary()["network"]["c1"]
    assert (found["lost"], found["away"]) == ([], [1])
    simulated(run, tmp_path / "one", monkeypatch, 0)
    assert [s[:4] for s in steps(run.root / "server")] == [s[:4] for s in steps(tmp_path / "one")]
    assert run.same(tmp_path / "one")


@pytest.mark.slow
def test_a_client_that_is_lost_before_it_told_its_sketch_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, how = arranged(tmp_path, "groups-by-hashes", "u-shape", monkeypatch)
    server = run.serve("--patience", "2")
    traps = {"c1": [Trap("sketch", 0, "kill")]}
    clients = {name: run.join(name, *how, traps=traps.get(name, [])) for name in run.files}
    run.until("server", "the run waits for c1, who has told no sketch of its data yet")
    clients["c1"].wait()
    clients["c1"] = run.join("c1", *how)
    run.ended({**clients, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert run.summary()["network"]["c1"]["away"] == []
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)
