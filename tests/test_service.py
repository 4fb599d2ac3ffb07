"""Several runs in one server: each has the numbers that it would have alone, and knows nothing of the others."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cutlayer
from apart import LONG, Apart, Command, Noted, Trap, steps
from crash import Forge
from cutlayer import served_run, serving
from cutlayer.apart import taken
from cutlayer.build import load_base
from cutlayer.config import load_config
from cutlayer.errors import ConfigError, NetworkError, OutputError, Refused
from cutlayer.joining import join
from cutlayer.links.net.connecting import connect
from cutlayer.models.sharing import SharedModels
from cutlayer.served_run import Patience
from cutlayer.service import Service
from cutlayer.service_file import is_service, load_service
from spine import TWO, U, model
from tiny import text_rows, write_rows

NAMES = {"flu": ("ann", "bob"), "fraud": ("cleo", "dan")}
DROPOUT = {"name": "lora", "rank": 2, "dropout": 0.2}


class Two(Apart):
    """A server with two runs on one base, with dropout, whose clients are others."""

    def __init__(self, root: Path, *, stay: bool = False, names: Any = NAMES, **changes: Any) -> None:
        super().__init__(root, peft=DROPOUT, **changes)
        self.stay, self.trees = stay, dict[str, dict[str, Any]]()
        for number, (run, clients) in enumerate(names.items()):
            for client in clients:
                rows = text_rows(5, seed=number + len(client))
                self.files[client] = str(write_rows(root / f"{client}.jsonl", rows))
            own = {"framework": ("sfl-v2", "psl")[number], "partition": (U, TWO)[number], "seed": number}
            self.trees[run] = {**self.tree, **own, "clients": [{"name": name} for name in clients]}
            (root / f"{run}.yaml").write_text(yaml.safe_dump(self.trees[run]))
        self.write(list(names))

    def write(self, runs: list[Any]) -> None:
        """The service file."""
        listed = [f"{one}.yaml" if isinstance(one, str) else one for one in runs]
        self.file.write_text(yaml.safe_dump({"runs": listed, "stay": self.stay}))

    def alone(self, run: str) -> dict[str, Any]:
        """A run's tree with all clients in one process."""
        tree = self.trees[run]
        return {**tree, "clients": [{"name": c["name"], "data": self.files[c["name"]]} for c in tree["clients"]]}

    def until(self, there: Callable[[], bool], *running: Command) -> None:
        """Wait until something is so, while these run."""
        end = time.monotonic() + LONG
        while not there():
            assert time.monotonic() < end, self.said("server")
            assert all(process.poll() is None for process in running), self.said("server")
            time.sleep(0.02)


def test_two_runs_in_one_server_have_the_numbers_that_they_have_alone(tmp_path: Path) -> None:
    both = Two(tmp_path / "apart", rounds=2)
    server = both.serve()
    both.ended({**{name: both.join(name) for names in NAMES.values() for name in names}, "server": server})
    for run, clients in NAMES.items():
        alone = cutlayer.train(both.alone(run), out=tmp_path / run, progress=False)
        assert steps(both.root / "server" / run) == steps(alone.out)
        assert both.same(alone.out, server=f"server/{run}", names=clients)


def test_a_client_learns_nothing_of_runs_that_it_is_not_in(tmp_path: Path) -> None:
    both = Two(tmp_path / "apart", names={"flu": ("ann", "bob"), "fraud": ("ann", "dan")})
    server = both.serve()
    own: dict[str, Any] = {"data": both.files["ann"], "model": both.tree["model"], "progress": False}
    address = f"localhost:{both.port}"
    try:
        for name, run, said in (
            ("bob", "fraud", "No run 'fraud' here has a client 'bob'. It is in: 'flu'."),
            ("bob", "secret", "No run 'secret' here has a client 'bob'. It is in: 'flu'."),
            ("eve", None, "No run here has a client 'eve'."),
            ("eve", "flu", "No run here has a client 'eve'."),
            ("ann", None, "Client 'ann' is in several runs here: 'flu', 'fraud'. Say which"),
        ):
            with pytest.raises(Refused, match=said) as caught:
                join(address, out=both.root / "out", name=name, run=run, **own)
            assert name == "ann" or "fraud" not in str(caught.value).replace("No run 'fraud'", "")
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("command", ["serve", "join", "keys"])
@pytest.mark.parametrize("place", ["a file", "below a file", "not of this world"])
def test_where_no_folder_can_be_is_said_in_words(command: str, place: str, tmp_path: Path, forge: Forge) -> None:
    file = write_rows(tmp_path / "rows.jsonl", text_rows(2))
    out = {"a file": file, "below a file": file / "x", "not of this world": Path("/proc/x")}[place]
    run = Apart(tmp_path / "apart")
    arguments = {
        "serve": [str(run.file), "--bind", "localhost:0", "--insecure"],
        "join": ["localhost:1", "--data", str(file), "--insecure", "--name", "ann"],
        "keys": ["--host", "localhost", "--client", "ann"],
    }[command]
    said = forge.run(command, *arguments, "--out", out).refused("--out", str(out))
    assert "Delete" not in said
    assert file.is_file()


