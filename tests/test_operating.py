"""What an operator has: metrics, health and readiness, logs for a machine to read, and a server that stops in order."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import cutlayer
from apart import LONG, ROWS, Apart, Trap, steps
from cutlayer import logs, status, watching
from cutlayer.draining import Drain, Drained
from cutlayer.errors import NetworkError, Refused
from cutlayer.issuing import authority
from cutlayer.links.net.remote import Remote
from cutlayer.measures import COUNTERS, GAUGES, Measures
from cutlayer.merging import Counters
from cutlayer.real_clock import RealClock
from cutlayer.report.progress import Quiet
from cutlayer.status import status_server
from cutlayer.watching import House, Watch
from cutlayer.wire import Header, Meter, encode
from network import run as run_async
from network import serving

SOURCE = Path(__file__).parents[1] / "src" / "cutlayer"
FILES = sorted(SOURCE.rglob("*.py"))
STARTED = re.compile(r"status at http://(127\.0\.0\.1:\d+)")


def ask(address: str, path: str) -> tuple[int, Any]:
    """The status code, and what was said: metrics as ``{(name, labels): value}``."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as reply:
            code, body = reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        code, body = error.code, error.read().decode()
    return code, values(body) if path == "/metrics" else json.loads(body)


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[f"cutlayer_{name}", frozenset(labels.items())]


def lines(text: str) -> list[dict[str, Any]]:
    """Each line as JSON; one that is none fails."""
    return [json.loads(line) for line in text.splitlines()]


# Between processes.


def test_a_server_that_is_drained_loses_nothing(tmp_path: Path) -> None:
    """It finishes its round, says so, ends with 75, and goes on from there; on the way metrics and logs are true."""
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=12, checkpoint_every=100)
    with authority(tmp_path / "keys", make=True) as ca:
        ca.add(hosts=["localhost"], clients=[*ROWS], days=30)
    as_json = ("--log-format", "json", "--log-level", "debug")
    server = run.serve("--status", "127.0.0.1:0", *as_json, keys=tmp_path / "keys")
    address = STARTED.findall(run.said("server"))[-1]
    assert ask(address, "/healthz") == (200, {"healthy": True, "why": ""})
    code, told = ask(address, "/readyz")
    assert code == 200
    assert told["runs"] == {"run": {"state": "waiting", "missing": ["ann", "bob"]}}
    clients = {name: run.join(name, *as_json, keys=tmp_path / "keys") for name in ROWS}
    metrics, until = run.root / "server" / "metrics.jsonl", time.monotonic() + LONG
    found: dict[Any, float] = {}
    while not any(name == "cutlayer_run_rounds" and count >= 2 for (name, _), count in found.items()):
        assert server.poll() is None, run.said("server")
        assert time.monotonic() < until, run.said("server")
        found = ask(address, "/metrics")[1]
        time.sleep(0.01)
    server.process.terminate()
    assert server.wait() == 75, run.said("server")
    for name in ROWS:
        of_run = {"run": "run", "client": name}
        assert of(found, "client_connected", **of_run) == 1
        assert of(found, "run_steps", **of_run) <= of(found, "steps_total", **of_run)
        assert of(found, "client_bytes_total", **of_run, direction="up") > 1000
        assert of(found, "run_step_loss", **of_run) > 0
    assert of(found, "run_state", run="run", state="training") == 1
    assert of(found, "run_memory_bytes", run="run", what="trained") > 0
    assert of(found, "certificate_end_seconds") > time.time()
    assert of(found, "draining") == 0

    done = len(steps(run.root / "server"))  # of whole rounds, all written down
    assert done % len(ROWS) == 0
    assert 2 * len(ROWS) <= done < 12 * len(ROWS), "it was over before it was asked; give it more rounds"
    rounds = done // len(ROWS)
    for who in ("server", *ROWS):
        kept = sorted(folder.name for folder in (run.root / who / "checkpoints").iterdir())
        assert kept[-1] == f"round-{rounds:06d}", who  # clients also hold the begin of that round
    run.ended({"server": run.serve("--log-format", "json", keys=tmp_path / "keys"), **clients})
    assert run.same(cutlayer.train(run.simulated, out=tmp_path / "one").out)
    assert steps(run.root / "server") == steps(tmp_path / "one")
    assert metrics.is_file()

    secrets = [(tmp_path / "keys" / name / "token").read_text().strip() for name in ROWS]
    texts = [row["text"] for rows in ROWS.values() for row in rows]
    for who in ("server", *ROWS):
        said = run.said(who)
        assert not [secret for secret in [*secrets, *texts, "PRIVATE KEY"] if secret in said], who
        for line in lines(said):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
            assert line["level"] in logs.LEVELS
            assert line["event"]
            assert line["run" if who == "server" else "client"] == ("run" if who == "server" else who)
    told = lines(run.said("server"))
    assert {"ann", "bob"} <= {line.get("client") for line in told if line["event"].startswith("step ")}
    assert any("asked to stop: the round is finished first" in line["event"] for line in told)
    assert any("The server is going down for a while" in line["event"] for line in lines(run.said("ann")))


