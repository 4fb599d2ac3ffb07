"""What the network costs: CPU-seconds of a client-step over TLS, and a client's peak memory beside its own blocks.

    python benchmarks/network.py                  # both
    python benchmarks/network.py --only cpu       # the CPU-seconds: some ten minutes on one core
    python benchmarks/network.py --only memory    # the memory: a quarter of an hour, and 4 GB of the temporary folder

CPU-seconds: the same run in one process and between processes over loopback TLS (a server and a client), of GPT-2
small's shape; user and system time of all their processes, from the second step on. Both go on at once, but each is
stopped while the other has its turn of some seconds, so a machine whose speed drifts slows both. Memory is the peak of
a fresh client process with a model of some 400M numbers in shards, against the same with a tiny one plus the bytes of
its own blocks; its rows go through the whole vocabulary, or much of a frozen embedding would never be read from its
file. Numbers are printed, never asserted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from bench import LENGTH, ROWS, SHAPES, make_model, make_rows, run_config

HERE = Path(__file__).resolve()
CUTLAYER = [sys.executable, "-m", "cutlayer"]
GPT2 = "GPT-2 small (12 blocks, H=768)"
MIB = 1 << 20
VOCABULARY = 32_000  # of the large model
STRIDE = 16  # words; a row of the embedding is a page, and Linux maps 16 at a time of a file that it has in memory
SLICE = 6.0  # seconds of a turn, well within the silence after which a session counts as lost
PARTITIONS = ["two-part-split", "u-shaped-split"]


class Process:
    """A process of a run."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def said(self, pattern: str) -> str:
        """Wait until it says that; what is in the pattern's group."""
        while (found := re.search(pattern, self.log.read_text())) is None:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return found[1]

    def ended(self) -> str:
        """Wait for its end; all that it said."""
        assert self.process.wait() == 0, self.log.read_text()
        return self.log.read_text()

    @property
    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Setting:
    """A folder with a model, texts, keys and run files."""

    def __init__(self, root: Path) -> None:
        self.root, self.started = root, list[Process]()
        subprocess.run(
            [*CUTLAYER, "keys", "--out", root / "keys", "--host", "localhost", "--client", "client-0"],
            check=True, capture_output=True,
        )  # fmt: skip

    def start(self, what: str, tree: dict[str, Any], *more: str) -> Process:
        """A process of ``worker``."""
        file = self.root / f"{len(self.started)}.yaml"
        file.write_text(yaml.safe_dump(tree))
        out = str(file.with_suffix(".out"))
        command = [sys.executable, str(HERE), "--worker", what, str(file), out, *more]
        self.started.append(Process(command, file.with_suffix(".log")))
        return self.started[-1]

    def apart(self, tree: dict[str, Any], model: str) -> tuple[Process, Process]:
        """A server and a client over TLS."""
        server = self.start("serve", tree, str(self.root / "keys" / "server"))
        port = server.said(r"listening at localhost:(\d+)")
        return server, self.start("join", tree, str(self.root / "keys" / "client-0"), port, model)

    def __enter__(self) -> Setting:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.started:
            one.process.kill()
            one.process.wait()


