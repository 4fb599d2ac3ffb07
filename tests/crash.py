"""Run the command line in a process that can be made to die, be stopped, or meet a full disk at a chosen moment.

Importing PyTorch takes seconds, so one process imports it once and forks for each command (``Forge``). A moment is
named by a function that the run calls and by the number of the call; ``EVENTS`` lists the functions.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVENTS = {  # where: "module:attribute", or "module:Class.attribute"
    "fsync": "os:fsync", "rename": "pathlib:Path.rename", "replace": "pathlib:Path.replace", "rmtree": "shutil:rmtree",
    "save_file": "cutlayer.checkpoint:save_file", "prepare_data": "cutlayer.run:prepare_data",
    "load_base": "cutlayer.run:load_base", "assemble": "cutlayer.run:assemble",
    "save_adapter": "cutlayer.run:save_adapter", "summarize": "cutlayer.run:summarize",
    "restore": "cutlayer.engine:Engine.restore",
    "flush": "cutlayer.engine:Engine._flush", "set_up": "cutlayer.driver:Run.set_up",
    "step": "cutlayer.driver:Run.step",
    "merge": "cutlayer.driver:Run.merge", "evaluate": "cutlayer.driver:Run.evaluate",
    "frame": "cutlayer.wire:Meter._write", "update": "cutlayer.models.slots:Slot.update",
}  # fmt: skip
QUIET = ("frame", "update")  # too many of them to try each


@dataclass
class Ended:
    """How a command ended: its exit code (negative: the signal), what it said, and the events that it passed."""

    code: int
    out: str
    err: str
    events: list[str] = field(default_factory=list)

    def refused(self, *said: str) -> str:
        """Assert that it ended as a user's mistake does, with all of ``said`` in its one paragraph."""
        assert self.code == 2, (self.code, self.err)
        assert self.err.startswith("Error: "), self.err
        assert "Traceback" not in self.out + self.err
        assert "\n\n" not in self.err.strip()
        for text in said:
            assert text in self.err, self.err
        return self.err


class Forge:
    """The process that has everything imported, and forks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(
        self, *arguments: str | Path, cwd: Path | None = None, at: tuple[str, int] | None = None, act: str = "kill",
        index: int | None = None, after: float | None = None, code: str = "",
    ) -> Ended:  # fmt: skip
        """Run ``cutlayer ARGUMENTS``.

        Args:
            arguments: of the command line.
            cwd: the folder to start in.
            at: do ``act`` at this event, counted from 1.
            act: ``kill`` (SIGKILL), ``interrupt`` (SIGINT), ``torn`` (half lines in the files, then SIGKILL),
                ``half`` (the file just written cut in half, then SIGKILL), or ``fill:FOLDER`` (a full disk).
            index: instead of ``at``: the event with this number among all but the ``QUIET`` ones, from 0.
            after: SIGKILL after so many seconds.
            code: Python to execute first.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.count += 1
        base = self.folder / f"command-{self.count}"
        order = {
            "arguments": [str(a) for a in arguments], "cwd": str(cwd or self.folder), "at": at, "act": act,
            "index": index, "after": after, "code": code, "base": str(base),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        out, err, events = (base.with_suffix(s).read_text() for s in (".out", ".err", ".events"))
        return Ended(os.waitstatus_to_exitcode(status), out, err, events.split())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Fate:
    """In the forked process: counts events and strikes."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.at, self.act, self.index = order["at"], order["act"], order["index"]
        self.log = os.open(order["base"] + ".events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.counts: dict[str, int] = {}
        self.seen = 0
        self.busy = False

    def passes(self, name: str, arguments: tuple[Any, ...], call: Any) -> Any:
        if self.busy:
            return call()
        self.counts[name] = self.counts.get(name, 0) + 1
        mine = self.at is not None and (name, self.counts[name]) == tuple(self.at)
        if name not in QUIET:
            os.write(self.log, f"{name}\n".encode())
            mine = mine or self.index == self.seen
            self.seen += 1
        if mine:
            self.busy = True
            self.strike(arguments, call)
            self.busy = False
        return call()

    def strike(self, arguments: tuple[Any, ...], call: Any) -> None:
        if self.act == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.act.startswith("fill:"):
            fill(Path(self.act.removeprefix("fill:")))
        else:
            if self.act == "half":
                call()
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            if self.act == "torn":
                tear(arguments[0].run)
            os.kill(os.getpid(), signal.SIGKILL)


def fill(folder: Path) -> None:
    """Fill the disk under ``folder``."""
    handle = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 1 << 12, 1):
        try:
            while True:
                os.write(handle, b"0" * size)
        except OSError:
            continue
    os.close(handle)


def tear(run: Any) -> None:
    """Leave what a process leaves that dies while it appends."""
    with (run.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "round": 0, "client": "nob')
    if run.meter.folder is not None:
        run.meter.flush()
        with (run.meter.folder / "frames.bin").open("ab") as file:
            file.write(b"CUTL\x00half a frame")
        with (run.meter.folder / "frames.jsonl").open("a") as file:
            file.write('{"number": 99, "st')


def instrument(fate: Fate) -> None:
    """Put every function of ``EVENTS`` under the fate."""
    import importlib

    for name, place in EVENTS.items():
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, leaf = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        original = getattr(owner, leaf)

        def wrapped(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            return fate.passes(_name, args, lambda: _original(*args, **kwargs))

        setattr(owner, leaf, wrapped)


def child(order: dict[str, Any]) -> int:
    """What the forked process does."""
    import torch

    # PyTorch makes its thread pool anew after a fork, and fails where two of its own threads do so at once.
    torch.set_num_threads(torch.get_num_threads())
    for number, suffix in ((1, ".out"), (2, ".err")):
        handle = os.open(order["base"] + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    instrument(Fate(order))
    from cutlayer.cli.main import app

    try:
        exec(order["code"], {})
        app(order["arguments"])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def warm_up() -> None:
    """Do once what every command would do anew: find the methods, and build tables in Transformers and PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping

    from cutlayer import registry

    registry.cards()
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = LlamaForCausalLM(config)
    get_model_conversion_mapping(model)
    get_peft_model(model, LoraConfig(target_modules="all-linear"))


def serve() -> None:
    """Fork for every line of standard input."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import cutlayer.cli.generate
    import cutlayer.report.division_picture
    import cutlayer.report.progress
    import cutlayer.report.tables
    import cutlayer.run  # noqa: F401

    torch.set_num_threads(1)
    warm_up()
    gc.freeze()  # what is here stays; a collection in a forked process would copy its pages
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = child(order)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        if order["after"] is not None:
            time.sleep(order["after"])
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
        else:
            _, status = os.waitpid(pid, 0)
        print(status, flush=True)


if __name__ == "__main__":
    serve()
