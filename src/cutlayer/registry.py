"""Where methods are found: one class in one file, its folder is its family, its file name is its id.

``methods/<family>/<file>.py`` holds the method ``<file>`` with dashes for underscores (``sfl_v2.py`` is ``sfl-v2``).
Nothing is listed anywhere: a file that exists is a method. Files with a leading underscore are helpers. A package
outside this repository registers under the entry-point group ``cutlayer.methods`` with the name ``family.id``; a run
file on one's own machine may also name a path ending in ``.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib.abc import ExecutionLoader
from importlib.metadata import entry_points
from importlib.util import decode_source, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pydantic import ValidationError

from cutlayer.errors import CutlayerError, MethodError, suggest
from cutlayer.method_check import check_method, checked, option_fields, option_types, what_is_wrong

__all__ = [
    "FAMILIES", "ROOT", "Card", "card", "cards", "create", "load", "method", "names", "no_files",
    "option_fields",
]  # fmt: skip

T = TypeVar("T")
ROOT = Path(__file__).parent / "methods"
ENTRY_POINTS = "cutlayer.methods"
_files: ContextVar[bool] = ContextVar("cutlayer_files", default=True)  # whether method files may be loaded

FAMILIES = (
    "framework", "partition", "planner", "peft", "data", "selection", "objective", "defense", "codec", "exchange",
    "scheduler", "mixing", "optimizer", "overlap", "aggregator", "monitor", "attack", "unlearning",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What a method says of itself; shown by ``cutlayer methods``.

    ``summary`` is the first sentence of the class's docstring (or of its module's), ``paper`` its source, ``needs`` the
    things a run must have for it, in words.
    """

    id: str
    family: str
    summary: str
    paper: str
    needs: tuple[str, ...] = ()


def method(family: str, *, paper: str = "", needs: Sequence[str] = ()) -> Callable[[type[T]], type[T]]:
    """Mark the one class of a method file; ``family`` must be the name of its folder.

    Example::

        @method("aggregator", paper="Yin et al., arXiv:1803.01498")
        @dataclass
        class Median: ...
    """
    if family not in FAMILIES:
        raise MethodError(
            f"'{family}' is no family of methods.{suggest(family, FAMILIES)} Families: {', '.join(FAMILIES)}"
        )

    def mark(cls: type[T]) -> type[T]:
        module = sys.modules[cls.__module__]
        text = (cls.__doc__ or "") if not _is_generated_doc(cls) else ""
        text = text or module.__doc__ or ""
        summary = " ".join(text.strip().split("\n\n")[0].split())
        ident = Path(getattr(module, "__file__", None) or cls.__module__).stem.replace("_", "-")
        cls.__cutlayer_card__ = Card(ident, family, summary, paper, tuple(needs))  # type: ignore[attr-defined]
        return cls

    return mark


def _is_generated_doc(cls: type) -> bool:
    """Whether the docstring is the signature that ``dataclass`` writes when there is none."""
    return bool(cls.__doc__ and cls.__doc__.startswith(cls.__name__ + "("))


@lru_cache
def _external(family: str) -> dict[str, Any]:
    found = {}
    for point in entry_points(group=ENTRY_POINTS):
        fam, _, ident = point.name.partition(".")
        if fam == family:
            found[ident] = point
    return found


def names(family: str) -> list[str]:
    """The ids of all methods of a family, sorted, without importing any of them."""
    own = {p.stem.replace("_", "-") for p in (ROOT / family).glob("*.py") if not p.stem.startswith("_")}
    clash = own & set(_external(family))
    if clash:
        raise MethodError(
            f"An installed package registers {family} {sorted(clash)}, which cutlayer has itself. Rename it."
        )
    return sorted(own | set(_external(family)))


@contextmanager
def no_files() -> Iterator[None]:
    """Refuse method files: what somebody else's run file names is not executed."""
    token = _files.set(False)
    try:
        yield
    finally:
        _files.reset(token)