@pytest.mark.slow
def test_a_server_whose_clients_are_all_away_is_drained_at_once(tmp_path: Path) -> None:
    """Nothing is under way between two rounds, so there is nothing to wait for; what was made since is written down."""
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=12, checkpoint_every=100)
    server = run.serve("--patience", "2", "--status", "127.0.0.1:0")
    address = STARTED.findall(run.said("server"))[-1]
    clients = {name: run.join(name, traps=[Trap("hold", 3, "kill")]) for name in ROWS}
    assert [client.wait() for client in clients.values()] == [-9, -9]
    run.until("server", "waits for a client: ann, bob")
    assert ask(address, "/readyz")[1]["runs"]["run"]["waits"] == ["the run waits for clients that are away: ann, bob"]
    server.process.terminate()
    assert server.wait(60) == 75, run.said("server")
    clients = {"server": run.serve()}
    run.ended({**clients, **{name: run.join(name) for name in ROWS}})
    made = {(number, client) for number, client, *_ in steps(run.root / "server")}
    assert made == {(number, client) for number in range(12) if number != 3 for client in ROWS}, "both were lost in it"


@pytest.mark.slow
def test_a_server_that_waits_for_its_clients_is_drained_at_once(tmp_path: Path) -> None:
    """Nobody has a round to finish: not the clients that are there, nor the server."""
    run = Apart(tmp_path / "apart", rounds=2)
    server = run.serve()
    clients = {"ann": run.join("ann")}
    until = time.monotonic() + LONG
    while "client 'ann' is here" not in run.said("server"):
        assert time.monotonic() < until, run.said("server")
        time.sleep(0.05)
    server.process.terminate()
    assert server.wait() == 75, run.said("server")
    assert not (run.root / "server" / "checkpoints").exists()
    assert "The same command goes on with the run" in run.said("server")
    server = run.serve()
    clients["bob"] = run.join("bob")
    run.ended({**clients, "server": server})
    assert run.summary()["rounds"] == 2


# Metrics.


def watched(name: str = "night") -> Watch:
    return Watch(name, Quiet(), {client: Remote(client, patience=60) for client in ("ann", "bob")})


def scraped(house: House) -> dict[Any, float]:
    registry = CollectorRegistry()
    registry.register(Measures(house))
    return values(generate_latest(registry).decode())


def driven(**more: Any) -> Any:
    """What of a run is read."""
    slot = SimpleNamespace(get=lambda optimizer: {"w": torch.zeros(5), "optimizer/w/exp_avg": torch.zeros(5)})
    party = SimpleNamespace(slots={"shared": slot}, watch=SimpleNamespace(saved=more.pop("saved", 0)))
    return SimpleNamespace(
        counters=Counters(steps={"ann": 3, "bob": 2}, rounds=2), meter=Meter(), clock=RealClock(),
        config=SimpleNamespace(length=("rounds", 9)), parts=SimpleNamespace(parties={"server": party}), **more,
    )  # fmt: skip


def test_only_what_was_measured_is_told() -> None:
    """No run, no losses, no clients: no sample of these; a loss that a client keeps to itself is none."""

    async def scenario() -> None:
        watch = watched()
        house = House(runs=[watch])
        found = {name for name, _ in scraped(house)}
        assert not {
            name for name in found if name.startswith(("cutlayer_run_r", "cutlayer_run_s", "cutlayer_steps"))
        } - {"cutlayer_run_state"}
        assert not {name for name in found if "gpu" in name or "certificate" in name or "refused" in name}
        record = {"client": "ann", "round": 0, "step": 0, "loss": 1.5, "tokens": 7, "bytes_up": 1, "bytes_down": 2}
        watch.update(record)
        watch.update({**record, "client": "bob", "loss": math.nan})
        watch.run = driven()
        watch.state = "training"
        house.until = datetime(2030, 1, 1, tzinfo=UTC)
        found = scraped(house)
        assert of(found, "run_step_loss", run="night", client="ann") == 1.5
        assert ("cutlayer_run_step_loss", frozenset({"run": "night", "client": "bob"}.items())) not in found
        assert of(found, "steps_total", run="night", client="bob") == 1
        assert of(found, "tokens_total", run="night", client="ann") == 7
        assert of(found, "run_steps", run="night", client="ann") == 3
        assert of(found, "run_rounds", run="night") == 2
        assert of(found, "run_planned_rounds", run="night") == 9
        assert of(found, "run_memory_bytes", run="night", what="trained") == 40
        assert ("cutlayer_run_memory_bytes", frozenset({"run": "night", "what": "activations"}.items())) not in found
        assert of(found, "certificate_end_seconds") == house.until.timestamp()
        states = {s: of(found, "run_state", run="night", state=s) for s in watching.STATES}
        assert states == {"waiting": 0, "training": 1, "done": 0, "failed": 0}

    run_async(scenario())


