"""What the server can read, by cut, tail and defense, on pretrained models and real text.

    python benchmarks/leakage.py --models MODELS --data DATA                # what is missing; goes on where it was
    python benchmarks/leakage.py --models MODELS --data DATA --only plain   # without defenses

MODELS has the folders ``gpt2-tiny-wt2`` and ``llama-tiny-wt2``, DATA the folder ``wikitext-2``. Each line of the tables
is a ``cutlayer audit`` of a run of one client, of 40 optimizer steps, attacked at its first and at its last step on
eight sequences of 64 tokens. They are written to ``docs/results/leakage.md`` and ``leakage.json``; from the latter
``cutlayer train`` and ``join`` take what they warn of.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

from cutlayer.audit.auditing import audit
from cutlayer.audit.settings import with_defense
from cutlayer.config import load_config
from cutlayer.config_write import tree_of

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("llama-tiny-wt2", "gpt2-tiny-wt2")
ATTACKS = ("causal-search", "label-solve")
CUTS, TAILS = (0, 1, 2, 4), (0, 1, 2)
ROWS, EVAL_ROWS = 400, 24
KEPT = ("attack", "target", "defense", "moment", "token_recovery", "rouge_l", "controls", "utility")
STRENGTHS = {  # at cut 2, tail 0, each by itself
    "dp-forward": [{"noise": 0.1, "clip": None}, {"noise": 0.3, "clip": None}, {"noise": 1.0, "clip": None}],
    "laplace-embedding": [{"noise": 0.1}, {"noise": 0.3}, {"noise": 1.0}],
    "clip-noise": [{"multiplier": 0.003}, {"multiplier": 0.01}, {"multiplier": 0.03}],
}  # fmt: skip
BOTH = ["dp-forward(noise=1.0,clip=null)+clip-noise(multiplier=0.03)"]  # the inputs and the labels


def texts(data: Path, folder: Path) -> dict[str, str]:
    """The first rows of WikiText-2, without blank lines and headings, as files of ours."""
    found = {}
    for part, rows in (("train", ROWS), ("valid", EVAL_ROWS)):
        with gzip.open(data / "wikitext-2" / f"{part}.txt.gz", "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip() and not line.startswith(" =")]
        path = folder / f"{part}.txt"
        path.write_text("".join(lines[:rows]), encoding="utf-8")
        found[part] = str(path)
    return found


def config(model: Path, files: dict[str, str], cut: int, tail: int) -> dict[str, Any]:
    """A run of one client."""
    text = {"train": files["train"], "eval": files["valid"], "format": "text", "max_length": 64}
    return {
        "model": str(model), "data": text, "clients": 1,
        "partition": {"name": "u-shaped-split", "head_blocks": cut, "tail_blocks": tail},
        "peft": {"name": "lora", "rank": 8, "alpha": 16}, "optimizer": {"name": "adamw", "lr": 2e-3}, "batch_size": 8,
        "steps": 40, "checkpoint_every": 1000, "device": "cpu",
    }  # fmt: skip


def settings(names: list[str] | None) -> list[str]:
    """The texts of all defense settings, or of some defenses."""
    found = [
        f"{name}({','.join(f'{key}={json.dumps(value)}' for key, value in options.items())})"
        for name, strengths in STRENGTHS.items()
        for options in strengths
        if names is None or name in names
    ]
    return found + ([] if names is not None else BOTH)


def main() -> None:
    """Make what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder with wikitext-2")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "leakage", help="where the audits are kept")
    parser.add_argument("--only", choices=["plain", "defended"])
    parser.add_argument("--defenses", nargs="*", help="some of the defenses")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    files = texts(given.data, given.out)
    if given.only != "defended":
        for model in MODELS:
            for cut in CUTS:
                for tail in TAILS:
                    made(given.out / f"{model}-cut{cut}-tail{tail}", config(given.models / model, files, cut, tail))
    if given.only != "plain":
        for setting in settings(given.defenses):
            called = "".join(letter if letter.isalnum() or letter in "-.=" else "_" for letter in setting)
            run = with_defense(load_config(config(given.models / MODELS[0], files, 2, 0)), setting)
            made(given.out / f"defended-{called}", tree_of(run))
    write(given.out)


