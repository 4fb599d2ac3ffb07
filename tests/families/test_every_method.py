"""What every method of every family must satisfy, swept over the registry: a new file is tested once it exists."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from cutlayer import registry
from cutlayer.errors import MethodError

TESTS = Path(__file__).parents[1] / "methods"
EVERY = [(family, name) for family in registry.FAMILIES for name in registry.names(family)]
NEEDED = {  # options that have no default, since only the data can tell, or only its owner may
    ("data", "by-column"): {"column": "clinic"},
    **{("selection", name): {"sketch": "labels"} for name in ("csfl", "parallelsfl", "pairingfl-selection")},
}


def test_how_many_were_found() -> None:
    files = [p for p in registry.ROOT.glob("*/*.py") if not p.stem.startswith("_")]
    assert len(EVERY) == len(files) >= 13
    assert {p.parent.name for p in files} <= set(registry.FAMILIES)
    assert {"sequential-sl", "sfl-v2"} <= set(registry.names("framework"))
    assert registry.names("partition") == ["two-part-split", "u-shaped-split"]
    assert {"full", "lora"} <= set(registry.names("peft"))
    for family, name in (("aggregator", "fedavg"), ("selection", "all"), ("scheduler", "fifo"), ("exchange", "plain")):
        assert name in registry.names(family)


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_card_docstring_and_test_file(family: str, name: str) -> None:
    cls = registry.load(family, name)
    card = registry.card(cls)
    module = sys.modules[cls.__module__]
    assert (card.id, card.family) == (name, family)
    assert Path(str(module.__file__)).stem == name.replace("-", "_")
    assert module.__doc__
    assert card.summary.endswith(".")
    assert 20 <= len(card.summary) <= 160
    assert not card.summary.startswith(cls.__name__ + "(")
    assert card.paper == "" or any(mark in card.paper for mark in ("arXiv:", "doi:", "http"))
    test = TESTS / family / f"test_{name.replace('-', '_')}.py"
    assert test.is_file(), f"{family} '{name}' has no test: {test}"
    tree = ast.parse(test.read_text())
    assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)
    made = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert name in made, f"{test} makes no {family} '{name}'"


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_options_are_typed_dataclass_fields_with_defaults(family: str, name: str) -> None:
    cls = registry.load(family, name)
    assert dataclasses.is_dataclass(cls)
    fields = registry.option_fields(cls)
    without = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    assert without == set(NEEDED.get((family, name), {}))
    made = registry.create(family, name, NEEDED.get((family, name)))
    assert isinstance(made, cls)
    again = registry.create(family, name, {n: getattr(made, n) for n in fields})
    assert again == made
    for method in (cls.__init__, *(value for value in vars(cls).values() if inspect.isfunction(value))):
        kinds = {p.kind for p in inspect.signature(method).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{method.__qualname__} swallows options"


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_unknown_options_are_refused_with_a_suggestion(family: str, name: str) -> None:
    fields = list(registry.option_fields(registry.load(family, name)))
    given: dict[str, Any] = dict(NEEDED.get((family, name), {}))
    with pytest.raises(
        MethodError, match=rf"{family} '{name}' has no option 'zzz'\. Options: {', '.join(fields) or 'none'}\."
    ):
        registry.create(family, name, {**given, "zzz": 1})
    for field in fields:
        with pytest.raises(MethodError, match=f"has no option '{field}x'. Did you mean '{field}'"):
            registry.create(family, name, {**given, f"{field}x": 1})


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_an_unknown_method_is_refused_with_what_is_known(family: str) -> None:
    with pytest.raises(MethodError, match=f"There is no {family} 'zzz'"):
        registry.load(family, "zzz")
    for name in registry.names(family):
        with pytest.raises(MethodError, match=rf"Did you mean '[\w-]+'\? Known: .*{name}"):
            registry.load(family, name + "x")


@pytest.mark.parametrize("name", registry.names("framework"))
def test_frameworks_have_what_the_engine_asks(name: str) -> None:
    framework = registry.create("framework", name)
    assert framework.local_steps >= 1
    assert isinstance(framework.travels, bool)
    assert inspect.iscoroutinefunction(framework.round)


@pytest.mark.parametrize("name", registry.names("partition"))
def test_partitions_cover_every_block_once(name: str) -> None:
    seen = 0
    for blocks in (1, 2, 5):
        for head in range(blocks + 1):
            try:
                layout = registry.create("partition", name, {"head_blocks": head}).layout(blocks)
            except MethodError:
                continue
            seen += 1
            assert [*layout.head, *layout.trunk, *layout.tail] == list(range(blocks))
    assert seen >= 8