def test_runs_are_told_apart() -> None:
    async def scenario() -> None:
        one, two = watched("one"), watched("two")
        two.run = driven(saved=8)
        with two.run.clock.waiting("ann", "the trunk"):
            found = scraped(House(runs=[one, two]))
            assert of(found, "run_waiting", run="two") == 1
            assert two.told()["waits"] == ["ann waits for the trunk"]
        assert of(found, "run_waiting", run="one") == 0
        assert of(found, "run_memory_bytes", run="two", what="activations") == 8
        assert ("cutlayer_run_rounds", frozenset({("run", "one")})) not in found
        for name, _, _ in [*GAUGES, *COUNTERS]:
            labels = [dict(labels) for (known, labels) in found if known.removeprefix("cutlayer_").startswith(name)]
            assert all("run" in label for label in labels), name

    run_async(scenario())


def test_counts_of_a_connection_only_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over sessions that come and go, bytes and seconds away are those of all of them."""

    async def scenario() -> None:
        remote = Remote("ann", patience=60)
        now = 100.0
        monkeypatch.setattr("cutlayer.links.net.remote.time", SimpleNamespace(monotonic=lambda: now))
        remote._absence = 0.0, now

        def session(received: int, sent: int) -> Any:
            async def forever() -> None:
                await asyncio.Event().wait()

            return SimpleNamespace(hello={"instance": 1}, received=received, sent=sent, receive=forever)

        now += 5
        first = session(10, 1)
        remote.attach(first)
        assert (remote.frame_bytes(), remote.seconds_away) == ((10, 1), 5)
        first.received += 7
        now += 90
        assert (remote.frame_bytes(), remote.seconds_away) == ((17, 1), 5)
        remote.detach(first)
        now += 2
        assert (remote.frame_bytes(), remote.seconds_away) == ((17, 1), 7)
        second = session(0, 4)
        remote.attach(second)
        remote.attach(session(1, 0))  # a second one replaces the first
        assert (remote.frame_bytes(), remote.seconds_away) == ((18, 5), 7)
        for task in remote._tasks:
            task.cancel()

    run_async(scenario())


def test_a_scrape_while_everything_changes() -> None:
    """Another thread adds to all that is read."""
    watch = watched()
    watch.run = run = driven()
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            name = f"client-{number % 997}"
            run.counters.steps[name] = number
            run.meter.by_step[name] += 1
            watch.update({"client": name, "tokens": 1, "loss": 1.0})
            with contextlib.ExitStack() as waits:
                for _ in range(30):
                    waits.enter_context(run.clock.waiting(name, lambda: "a turn"))
            if not number % 997:
                run.counters = Counters()
                run.meter.by_step = Counter()
                watch.losses.clear()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            assert of(scraped(House(runs=[watch])), "run_state", run="night", state="waiting") == 1
            for _ in range(100):
                assert len(watch.waits) <= 30
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


# Health and readiness.


def serve_status(house: House, said: list[str]) -> Any:
    return status_server("127.0.0.1:0", house, said.append)


def test_health_and_readiness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Healthy is a loop that answers; ready a server that listens and was not asked to stop."""
    said: list[str] = []
    house = House(runs=[])

    async def scenario() -> None:
        house.runs.append(watched())
        address = STARTED.findall(said[0])[0]
        assert (await asyncio.to_thread(ask, address, "/healthz"))[0] == 200  # it still loads
        code, told = await asyncio.to_thread(ask, address, "/readyz")
        assert (code, told["ready"]) == (503, False)
        assert "does not listen yet" in told["why"]
        house.loop, house.listener = asyncio.get_running_loop(), SimpleNamespace(sessions={}, reasons=Counter())  # type: ignore[assignment]
        assert (await asyncio.to_thread(ask, address, "/healthz"))[0] == 200
        code, told = await asyncio.to_thread(ask, address, "/readyz")
        assert (code, told["runs"]["night"]["missing"]) == (200, ["ann", "bob"])
        house.drain.ask()
        code, told = await asyncio.to_thread(ask, address, "/readyz")
        assert code == 503
        assert "draining" in told["why"]
        assert of((await asyncio.to_thread(ask, address, "/metrics"))[1], "draining") == 1
        assert (await asyncio.to_thread(ask, address, "/secrets"))[0] == 404
        monkeypatch.setattr(watching, "ANSWER", 0.05)
        found: list[tuple[int, Any]] = []
        asking = threading.Thread(target=lambda: found.append(ask(address, "/healthz")))
        asking.start()
        asking.join()  # the loop does not get on meanwhile
        assert found[0][0] == 503
        assert "has not answered" in found[0][1]["why"]

    with serve_status(house, said):
        run_async(scenario())
        assert ask(STARTED.findall(said[0])[0], "/healthz")[1]["why"] == "The event loop has ended."
    assert "plain text" in said[0]
    assert "firewall" not in said[0]