def made(out: Path, run: dict[str, Any]) -> None:
    """An audit, unless it is there."""
    if (out / "audit.json").is_file():
        return
    began = time.process_time()
    given = {key: value for key, value in run.items() if value is not None}
    audit(given, out=out, attacks=ATTACKS, progress=False)
    print(f"{out.name}: {time.process_time() - began:.0f} CPU-seconds", flush=True)


def write(out: Path) -> None:
    """The tables of all audits that are there."""
    plain, defended = [], []
    for folder in sorted(out.glob("*/audit.json")):
        rows = json.loads(folder.read_text(encoding="utf-8"))
        name = folder.parent.name
        for row in rows:
            kept = {key: row[key] for key in KEPT}
            if name.startswith("defended-"):
                defended.append(kept)
            else:
                model, cut, tail = name.rsplit("-", 2)
                plain.append({"model": model, "cut": int(cut[3:]), "tail": int(tail[4:]), **kept})
    results = ROOT / "docs" / "results"
    numbers = json.dumps({"plain": plain, "defended": defended}, indent=1)
    (results / "leakage.json").write_text(numbers + "\n", encoding="utf-8")
    (ROOT / "src" / "cutlayer" / "audit" / "known.json").write_text(known(plain), encoding="utf-8")
    (results / "leakage.md").write_text(page(plain, defended), encoding="utf-8")


def known(plain: list[dict[str, Any]]) -> str:
    """A line for each model, cut, tail and attack, as ``cutlayer.audit.known`` reads it."""
    found: dict[tuple[str, int, int, str], dict[str, float]] = {}
    for row in plain:
        key = row["model"], row["cut"], row["tail"], row["attack"]
        found.setdefault(key, {})[row["moment"].split()[0]] = round(row["token_recovery"], 4)
    lines = [
        json.dumps({"model": model, "cut": cut, "tail": tail, "attack": attack, **shares})
        for (model, cut, tail, attack), shares in sorted(found.items())
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


PLAIN = """# What the server can read

Command: `python benchmarks/leakage.py --models MODELS --data DATA`. WikiText-2, one client, LoRA of rank 8, AdamW at
2e-3, 40 steps of 8 sequences of up to 64 tokens; attacked at the first and at the last step, on eight sequences. Share
of the private tokens that came back; in brackets after 40 steps. `constant`: always guessing the most frequent token.

## Without a defense

| model | cut | tail | `causal-search` (inputs) | `label-solve` (labels) | constant |
|---|---|---|---|---|---|
"""
DEFENDED = """
## With a defense

`llama-tiny-wt2`, cut 2, tail 0; perplexity on the evaluation data after the 40 steps.

| defense | `causal-search` (inputs) | `label-solve` (labels) | perplexity |
|---|---|---|---|
"""


def page(plain: list[dict[str, Any]], defended: list[dict[str, Any]]) -> str:
    """Both tables."""
    text = PLAIN
    for model in MODELS:
        for cut in CUTS:
            for tail in TAILS:
                of = [row for row in plain if (row["model"], row["cut"], row["tail"]) == (model, cut, tail)]
                if of:
                    cells = " | ".join(both(of, attack) for attack in ("causal-search", "label-solve"))
                    text += f"| {model} | {cut} | {tail} | {cells} | {of[0]['controls']['constant']:.3f} |\n"
    text += DEFENDED if defended else ""
    for setting in dict.fromkeys(row["defense"] for row in defended):
        of = [row for row in defended if row["defense"] == setting]
        cells = " | ".join(both(of, attack) for attack in ("causal-search", "label-solve"))
        text += f"| `{setting}` | {cells} | {of[0]['utility']['perplexity']:.1f} |\n"
    return text


def both(rows: list[dict[str, Any]], attack: str) -> str:
    """The share at the first step, and in brackets at the last."""
    found = {row["moment"]: row["token_recovery"] for row in rows if row["attack"] == attack}
    if not found:
        return "-"
    last = f" ({found['last step']:.3f})" if "last step" in found else ""
    return f"{found['first step']:.3f}{last}"


if __name__ == "__main__":
    sys.exit(main())