class Steps:
    """Says each step as it is done."""

    def start(self, total_steps: int) -> None:
        pass

    def update(self, record: Mapping[str, Any]) -> None:
        print("step", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def stop(self) -> None:
        pass


def worker(what: str, file: str, out: str, *more: str) -> None:
    """In a fresh process: a run, or a server or client of one; a client tells its peak and the bytes of its blocks."""
    if what == "train":
        from cutlayer.run import train

        train(file, out=out, progress=Steps())
    elif what == "serve":
        from cutlayer.serving import serve

        serve(file, bind="localhost:0", out=out, keys=more[0], progress=Steps())
    else:
        from cutlayer import joining
        from cutlayer.report.summary import peak_rss

        keys, port, model = more
        seats = []

        class Noted(joining.Seat):
            def __init__(self, *given: Any, **options: Any) -> None:
                super().__init__(*given, **options)
                seats.append(self)

        joining.Seat = Noted  # type: ignore[misc]
        data = yaml.safe_load(Path(file).read_text())["data"]["train"]
        joining.join(f"localhost:{port}", data=data, keys=keys, out=out, model=model, progress=Steps())
        own = sum(p.numel() * p.element_size() for p in seats[0].base.model.parameters() if not p.requires_grad)
        print(json.dumps([peak_rss(), own]))


class Turns:
    """Processes that are stopped while they do not have their turn, and what they used for how many steps."""

    def __init__(self, *processes: Process) -> None:
        self.processes = processes
        while self.steps < 2:  # the first ones load what is loaded late
            assert all(p.process.poll() is None for p in processes), [p.log.read_text() for p in processes]
            time.sleep(0.02)
        self.from_steps, self.from_cpu = self.steps, self.cpu
        self._signal(signal.SIGSTOP)

    @property
    def steps(self) -> int:
        """Done so far, as the first process says."""
        return self.processes[0].log.read_text().count("step\n")

    @property
    def cpu(self) -> list[float]:
        """CPU-seconds so far, by process."""
        return [process.cpu_seconds for process in self.processes]

    def turn(self, seconds: float) -> None:
        """Let them work."""
        self._signal(signal.SIGCONT)
        time.sleep(seconds)
        self._signal(signal.SIGSTOP)

    def end(self) -> list[float]:
        """CPU-seconds of a step by process, up to a step's end; they stay stopped."""
        self._signal(signal.SIGCONT)
        steps = self.steps
        while self.steps == steps:
            time.sleep(0.01)
        used, steps = self.cpu, self.steps
        self._signal(signal.SIGSTOP)
        return [(now - before) / (steps - self.from_steps) for now, before in zip(used, self.from_cpu, strict=True)]

    def _signal(self, number: int) -> None:
        for process in self.processes:
            process.process.send_signal(number)


def cpu(shape: str, partition: str, steps: int) -> None:
    """Print the CPU-seconds of a step in one process and over TLS."""
    with tempfile.TemporaryDirectory() as name, Setting(Path(name)) as setting:
        make_model(setting.root / "model", SHAPES[shape])
        make_rows(setting.root / "rows.jsonl", 64)
        model = setting.root / "model"
        tree = run_config(model, setting.root / "rows.jsonl", partition, clients=1, rounds=100_000)
        alone = Turns(setting.start("train", tree))
        apart = Turns(*setting.apart(tree, str(model)))
        while min(alone.steps - alone.from_steps, apart.steps - apart.from_steps) < steps:
            alone.turn(SLICE)
            apart.turn(SLICE)
        (one,), (server, client) = alone.end(), apart.end()
    ratio = (server + client) / one
    print(
        f"{shape:32} {partition:15} one process {one:.3f}  over TLS {server:.3f} + {client:.3f} CPU-s a client-step "
        f"(batch {ROWS} x {LENGTH}; {steps} steps and more, in turns of {SLICE:g} s)  ratio {ratio:.3f}",
        flush=True,
    )


def make_large(folder: Path, *, tiny: bool) -> None:
    """A random Llama of 400M numbers in shards (or the same, but tiny), with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_model(folder, {"n_layer": 1, "n_embd": 8, "n_head": 1})  # for its tokenizer
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2} if tiny else {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16
    }  # fmt: skip
    config = LlamaConfig(
        **size, vocab_size=VOCABULARY, num_hidden_layers=26, max_position_embeddings=256, tie_word_embeddings=False
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300MB")


def make_varied(path: Path) -> int:
    """Rows that touch the whole vocabulary of the large model; how many."""
    words = [f"w{number}" for number in range(1, VOCABULARY, STRIDE)]
    rows = [words[start : start + LENGTH - 1] for start in range(0, len(words), LENGTH - 1)]
    path.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows))
    return len(rows)


def memory(partition: str) -> None:
    """Print a client's peak memory with a large model, from local files and from the server."""
    with tempfile.TemporaryDirectory() as name, Setting(Path(name)) as setting:
        peaks = {}
        for size in ("tiny", "large"):
            subprocess.run([sys.executable, HERE, "--make", setting.root / size, size], check=True, capture_output=True)
        rounds = make_varied(setting.root / "rows.jsonl")
        for size, where in (("tiny", "local"), ("tiny", "served"), ("large", "local"), ("large", "served")):
            tree = run_config(setting.root / size, setting.root / "rows.jsonl", partition, clients=1, rounds=rounds)
            tree |= {"batch_size": 1, "peft": {"name": "lora", "rank": 4}}
            tree["partition"] |= {"head_blocks": 2} | ({"tail_blocks": 1} if partition == "u-shaped-split" else {})
            model = str(setting.root / size) if where == "local" else "served"
            server, client = setting.apart(tree, model)
            peaks[size, where] = json.loads(client.ended().splitlines()[-1])
            server.ended()
        for where in ("local", "served"):
            runtime, (rss, own) = peaks["tiny", where][0], peaks["large", where]
            print(
                f"400M in shards, {partition}, {where:6}: a client's peak {rss / MIB:.0f} MiB; its own blocks "
                f"{own / MIB:.0f} MiB + the runtime {runtime / MIB:.0f} MiB = {(own + runtime) / MIB:.0f} MiB; "
                f"ratio {rss / (own + runtime):.3f}",
                flush=True,
            )


def main() -> None:
    """Parse the command line and print what was measured."""
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["--make"]:
        make_large(Path(sys.argv[2]), tiny=sys.argv[3] == "tiny")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no worker is left alive
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["cpu", "memory"])
    parser.add_argument("--quick", action="store_true", help="CPU-seconds of the small shape only")
    parser.add_argument("--steps", type=int, default=30, help="of each run, at least")
    parser.add_argument("--partition", choices=PARTITIONS, help="only this one")
    given = parser.parse_args()
    partitions = [given.partition] if given.partition else PARTITIONS
    for partition in partitions if given.only != "cpu" and not given.quick else []:
        memory(partition)
    for partition in partitions if given.only != "memory" else []:
        cpu(next(iter(SHAPES)) if given.quick else GPT2, partition, given.steps)


if __name__ == "__main__":
    main()
