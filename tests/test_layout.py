"""The rules of the layout: who may import what, how long a file may be, where a test must be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cutlayer.registry import FAMILIES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cutlayer"
FILES = sorted(SOURCE.rglob("*.py"))
METHODS = [p for p in FILES if p.parent.parent == SOURCE / "methods"]
LONGEST = 400  # lines

# What a method may import of ours, beside contracts, registry, errors, seeds and the helpers of its own family. A
# method sees what its Protocol hands it; what else a family needs for that Protocol is named here.
ALLOWED = {"contracts", "errors", "registry", "seeds"}
FAMILY_NEEDS = {
    "framework": {"clock", "cohorts", "joint", "watermark"},
    "exchange": {"step", "zeroth"},
    "planner": {"planning"},
    "peft": {"allotment", "models"},
    "selection": {"arrangement", "sketches"},
    "mixing": {"joint"},
    "optimizer": {"joint"},
    "aggregator": {"ranks"},
    "attack": {"audit", "threat"},
    "defense": {"accounting", "defense", "noise", "seeds", "threat"},
}


@cache
def parsed(path: Path) -> ast.Module:
    """A file as a tree; read once."""
    return ast.parse(path.read_text())


@cache
def imports(path: Path, *, typing_too: bool = False) -> frozenset[str]:
    """The modules that a file imports, dotted; what is imported for type checking only does not count."""
    return frozenset(_imports(path, typing_too))


def _imports(path: Path, typing_too: bool) -> Iterator[str]:
    tree = parsed(path)
    skipped: set[int] = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            if node.module == "cutlayer":
                yield from (f"cutlayer.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    """The modules of ours that a file imports, without ``cutlayer.``."""
    return {name.removeprefix("cutlayer.") for name in imports(path) if name.startswith("cutlayer.")}


def test_what_is_looked_at() -> None:
    assert len(FILES) > 50
    assert len([p for p in METHODS if not p.stem.startswith("_")]) >= 13


@pytest.mark.parametrize("path", METHODS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_method_imports_only_what_its_contract_needs(path: Path) -> None:
    family = path.parent.name
    assert family in FAMILIES
    for name in ours(path):
        top = name.split(".")[0]
        own_helper = name.startswith(f"methods.{family}._")
        assert top in ALLOWED | FAMILY_NEEDS.get(family, set()) or own_helper, f"{path.name} imports cutlayer.{name}"


@pytest.mark.parametrize("path", METHODS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_method_is_imported_by_name(path: Path) -> None:
    """The registry finds methods; whoever names one in an import has made a list."""
    if path.stem.startswith("_"):
        pytest.skip("a helper")
    dotted = f"cutlayer.methods.{path.parent.name}.{path.stem}"
    assert [p for p in FILES if dotted in imports(p, typing_too=True)] == []


PARTIES = [*(SOURCE / "parties").glob("*.py"), *(SOURCE / "models").glob("*.py"), *(SOURCE / "links").rglob("*.py")]


@pytest.mark.parametrize("path", sorted(PARTIES), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_parties_links_and_models_do_not_know_the_driver(path: Path) -> None:
    assert not ours(path) & {"run", "driver", "engine", "assembly", "build", "config", "cli.main", "checkpoint"}


def test_the_bottom_knows_nothing_above_it() -> None:
    assert ours(SOURCE / "errors.py") == set()
    assert ours(SOURCE / "seeds.py") == set()
    assert ours(SOURCE / "_header.py") == {"errors"}
    assert ours(SOURCE / "wire.py") == {"_header", "errors"}
    assert ours(SOURCE / "values.py") == {"wire"}
    assert ours(SOURCE / "framework.py") == {"values"}
    assert ours(SOURCE / "threat.py") == {"values"}
    assert ours(SOURCE / "noise.py") == set()
    assert ours(SOURCE / "defense.py") == {"noise", "threat", "values"}
    assert ours(SOURCE / "contracts.py") == {"defense", "framework", "threat", "values"}
    assert ours(SOURCE / "step.py") == {"contracts", "wire"}


def test_only_the_wire_makes_bytes() -> None:
    """One way to bytes: nobody else packs numbers (but for a stream's messages); links, and what seals, encode them."""
    for path in FILES:
        used = set(imports(path))
        name = path.relative_to(SOURCE).as_posix()
        if name not in ("_header.py", "wire.py", "links/net/messages.py"):
            assert not used & {"struct", "cutlayer._header"}, name
        assert not used & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, name
        tree = parsed(path)
        taken = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "cutlayer.wire"
            for alias in node.names
        }
        if not name.startswith("links/") and name != "sealing.py":
            assert not taken & {"encode", "decode"}, name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_every_method_has_a_test_and_every_test_a_method() -> None:
    methods = {(p.parent.name, p.stem) for p in METHODS if not p.stem.startswith("_")}
    tests = {(p.parent.name, p.stem.removeprefix("test_")) for p in (ROOT / "tests" / "methods").glob("*/test_*.py")}
    assert methods - tests == set()
    assert tests - methods == set()


JUDGES = {  # what fails a test, beside ``assert``; the helpers assert
    "raises", "fail", "refused", "must_refuse", "identical", "within", "same", "kill_and_resume",
}  # fmt: skip


def test_every_test_can_fail() -> None:
    """Each has an assertion, or calls what makes one."""
    count = 0
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = (inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call))
                called = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
                asserts = any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
                assert asserts or called & JUDGES, f"{path.name}: {node.name} cannot fail"
                count += 1
    assert count > 300


def test_test_files_have_names_of_their_own() -> None:
    """Test modules are imported by their bare names."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name not in ("conftest.py", "__init__.py")]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def test_the_families_of_the_sources_are_those_of_the_registry() -> None:
    folders = {p.name for p in (SOURCE / "methods").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders <= set(FAMILIES)
    assert {p.name for p in (ROOT / "tests" / "methods").iterdir() if p.is_dir() and p.name != "__pycache__"} <= folders