def test_who_asks_slowly_or_wrongly_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    said: list[str] = []
    monkeypatch.setattr(status._Handler, "timeout", 0.5)
    with serve_status(House(), said):
        address = STARTED.findall(said[0])[0]
        host, port = address.split(":")
        slow = [socket.create_connection((host, int(port))) for _ in range(20)]
        for connection in slow:
            connection.sendall(b"GET /metr")
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(f"http://{address}/metrics", data=b"x=1", timeout=60)
        assert ask(address, "/healthz")[0] == 200
        for connection in slow:
            connection.settimeout(60)
            assert connection.recv(100) == b"", "it is dropped"
            connection.close()
        with (
            pytest.raises(NetworkError, match="Is another server using port"),
            status_server(address, House(), said.append),
        ):
            pass
    assert "Traceback" not in capfd.readouterr().err
    with status_server("0.0.0.0:0", House(), said.append):
        assert "keep it from others by a firewall" in said[-1]


# Draining.


async def terminated(drain: Drain, notes: list[str], times: int = 1) -> None:
    """A server that never ends by itself is sent SIGTERM, and once more when it was heard."""
    task = asyncio.current_task()
    assert task is not None
    with drain.on_sigterm(task, notes.append):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
            while drain.seconds and not drain.asked():
                await asyncio.sleep(0.01)
        await asyncio.Event().wait()  # the round


def test_sigterm_asks_and_nothing_more() -> None:
    notes: list[str] = []
    drain = Drain(600)

    async def scenario() -> None:
        serving = asyncio.ensure_future(terminated(drain, notes))
        with pytest.raises(Drained):
            await drain.unless(asyncio.Event().wait())
        assert not serving.done()
        serving.cancel()

    before = signal.getsignal(signal.SIGTERM)
    run_async(scenario())
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(notes) == 1
    assert "there are 600 seconds" in notes[0]


@pytest.mark.parametrize(("seconds", "times"), [(600, 2), (0.05, 1), (0, 1)], ids=["again", "time", "none"])
def test_what_does_not_end_is_given_up(seconds: float, times: int) -> None:
    """A second SIGTERM, or the end of the time, cancels; without any time, the first does."""
    notes: list[str] = []
    with pytest.raises(asyncio.CancelledError):
        run_async(terminated(Drain(seconds), notes, times))
    assert len(notes) == bool(seconds)


def test_a_drain_gives_the_result_of_what_was_quicker() -> None:
    async def scenario() -> None:
        drain = Drain()
        assert await drain.unless(asyncio.sleep(0, 7)) == 7
        with pytest.raises(ZeroDivisionError):
            await drain.unless(failing())
        drain.ask()
        with pytest.raises(Drained):
            await drain.unless(asyncio.sleep(0, 7))

    async def failing() -> None:
        raise ZeroDivisionError

    run_async(scenario())


