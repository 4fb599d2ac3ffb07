"""Write the clinics' notes to ``demo/data/train.jsonl`` and ``demo/data/valid.jsonl``, the same bytes every time.

    python demo/make_data.py [--out DIR]

The three clinics have unequal numbers of rows and come interleaved in a fixed random order. No visit is in both files.
"""

import argparse
import itertools
import json
import random
from dataclasses import asdict
from pathlib import Path

from clinic_notes import Row, clinic_rows

HERE = Path(__file__).resolve().parent
SEED = 11
TRAIN_ROWS = {"clinic-a": 260, "clinic-b": 200, "clinic-c": 140}
VALID_ROWS = {"clinic-a": 39, "clinic-b": 30, "clinic-c": 21}


def make_rows() -> tuple[list[Row], list[Row]]:
    """The training and validation rows."""
    train: list[Row] = []
    valid: list[Row] = []
    for clinic, count in TRAIN_ROWS.items():
        visits = clinic_rows(clinic, SEED)
        train += itertools.islice(visits, count)
        known = {row.prompt for row in train}
        valid += itertools.islice((row for row in visits if row.prompt not in known), VALID_ROWS[clinic])
    rng = random.Random(SEED)
    rng.shuffle(train)
    rng.shuffle(valid)
    return train, valid


def as_jsonl(rows: list[Row]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data", help="folder to write (default demo/data)")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "valid"), make_rows(), strict=True):
        (out / f"{name}.jsonl").write_bytes(as_jsonl(rows).encode())
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
