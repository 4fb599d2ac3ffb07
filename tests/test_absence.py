"""Over the network clients are lost and taken back: with the bits of the simulation in which the same are lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cutlayer
from apart import ROWS, Apart, Command, Trap, steps
from cutlayer.presence import Presence
from spine import TWO, U, often

PATIENCE = ("--patience", "2")
KINDS = {"two-part": TWO, "u-shape": U}
MESSAGES = {"two-part": ["head_forward", "head_backward"], "u-shape": ["head_forward", "tail_step", "head_backward"]}
FRAMEWORKS = ["sfl-v1", "sfl-v2", "sequential-sl", "psl", "gsfl", "p-sl", "hsfl", "multisfl"]


def lost_at(monkeypatch: pytest.MonkeyPatch, message: int, away: dict[str, list[int]]) -> None:
    """Whoever is lost in a simulation is so at this message of the round; these are not there in these rounds."""
    begin, there = Presence.begin, Presence.there

    def at(self: Presence, *args: Any) -> None:
        begin(self, *args)
        self._messages.update(dict.fromkeys(self._messages, message))

    def not_away(self: Presence, client: str, number: int) -> bool:
        return number not in away.get(client, []) and there(self, client, number)

    monkeypatch.setattr(Presence, "begin", at)
    monkeypatch.setattr(Presence, "there", not_away)


def simulated(run: Apart, out: Path, monkeypatch: pytest.MonkeyPatch, message: int) -> Any:
    """The same run in one process, with the same clients lost and away in the rounds that the server wrote down."""
    told = run.summary()["network"]
    lost_at(monkeypatch, message, {name: told[name]["away"] for name in ROWS})
    tree = run.simulated
    for client in tree["clients"]:
        client["fails"] = told[client["name"]]["lost"]
    return cutlayer.train(tree, out=out)


def both(run: Apart, monkeypatch: pytest.MonkeyPatch, message: int) -> dict[str, Any]:
    """What the server wrote down of ann, whose run has the bits of the simulation."""
    simulated(run, run.root / "one", monkeypatch, message)
    assert run.same(run.root / "one")
    strip = [s[:4] for s in steps(run.root / "server")]
    assert strip == [s[:4] for s in steps(run.root / "one")]
    found: dict[str, Any] = run.summary()["network"]["ann"]
    return found


def killed_and_back(run: Apart, verb: str, *more: str) -> dict[str, Command]:
    """Ann is killed in round 1 at this request, and is taken back in the next one, for which bob waits."""
    back = run.root / "back"
    server = run.serve(*PATIENCE, *more)
    ann = run.join("ann", traps=[Trap(verb, 1, "kill")])
    bob = run.join("bob", traps=[Trap("keep", 2, "wait", str(back))])
    run.until("server", "'ann' is lost")
    ann.wait()
    ann = run.join("ann")
    run.until("server", "client 'ann' is here", 2)
    back.touch()
    return {"ann": ann, "bob": bob, "server": server}


@pytest.mark.parametrize(
    ("framework", "kind", "verb"),
    often(
        [(name, kind, verb) for name in FRAMEWORKS for kind in KINDS for verb in MESSAGES[kind]],
        ("sfl-v2", "u-shape", "tail_step"),
    ),
)
def test_a_client_lost_in_a_round_is_lost_as_in_a_simulation(
    framework: str, kind: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Apart(tmp_path / "apart", framework=framework, partition=KINDS[kind], rounds=4)
    run.ended(killed_and_back(run, verb))
    found = both(run, monkeypatch, MESSAGES[kind].index(verb))
    assert (found["lost"], found["away"]) == ([1], [])
    assert "client 'ann' is taken back, as it was after round 1" in run.said("server")
