"""Over the network clients are lost and taken back: with the bits of the simulation in which the same are lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

import cutlayer
from apart import ROWS, Apart, Command, Trap, steps
from cutlayer.driver import Run
from cutlayer.presence import Lost, Presence
from spine import TWO, U, often

PATIENCE = ("--patience", "2")
KINDS = {"two-part": TWO, "u-shape": U}
MESSAGES = {"two-part": ["head_forward", "head_backward"], "u-shape": ["head_forward", "tail_step", "head_backward"]}
FRAMEWORKS: dict[str, dict[str, Any]] = {
    **{name: {"framework": name} for name in ("sfl-v1", "sfl-v2", "sequential-sl", "psl", "gsfl", "p-sl")},
    "hsfl": {"framework": {"name": "hsfl", "intervals": [1, 1, 1]}},
    "sfl-v1-twice": {"framework": {"name": "sfl-v1", "local_steps": 2}},
    "multisfl": {"framework": {"name": "multisfl", "replay": False}},
    "p-sl-parallel": {"framework": {"name": "p-sl", "form": "parallel"}},
    "clipped": {"framework": "sfl-v2", "max_grad_norm": 0.1},
}


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
    lost_at(monkeypatch, message, {name: told[name]["away"] for name in run.files})
    tree = {**run.simulated, "record_wire": None}
    for client in tree["clients"]:
        client["fails"] = told[client["name"]]["lost"]
    return cutlayer.train(tree, out=out)


def both(run: Apart, monkeypatch: pytest.MonkeyPatch, message: int, *, unanswered: int = 1) -> dict[str, Any]:
    """What the server wrote down of ann, whose run has the bits of the simulation.

    And its bytes, but for the last request to a client that was lost, which left before anybody could know; where all
    go back to a checkpoint, what was sent since is not counted either.
    """
    alone = simulated(run, run.root / "one", monkeypatch, message).summary
    assert run.same(run.root / "one")
    assert steps(run.root / "server") == steps(run.root / "one")
    ours = run.summary()
    assert ours["bytes_up"] == alone["bytes_up"]
    assert ours["frames"] - alone["frames"] == unanswered
    lengths = unanswered_of(run, "ann")
    assert len(lengths) == unanswered
    assert sum(ours["bytes"].values()) - sum(alone["bytes"].values()) == sum(lengths)  # an edge's too
    found: dict[str, Any] = ours["network"]["ann"]
    return found


def unanswered_of(run: Apart, client: str) -> list[int]:
    """The bytes of each request to a client that was not answered, by the server's record of frames."""
    lengths, asked = [], None
    for line in map(json.loads, (run.root / "wire" / "frames.jsonl").read_text().splitlines()):
        if line["receiver"] == client:
            if asked is not None:
                lengths.append(asked)
            asked = line["length"]
        elif line["sender"] == client:
            asked = None
    return lengths


def recorded(run: Apart) -> str:
    """Let the server write down every frame."""
    return f"record_wire={run.root / 'wire'}"


