"""A client that dies at the same step each time and is started again at once: the others are done nevertheless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apart import Apart, Command, Trap, steps
from cutlayer.comings_back import COMINGS_BACK, ComingsBack
from spine import often
from test_absence import simulated

CASES: dict[str, dict[str, Any]] = {
    "sfl-v1": {"framework": "sfl-v1"},
    "sfl-v2": {"framework": "sfl-v2"},
    "minibatch-sfl": {"framework": "sfl-v1", "mixing": "minibatch-sfl"},  # where a round cannot go on without one
}


def started_again(run: Apart, server: Command, name: str, trap: Trap) -> int:
    """Start a client that dies of the trap until it does not; how often it was started."""
    for number in range(1, 30):
        if run.join(name, traps=[trap]).wait() != -9:
            return number
        assert server.poll() is None, run.said("server")
    raise AssertionError("The server lets one client stop the run for ever.")


@pytest.mark.parametrize("case", often(CASES, "sfl-v1"))
def test_a_client_that_always_dies_is_lost_and_the_others_go_on(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice all go back with it; after that it alone loses, in this round and in those that follow."""
    run = Apart(tmp_path / "apart", **CASES[case], rounds=5)
    server = run.serve("--patience", "300")
    bob = run.join("bob")
    assert started_again(run, server, "ann", Trap("tail_step", 3, "kill")) <= 2 * COMINGS_BACK + 4
    run.ended({"bob": bob, "server": server})
    assert run.said("server").count("All go back to the last round") <= (2 if case != "minibatch-sfl" else 4)
    found = run.summary()["network"]["ann"]
    assert sorted({*found["lost"], *found["away"]}) == [3, 4]
    assert run.summary()["steps"] == {"ann": 3, "bob": 5}
    simulated(run, run.root / "one", monkeypatch, 1)
    assert steps(run.root / "server") == steps(run.root / "one")
    assert run.same(run.root / "one")


@pytest.mark.slow
def test_where_a_run_ends_with_a_lost_client_it_ends(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", framework="sfl-v1", rounds=5)
    server = run.serve("--patience", "300", "--absent", "end")
    bob = run.join("bob")
    trap = Trap("tail_step", 3, "kill")
    while server.poll() is None:
        ann = run.join("ann", traps=[trap])
        while ann.poll() is None and server.poll() is None:
            ann.wait(0.1)
    assert server.wait() == 2
    assert "started again" in run.said("server")
    for one in (ann, bob):
        one.kill()
        one.wait()


def test_who_has_finished_a_round_may_come_back_again() -> None:
    found = ComingsBack()
    assert [found.too_often("ann", process, 3) for process in "aab"] == [False] * 3, "by processes, not by requests"
    found.begins(3, {})  # the same round, again
    assert found.too_often("ann", "c", 3)
    assert (found.sits_out("ann", 3), found.sits_out("ann", 4), found.sits_out("bob", 3)) == (True, False, False)
    found.begins(4, {"ann": 3})  # it was lost, and is taken back now
    assert found.too_often("ann", "d", 4), "it has finished no round"
    assert found.sits_out("ann", 4)
    found.play(["bob"])
    assert found.sits_out("ann", 4)
    found.play()
    assert not found.sits_out("ann", 4)
    found.begins(5, {})
    assert not found.too_often("ann", "e", 5), "it has finished round 4"
