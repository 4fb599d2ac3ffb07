"""From pydantic's errors to sentences: the dotted key, what is wrong with the value, and what is allowed."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from cutlayer.errors import suggest

NEEDED = {
    "model": "a model's name on the Hub, or a folder",
    "data": "a mapping with at least train: a file, a glob or a Hub data set",
    "train": "a file, a glob or a Hub data set",
    "name": "a name",
    "patience": "how many evaluations without progress to wait",
}
KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text (put it in quotes if it looks like something else)",
    "list_type": "a list",
    "dict_type": "a mapping {key: value}",
    "model_type": "a mapping {key: value}",
    "string_too_short": "a text that is not empty",
}
BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True)
class Problem:
    """One mistake: its sentence, where it is, what kind, and the keys whose values can no longer be trusted."""

    text: str
    loc: tuple[str | int, ...]
    kind: str
    doubtful: tuple[str, ...]


def problems_of(
    error: ValidationError, tree: Mapping[str, Any], root: type[BaseModel], *, what: str = "a run"
) -> list[Problem]:
    """Every error of a validation as a problem, in order; ``what`` is the tree as a whole."""
    return [_problem(details, tree, root, what) for details in error.errors(include_url=False)]


def show(value: Any) -> str:
    """A value as YAML would write it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def sentence(kind: str, message: str, context: Mapping[str, Any]) -> str:
    """What a value must be, for one of pydantic's kinds of error: ``must be a whole number``."""
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"must be {words} {context[bound]}"
    if kind in KINDS:
        return f"must be {KINDS[kind]}"
    if kind == "value_error":
        return str(context["error"])
    return message[:1].lower() + message[1:]


def dotted(loc: Iterable[str | int]) -> str:
    """``clients.0.name`` for ``("clients", 0, "name")``."""
    return ".".join(str(part) for part in loc)


def _problem(details: Mapping[str, Any], tree: Mapping[str, Any], root: type[BaseModel], what: str) -> Problem:
    kind, context = details["type"], details.get("ctx", {})
    loc = _real(details["loc"], tree, missing=kind == "missing")
    key, value = dotted(loc), details["input"]
    doubtful = [key]
    if kind == "extra_forbidden":
        known = _fields(root, loc[:-1])
        name = str(loc[-1])
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        doubtful += [dotted((*loc[:-1], *near))]
        inside = dotted(loc[:-1]) or what
        listed = f" Keys: {', '.join(known)}." if not near or len(known) <= 15 else ""
        text = f"{key}: {inside} has no key '{name}'.{suggest(name, known)}{listed}"
    elif kind == "missing":
        text = f"{key} is missing. It is {NEEDED.get(str(loc[-1]), 'a value')}."
        if loc[-1] == "name" and isinstance(value, dict) and not str(loc[0]).startswith("clients"):
            text = f"{dotted(loc[:-1])} does not say which method. Write {{name: id, option: value}}."
    elif kind == "invalid_key":
        text = f"{dotted(loc[:-1]) or what} has the key {show(value)}, which is no text. Put it in quotes, or mend it."
    elif kind == "literal_error":
        allowed = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        near_word = suggest(value, allowed) if isinstance(value, str) else ""
        text = f"{key} is {show(value)}.{near_word} Allowed: {', '.join(allowed)}."
    else:
        text = f"{key} is {show(value)}: {sentence(kind, details['msg'], context).rstrip('.')}."
    return Problem(text, loc, kind, tuple(doubtful))


def _real(loc: Sequence[str | int], tree: Any, *, missing: bool) -> tuple[str | int, ...]:
    """A location without the labels that pydantic adds for the members of a union and for keys."""
    real: list[str | int] = []
    for number, part in enumerate(loc):
        there = (isinstance(tree, Mapping) and part in tree) or (
            isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        )
        if there:
            real.append(part)
            tree = tree[part]
        elif missing and number == len(loc) - 1:
            real.append(part)
    return tuple(real)


def _fields(root: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """The keys of the model at a location."""
    model = root
    for part in loc:
        if isinstance(part, str):
            model = next(_models(model.model_fields[part].annotation))
    return list(model.model_fields)


def _models(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    """The pydantic models that a type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)
