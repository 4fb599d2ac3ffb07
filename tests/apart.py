"""Runs between processes, for the tests of the network: a server, its clients, and the same run in one process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from spine import model
from tiny import text_rows, write_rows

LONG = 400.0  # seconds after which a process that hangs fails its test
ROWS = {"ann": text_rows(7, seed=1), "bob": text_rows(4, seed=2)}


class Apart:
    """A run's files, and its processes.

    Args:
        root: an empty folder.
        changes: keys of the run.
    """

    def __init__(self, root: Path, **changes: Any) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.files = {
            name: str(write_rows(root / f"{name}.jsonl", [dict(r) for r in rows])) for name, rows in ROWS.items()
        }
        self.valid = str(write_rows(root / "valid.jsonl", text_rows(4, seed=9)))
        self.tree: dict[str, Any] = {
            "model": str(model(num_hidden_layers=4)),
            "data": {"max_length": 64, "eval": self.valid}, "clients": [{"name": name} for name in ROWS],
            "partition": {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 1},
            "peft": {"name": "lora", "rank": 2}, "optimizer": {"name": "adamw", "lr": 0.01},
            "rounds": 3, "batch_size": 3, "device": "cpu", **changes,
        }  # fmt: skip
        self.file = root / "run.yaml"
        self.file.write_text(yaml.safe_dump(self.tree))
        self.port = 0

    @property
    def simulated(self) -> dict[str, Any]:
        """The same run with all clients in one process."""
        return {**self.tree, "clients": [{"name": name, "data": file} for name, file in self.files.items()]}

    def start(self, who: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """A command of ``who``, whose words go to its log."""
        log = (self.root / f"{who}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "cutlayer", *arguments], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )  # fmt: skip

    def said(self, who: str) -> str:
        """All that ``who`` has said so far."""
        return (self.root / f"{who}.log").read_text()

    def serve(self, *, keys: Path | None = None) -> subprocess.Popen[bytes]:
        """A server, once it listens; one that is started again takes the same port."""
        own = ["--keys", str(keys / "server")] if keys else ["--insecure"]
        before = len(re.findall("listening", self.said("server"))) if (self.root / "server.log").exists() else 0
        bind = f"localhost:{self.port}"
        process = self.start(
            "server", "serve", str(self.file), "--bind", bind, "--out", str(self.root / "server"), *own
        )
        until = time.monotonic() + LONG
        while len(found := re.findall(r"listening at localhost:(\d+)", self.said("server"))) <= before:
            assert process.poll() is None, self.said("server")
            assert time.monotonic() < until, self.said("server")
            time.sleep(0.05)
        self.port = int(found[-1])
        return process

    def join(self, name: str, *, keys: Path | None = None) -> subprocess.Popen[bytes]:
        """A client."""
        own = ["--keys", str(keys / name)] if keys else ["--insecure", "--name", name]
        return self.start(
            name, "join", f"localhost:{self.port}", "--data", self.files[name], "--eval", self.valid, "--out",
            str(self.root / name), "--model", self.tree["model"], *own,
        )  # fmt: skip

    def ended(self, processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
        """Wait for these; all must end well."""
        for who, process in processes.items():
            try:
                code = process.wait(LONG)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{who} hangs: {self.said(who)}\n\nserver: {self.said('server')}") from None
            assert code == 0, f"{who}: {self.said(who)}\n\nserver: {self.said('server')}"

    def kill_after(self, who: str, process: subprocess.Popen[bytes], rounds: int) -> None:
        """Kill a process as soon as it holds the checkpoint of a round."""
        there, until = self.root / who / "checkpoints", time.monotonic() + LONG
        while not there.is_dir() or not any(int(f.name[6:]) >= rounds for f in there.glob("round-*")):
            assert process.poll() is None, self.said(who)
            assert time.monotonic() < until, self.said(who)
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(LONG)

    def adapter(self) -> dict[str, Tensor]:
        """What the server and the clients have, together."""
        found: dict[str, Tensor] = {}
        for who in ("server", *self.files):
            found |= load_file(self.root / who / "adapter" / "adapter_model.safetensors")
        return found

    def summary(self) -> dict[str, Any]:
        """The server's."""
        found: dict[str, Any] = json.loads((self.root / "server" / "summary.json").read_text())
        return found


def steps(out: Path) -> list[tuple[Any, ...]]:
    """Round, client, step, loss and bytes of each step, whoever was first."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sorted((m["round"], m["client"], m["step"], m["loss"], m["bytes_up"], m["bytes_down"]) for m in found)
