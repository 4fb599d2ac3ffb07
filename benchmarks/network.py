"""What the network costs: CPU-seconds of a client-step over TLS, and a client's peak memory beside its own blocks.

    python benchmarks/network.py                  # both
    python benchmarks/network.py --only cpu       # the CPU-seconds: about 20 minutes on one core
    python benchmarks/network.py --only memory    # the memory: about 3 minutes, and 4 GB of the temporary folder

CPU-seconds: the same run in one process (``cutlayer train``) and between processes over loopback TLS (``cutlayer
serve`` and ``cutlayer join``), of GPT-2 small's shape. They are user and system time of all processes of a run; start-up
goes out by the difference between a long run and a short one. The runs are made in turn, several times. Memory is the
peak of a fresh client process with a model of some 400M numbers in shards, against the same with a tiny one plus the
bytes of its own blocks. Numbers are printed, never asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from bench import LENGTH, ROWS, SHAPES, make_model, make_rows, run_config

HERE = Path(__file__).resolve()
CUTLAYER = [sys.executable, "-m", "cutlayer"]
GPT2 = "GPT-2 small (12 blocks, H=768)"
MIB = 1 << 20


class Process:
    """A process of a run, and what it used when it ended."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.pid = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment).pid

    def said(self, pattern: str) -> str:
        """Wait until it says that; what is in the pattern's group."""
        while (found := re.search(pattern, self.log.read_text())) is None:
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.log.read_text()
            time.sleep(0.05)
        return found[1]

    def cpu_seconds(self) -> float:
        """Wait for its end; user and system time."""
        _, status, used = os.wait4(self.pid, 0)
        assert status == 0, self.log.read_text()
        return used.ru_utime + used.ru_stime


