"""Runs between processes, for the tests of the network: a server, its clients, and the same run in one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from cutlayer.cli.main import main
from cutlayer.issuing import authority
from cutlayer.links.net.session import Heartbeat
from spine import HOME, model
from striking import Fate, Trap, await_fate, lay
from tiny import text_rows, write_rows

LONG = 400.0  # seconds after which a process that hangs fails its test
ROWS = {"ann": text_rows(7, seed=1), "bob": text_rows(4, seed=2)}


FORKS = multiprocessing.get_context("forkserver")  # imports once, which takes seconds, and forks for each command
FORKS.set_forkserver_preload(["cutlayer.serving", "cutlayer.joining", "cutlayer.cli.main"])


@lru_cache
def keys_for(*clients: str) -> Path:
    """Keys of a server on this machine and of these clients, made once a process."""
    folder = Path(tempfile.mkdtemp(dir=HOME.name))
    with authority(folder, make=True) as ca:
        ca.add(hosts=["localhost"], clients=clients, days=30)
    return folder


def _carry_out(
    log: str, arguments: Sequence[str], fate: Fate | None, traps: Sequence[Trap], pulse: tuple[float, float] | None,
    first: Callable[[], None] | None,
) -> None:  # fmt: skip
    """The command line, in a process of its own."""
    Path(log).with_suffix(".pid").write_text(str(os.getpid()))
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["cutlayer", *arguments]
    lay(traps)
    if pulse is not None:
        Heartbeat.__init__.__defaults__ = pulse  # type: ignore[attr-defined]
    torch.set_num_threads(1)  # as the tests have it; also makes the thread pool anew, before two threads do so at once
    if fate is not None:
        await_fate(fate)
    if first is not None:
        first()
    main()


class Command:
    """A command that runs, as ``subprocess.Popen`` has it."""

    def __init__(
        self, log: Path, arguments: Sequence[str], fate: Fate | None = None, traps: Sequence[Trap] = (),
        pulse: tuple[float, float] | None = None, first: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self.process = FORKS.Process(target=_carry_out, args=(str(log), arguments, fate, traps, pulse, first))
        self.process.start()

    def poll(self) -> int | None:
        """The exit code, once it has ended."""
        return self.process.exitcode

    def wait(self, seconds: float = LONG) -> int | None:
        """The exit code; None if it has not ended by then."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> None:
        """End it, without a word to it."""
        self.process.kill()

    def frozen(self) -> None:
        """Wait until it is stopped."""
        until = time.monotonic() + LONG
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "tT":
            assert time.monotonic() < until
            time.sleep(0.02)

    def thaw(self) -> None:
        """Let it go on."""
        assert self.process.pid
        os.kill(self.process.pid, signal.SIGCONT)


