"""Write the tables of the documentation that follow from the code: methods, models, options.

python docs/generate.py          # after a method was added or changed; tests/test_docs.py says if it is due
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from cutlayer import registry
from cutlayer.models.families import EXACT
from cutlayer.options import options_of

ROOT = Path(__file__).resolve().parents[1]
CAUSAL = {
    "gpt2": "GPT-2", "opt": "OPT", "gpt_neox": "GPT-NeoX", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3 (text)", "phi": "Phi",
    "phi3": "Phi-3",
}  # fmt: skip
CLASSIFIERS = {"bert": "BERT", "roberta": "RoBERTa", "distilbert": "DistilBERT"}


def methods() -> str:
    """A row for each method: family, id, its sentence and its paper."""
    rows = ["| family | id | what it does | paper |", "|---|---|---|---|"]
    rows += [f"| {card.family} | `{card.id}` | {card.summary} | {card.paper} |" for card in registry.cards()]
    return "\n".join(rows)


def models() -> str:
    """The families that are exact; a family without a name here is shown by its type."""
    names = {kind: CAUSAL.get(kind, f"`{kind}`") for kind in sorted(EXACT) if kind not in CLASSIFIERS}
    ordered = [names.pop(kind) for kind in CAUSAL if kind in names] + list(names.values())
    encoders = [name for kind, name in CLASSIFIERS.items() if kind in EXACT]
    return f"- causal language models: {', '.join(ordered)}\n- classifiers: {', '.join(encoders)}"


def options() -> str:
    """A row for each option of each method: default, and the comment beside it in the source."""
    rows = ["| family | method | option | default | |", "|---|---|---|---|---|"]
    for card in registry.cards():
        cls = registry.load(card.family, card.id)
        for option in options_of(cls):
            default = "must be given" if option.default is None else f"`{option.default}`"
            about = option.about.replace("|", r"\|")
            rows.append(f"| {card.family} | `{card.id}` | `{option.name}` | {default} | {about} |")
    return "\n".join(rows)


TABLES: Mapping[str, tuple[str, Callable[[], str]]] = {
    "methods": ("README.md", methods),
    "models": ("README.md", models),
    "options": ("docs/runs.md", options),
}


def with_tables(file: str, text: str) -> str:
    """``text`` of a file with its tables as they should be."""
    for name, (where, make) in TABLES.items():
        if where == file:
            pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", re.DOTALL)
            assert len(pattern.findall(text)) == 1, f"{file} should have one place for the table '{name}'"
            text = pattern.sub(lambda found, table=make(): f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for file in sorted({where for where, _ in TABLES.values()}):
        path = ROOT / file
        path.write_text(with_tables(file, path.read_text(encoding="utf-8")), encoding="utf-8")
