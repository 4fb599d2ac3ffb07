"""Print or write some of the generated text, to look at it.

    python demo/make_text.py general --documents 20         # what the base model is pretrained on
    python demo/make_text.py clinic-b --documents 5         # what a clinic would keep to itself
    python demo/make_text.py general --documents 1000 --out general.txt

The text itself comes from ``general_text.py`` and ``clinic_notes.py``, where the other scripts take it.
"""

import argparse
import itertools
import sys
from pathlib import Path

from clinic_notes import CLINICS, clinic_rows
from general_text import general_documents


def documents(kind: str, count: int, seed: int) -> list[str]:
    """The first documents of one kind: ``general`` or the name of a clinic."""
    if kind == "general":
        return list(itertools.islice(general_documents(seed), count))
    return [row.prompt + row.completion for row in itertools.islice(clinic_rows(kind, seed), count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["general", *CLINICS])
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to write (default: print)")
    arguments = parser.parse_args()
    text = "\n\n---\n\n".join(documents(arguments.kind, arguments.documents, arguments.seed)) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
