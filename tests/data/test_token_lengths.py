"""How long a row is before anything is cut off."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cutlayer.config import DataConfig
from cutlayer.data.formats import token_lengths, tokenize
from tiny import make_tokenizer

TURNS = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "w5 " * count} for count in (1, 7, 40)],
    "prompt-completion": [{"prompt": "w5 " * 30, "completion": "w6"}, {"prompt": "w5", "completion": ""}],
    "messages": [
        {"messages": [{"role": "user", "content": "w5 " * 20}, {"role": "assistant", "content": "w6"}]},
        {
            "messages": [{"role": "assistant", "content": "w5"}]
        },  # refused only where the assistant's turns are looked for
    ],
    "classification": [{"text": "w5 " * count, "label": count % 2} for count in (1, 40)],
}


@pytest.mark.parametrize("format", ROWS)
@pytest.mark.parametrize("eos", [True, False])
def test_as_long_as_the_example_would_be(format: Any, eos: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer(chat_template=TURNS)
    rows = ROWS[format]
    short = DataConfig(format=format, max_length=6, append_eos=eos)
    with caplog.at_level(logging.WARNING):
        found = token_lengths(rows, short, tokenizer, where="rows")
    assert not caplog.records  # tokenize will say it, once
    long = DataConfig(format=format, max_length=1000, append_eos=eos, completion_only=False)
    task: Any = "classification" if format == "classification" else "causal"
    assert found == [len(e.input_ids) for e in tokenize(rows, long, tokenizer, task=task, where="rows")]
    assert max(found) > 20


def test_plain_numbers() -> None:
    assert token_lengths(ROWS["text"], DataConfig(), make_tokenizer(), where="rows") == [2, 8, 41]
