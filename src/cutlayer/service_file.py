"""A service file: the runs that one server serves at a time.

.. code-block:: yaml

    runs:
      - flu.yaml                                           # a run file beside this one
      - {run: fraud.yaml, name: fraud-2, set: {rounds: 20}}
    stay: true                                             # do not end when all are done: more may come
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from cutlayer.config_read import read
from cutlayer.config_types import NAME, Text, Tree
from cutlayer.config_words import problems_of
from cutlayer.errors import ConfigError

NEEDS = "Name at least one run, such as: runs: [flu.yaml]"


class Entry(Tree):
    """One run: its file, its name (by default the file's), and what is set otherwise."""

    run: Text
    name: str = ""
    set: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _named(self) -> Entry:
        name = self.name or Path(self.run).stem
        if not NAME.fullmatch(name):
            raise ValueError(
                f"the name '{name}' cannot be a folder's: take 1 to 64 letters, digits, '_', '-' and '.', and begin "
                "with none of the last two"
            )
        self.__dict__["name"] = name  # a validator that assigned it would be called again
        return self


def _entries(value: Any) -> Any:
    return [{"run": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class ServiceFile(Tree):
    """The runs of a server; a run's name is that of its folder under ``--out``, and its label in logs."""

    runs: Annotated[list[Entry], BeforeValidator(_entries)]
    stay: bool = False


def is_service(source: object) -> bool:
    """Whether this is a service file, and not a run file; what cannot be read is neither.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    if not isinstance(source, str | Path | Mapping):
        return False
    tree, _, _ = read(source)
    return "runs" in tree and "model" not in tree


def load_service(source: str | Path) -> ServiceFile:
    """Read a service file; the run files in it are absolute then.

    Raises:
        ConfigError: with all its mistakes.
    """
    tree, found, where = read(source, needs=NEEDS)
    try:
        service = ServiceFile.model_validate(tree)
    except ValidationError as error:
        found += [problem.text for problem in problems_of(error, tree, ServiceFile, what="a service")]
        raise ConfigError(list(dict.fromkeys(found)), where) from error
    names = [entry.name for entry in service.runs]
    if not names:
        found.append(f"runs is empty. {NEEDS}")
    found += [f"runs: two have the name '{name}'. Give one another." for name in set(names) if names.count(name) > 1]
    if found:
        raise ConfigError(found, where)
    beside = Path(source).resolve().parent
    for entry in service.runs:
        entry.run = str(beside / Path(entry.run).expanduser())
    return service