def test_a_folder_of_another_owner_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Apart(tmp_path / "apart")
    rights: list[Any] = []

    def access(path: Any, mode: int) -> bool:
        rights.append((path, mode))
        return False

    monkeypatch.setattr("cutlayer.files.os.access", access)
    with pytest.raises(OutputError, match=r"You have no right to write into .*out"):
        serving.serve(str(run.file), bind="localhost:0", out=tmp_path / "out", progress=False)
    with pytest.raises(OutputError, match=r"You have no right to write into .*out"):
        join("localhost:1", data=run.files["ann"], out=tmp_path / "out", name="ann", progress=False)
    assert (tmp_path / "out", os.W_OK | os.X_OK) in rights


def test_an_error_of_the_machine_ends_a_run_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run.yaml")

    monkeypatch.setattr("cutlayer.served_run.checkpoint.write_text", full)
    with caplog.at_level("INFO"), pytest.raises(OSError, match="No space left"):
        serving.serve(str(Apart(tmp_path / "apart").file), bind="localhost:0", out=tmp_path / "out", progress=False)
    # gRPC's one poller of the process may call a loop of an earlier test, which is closed; that is asyncio's record
    assert not [record for record in caplog.records if record.exc_info and record.name != "asyncio"]


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_other_alone(tmp_path: Path) -> None:
    both = Two(tmp_path / "apart", rounds=2)
    both.write(["flu", {"run": "fraud.yaml", "name": "fraud", "set": {"optimizer.lr": 1e30, "rounds": 9}}])
    server = both.serve()
    clients = {name: both.join(name) for names in NAMES.values() for name in names}
    both.ended({name: clients[name] for name in NAMES["flu"]})
    assert all(clients[name].wait() == 2 for name in NAMES["fraud"])
    assert server.wait() == 2
    assert "1 of 2 runs did not end well. 'fraud': " in both.said("server")
    assert "Its training has diverged (lower optimizer.lr" in both.said("server")
    assert "The run failed at the server: AllLeft" in both.said("cleo")
    alone = cutlayer.train(both.alone("flu"), out=tmp_path / "flu", progress=False)
    assert both.same(alone.out, server="server/flu", names=NAMES["flu"])


@pytest.mark.slow
def test_runs_come_and_go_while_the_server_serves(tmp_path: Path) -> None:
    both = Two(tmp_path / "apart", stay=True, rounds=2)
    both.write(["flu"])
    server = both.serve()
    clients = {name: both.join(name) for name in NAMES["flu"]}
    both.ended(clients)
    assert server.poll() is None, "it is to stay"
    pid = server.process.pid
    assert pid is not None
    both.file.write_text("runs: [")
    os.kill(pid, signal.SIGHUP)
    both.until(lambda: "nothing is changed: 1 mistake" in both.said("server"), server)
    both.write([{"run": "flu.yaml", "set": {"rounds": 5}}, "fraud"])
    os.kill(pid, signal.SIGHUP)
    both.until(lambda: "run 'flu' is another now, and goes on as it was begun" in both.said("server"), server)
    both.until(lambda: "fraud: listening at" in both.said("server"), server)
    cleo = both.join("cleo")
    both.until(lambda: "client 'cleo' is here" in both.said("server"), server, cleo)
    both.write(["flu"])
    os.kill(pid, signal.SIGHUP)
    both.until(lambda: "run 'fraud' is not served any more" in both.said("server"), server)
    assert cleo.wait() == 2
    assert "No run here has a client 'cleo'" in both.said("cleo")
    server.process.terminate()
    assert server.wait() == 0, "all that it serves is done"