def killed_and_back(run: Apart, verb: str, number: int = 1) -> dict[str, Command]:
    """Ann is killed in round 1 at this request of that step, and is taken back in the next one; bob waits for it."""
    back = run.root / "back"
    server = run.serve(*PATIENCE, recorded(run))
    ann = run.join("ann", traps=[Trap(verb, number, "kill")])
    bob = run.join("bob", traps=[Trap("keep", 2, "wait", str(back))])
    run.until("server", "Client 'ann' is gone")
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
    run = Apart(tmp_path / "apart", **FRAMEWORKS[framework], partition=KINDS[kind], rounds=4)
    local = 2 if framework == "sfl-v1-twice" else 1
    run.ended(killed_and_back(run, verb, 2 * local - 1))
    found = both(run, monkeypatch, (local - 1) * len(MESSAGES[kind]) + MESSAGES[kind].index(verb))
    assert (found["lost"], found["away"]) == ([1], [])
    assert "client 'ann' is taken back, as it was after round 1" in run.said("server")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"framework": "sfl-v1", "mixing": "minibatch-sfl"},
        {"framework": {"name": "psl", "joint": "concatenate", "grad_scale": "joint"}},
    ],
    ids=["minibatch-sfl", "psl-joint"],
)
def test_where_batches_meet_the_round_is_made_again_without_the_lost_one(
    changes: dict[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step cannot be taken apart, so all go back to the begin of the round; nobody waits for ever at the pool."""
    run = Apart(tmp_path / "apart", **changes, partition=KINDS[kind], rounds=4)
    run.ended(killed_and_back(run, MESSAGES[kind][-1]))
    found = both(run, monkeypatch, 0, unanswered=0)
    assert (found["lost"], found["away"]) == ([], [1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_where_cuts_move_the_round_is_made_again_without_the_lost_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was set back to the begin of a round would have the cut from before a move, so all go back to it."""
    planner = {"name": "splitft-adaptive-cut", "every": 1, "cut": 1, "least": 0, "gamma": 2.0}
    unlike = {**ROWS, "ann": [{"text": "w5 w6 w7 w8 w5 w6 w7 w8 w5 w6"} for _ in range(7)]}
    run = Apart(
        tmp_path / "apart", unlike, framework="sfl-v1", partition=KINDS[kind], planner=planner, rounds=6,
        optimizer={"name": "adamw", "lr": 0.05},
    )  # fmt: skip
    run.ended(killed_and_back(run, MESSAGES[kind][-1]))
    alone = simulated(run, run.root / "one", monkeypatch, 0)
    assert run.same_state(run.root / "one")
    assert [s[:4] for s in steps(run.root / "server")] == [s[:4] for s in steps(run.root / "one")]
    assert (run.summary()["network"]["ann"]["lost"], run.summary()["network"]["ann"]["away"]) == ([], [1])
    assert run.summary()["cuts"] == alone.summary["cuts"]
    assert alone.summary["cuts"], "somebody's cut moved"


def ended_together(run: Apart, back: Path, processes: dict[str, Command]) -> None:
    """Once ann is there again bob, who waits for that, goes on; all end well."""
    run.until("server", "client 'ann' is here", 2)
    back.touch()
    run.ended(processes)


class Proxy:
    """A way to a port of this machine that can be cut, without a word to either end."""

    def __init__(self, port: int) -> None:
        self.to, self.silent = port, False
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("localhost", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                one, _ = self._listener.accept()
                other = socket.create_connection(("localhost", self.to))
                self._ends += [one, other]
                for ends in ((one, other), (other, one)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, come: socket.socket, go: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := come.recv(65536):
                if not self.silent:
                    go.sendall(data)

    def mend(self) -> None:
        """New connections are carried; what was said into the void stays there."""
        for end in self._ends:
            end.close()
        self._ends, self.silent = [], False

    def close(self) -> None:
        """It is not there any more."""
        self._listener.close()
        self.mend()


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["sfl-v1", "psl", "sequential-sl"])
def test_a_frozen_client_is_taken_back_when_it_thaws(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it still answers to the old request is not used; the process is the same, and sets itself back."""
    run = Apart(tmp_path / "apart", **FRAMEWORKS[framework], rounds=4)
    back, run.pulse = tmp_path / "back", (0.5, 4.0)
    server = run.serve(*PATIENCE, recorded(run))
    ann = run.join("ann", traps=[Trap("tail_step", 1, "stop")])
    bob = run.join("bob", traps=[Trap("keep", 2, "wait", str(back))])
    ann.frozen()
    run.until("server", "'ann' is lost")
    ann.thaw()
    ended_together(run, back, {"ann": ann, "bob": bob, "server": server})
    found = both(run, monkeypatch, 1)
    assert (found["lost"], found["away"]) == ([1], [])
    assert found["reconnects"] >= 1


@pytest.mark.slow
def test_a_client_that_was_cut_off_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes go nowhere, and nobody says so; both ends notice by the silence."""
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=4)
    asked, back, run.pulse = tmp_path / "asked", tmp_path / "back", (0.5, 4.0)
    server = run.serve(*PATIENCE, recorded(run))
    proxy = Proxy(run.port)
    ann = run.join("ann", port=proxy.port, traps=[Trap("tail_step", 1, "wait", str(asked))])
    bob = run.join("bob", traps=[Trap("keep", 2, "wait", str(back))])
    run.reached(asked)
    proxy.silent = True
    asked.touch()
    run.until("server", "'ann' is lost")
    proxy.mend()
    ended_together(run, back, {"ann": ann, "bob": bob, "server": server})
    proxy.close()
    found = both(run, monkeypatch, 1)
    assert (found["lost"], found["away"]) == ([1], [])


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["sfl-v1", "sfl-v2", "sequential-sl", "psl", "gsfl", "p-sl-parallel"])
def test_absent_for_rounds_while_the_server_is_started_again(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes on without whom it does not find, and takes it back as it was when it was lost."""
    run = Apart(tmp_path / "apart", **FRAMEWORKS[framework], rounds=9)
    stop, back = tmp_path / "stop", tmp_path / "back"
    server = run.serve(*PATIENCE, recorded(run))
    ann = run.join("ann", traps=[Trap("tail_step", 1, "kill")])
    bob = run.join("bob", traps=[Trap("keep", 4, "wait", str(stop)), Trap("keep", 7, "wait", str(back))])
    run.reached(stop)
    ann.wait()
    server.kill()
    server.wait()
    stop.touch()
    server = run.serve("--patience", "4", recorded(run))
    run.reached(back)
    ann = run.join("ann")
    ended_together(run, back, {"ann": ann, "bob": bob, "server": server})
    found = both(run, monkeypatch, 1)
    assert found["lost"] == [1]
    assert found["away"] == [2, 3, 4, 5, 6]
    assert "client 'ann' is taken back, as it was after round 1" in run.said("server")


@pytest.mark.slow
def test_between_two_checkpoints_a_client_holds_the_begin_of_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Apart(tmp_path / "apart", framework="psl", rounds=8, checkpoint_every=5)
    back = tmp_path / "back"
    server = run.serve(*PATIENCE, recorded(run))
    ann = run.join("ann", traps=[Trap("tail_step", 3, "kill")])
    bob = run.join("bob", traps=[Trap("keep", 5, "wait", str(back))])
    run.reached(back)
    ann.wait()
    ann = run.join("ann")
    ended_together(run, back, {"ann": ann, "bob": bob, "server": server})
    found = both(run, monkeypatch, 1)
    assert (found["lost"], found["away"]) == ([3], [4])


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["sfl-v1", "sfl-v2"])
@pytest.mark.parametrize("verb", ["get_state", "set_state"])
def test_lost_in_a_merge(framework: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it gave its part, it is left out; after, its part counts, but the client goes on from before the round."""
    run = Apart(tmp_path / "apart", framework=framework, rounds=4)
    run.ended(killed_and_back(run, verb))
    call = {"get_state": "_asked", "set_state": "_give"}[verb]
    original = getattr(Run, call)

    async def lost(self: Run, client: str, *args: Any) -> Any:
        if (client, self.counters.rounds) == ("ann", 1):
            raise Lost(client)
        return await original(self, client, *args)

    monkeypatch.setattr(Run, call, lost)
    found = both(run, monkeypatch, 99)
    assert (found["lost"], found["away"]) == ([1], [])


@pytest.mark.slow
def test_when_nobody_is_left_the_server_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Apart(tmp_path / "apart", framework="psl", rounds=3)
    server = run.serve(*PATIENCE, recorded(run))
    first = {name: run.join(name, traps=[Trap("tail_step", 1, "kill")]) for name in ROWS}
    run.until("server", "waits for a client: ann, bob")
    for client in first.values():
        client.wait()
    run.ended({**{name: run.join(name) for name in ROWS}, "server": server})
    simulated(run, run.root / "one", monkeypatch, 1)
    assert all(run.summary()["network"][name]["lost"] == [1] for name in ROWS)


@pytest.mark.slow
def test_a_client_whose_limit_is_reached_leaves_for_good(tmp_path: Path) -> None:
    """The others go on; what it refused is told, and it ends with its part as it was, says so, and ends with code 2."""
    run = Apart(tmp_path / "apart", framework="sfl-v1", rounds=4)
    policy = tmp_path / "policy.yaml"
    policy.write_text("most: {bytes: 50 kB}\nmay_leave: {error_texts: true}\n")
    server = run.serve(*PATIENCE, recorded(run))
    clients = {"ann": run.join("ann", "--policy", str(policy)), "bob": run.join("bob")}
    assert clients["ann"].wait() == 2, run.said("ann")
    run.ended({"server": server, "bob": clients["bob"]})
    found = run.summary()["network"]["ann"]
    (lost,) = found["lost"]
    said = " ".join(run.said("ann").split())
    assert f"This client left the run in round {lost}, as it refused what it was asked for" in said
    assert f"Its own part as it was after {lost} rounds is in" in said
    assert "the run is done" not in said
    assert "left this machine for 'ann'" in said
    assert found["away"] == list(range(lost + 1, 4)) != []
    assert "most.bytes" in found["gone"]
    made = run.summary()["steps"]
    assert made["ann"] < made["bob"] == 4
    assert run.adapter("ann").keys() == run.adapter("bob").keys()


@pytest.mark.slow
def test_a_client_that_lost_its_folder_begins_anew(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", framework="sfl-v1", rounds=5)
    back = tmp_path / "back"
    server = run.serve(*PATIENCE, recorded(run))
    ann = run.join("ann", traps=[Trap("tail_step", 1, "kill")])
    bob = run.join("bob", traps=[Trap("keep", 3, "wait", str(back))])
    run.reached(back)
    ann.wait()
    shutil.rmtree(run.root / "ann")
    ann = run.join("ann")
    ended_together(run, back, {"ann": ann, "bob": bob, "server": server})
    assert "client 'ann' does not hold round 1 any more, so it begins anew" in run.said("server")
    assert run.summary()["steps"] == {"ann": 3, "bob": 5}