class Setting:
    """A folder with a model, texts, keys and run files."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0
        subprocess.run(
            [*CUTLAYER, "keys", "--out", root / "keys", "--host", "localhost", "--client", "client-0"],
            check=True, capture_output=True,
        )  # fmt: skip

    def run_file(self, tree: dict[str, Any]) -> Path:
        """A run file of its own."""
        self.count += 1
        file = self.root / f"run-{self.count}.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    def alone(self, tree: dict[str, Any]) -> float:
        """CPU-seconds of the run in one process."""
        file = self.run_file(tree)
        command = [*CUTLAYER, "train", str(file), "--out", str(self.root / f"out-{self.count}")]
        return Process(command, file.with_suffix(".log")).cpu_seconds()

    def apart(self, tree: dict[str, Any], client: Sequence[str]) -> tuple[float, float, str]:
        """CPU-seconds of the server and the client over TLS, and what the client said."""
        file = self.run_file(tree)
        out = self.root / f"out-{self.count}"
        command = [*CUTLAYER, "serve", str(file), "--bind", "localhost:0", "--keys", str(self.root / "keys/server")]
        server = Process([*command, "--out", str(out / "server")], file.with_suffix(".server.log"))
        port = server.said(r"listening at localhost:(\d+)")
        own = [
            "--data",
            tree["data"]["train"],
            "--keys",
            str(self.root / "keys/client-0"),
            "--out",
            str(out / "client"),
        ]
        joined = Process([*client, f"localhost:{port}", *own], file.with_suffix(".client.log"))
        theirs, ours = joined.cpu_seconds(), server.cpu_seconds()
        return ours, theirs, joined.log.read_text()


def cpu(partition: str, steps: int, repeats: int) -> None:
    """Print the CPU-seconds of a step in one process and over TLS."""
    with tempfile.TemporaryDirectory() as name:
        setting = Setting(Path(name))
        make_model(setting.root / "model", SHAPES[GPT2])
        make_rows(setting.root / "rows.jsonl", 64)
        found: list[tuple[float, float, float]] = []
        client = [*CUTLAYER, "join", "--model", str(setting.root / "model")]
        for _ in range(repeats):
            one, server, joined = [], [], []
            for rounds in (2, 2 + steps):
                tree = run_config(
                    setting.root / "model", setting.root / "rows.jsonl", partition, clients=1, rounds=rounds
                )
                one.append(setting.alone(tree))
                ours, theirs, _ = setting.apart(tree, client)
                server.append(ours)
                joined.append(theirs)
            found.append(tuple((long - short) / steps for short, long in (one, server, joined)))  # type: ignore[arg-type]
            a, b, c = found[-1]
            print(f"  {partition}: alone {a:.3f}, server {b:.3f} + client {c:.3f}, ratio {(b + c) / a:.3f}", flush=True)
    one_s, both_s = statistics.median(a for a, _, _ in found), statistics.median(b + c for _, b, c in found)
    print(
        f"{GPT2:32} {partition:15} one process {one_s:.3f}  over TLS {both_s:.3f} CPU-s a client-step (batch {ROWS} x "
        f"{LENGTH}; medians of {repeats} runs in turn)  ratio {both_s / one_s:.3f}"
    )


def make_large(folder: Path, *, tiny: bool) -> None:
    """A random Llama of 400M numbers in shards (or the same, but tiny), with a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_model(folder, {"n_layer": 1, "n_embd": 8, "n_head": 1})  # for its tokenizer
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64} if tiny else {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 32_000
    }  # fmt: skip
    config = LlamaConfig(**size, num_hidden_layers=26, max_position_embeddings=256, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300MB")


def memory(partition: str, rounds: int) -> None:
    """Print a client's peak memory with a large model, from local files and from the server."""
    with tempfile.TemporaryDirectory() as name:
        setting, peaks = Setting(Path(name)), {}
        for size in ("tiny", "large"):
            subprocess.run([sys.executable, HERE, "--make", setting.root / size, size], check=True, capture_output=True)
        (setting.root / "rows.jsonl").write_text("\n".join(json.dumps({"text": "w5 w6 w7 " * 10}) for _ in range(8)))
        for size, where in (("tiny", "local"), ("tiny", "served"), ("large", "local"), ("large", "served")):
            tree = run_config(setting.root / size, setting.root / "rows.jsonl", partition, clients=1, rounds=rounds)
            tree |= {"batch_size": 1, "peft": {"name": "lora", "rank": 4}}
            tree["partition"] |= {"head_blocks": 2} | ({"tail_blocks": 1} if partition == "u-shaped-split" else {})
            model = str(setting.root / size) if where == "local" else "served"
            *_, said = setting.apart(tree, [sys.executable, str(HERE), "--join", model])
            told = json.loads(said.splitlines()[-1])
            peaks[size, where] = told
        for where in ("local", "served"):
            runtime, (rss, own) = peaks["tiny", where][0], peaks["large", where]
            print(
                f"400M in shards, {partition}, {where:6}: a client's peak {rss / MIB:.0f} MiB; its own blocks "
                f"{own / MIB:.0f} MiB + the runtime {runtime / MIB:.0f} MiB = {(own + runtime) / MIB:.0f} MiB; "
                f"ratio {rss / (own + runtime):.3f}",
                flush=True,
            )


def joined(arguments: list[str]) -> None:
    """In a fresh process: take part in a run, then tell the peak and the bytes of what is frozen of the model."""
    parser = argparse.ArgumentParser()
    for option in ("model", "address", "--data", "--keys", "--out"):
        parser.add_argument(option)
    given = parser.parse_args(arguments)
    from cutlayer import joining
    from cutlayer.report.summary import peak_rss

    seats = []

    class Noted(joining.Seat):
        def __init__(self, *more: Any, **options: Any) -> None:
            super().__init__(*more, **options)
            seats.append(self)

    joining.Seat = Noted  # type: ignore[misc]
    joining.join(given.address, data=given.data, keys=given.keys, out=given.out, model=given.model, progress=False)
    own = sum(p.numel() * p.element_size() for p in seats[0].base.model.parameters() if not p.requires_grad)
    print(json.dumps([peak_rss(), own]))


def main() -> None:
    """Parse the command line and print what was measured."""
    if sys.argv[1:2] == ["--join"]:
        joined(sys.argv[2:])
        return
    if sys.argv[1:2] == ["--make"]:
        make_large(Path(sys.argv[2]), tiny=sys.argv[3] == "tiny")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["cpu", "memory"])
    parser.add_argument("--steps", type=int, default=12, help="between the short and the long run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--partition", choices=["two-part-split", "u-shaped-split"], help="only this one")
    given = parser.parse_args()
    partitions = [given.partition] if given.partition else ["two-part-split", "u-shaped-split"]
    for partition in partitions if given.only != "cpu" else []:
        memory(partition, 3)
    for partition in partitions if given.only != "memory" else []:
        cpu(partition, given.steps, given.repeats)


if __name__ == "__main__":
    main()
