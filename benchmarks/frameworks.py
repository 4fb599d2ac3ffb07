"""Every framework on the same model, text, clients and seeds: what comes out, how fast, and for how many bytes.

    python benchmarks/frameworks.py --models MODELS --data DATA              # all, about an hour on one core; goes on
    python benchmarks/frameworks.py --models MODELS --data DATA --only e2e-iid

MODELS has the folder ``llama-tiny-wt2``, DATA the folders ``wikitext-2`` and ``e2e``. Five clients with unequal devices
and links; 20 optimizer steps each, 100 a run; texts divided by length (Dirichlet 0.1, of SplitFT) and IID; three seeds.
A call that was stopped goes on where it was. The table of each comparison is written to ``docs/results``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

from cutlayer import compare

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("laptop+dsl", "laptop+fibre", "phone+5g", "workstation+fibre", "laptop+4g")
CLIENTS = [{"name": f"client-{i}", "profile": profile} for i, profile in enumerate(PROFILES)]
STEPS, LOCAL = 20, 4  # of each client in the run, and in a round
EVAL_ROWS = 24
TEXTS: dict[str, dict[str, Any]] = {
    "wikitext-2": {"format": "text", "max_length": 64},
    "e2e": {
        "format": "prompt-completion", "columns": {"prompt": "context", "completion": "ref"}, "max_length": 96,
    },
}  # fmt: skip
DIVISIONS: dict[str, Any] = {
    "length-0.1": {"name": "splitft-length-dirichlet", "alpha": 0.1},
    "iid": "iid",
}
TARGETS = {"wikitext-2": 4.23, "e2e": 4.9}  # losses that every run reaches but ringsfl, which the rate is too high for
TRAINING_ROWS = 2000  # of each set, from its beginning: more than the runs see


def framework(name: str, **options: Any) -> dict[str, Any]:
    """A run's keys for a framework with its local steps."""
    return {"framework": {"name": name, "local_steps": LOCAL, **options}}


# Five clients: groups, edges and branches of two and three; ring lengths for eight blocks.
RUNS: dict[str, dict[str, Any]] = {
    "sequential-sl": framework("sequential-sl"),
    "psl": framework("psl"),
    "minibatch-sfl": {**framework("sfl-v1"), "mixing": "minibatch-sfl"},
    "sfl-v1": framework("sfl-v1"),
    "sfl-v2": framework("sfl-v2"),
    "gsfl": framework("gsfl", groups=2),
    "hsfl": {"framework": {"name": "hsfl", "edges": 2, "intervals": [4, 2, 1]}},
    "ringsfl": framework("ringsfl"),
    "pairingfl": {  # five clients make no pairs of neighbours, so its selection matches two each round
        **framework("pairingfl", pairs="selection"),
        "selection": {"name": "pairingfl-selection", "sketch": "lengths"},
    },
    "clicooper": framework("clicooper", owners=2),  # two bring data and three train, so it makes 40 steps
    "multisfl": framework("multisfl", branches=2),
    "p-sl": framework("p-sl", form="parallel"),
    "async-dt-asfl": {**framework("async-sfl"), "aggregator": "dt-asfl"},
    # The same cuts for all, and SplitFT's cuts, which follow the clients' accuracies; SplitFT's ranks in both.
    "splitft-same": {
        **framework("sfl-v2"), "aggregator": "lora-products",
        "peft": {"name": "splitft-cut-rank", "rank": 16, "cut_rank": 8, "alpha": 32},
    },
    "splitft-adaptive": {
        **framework("sfl-v2"), "aggregator": "lora-products",
        "peft": {"name": "splitft-cut-rank", "rank": 16, "cut_rank": 8, "alpha": 32},
        "planner": {"name": "splitft-adaptive-cut", "every": 1, "budget": 10.0},
    },
}  # fmt: skip


def texts(data: Path, folder: Path) -> dict[str, dict[str, str]]:
    """The first rows of each set, with blank lines left out, as files of ours."""
    found: dict[str, dict[str, str]] = {}
    for name in TEXTS:
        suffix = "txt" if name == "wikitext-2" else "jsonl"
        found[name] = {}
        for part, rows in (("train", TRAINING_ROWS), ("valid", EVAL_ROWS)):
            with gzip.open(data / name / f"{part}.{suffix}.gz", "rt", encoding="utf-8") as file:
                lines = [line for line in file if line.strip() and (name == "e2e" or not line.startswith(" ="))]
            path = folder / f"{name}-{part}.{suffix}"
            path.write_text("".join(lines[:rows]), encoding="utf-8")
            found[name][part] = str(path)
    return found


def config(model: Path, files: dict[str, str], name: str, division: str) -> dict[str, Any]:
    """What all runs of a comparison have in common."""
    return {
        "model": str(model),
        "data": {"train": files["train"], "eval": files["valid"], **TEXTS[name], "division": DIVISIONS[division]},
        "clients": CLIENTS,
        "partition": {"name": "u-shaped-split", "head_blocks": 2, "tail_blocks": 1},
        "peft": {"name": "lora", "rank": 8, "alpha": 16},
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "batch_size": 4,
        "steps": STEPS,
        "eval_every": 1,
        "checkpoint_every": 1000,
        "device": "cpu",
    }


def main() -> None:
    """Make what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder with llama-tiny-wt2")
    parser.add_argument("--data", type=Path, required=True, help="the folder with wikitext-2 and e2e")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "frameworks", help="where the runs are kept")
    parser.add_argument("--only", help="one comparison, such as e2e-iid")
    parser.add_argument("--runs", nargs="*", help="some of the runs (then no table is written to docs/results)")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    files = texts(given.data, given.out)
    chosen = {name: RUNS[name] for name in given.runs or RUNS}
    for name in TEXTS:
        for division in DIVISIONS:
            called = f"{name}-{division}"
            if given.only not in (None, called):
                continue
            common = config(given.models / "llama-tiny-wt2", files[name], name, division)
            runs = {run: {**common, **special} for run, special in chosen.items()}
            made = compare(runs, out=given.out / called, seeds=given.seeds, target=TARGETS[name], progress=False)
            if not given.runs:
                keep(made.out, called, made.summary)


def keep(folder: Path, called: str, summary: Any) -> None:
    """Put a comparison's table, and its numbers without the curves, into ``docs/results``."""
    results = ROOT / "docs" / "results"
    results.mkdir(parents=True, exist_ok=True)
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    command = f"python benchmarks/frameworks.py --models MODELS --data DATA --only {called}"
    text = re.sub(r"^Command: `.*`$", lambda _: f"Command: `{command}`", text, flags=re.MULTILINE)
    (results / f"{called}.md").write_text(text, encoding="utf-8")
    numbers = {name: found["over_seeds"] for name, found in summary["results"].items()}
    (results / f"{called}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
