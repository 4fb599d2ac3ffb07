"""From a YAML text and ``key=value`` overrides to one plain tree; nothing is judged here but its form."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from cutlayer.errors import ConfigError

TIMESTAMP = "tag:yaml.org,2002:timestamp"
FLOAT = "tag:yaml.org,2002:float"
SCIENTIFIC = re.compile(r"^[-+]?([0-9][0-9_]*\.?|\.[0-9])[0-9_]*[eE][-+]?[0-9]+$")  # 2e-4: text in YAML 1.1


class _Loader(yaml.SafeLoader):
    """Safe YAML that notices keys given twice, reads ``2e-4`` as a number and leaves dates as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A dict; a key that comes twice is noted with both lines."""
        seen: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                self.problems.append(
                    f"line {line}: the key '{key.value}' is given twice (first in line {seen[key.value]}). Remove one."
                )
            seen.setdefault(key.value, line)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(FLOAT, SCIENTIFIC, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Safe YAML without anchors, whose texts the loader above reads back as texts."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice out twice."""
        return True


_Dumper.add_implicit_resolver(FLOAT, SCIENTIFIC, list("-+.0123456789"))


def write(tree: Mapping[str, Any]) -> str:
    """The YAML of a tree; innermost mappings and lists on one line."""
    text: str = yaml.dump(
        dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )
    return text


def _parse(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML text and the keys that come twice in it; raises ``yaml.YAMLError``."""
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.problems
    finally:
        loader.dispose()


def read(
    source: str | Path | Mapping[str, Any], *, needs: str = "A run needs at least model and data.train."
) -> tuple[dict[str, Any], list[str], str]:
    """The tree of a run, the keys given twice, and what to call the source in a message.

    Args:
        source: a path, a YAML text (it has a line break), or a mapping (copied, with paths as texts).

    Raises:
        ConfigError: there is no such file, it cannot be read, is no YAML, or is no mapping.
    """
    if isinstance(source, Mapping):
        return to_jsonable_python(dict(source), fallback=lambda value: value), [], "the run"
    if isinstance(source, str) and "\n" in source:
        text, where = source, "the run"
    else:
        where = str(source)
        text = _text_of(Path(source))
    try:
        tree, problems = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError([f"{_place(error)}this is not YAML: {_reason(error)}."], where) from error
    if tree is None:
        raise ConfigError([f"it is empty. {needs}"], where)
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"the single value {tree!r}"
        raise ConfigError([f"the top level is {kind}; it must be a mapping of keys, such as 'model: gpt2'."], where)
    return tree, problems, where


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"there is no such file (looked for {path.absolute()})."], str(path)) from None
    except IsADirectoryError:
        raise ConfigError(["this is a folder. Name the YAML file in it."], str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"it is no UTF-8 text (byte {error.start}). Save it as UTF-8."], str(path)) from None


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    return ", ".join(part for part in parts if part) or " ".join(str(error).split())


def parse_value(text: str) -> Any:
    """The value in ``key=value``, read as YAML; what is no YAML, such as ``*.jsonl``, is text as it stands.

    Raises:
        ValueError: it is empty, or starts like a list, a mapping or a quoted text and is broken.
    """
    text = text.strip()
    if not text:
        raise ValueError("there is nothing after the '='; write null for no value, '' for an empty text")
    try:
        value, problems = _parse(text)
    except yaml.YAMLError as error:
        if text[:1] in "[{\"'":
            raise ValueError(_reason(error)) from error
        return text
    if problems:
        raise ValueError("; ".join(problem.split(": ", 1)[1] for problem in problems))
    if value is None and text.lower() not in ("null", "~"):
        return text  # such as '# 3', which YAML takes for a comment
    return text if isinstance(value, str) and text[:1] not in "\"'|>" else value


class Overrides:
    """Sets ``key=value`` in a tree.

    Args:
        tree: the tree, changed in place.
        defaults: the default method of each key that has one, by dotted key (``data.division``), so that an option of
            a method can be set that the file does not mention.
        families: all dotted keys whose value is a method; where one is given by its id alone it becomes
            ``{name: id}`` when an option of it is set.
    """

    def __init__(self, tree: dict[str, Any], *, defaults: Mapping[str, str], families: Sequence[str]) -> None:
        self.tree = tree
        self.defaults = defaults
        listed = "|".join(re.escape(key) for key in families)
        self._family = re.compile(rf"({listed})(\.(up|down|\d+))?")

    def apply(self, overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
        """Set them all, in order; returns what is wrong with them."""
        problems = []
        pairs: list[tuple[str, Any]] = []
        if isinstance(overrides, Mapping):
            plain = to_jsonable_python(dict(overrides), fallback=lambda value: value)
            pairs = [(str(key), value) for key, value in plain.items()]
        else:
            for text in overrides:
                key, found, value = text.partition("=")
                try:
                    if not found:
                        raise ValueError("there is no '=' in it; write key=value")
                    pairs.append((key.strip(), parse_value(value)))
                except ValueError as error:
                    problems.append(f"the override '{text}' cannot be read: {error}.")
        for key, value in pairs:
            try:
                self._set(key, value)
            except ValueError as error:
                problems.append(str(error))
        return problems

    def _set(self, key: str, value: Any) -> None:
        parts = key.split(".")
        if not all(parts):
            raise ValueError(f"the override '{key}' has an empty name in it. Write for instance optimizer.lr=1e-3.")
        node: Any = self.tree
        for depth, part in enumerate(parts):
            path = ".".join(parts[:depth])
            place: Any
            if isinstance(node, list):
                place = self._index(path, node, part)
            elif isinstance(node, dict):
                place = part
            else:
                raise ValueError(f"{key} cannot be set: {path} is {node!r}, which has no parts.")
            if depth == len(parts) - 1:
                node[place] = value
                return
            here = f"{path}.{part}" if path else part
            inner = node[place] if isinstance(node, list) else node.get(place)
            node[place] = node = self._opened(here, inner, parts[depth + 1])

    @staticmethod
    def _index(path: str, node: list[Any], part: str) -> int:
        if not part.isdecimal() or int(part) >= len(node):
            raise ValueError(f"{path}.{part} does not exist: {path} is a list of {len(node)}, counted from 0.")
        return int(part)

    def _opened(self, path: str, value: Any, part: str) -> Any:
        """The value at a key, in the form whose part ``part`` can be set."""
        family = self._family.fullmatch(path) is not None
        if value is None or value == "none":
            return {"name": self.defaults[path]} if path in self.defaults and part != "name" else {}
        if path == "clients" and type(value) is int and part.isdecimal():
            return [{"name": name} for name in numbered(value)]
        if re.fullmatch(r"clients\.\d+\.data", path) and isinstance(value, str):
            return {"train": value}
        if path == "engine":
            return self._named(value)
        if path == "codec" and part in ("up", "down") and (isinstance(value, str) or "name" in value):
            return {"up": self._named(value), "down": self._named(value)}
        if family and part.isdecimal() and not isinstance(value, list):
            return [self._named(value)]
        return self._named(value) if family else value

    @staticmethod
    def _named(value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else copy.deepcopy(value)


def numbered(count: int) -> list[str]:
    """The names of clients that were only counted: ``client-0``, ``client-1``, ..."""
    return [f"client-{number}" for number in range(count)]
