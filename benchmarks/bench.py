"""What splitting costs: CPU-seconds of a client-step and peak memory, against plain Transformers + PEFT.

    python benchmarks/bench.py            # both shapes, both partitions, and memory a further client
    python benchmarks/bench.py --quick    # the small shape only, few steps

The split run and the unsplit one do the same work on the same model, data, LoRA and optimizer, one step of each in
turn in one process, so that a machine whose speed drifts slows both. CPU-seconds are those of the whole process (all
threads; one compute thread). Memory is the peak of a fresh process for each case. Numbers are printed, never asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

SHAPES = {
    "4 blocks, H=256": {"n_layer": 4, "n_embd": 256, "n_head": 4},
    "GPT-2 small (12 blocks, H=768)": {"n_layer": 12, "n_embd": 768, "n_head": 12},
}
VOCAB, ROWS, LENGTH, RANK = 50_257, 4, 128, 4
LR = 2e-4


def make_model(folder: Path, shape: Mapping[str, int]) -> None:
    """A random GPT-2 of the shape, without dropout, and a tokenizer with one word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=1024, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, eos_token_id=0, **shape
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"</s>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>").save_pretrained(folder)


def make_rows(path: Path, count: int) -> None:
    """Rows of exactly LENGTH tokens with the end-of-text token."""
    draw = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(count):
            ids = torch.randint(1, VOCAB, (LENGTH - 1,), generator=draw).tolist()
            file.write(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n")


def run_config(model: Path, rows: Path, partition: str, *, clients: int, rounds: int) -> dict[str, Any]:
    """The split run; the cut leaves the client the first block of four, or three of twelve."""
    return {
        "model": str(model),
        "data": {"train": str(rows), "format": "text", "shuffle": False, "max_length": LENGTH},
        "clients": clients,
        "partition": {"name": partition, "head_blocks": 1},
        "peft": {"name": "lora", "rank": RANK, "alpha": 2 * RANK, "targets": ["c_attn"]},
        "framework": {"name": "sfl-v2", "order": "listed"},
        "optimizer": {"name": "adamw", "lr": LR},
        "batch_size": ROWS,
        "rounds": rounds,
        "checkpoint_every": 1_000_000,
        "device": "cpu",
    }


class Unsplit:
    """Plain Transformers + PEFT, one step a call."""

    def __init__(self, model: Path, rows: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        base.config.use_cache = False
        adapter = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(base, adapter)
        self.model.train()
        tokenizer = AutoTokenizer.from_pretrained(model)
        texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
        self.ids = torch.tensor([[*tokenizer(text)["input_ids"], 0] for text in texts])
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=LR)
        self.number = 0

    def step(self) -> float:
        """One optimizer step; its loss."""
        start = (self.number * ROWS) % len(self.ids)
        self.number += 1
        batch = self.ids[start : start + ROWS]
        loss = self.model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class InTurn:
    """Told after each split step; makes an unsplit step then, and keeps the CPU-seconds of both."""

    def __init__(self, unsplit: Unsplit | None) -> None:
        self.unsplit = unsplit
        self.split_s: list[float] = []
        self.unsplit_s: list[float] = []
        self.worst = 0.0
        self.mark = 0.0

    def start(self, total_steps: int) -> None:
        self.mark = time.process_time()

    def update(self, record: Mapping[str, Any]) -> None:
        now = time.process_time()
        self.split_s.append(now - self.mark)
        if self.unsplit is not None:
            loss = self.unsplit.step()
            self.unsplit_s.append(time.process_time() - now)
            if not self.worst and record["step"] == 0:
                self.worst = abs(loss - record["loss"])
        self.mark = time.process_time()

    def note(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


def time_steps(shape: str, partition: str, steps: int) -> None:
    """Print the CPU-seconds of split and unsplit steps, made in turn."""
    from cutlayer.run import train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", SHAPES[shape])
        make_rows(folder / "rows.jsonl", 64)
        turn = InTurn(Unsplit(folder / "model", folder / "rows.jsonl"))
        warm = 2
        config = run_config(folder / "model", folder / "rows.jsonl", partition, clients=1, rounds=steps + warm)
        train(config, out=folder / "out", progress=turn)
    split, unsplit = turn.split_s[warm:], turn.unsplit_s[warm:]
    ratio = statistics.median(a / b for a, b in zip(split, unsplit, strict=True))
    a, b = statistics.median(split), statistics.median(unsplit)
    print(
        f"{shape:32} {partition:15} split {a:.3f}  unsplit {b:.3f} CPU-s a step (medians of {len(split)}, in turn)  "
        f"ratio {ratio:.3f}  difference {1000 * (a - b):+.1f} ms  first loss differs by {turn.worst:.1e}"
    )


def peak(shape: str, kind: str, clients: int, rounds: int) -> tuple[int, int]:
    """Peak RSS of a fresh process in bytes, and the bytes of one client's adapter, gradients and optimizer state."""
    command = [sys.executable, __file__, "--worker", json.dumps([shape, kind, clients, rounds])]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    rss, own = json.loads(out)
    return rss, own


def worker(shape: str, kind: str, clients: int, rounds: int) -> None:
    """In a fresh process: a few steps, then the peak."""
    from cutlayer.report.summary import peak_rss

    torch.set_num_threads(1)
    own = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [sys.executable, __file__, "--make", json.dumps([shape, str(folder), max(64, ROWS * clients)])], check=True
        )
        if kind == "unsplit":
            plain = Unsplit(folder / "model", folder / "rows.jsonl")
            for _ in range(rounds):
                plain.step()
        else:
            from cutlayer.run import train

            config = run_config(folder / "model", folder / "rows.jsonl", kind, clients=clients, rounds=rounds)
            result = train(config, out=folder / "out", progress=InTurn(None))
            memory = result.summary["parties"]["client-0"]["memory"]
            own = memory["trainable"] + memory["gradients"] + memory["optimizer"]
    print(json.dumps([peak_rss(), own]))


def memory_table(shape: str, many: int) -> None:
    """Print peak memory of unsplit and split, and what a further client costs: the same number of steps either way."""
    mib = 1 << 20
    plain, _ = peak(shape, "unsplit", 1, many)
    print(f"{shape:32} peak RSS: unsplit {plain / mib:.0f} MiB", end="")
    for partition in ("two-part-split", "u-shaped-split"):
        few, own = peak(shape, partition, 2, many // 2)
        lots, _ = peak(shape, partition, many, 1)
        more = (lots - few) / (many - 2)
        print(
            f"; {partition} with 2 clients {few / mib:.0f} MiB, each further client {more / mib:.3f} MiB = "
            f"{more / own:.2f} x its adapter, gradients and optimizer state ({own / mib:.3f} MiB)",
            end="",
        )
    print()


def demo_worker(framework: str, clients: int) -> None:
    """In a fresh process: one round of so many clients on the demo's model, then peak, CPU-seconds, and one's state."""
    from cutlayer.report.summary import peak_rss
    from cutlayer.run import train

    torch.set_num_threads(1)
    demo = Path(__file__).resolve().parents[1] / "demo"
    config = {
        "model": str(demo / "model"), "clients": clients, "framework": framework, "rounds": 2,
        "data": {"train": str(demo / "data/train.jsonl"), "format": "prompt-completion", "max_length": 96},
        "partition": {"name": "u-shaped-split", "head_blocks": 2, "tail_blocks": 1}, "batch_size": 2,
        "optimizer": {"name": "adamw", "lr": LR}, "checkpoint_every": 1_000_000, "device": "cpu",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        before = time.process_time()
        result = train(config, out=Path(name) / "out")
    parties = result.summary["parties"]
    own = sum(parties["client-0"]["memory"][key] for key in ("trainable", "gradients", "optimizer"))
    own += sum(parties["server"]["memory"][key] for key in ("trainable", "gradients", "optimizer")) // clients
    print(json.dumps([peak_rss(), time.process_time() - before, own]))


def hundred_clients() -> None:
    """Print what memory and time a further client costs from 20 to 100 clients, with one trunk and with one each."""
    for framework in ("sfl-v2", "sfl-v1"):
        found = {}
        for clients in (20, 100):
            command = [sys.executable, __file__, "--demo", json.dumps([framework, clients])]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            found[clients] = json.loads(out)
        (few, short, _), (lots, long, own) = found[20], found[100]
        print(
            f"demo model, {framework}: 100 clients {lots / (1 << 20):.0f} MiB, each further client "
            f"{(lots - few) / 80 / (1 << 20):.3f} MiB = {(lots - few) / 80 / own:.2f} x its adapters, gradients and "
            f"optimizer state; CPU-seconds {short:.1f} with 20 and {long:.1f} with 100 clients"
        )


def main() -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small shape only, few steps")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--demo", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(*json.loads(arguments.worker))
        return
    if arguments.demo:
        demo_worker(*json.loads(arguments.demo))
        return
    if arguments.make:
        shape, folder, rows = json.loads(arguments.make)
        make_model(Path(folder) / "model", SHAPES[shape])
        make_rows(Path(folder) / "rows.jsonl", rows)
        return
    torch.set_num_threads(1)
    small, large = SHAPES
    print(f"batch {ROWS} x {LENGTH}, vocabulary {VOCAB}, LoRA rank {RANK} on c_attn, float32, one thread\n")
    for shape, steps in [(small, 10)] if arguments.quick else [(small, 30), (large, 8)]:
        for partition in ("two-part-split", "u-shaped-split"):
            time_steps(shape, partition, steps)
    memory_table(small, 12 if arguments.quick else 42)
    if not arguments.quick:
        hundred_clients()


if __name__ == "__main__":
    main()
