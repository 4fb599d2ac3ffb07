"""What is counted of connections stays counted when the server is started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from apart import ROWS, Apart
from cutlayer.errors import NetworkError
from cutlayer.links.net.remote import Remote
from cutlayer.tally import FILE, Tally


def test_counts_add_up_over_processes(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        remote = Remote("ann", patience=60)
        remote._sessions, remote.retries, remote._absence = 2, 3, (1.5, None)
        tally = Tally(tmp_path, {"ann": remote, "bob": Remote("bob", patience=60)}, {"ann": 10})
        told = tally.told("ann")
        assert told == {
            "reconnects": 2 * number - 1, "retries": 3 * number, "dropped": 0, "model_bytes": 10 * number,
            "seconds_away": 1.5 * number,
        }  # fmt: skip
        assert tally.told("bob")["reconnects"] == 0
        tally.write()
        tally.write()
    (tmp_path / FILE).write_text('{"ann": {"sessions": "many"}}')
    with pytest.raises(NetworkError, match="begin anew"):
        Tally(tmp_path, {}, {})


def test_a_server_that_is_started_again_goes_on_counting(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", framework="sfl-v1", rounds=6)
    server = run.serve()
    clients = {name: run.join(name, model=False) for name in ROWS}
    assert run.kill_after("server", server, 2, gently=True) == 75, run.said("server")
    run.ended({"server": run.serve(), **clients})
    for name in ROWS:
        found = run.summary()["network"][name]
        assert found["reconnects"] >= 1
        assert found["model_bytes"] > 0, "it was handed by the first process"
