"""The options of a method as people read them: default, and the comment beside each in the source."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

from cutlayer.method_check import option_fields

_YAML = {"None": "null", "True": "true", "False": "false", "inf": ".inf"}


@dataclass(frozen=True)
class Option:
    """One option; ``default`` is as YAML would have it, None where it must be given."""

    name: str
    default: str | None
    about: str


def options_of(cls: type[Any]) -> list[Option]:
    """All options of a method, in their order."""
    return [Option(name, _default(option), _comment(cls, name)) for name, option in option_fields(cls).items()]


def _default(option: dataclasses.Field[Any]) -> str | None:
    if option.default is not dataclasses.MISSING:
        return _YAML.get(repr(option.default), str(option.default))
    return None if option.default_factory is dataclasses.MISSING else str(option.default_factory())


def _comment(cls: type[Any], name: str) -> str:
    found = re.search(rf"^    {name}: [^#\n]*# (.*)$", inspect.getsource(cls), re.MULTILINE)
    return found[1] if found else ""
