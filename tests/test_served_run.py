"""What a server does around a run: it ends the sessions of the revoked, goes back whole, and parts from all."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apart import ROWS, Apart
from cutlayer import checkpoint, service
from cutlayer.attempt import Attempt
from cutlayer.computing import Computing
from cutlayer.errors import Disconnected, Refused
from cutlayer.issuing import authority
from cutlayer.keys import client_keys, server_keys
from cutlayer.links.net.connecting import connect
from cutlayer.links.net.tls import Credentials
from cutlayer.models.sharing import SharedModels
from cutlayer.report.progress import Quiet
from cutlayer.run import Result
from cutlayer.served_run import Patience, ServedRun
from cutlayer.service import Service
from cutlayer.serving import _checked
from network import run as run_async


def test_the_session_of_a_client_that_is_revoked_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within ``RECHECK`` seconds of the command, while it does nothing that the server would look at."""
    monkeypatch.setattr(service, "RECHECK", 0.05)
    keys, out = tmp_path / "keys", tmp_path / "server"
    with authority(keys, make=True) as ca:
        ca.add(hosts=["localhost"], clients=[*ROWS], days=30)
    config = _checked(str(Apart(tmp_path / "apart").file), (), out)

    async def scenario() -> None:
        served = Service("localhost:0", server_keys(keys / "server"), Quiet())
        served.begin("", config, out, Patience(60))
        going = asyncio.ensure_future(served.run())
        while not served.port:
            await asyncio.sleep(0.01)
        sessions = {}
        for name in ROWS:
            own = client_keys(keys / name)
            sessions[name] = await connect(
                f"localhost:{served.port}", Credentials(own.ca, own.certificate, own.key), own.token,
                {"client": name, "wants": "run"},
            )  # fmt: skip
        path = keys / "server/clients.json"
        whole = path.read_text()
        path.write_text(whole[: len(whole) // 2])  # as while it is copied
        with pytest.raises(Disconnected, match="cannot read its list of clients"):
            await connect(
                f"localhost:{served.port}", Credentials(own.ca, own.certificate, own.key), own.token,
                {"client": "bob", "wants": "run"},
            )  # fmt: skip
        await served.listener.recheck()
        assert not any(session.ended.is_set() for session in sessions.values())
        path.write_text(whole)
        with authority(keys) as ca:
            ca.revoke("ann")
        with pytest.raises(Refused, match="revoked"):
            await sessions["ann"].receive()
        assert not sessions["bob"].ended.is_set()
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)

    run_async(scenario())


def test_a_server_stays_until_all_have_heard_that_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who missed the goodbye comes back for it, to a server that is still there."""
    out = tmp_path / "server"
    config = _checked(str(Apart(tmp_path / "apart").file), (), out)
    result = Result(out, out / "adapter", {})

    async def driven(run: ServedRun) -> Result:
        return result

    async def scenario() -> None:
        monkeypatch.setattr(ServedRun, "_driven", driven)
        monkeypatch.setattr("cutlayer.served_run.FAREWELL", 100.0)
        computing = Computing()
        run = ServedRun(
            "", config, out, patience=Patience(60, "end"), progress=Quiet(), computing=computing, models=SharedModels()
        )
        serving = asyncio.ensure_future(run.serve())
        for name in ROWS:
            done, _ = await asyncio.wait([serving], timeout=0.3)
            assert not done, f"it did not wait for {name}"
            run.remotes[name].heard.set()
        assert await serving is result
        computing.close()

    run_async(scenario())


@pytest.mark.parametrize("number", [0, 2])
def test_checkpoints_that_not_all_hold_are_removed(number: int, tmp_path: Path) -> None:
    """Else a server that is stopped before the next one would go on from one of a past that was given up."""
    kept = tmp_path / "checkpoints"
    for one in range(1, 5):
        (kept / f"round-{one:06d}").mkdir(parents=True)
    restored: list[Any] = []
    meter = SimpleNamespace(restore=restored.append)
    counters = SimpleNamespace(lines=0, uploads=0)
    engine: Any = SimpleNamespace(run=SimpleNamespace(meter=meter, counters=counters), restore=restored.append)
    nothing: Any = None
    watch: Any = SimpleNamespace(note=lambda text: None)
    attempt = Attempt(nothing, tmp_path, nothing, nothing, [], nothing, watch, lambda: False)
    attempt._go_back(engine, number)
    assert checkpoint.rounds(kept) == list(range(1, number + 1))
    assert restored == [kept / "round-000002" if number else None]