def load(family: str, name: str) -> type[Any]:
    """The class of a method.

    Raises:
        MethodError: there is no such method, its file is broken, it belongs to another family, or it lacks what the
            methods of this one must have.
    """
    if name.endswith(".py"):
        if not _files.get():
            raise MethodError(
                f"{family} is the file {name}; over the network both ends need it as an installed method."
            )
        found, where = _load_file(Path(name)), name
    elif name in _external(family):
        found, where = _load_external(family, name)
    elif name in names(family):
        found = importlib.import_module(f"cutlayer.methods.{family}.{name.replace('-', '_')}")
        where = str(found.__file__)
    else:
        known = names(family)
        listed = ", ".join(known) if known else "none yet"
        raise MethodError(f"There is no {family} '{name}'.{suggest(name, known)} Known: {listed}.")
    marked = [found] if isinstance(found, type) else _classes_of(found)
    marked = [cls for cls in marked if "__cutlayer_card__" in vars(cls)]
    if len(marked) != 1:
        raise MethodError(f"{where} must hold exactly one class marked @method(...); it holds {len(marked)}.")
    cls = marked[0]
    if not dataclasses.is_dataclass(cls):
        raise MethodError(f"The class {cls.__name__} in {where} is no dataclass. Put @dataclass below @method.")
    if card(cls).family != family:
        raise MethodError(f"{where} is marked as a {card(cls).family}, but used as a {family}.")
    check_method(cls, family, where)
    return cls


def _classes_of(module: ModuleType) -> list[type[Any]]:
    """The classes that a module defines itself."""
    return [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]


def _load_external(family: str, name: str) -> tuple[Any, str]:
    """The module or class that an installed package registers, and what to call it."""
    point = _external(family)[name]
    where = f"'{point.value}' (registered as {point.name} by an installed package)"
    try:
        return point.load(), where
    except Exception as error:
        raise MethodError(f"The method {where} does not import: {type(error).__name__}: {error}") from error


class _AsRead(ExecutionLoader):
    """Loads a source that was read; importlib's own loader takes a compiled file of the same second for current."""

    def __init__(self, path: Path, source: bytes) -> None:
        self.path, self.source = str(path), source

    def get_filename(self, fullname: str) -> str:
        """For tracebacks."""
        return self.path

    def get_source(self, fullname: str) -> str:
        """The text."""
        return decode_source(self.source)


def _load_file(path: Path) -> ModuleType:
    """The module of a file as it now is: it may have been changed since it was last read."""
    try:
        source = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise MethodError(f"The method file {path} does not exist. Give its path, or a method's id.") from None
    except OSError as error:
        raise MethodError(f"The method file {path} cannot be read: {error.strerror or error}.") from error
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source)
    name = f"cutlayer_file_{digest.hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path, loader=_AsRead(path, source))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise MethodError(f"The method file {path} does not import: {type(error).__name__}: {error}") from error
    return module


def card(cls: type[Any]) -> Card:
    """The card of a method class."""
    found: Card = cls.__cutlayer_card__
    return found


def cards(family: str | None = None) -> list[Card]:
    """The cards of all methods, or of one family, sorted by family and id."""
    chosen = [family] if family else list(FAMILIES)
    return [card(load(fam, ident)) for fam in chosen for ident in names(fam)]


def create(family: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make a method from its id and options, or say every mistake in them.

    Raises:
        MethodError: unknown method or option, a value of the wrong type or outside its bounds.
    """
    cls: Any = load(family, name)
    options = dict(options or {})
    fields = option_fields(cls)
    problems = []
    types = option_types(cls)
    for key in list(options):
        if key not in fields:
            known = ", ".join(fields) if fields else "none"
            problems.append(f"{family} '{name}' has no option '{key}'.{suggest(key, fields)} Options: {known}.")
            continue
        try:
            options[key] = checked(types[key], options[key])
        except ValidationError as error:
            problems.append(f"{family} '{name}': option '{key}' is {options[key]!r}: {what_is_wrong(error)}.")
    missing = [f.name for f in fields.values() if _required(f) and f.name not in options]
    problems += [f"{family} '{name}' needs the option '{key}'." for key in missing]
    if problems:
        raise MethodError(" ".join(problems))
    try:
        return cls(**options)
    except ValueError as error:
        raise MethodError(f"{family} '{name}': {error}") from error
    except CutlayerError:
        raise
    except Exception as error:
        raise MethodError(f"{family} '{name}' cannot be made: {type(error).__name__}: {error}") from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
