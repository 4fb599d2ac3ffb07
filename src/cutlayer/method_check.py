"""Whether a class can be a method of its family: sound options, and all that the family's Protocol asks for.

Looked at when a method is loaded, so that one that lacks something is refused before a model is read, not in the middle
of a run.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
import warnings
from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.warnings import ArbitraryTypeWarning
from pydantic_core import PydanticSerializationError, to_json

from cutlayer.config_words import sentence
from cutlayer.errors import MethodError

# The families that have a Protocol in contracts.py, and its name there.
PROTOCOLS = {
    "framework": "Framework",
    "partition": "Partition",
    "planner": "Planner",
    "peft": "Peft",
    "data": "Division",
    "selection": "Selection",
    "exchange": "Exchange",
    "scheduler": "Scheduler",
    "mixing": "Mixing",
    "optimizer": "Rate",
    "aggregator": "Aggregator",
    "attack": "Attack",
    "defense": "Defense",
}


@cache
def check_method(cls: Any, family: str, where: str) -> None:
    """Refuse a class that cannot be a method.

    Args:
        cls: a dataclass.
        family: its family.
        where: the file or package that it is from.

    Raises:
        MethodError: an option's type or default is unsound, or the class does not have what the Protocol asks for.
    """
    problems = [*_option_problems(cls), *_protocol_problems(cls, family)]
    if problems:
        told = ""
        if family in PROTOCOLS and any(problem.startswith("it ") for problem in problems):
            told = f" Derive it from {PROTOCOLS[family]} of cutlayer/contracts.py, where all that it must have is told."
        raise MethodError(f"The class {cls.__name__} in {where} is no {family}: {'; '.join(problems)}.{told}")


def option_fields(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The options of a method: the init fields of its dataclass."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


@cache
def option_types(cls: Any) -> dict[str, TypeAdapter[Any]]:
    """What checks the values of each option."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: _adapter(hints[name]) for name in option_fields(cls)}


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ArbitraryTypeWarning)  # of what is no type at all
            return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type with settings of its own, which cannot be overruled
        return TypeAdapter(hint)


def checked(adapter: TypeAdapter[Any], value: Any) -> Any:
    """The value of an option as its type has it; ``"3"`` is no number, and ``true`` is none either.

    What YAML cannot write otherwise is read as in JSON: a list for a tuple, a text for a path.

    Raises:
        ValidationError: it is of another type, or out of bounds.
    """
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        try:
            text = to_json(value, inf_nan_mode="constants")
        except PydanticSerializationError:
            text = b""
        if not text:
            raise
        return adapter.validate_json(text, strict=True)


def what_is_wrong(error: ValidationError) -> str:
    """A refused value in words."""
    return "; ".join(dict.fromkeys(sentence(e["type"], e["msg"], e.get("ctx", {})) for e in error.errors()))


def _option_problems(cls: Any) -> Iterator[str]:
    try:
        types = option_types(cls)
    except (PydanticUserError, NameError, TypeError, AttributeError, SyntaxError, ArbitraryTypeWarning) as error:
        said = " ".join(str(error).split(". ")[0].split()).rstrip(".")
        yield f"the types of its options cannot be read ({said}); what they name must be imported, and be types"
        return
    for name, field in option_fields(cls).items():
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            continue
        try:
            checked(types[name], default)
        except ValidationError as error:
            yield f"the default of its option '{name}' is {default!r}: by its own type it {what_is_wrong(error)}"


def _protocol_problems(cls: type[Any], family: str) -> Iterator[str]:
    if family not in PROTOCOLS:
        return
    from cutlayer import contracts

    protocol = getattr(contracts, PROTOCOLS[family])
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in protocol.__annotations__:
        if not hasattr(cls, name) and name not in fields:
            yield f"it lacks the attribute {name}"
    for name, wanted in vars(protocol).items():
        if isinstance(wanted, property) and not hasattr(cls, name) and name not in fields:
            yield f"it lacks the attribute {name}"
        if name.startswith("_") or not isinstance(wanted, FunctionType):
            continue
        found = inspect.getattr_static(cls, name, None)
        if not callable(getattr(cls, name, None)) or getattr(found, "__isabstractmethod__", False):
            yield f"it lacks the method {name}({_parameters(wanted)})"
        elif isinstance(found, FunctionType):
            if inspect.iscoroutinefunction(wanted) and not inspect.iscoroutinefunction(found):
                yield f"it must have {name} as 'async def'"
            if not _takes(found, wanted):
                yield f"it has {name}({_parameters(found)}), which is called as {name}({_parameters(wanted)})"


def _parameters(function: FunctionType) -> str:
    """The names of a method's parameters, without ``self``."""
    shown: list[str] = []
    kind: Any = None
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and kind not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            shown.append("*")
        kind = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        shown.append(f"{stars}{parameter.name}")
    return ", ".join(shown)


def _takes(found: FunctionType, wanted: FunctionType) -> bool:
    """Whether ``found`` can be called as ``wanted`` is."""
    parameters = inspect.signature(wanted).parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    try:
        inspect.signature(found).bind(*range(len(parameters) - len(named)), **dict.fromkeys(named))
    except TypeError:
        return False
    return True
