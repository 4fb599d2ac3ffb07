"""A method in a file of one's own: read as it now is, and refused when it is loaded if it cannot be one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cutlayer import contracts, registry
from cutlayer.config import load_config
from cutlayer.config_check import DRIVEN
from cutlayer.errors import ConfigError, MethodError
from cutlayer.method_check import PROTOCOLS

ROOT = Path(__file__).resolve().parents[1]
HEAD = """from __future__ import annotations
from dataclasses import dataclass, field
from cutlayer.registry import method
"""
MERGE = "    def merge(self, before, states, weights):\n        return states\n"
BODIES = {  # the least that a class of each family has
    "framework": (
        "    local_steps: int = 1\n    participation: float = 1.0\n    travels = False\n"
        "    async def round(self, run, number): ...\n    def evaluators(self, run): ...\n"
    ),
    "partition": "    def layout(self, num_blocks): ...\n",
    "peft": (
        "    def check(self, model, anatomy, *, task): ...\n    def prepare(self, model, anatomy, *, task, seed): ...\n"
    ),
    "planner": "    every: int = 1\n    def bounds(self, now): ...\n    def start(self, now): ...\n",
    "data": "    def divide(self, rows, clients, *, seed, shuffle): ...\n",
    "selection": "    def pick(self, number, clients): ...\n",
    "scheduler": "    def wrap(self, stop, client): ...\n",
    "exchange": "    async def step(self, inner, client, middle, tail, *, step, micro, how): ...\n",
    "optimizer": "    def factor(self, participants, updates): ...\n",
    "mixing": "    def gather(self, run, clients): ...\n",
    "aggregator": MERGE,
    "defense": "    protects = ()\n    def spent(self, ground, sends): ...\n",
    "attack": "    threat = None\n    def prepare(self, view): ...\n    def finish(self, view): ...\n",
}


def write(folder: Path, family: str, body: str, name: str = "own.py", head: str = HEAD) -> str:
    path = folder / name
    base = f"({PROTOCOLS[family]})" if body else ""
    told = f"from cutlayer.contracts import {PROTOCOLS[family]}\n"
    path.write_text(f'{head}{told}\n@method("{family}")\n@dataclass\nclass Own{base}:\n    """Mine."""\n{body}')
    return str(path)


def refused(family: str, path: str, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(MethodError) as caught:
        registry.create(family, path, options)
    return str(caught.value)


def test_the_families_with_a_protocol_are_those_that_are_driven() -> None:
    assert set(PROTOCOLS) == set(BODIES)
    assert set(DRIVEN) == set(PROTOCOLS) - {"attack"}, "an attack is played on a run, not in it"
    assert all(hasattr(contracts, protocol) for protocol in PROTOCOLS.values())
    told = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert dict(told) == PROTOCOLS


@pytest.mark.parametrize("family", BODIES)
def test_what_a_class_lacks_is_named_when_it_is_loaded(family: str, tmp_path: Path) -> None:
    registry.create(family, write(tmp_path, family, BODIES[family]))
    protocol = getattr(contracts, PROTOCOLS[family])
    wanted = [*protocol.__annotations__, *(name for name in vars(protocol) if name[0] != "_")]
    assert wanted
    said = refused(family, write(tmp_path, family, "", "bare.py"))
    assert f"in {tmp_path}/bare.py is no {family}" in said
    assert said.endswith(
        f"Derive it from {PROTOCOLS[family]} of cutlayer/contracts.py, where all that it must have is told."
    )
    for name in wanted:
        assert re.search(rf"it lacks the (attribute|method) {name}\b", said), said


def test_a_run_with_such_a_class_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "aggregator", "    def merg(self, before, states, weights): ...\n")
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "m", "data": {"train": "x"}, "aggregator": path, "batch_size": 0})
    assert len(caught.value.problems) == 2
    assert "aggregator: The class Own in" in caught.value.problems[1]
    assert "it lacks the method merge(before, states, weights)" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("family", "body", "said"),
    [
        ("aggregator", "    def merge(self, states): ...\n", "merge(states), which is called as merge(before, "),
        ("aggregator", "    merge: int = 3\n", "it lacks the method merge("),
        ("data", "    def divide(self, rows, clients, seed): ...\n", "as divide(rows, clients, *, seed, shuffle)"),
        ("framework", BODIES["framework"].replace("async ", ""), "it must have round as 'async def'"),
        ("aggregator", "    k: int = 'three'\n" + MERGE, "default of its option 'k' is 'three': by its own type it"),
        ("aggregator", "    k: int = None\n" + MERGE, "the default of its option 'k' is None"),
        ("aggregator", "    k: list[int] = field(default_factory=lambda: ['a'])\n" + MERGE, "option 'k' is ['a']"),
        ("aggregator", "    k: Nowhere = 3\n" + MERGE, "options cannot be read (name 'Nowhere' is not defined)"),
        ("aggregator", "    k: 3 = 3\n" + MERGE, "the types of its options cannot be read"),
    ],
)  # fmt: skip
def test_what_is_there_but_unsound_is_refused(family: str, body: str, said: str, tmp_path: Path) -> None:
    assert said in refused(family, write(tmp_path, family, body))


def test_more_than_is_asked_for_is_allowed(tmp_path: Path) -> None:
    body = (
        "    k: tuple[int, str] = (1, 'a')\n    where: Path = Path('x')\n    share: float = 1\n"
        "    other: Own | None = None\n"
        "    @staticmethod\n    def merge(*everything, **named): ...\n    def more(self): ...\n"
    )
    path = write(tmp_path, "aggregator", body, head=HEAD + "from pathlib import Path\n")
    made = registry.create("aggregator", path, {"k": [2, "b"], "where": "y", "share": 2})
    assert (made.k, made.where, made.share) == ((2, "b"), Path("y"), 2.0)
    for options in ({"k": ["2", "b"]}, {"share": "2"}, {"share": True}, {"where": 3}):
        assert "option" in refused("aggregator", path, options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_at_all", "does not import: ModuleNotFoundError"),
        ("def", "does not import: SyntaxError"),
        ("raise SystemExit(3)", "does not import: SystemExit"),
        ("x = 3", "must hold exactly one class marked @method(...); it holds 0"),
        (HEAD + "@method('aggregator')\nclass A: ...", "is no dataclass"),
        (HEAD + "@method('data')\n@dataclass\nclass A: ...", "marked as a data, but used as a aggregator"),
        (
            HEAD
            + "from cutlayer.contracts import Aggregator\n@method('aggregator')\n@dataclass\nclass A(Aggregator):\n"
            "    def __post_init__(self): 1 / 0\n" + MERGE,
            "cannot be made: ZeroDivisionError",
        ),
    ],
)
def test_a_file_that_is_no_method(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(text)
    assert said in refused("aggregator", str(tmp_path / "own.py"))


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    assert "cannot be read: Is a directory" in refused("aggregator", str(tmp_path / "folder.py"))
    assert "does not exist" in refused("aggregator", str(tmp_path / "no.py"))
    assert "does not exist" in refused("aggregator", str(tmp_path / "folder.py" / "no.py"))


def test_a_file_that_was_changed_is_read_anew(tmp_path: Path) -> None:
    """Also where it keeps its length and its time, by which Python tells whether a compiled file is current."""
    path = write(tmp_path, "aggregator", "    k: int = 3\n" + MERGE)
    time = os.stat(path)
    first = registry.load("aggregator", path)
    assert registry.load("aggregator", path) is first
    write(tmp_path, "aggregator", "    k: int = 4\n" + MERGE)
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    second = registry.create("aggregator", path)
    assert (first().k, second.k) == (3, 4)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["own.py"]


def test_an_installed_method_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(value: Any) -> Any:
        def load() -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        return SimpleNamespace(name="aggregator.theirs", value="their.module", load=load)

    good = registry.load("aggregator", write(tmp_path, "aggregator", MERGE))
    bare = type("Bare", (), {})
    for value, said in ((bare, "it holds 0"), (ImportError("gone"), "does not import: ImportError: gone")):
        monkeypatch.setattr(registry, "_external", lambda family, value=value: {"theirs": loads(value)})
        assert said in refused("aggregator", "theirs")
    monkeypatch.setattr(registry, "_external", lambda family: {"theirs": loads(good)})
    assert registry.load("aggregator", "theirs") is good