class Noted:
    """A reporter that keeps what was told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def start(self, total_steps: int) -> None: ...
    def update(self, record: Any) -> None: ...
    def stop(self) -> None: ...
    def note(self, text: str) -> None:
        self.words.append(text)


class Apart:
    """A run's files, and its processes.

    Args:
        root: an empty folder.
        rows: of each client.
        changes: keys of the run.
    """

    def __init__(self, root: Path, rows: Mapping[str, list[dict[str, Any]]] = ROWS, **changes: Any) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.files = {name: str(write_rows(root / f"{name}.jsonl", theirs)) for name, theirs in rows.items()}
        self.valid = str(write_rows(root / "valid.jsonl", text_rows(4, seed=9)))
        self.tree: dict[str, Any] = {
            "model": str(model(num_hidden_layers=4)),
            "clients": [{"name": name} for name in rows],
            "partition": {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 1},
            "peft": {"name": "lora", "rank": 2}, "optimizer": {"name": "adamw", "lr": 0.01},
            "rounds": 3, "batch_size": 3, "device": "cpu", **changes,
        }  # fmt: skip
        data = {"max_length": 64, **changes.get("data", {})}
        self.tree["data"] = data if "eval_fraction" in data else {"eval": self.valid, **data}
        self.file = root / "run.yaml"
        self.file.write_text(yaml.safe_dump(self.tree))
        self.port = 0
        self.pulse: tuple[float, float] | None = None  # of heartbeats: every, silence
        self.first: Callable[[], None] | None = None  # what each process does before its command

    @property
    def simulated(self) -> dict[str, Any]:
        """The same run with all clients in one process."""
        own = [{**client, "data": self.files[client["name"]]} for client in self.tree["clients"]]
        return {**self.tree, "clients": own}

    def start(self, who: str, *arguments: str, fate: Fate | None = None, traps: Sequence[Trap] = ()) -> Command:
        """A command of ``who``, whose words go to its log, and whose number is in a file beside it."""
        return Command(self.root / f"{who}.log", arguments, fate, traps, self.pulse, self.first)

    def said(self, who: str) -> str:
        """All that ``who`` has said so far."""
        return (self.root / f"{who}.log").read_text()

    def serve(self, *more: str, keys: Path | None = None, fate: Fate | None = None) -> Command:
        """A server, once it listens; one that is started again takes the same port."""
        own = ["--keys", str(keys / "server")] if keys else ["--insecure"]
        before = len(re.findall("listening", self.said("server"))) if (self.root / "server.log").exists() else 0
        bind = f"localhost:{self.port}"
        process = self.start(
            "server", "serve", str(self.file), "--bind", bind, "--out", str(self.root / "server"), *own, *more,
            fate=fate,
        )  # fmt: skip
        until = time.monotonic() + LONG
        while not (self.root / "server.log").exists() or (
            len(found := re.findall(r"listening at localhost:(\d+)", self.said("server"))) <= before
        ):
            assert process.poll() is None, self.said("server")
            assert time.monotonic() < until, self.said("server")
            time.sleep(0.05)
        self.port = int(found[-1])
        return process

    def join(
        self, name: str, *more: str, keys: Path | None = None, model: bool = True, fate: Fate | None = None,
        traps: Sequence[Trap] = (), port: int = 0,
    ) -> Command:  # fmt: skip
        """A client; ``model`` False: it is not told where the model is; ``port``: another than the server's."""
        own = ["--keys", str(keys / name)] if keys else ["--insecure", "--name", name]
        held_out = ["--eval", self.valid] if self.tree["data"].get("eval", True) else []
        return self.start(
            name, "join", f"localhost:{port or self.port}", "--data", self.files[name], *held_out, "--out",
            str(self.root / name), *(["--model", self.tree["model"]] if model else []), *own, *more, fate=fate,
            traps=traps,
        )  # fmt: skip

    def reached(self, file: Path) -> None:
        """Wait until a client waits for this file."""
        until = time.monotonic() + LONG
        while not Path(f"{file}.reached").exists():
            assert time.monotonic() < until, self.said("server")
            time.sleep(0.02)

    def until(self, who: str, words: str, times: int = 1) -> None:
        """Wait until ``who`` has said this so often."""
        until = time.monotonic() + LONG
        while self.said(who).count(words) < times:
            assert time.monotonic() < until, f"{who} never said '{words}': {self.said(who)}"
            time.sleep(0.02)

    def ended(self, processes: Mapping[str, Command]) -> None:
        """Wait for these; all must end well."""
        for who, process in processes.items():
            code = process.wait()
            if code is None:
                process.kill()
            assert code == 0, f"{who} (None: it hangs): {code}: {self.said(who)}\n\nserver: {self.said('server')}"

    def kill_after(self, who: str, process: Command, rounds: int, *, gently: bool = False) -> int | None:
        """Kill a process as soon as it holds the checkpoint of a round (or ask it to end); its exit code."""
        there, until = self.root / who / "checkpoints", time.monotonic() + LONG
        while not there.is_dir() or not any(int(f.name[6:]) >= rounds for f in there.glob("round-*")):
            assert process.poll() is None, self.said(who)
            assert time.monotonic() < until, self.said(who)
            time.sleep(0.005)
        (process.process.terminate if gently else process.kill)()
        return process.wait()

    def adapter(self, who: str, of: str = "") -> dict[str, Tensor]:
        """What a party has of the adapter (or of all weights); a server, where each client has a model: for one."""
        out = self.root / who
        places = [out / "adapters" / of, out / "adapter", out / "models" / of, out / "model"]
        folder = next(place for place in places if any(place.glob("*.safetensors")))
        return load_file(next(folder.glob("*.safetensors")))

    def same(self, one: Path, *, server: str = "server", names: Sequence[str] = ()) -> bool:
        """Whether each client's part, and the server's for it, are the bits of the run in one process; all of it."""
        for name in names or self.files:
            places = [one / "adapters" / name, one / "adapter", one / "models" / name, one / "model"]
            whole = load_file(next(file for place in places for file in place.glob("*.safetensors")))
            own, trunk = self.adapter(name), self.adapter(server, name)
            together = {**trunk, **own}
            if together.keys() != whole.keys() or not all(torch.equal(together[n], whole[n]) for n in whole):
                return False
            if not own or not trunk or not all(torch.equal(trunk[n], whole[n]) for n in trunk):
                return False
        return True

    def same_state(self, one: Path) -> bool:
        """Whether the last checkpoints of all have the bits of the run in one process: tensors and optimizer state."""
        last = sorted((one / "checkpoints").iterdir())[-1]
        found = {}
        for file in (self.root / "server" / "checkpoints" / last.name).glob("*.safetensors"):
            found[file.name] = load_file(file)
        for name in self.files:
            mine = self.root / name / "checkpoints" / last.name
            found[f"client-{name}.safetensors"] = load_file(mine / "client.safetensors")
            if (mine / "trunk.safetensors").exists():  # which it trains for its group; the server's copy is another
                slot = json.loads((mine / "checkpoint.json").read_text())["trunk"]["slot"]
                found[f"{name}-{slot}.safetensors"] = load_file(mine / "trunk.safetensors")
        whole = {file.name: load_file(file) for file in last.glob("*.safetensors")}
        return found.keys() == whole.keys() and all(
            found[file].keys() == state.keys() and all(torch.equal(found[file][n], state[n]) for n in state)
            for file, state in whole.items()
        )

    def summary(self) -> dict[str, Any]:
        """The server's."""
        found: dict[str, Any] = json.loads((self.root / "server" / "summary.json").read_text())
        return found


def steps(out: Path) -> list[tuple[Any, ...]]:
    """Round, client, step, loss and bytes of each step, whoever was first."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sorted((m["round"], m["client"], m["step"], m["loss"], m["bytes_up"], m["bytes_down"]) for m in found)
