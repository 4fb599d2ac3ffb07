"""Which columns a format has, and what each must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlayer.contracts import Row

FIELDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "classification": ("text", "label"),
}


def check_row(row: Row, format: str, columns: Mapping[str, str]) -> str | None:
    """What is wrong with a row, as the end of a message that names its place, or None; ``columns`` as in DataConfig."""
    for field in FIELDS[format]:
        value, name = row.get(field), f"the column '{columns.get(field, field)}'"
        if value is None or (field == "label" and value == ""):
            return f"{name} is missing or empty. Give every row a value, or take the row out."
        if field == "messages":
            if problem := _check_messages(value):
                return f'{name} {problem}. Write [{{"role": "user", "content": "..."}}, ...].'
        elif field == "label":
            if isinstance(value, bool) or not isinstance(value, int | str):
                return f"{name} holds {value!r}. A label is a whole number or text."
        elif not isinstance(value, str):
            return f"{name} holds a {type(value).__name__}, not text. Turn it into text, or choose another column."
        elif _is_torn(value):
            return f"{name} has half a character (a lone surrogate), which no tokenizer takes. Write the text again."
    return None


def _check_messages(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return f"holds {'an empty list' if value == [] else f'a {type(value).__name__}'}, not a list of messages"
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            return f"holds a {type(message).__name__} as message {number}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or _is_torn(message[key]):
                return f"has a message {number} whose '{key}' is not text"
    return None


def _is_torn(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, as JSON of a text cut in the middle of an emoji does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