# Logs.


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Sets the log up; gives what was written since."""
    level, hook = logs.LOG.level, sys.excepthook

    def begin(form: str, level: str = "info", **fields: str) -> Callable[[], str]:
        logs.set_up(form, level, **fields)
        return lambda: capsys.readouterr().err

    yield begin  # type: ignore[misc]
    for handler in [one for one in logging.getLogger().handlers if isinstance(one, logs._Stderr)]:
        logging.getLogger().removeHandler(handler)
    logs.LOG.setLevel(level)
    logging.captureWarnings(False)
    sys.excepthook = hook


def test_a_line_of_json_says_when_who_and_what(log: Any) -> None:
    said = log("json", run="night", client="")
    logging.getLogger("cutlayer.net").warning(
        "Refused %s\nwith %r", "ann", "ä", extra={"peer": "1.2.3.4:5", "reason": ""}
    )
    logging.getLogger("cutlayer.net").debug("not shown")
    logging.getLogger("another").info("not shown")
    (line,) = lines(said())
    assert abs(datetime.fromisoformat(line.pop("time")).timestamp() - time.time()) < 3600
    assert line == {
        "level": "warning", "logger": "cutlayer.net", "event": "Refused ann\nwith 'ä'", "run": "night",
        "peer": "1.2.3.4:5",
    }  # fmt: skip


def test_text_has_the_time_and_the_sentence(log: Any) -> None:
    said = log("text", run="night")
    assert not logs.as_json()
    logging.getLogger("cutlayer.net").info("Client 'ann' is away", extra={"client": "ann"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}Z info: Client 'ann' is away\n", said())
    said = log("text", level="error")  # set up anew, there is still one line each
    logging.getLogger("cutlayer.net").error("once")
    assert said().count("once") == 1


def test_errors_are_lines_too(log: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a command would print as its last paragraph, and a mistake of ours with its traceback."""
    from cutlayer.cli.console import complain

    said = log("json", client="ann")
    complain("The disk is full.")
    complain("go on with it", head="Stopped")
    try:
        raise ZeroDivisionError("by hand")
    except ZeroDivisionError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    full, stopped, crashed = lines(said())
    assert (full["level"], full["event"], full["what"]) == ("error", "The disk is full.", "error")
    assert (stopped["level"], stopped["what"]) == ("warning", "stopped")
    assert crashed["level"] == "critical"
    assert "ZeroDivisionError: by hand" in crashed["traceback"]


def test_of_many_steps_a_line_now_and_then(log: Any) -> None:
    said = log("json")
    now = 0.0
    reporter = logs.LogReporter(every=10.0, clock=lambda: now, run="night")
    reporter.start(40)
    record = {"client": "ann", "round": 0, "loss": 1.0, "tokens": 3, "bytes_up": 1, "bytes_down": 2, "seconds": {}}
    for step in range(40):
        now += 1.0
        reporter.update({**record, "step": step})
    reporter.note("round 1: eval loss 2.0000")
    told = lines(said())
    assert [line["step"] for line in told if "step" in line] == [0, 10, 20, 30, 39]
    assert all(line["run"] == "night" for line in told)
    assert told[-1]["event"] == "round 1: eval loss 2.0000"


def test_who_is_not_let_in_is_counted_and_logged(log: Any) -> None:
    """By address and reason; the token that was shown is not in it."""
    said = log("json", run="night")

    async def admit(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        raise Refused("The certificate and the token do not belong to this client.", reason="keys")

    async def scenario() -> Any:
        async with serving(admit=admit) as served:
            for _ in range(2):
                with pytest.raises(Refused):
                    await served.join(token="top-secret-token")
            return scraped(House(listener=served.listener))

    found = run_async(scenario())
    assert of(found, "refused_sessions_total", reason="keys") == 2
    text = said()
    assert "top-secret-token" not in text
    refused = [line for line in lines(text) if line.get("reason") == "keys"]
    assert len(refused) == 2
    assert all(line["level"] == "warning" and re.search(r"127\.0\.0\.1:\d+$", line["peer"]) for line in refused)


def test_only_dates_of_certificates_depend_on_the_clock_on_the_wall() -> None:
    """Who asks for the time of day, by module: certificates, times in logs, the name of an output folder.

    What is sealed between clients: its numbers must grow, which a file sees to, and the clock where that is lost. And
    whether a file was left alone for a while, so that its checksum may be remembered with its times.
    """
    asks = re.compile(
        r"((dt|datetime)\.)+(now|today|utcnow|fromtimestamp)|time\.(time|time_ns|strftime|localtime|gmtime)"
    )
    found = set()
    for path in FILES:
        text = path.read_text()
        if asks.search(text) and any(
            isinstance(node, ast.Call) and asks.fullmatch(ast.unparse(node.func)) for node in ast.walk(ast.parse(text))
        ):
            found.add(path.relative_to(SOURCE).as_posix())
    certificates = {"issuing.py", "keys.py", "links/net/tls.py"}
    assert found == certificates | {"identity.py", "logs.py", "released.py", "run.py", "sealing.py"}


def test_bytes_are_those_of_the_meter() -> None:
    watch = watched()
    watch.run = run = driven()
    frame = encode(
        Header("send_activations", "activations", "ask", "ann", "server", "ann", names=("x",)), [torch.ones(3)]
    )
    run.meter.count(frame)
    found = scraped(House(runs=[watch]))
    assert of(found, "run_bytes", run="night", step_name="send_activations") == frame.length