@pytest.mark.slow
def test_a_server_with_several_runs_finishes_the_rounds_of_all(tmp_path: Path) -> None:
    """SIGTERM in the middle of a round of each; a SIGHUP after it changes nothing; the same command goes on."""
    both = Two(tmp_path / "apart", rounds=8)
    server = both.serve()
    waits = {"ann": Trap("tail_step", 3, "wait", "ann.go"), "cleo": Trap("head_backward", 4, "wait", "cleo.go")}
    gates = {name: tmp_path / trap.file for name, trap in waits.items()}
    clients = {
        name: both.join(name, traps=[replace(waits[name], file=str(gates[name]))] if name in waits else [])
        for names in NAMES.values()
        for name in names
    }
    for gate in gates.values():
        both.reached(gate)
    pid = server.process.pid
    assert pid is not None
    server.process.terminate()
    both.until(lambda: "asked to stop: the round is finished first" in both.said("server"), server)
    both.write(["flu"])
    os.kill(pid, signal.SIGHUP)
    both.until(lambda: "the service file is read when it is started again" in both.said("server"), server)
    for gate in gates.values():
        gate.touch()
    assert server.wait() == 75, both.said("server")
    assert "is not served any more" not in both.said("server")
    for run in NAMES:
        assert 4 <= max(int(folder.name[6:]) for folder in (both.root / "server" / run / "checkpoints").iterdir()) < 8
    both.write(["flu", "fraud"])
    both.ended({**clients, "server": both.serve()})
    for run, names in NAMES.items():
        alone = cutlayer.train(both.alone(run), out=tmp_path / run, progress=False)
        assert steps(both.root / "server" / run) == steps(alone.out)
        assert both.same(alone.out, server=f"server/{run}", names=names)


def test_sessions_live_on_while_a_new_run_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the new run's model is read, a client is let in to another; when the server is to stop, nothing is read."""
    both, out = Two(tmp_path / "apart", stay=True), tmp_path / "server"
    both.write(["flu"])
    (entry,) = load_service(both.file).runs
    begun, let, real = threading.Event(), threading.Event(), served_run.fingerprint

    def slow(model: str) -> dict[str, str]:
        begun.set()
        assert let.wait(60)
        return real(model)

    async def scenario() -> None:
        noted = Noted()
        service, patience, turn = Service("localhost:0", None, noted, stay=True), Patience(60), asyncio.Lock()
        service.begin("flu", serving._entry(entry, out), out / "flu", patience)
        monkeypatch.setattr(served_run, "fingerprint", slow)
        going = asyncio.ensure_future(service.run())
        while not service.port:
            await asyncio.sleep(0.01)
        both.write(["flu", "fraud"])
        reading = asyncio.ensure_future(serving._reload(service, both.file, out, patience, turn))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        session = await connect(f"localhost:{service.port}", None, "", {"client": "ann", "wants": "run"})
        assert session.welcome["name"] == "flu"
        assert set(service.runs) == {"flu"}
        await session.close("It has seen enough.")
        let.set()
        await reading
        assert set(service.runs) == {"flu", "fraud"}
        both.write(["flu"])
        service.house.drain.ask()
        await serving._reload(service, both.file, out, patience, turn)
        assert set(service.runs) == {"flu", "fraud"}
        assert "the service file is read when it is started again" in noted.words[-1]
        await asyncio.gather(going, return_exceptions=True)

    asyncio.run(scenario())


def test_hundreds_of_clients_are_all_let_in(tmp_path: Path) -> None:
    """Each is told the run with all the others, and all are here at once."""
    names = [f"hospital-of-region-{number:03d}" for number in range(300)]
    run = Apart(tmp_path / "apart", clients=[{"name": name, "profile": "laptop"} for name in names])
    config = serving._checked(str(run.file), [], tmp_path / "server")

    async def scenario() -> None:
        service = Service("localhost:0", None, Noted())
        service.begin("", config, tmp_path / "server", Patience(60))
        going = asyncio.ensure_future(service.run())
        while not service.port:
            await asyncio.sleep(0.01)
        sessions = []
        for name in names:
            sessions.append(await connect(f"localhost:{service.port}", None, "", {"client": name, "wants": "run"}))
        assert taken(sessions[-1].welcome["run"], model=config.model, device="cpu").client_names == names
        while len(service.listener.sessions) < len(names):
            await asyncio.sleep(0.01)
        await asyncio.gather(*(session.close() for session in sessions))
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)

    asyncio.run(scenario())


def test_a_run_that_is_too_long_to_be_told_is_refused_as_serving_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Apart(tmp_path / "apart")
    monkeypatch.setattr(serving, "WELCOME", serving.ABOUT + 500)
    with pytest.raises(ConfigError, match=r"with its 2 clients is \d+ bytes as it is told to each"):
        serving._checked(str(run.file), [], tmp_path / "server")


def test_more_clients_than_connections_are_refused_as_serving_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Two(tmp_path / "apart", stay=True)
    (flu, fraud) = load_service(both.file).runs
    monkeypatch.setattr("cutlayer.service.resource.getrlimit", lambda _: (261, 261))
    monkeypatch.setattr("cutlayer.service.CONNECTIONS", 4)

    async def scenario() -> None:
        out, few = tmp_path / "server", Patience(60)
        service = Service("localhost:0", None, Noted())
        service.begin("flu", serving._entry(flu, out), out / "flu", few)
        service._bound()
        assert service.listener.max_connections == 5
        with pytest.raises(NetworkError, match="2 clients more are too many for the 5 connections"):
            await service.begin_beside({"fraud": (serving._entry(fraud, out), out / "fraud")}, few)
        assert set(service.runs) == {"flu"}
        service.begin("fraud", serving._entry(fraud, out), out / "fraud", few)
        with pytest.raises(NetworkError, match="4 clients need 264 open files, and this process may have 261"):
            await service.run()

    asyncio.run(scenario())


def test_runs_share_the_frozen_base(tmp_path: Path) -> None:
    """Whatever each trains: the weights are one memory, the modules are not, and no run writes to them."""
    base = {"model": str(model(num_hidden_layers=4)), "data": {"train": "x"}, "rounds": 1}
    models, made = SharedModels(), []
    for peft in ({"name": "lora", "rank": 2}, {"name": "lora", "rank": 3, "targets": ["q_proj"]}, "full"):
        made.append(load_base(load_config({**base, "peft": peft}), labels=None, device="cpu", models=models))
    alone = load_base(load_config({**base, "peft": "full"}), labels=None, device="cpu")

    def weights(one: Any) -> dict[str, torch.Tensor]:
        named = one.model.named_parameters(remove_duplicate=False)
        return {name.replace(".base_layer", ""): p for name, p in named if "lora_" not in name}

    first, second, third = map(weights, made)
    assert first.keys() == second.keys() == third.keys() == weights(alone).keys()
    for name, tensor in first.items():
        assert tensor.data_ptr() == second[name].data_ptr() == third[name].data_ptr()
        assert tensor is not third[name]
        assert torch.equal(tensor, weights(alone)[name])
        assert (tensor.requires_grad, third[name].requires_grad) == (False, True)
    ranks = [{p.shape[0] for n, p in one.initial.items() if "lora_A" in n} for one in made]
    assert ranks == [{2}, {3}, set()]
    assert made[0].tied == made[2].tied == alone.tied
    assert len(models._held) == 1
    del first, second, third, name, tensor
    made.clear()
    gc.collect()
    assert not models._held, "nobody uses the weights any more"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: []", "runs is empty"),
        ("runs: 3", "runs is 3: must be a list"),
        ("runs: [{ran: x}]", "runs.0 has no key 'ran'. Did you mean 'run'?"),
        ("runs: [a.yaml, b/a.yaml]", "two have the name 'a'"),
        ("runs: [{run: a.yaml, name: ../a}]", "the name '../a' cannot be a folder's"),
        ("runs: [a.yaml]\nstays: true", "a service has no key 'stays'. Did you mean 'stay'?"),
        ("runs: [a.yaml]\nruns: [b.yaml]", "'runs' is given twice"),
    ],
)
def test_what_is_wrong_with_a_service_file(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_service(tmp_path / "service.yaml")
    assert said in str(caught.value)


def test_a_service_file_is_told_from_a_run_file(tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text("runs: [flu.yaml, {run: sub/x.yaml, name: y, set: {rounds: 2}}]")
    assert is_service(tmp_path / "service.yaml")
    first, second = load_service(tmp_path / "service.yaml").runs
    assert (first.name, first.run, first.set) == ("flu", str(tmp_path / "flu.yaml"), {})
    assert (second.name, second.run, second.set) == ("y", str(tmp_path / "sub/x.yaml"), {"rounds": 2})
    assert not is_service(Two(tmp_path / "apart").root / "flu.yaml")
