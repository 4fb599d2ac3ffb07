"""The documentation: its blocks run or are checked, its tables follow from the code, its keys are all there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement
from pydantic import BaseModel

import cutlayer
from cutlayer import contracts, registry
from cutlayer.cli.main import app
from cutlayer.config import (
    ClientConfig,
    DataConfig,
    EarlyStop,
    EngineConfig,
    OptimizerConfig,
    RunConfig,
    load_config,
)
from cutlayer.config_types import CodecConfig, Spec
from cutlayer.config_write import OTHER_KEYS
from cutlayer.models.families import EXACT
from cutlayer.policy import Policy, load_policy
from cutlayer.service_file import load_service
from tiny import make_model, texts, write_rows

ROOT = Path(__file__).resolve().parents[1]
DOCS = ["README.md", "CONTRIBUTING.md", "demo/README.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md")))]
MODEL = "HuggingFaceTB/SmolLM2-360M"  # the README's; in the test a tiny one is in a folder of that name
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(language, text, id=f"{file}-{number}-{language or 'plain'}")
    for file in DOCS
    for number, (language, text) in enumerate(BLOCK.findall((ROOT / file).read_text(encoding="utf-8")))
]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks_of(file: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall((ROOT / file).read_text(encoding="utf-8")) if kind == language]


def commands_of(text: str) -> list[list[str]]:
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def cut(*arguments: str) -> None:
    """Run ``cutlayer`` in this process; it must end well."""
    with pytest.raises(SystemExit) as end:
        app(list(arguments))
    assert not end.value.code, arguments


def checked_command(words: list[str]) -> None:
    """Whether a documented command could be run: its program, its files, its options."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif Path(program).name == "python":
        assert (ROOT / rest[0]).is_file(), rest
    else:
        assert program == "cutlayer", words
        group: Any = typer.main.get_command(app)
        command = group.commands[rest[0]]
        command.make_context(rest[0], rest[1:])  # refuses options that there are not


@pytest.mark.parametrize(("language", "text"), BLOCKS)
def test_block_is_sound(language: str, text: str, tmp_path: Path) -> None:
    """Commands name what is there, Python compiles, YAML is a run or a part of one."""
    if language == "sh":
        for words in commands_of(text):
            checked_command(words)
    elif language == "python":
        compile(text, "block", "exec")
    elif language == "yaml" and text.startswith("# policy.yaml"):
        assert load_policy(text).most.bytes
    elif language == "yaml" and text.startswith("# service.yaml"):
        (tmp_path / "service.yaml").write_text(text)
        load_service(tmp_path / "service.yaml")
    elif language == "yaml":
        load_config({"model": "m", "data": {"train": "x"}, **yaml.safe_load(text)})
    else:
        assert language == "", f"say how a block of '{language}' is to be checked"


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 12
    assert len(DOCS) >= 7


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README takes for granted: a model, data, and the files that its blocks begin with."""
    make_model(tmp_path / MODEL, "llama", num_hidden_layers=4)  # its cuts leave a smaller one without a trunk
    (tmp_path / "data").mkdir()
    rows = [{"question": text, "answer": text} for text in texts(24)]
    for name in ("train", "valid", "a", "b"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    for language in ("yaml", "python"):
        for text in blocks_of("README.md", language):
            if named := re.match(r"# ([\w.]+)\n", text):
                (tmp_path / named[1]).write_text(text)
    short = (tmp_path / "run.yaml").read_text()
    for said, few in (("local_steps: 4", "local_steps: 1"), ("rounds: 10", "rounds: 2"), ("eval_every: 5", "")):
        assert said in short
        short = short.replace(said, few)
    (tmp_path / "run.yaml").write_text(short)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command and every piece of Python of the README, in order, on a tiny model."""
    ran = []
    for text in blocks_of("README.md", "sh"):
        for program, *arguments in commands_of(text):
            if program == "cutlayer" and arguments[0] not in ("serve", "join"):  # which wait for each other
                cut(*arguments)
                ran.append(arguments[0])
    assert {"train", "plan", "generate", "verify", "methods", "keys"} == set(ran)
    assert len(ran) >= 8
    python = [text for text in blocks_of("README.md", "python") if not re.match(r"# [\w.]+\.py\n", text)]
    assert len(python) >= 3
    for text in python:
        exec(compile(text, "README.md", "exec"), {})
    summaries = {path.parent.name: json.loads(path.read_text()) for path in (place / "outputs").glob("*/summary.json")}
    assert set(summaries) == {"first", "second", "third", "fourth", "median"}
    assert (place / "outputs/first/adapter/adapter_model.safetensors").is_file()
    assert "send_activations clinic" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["README.md", "docs/network.md", "docs/deploy.md"])
def test_what_waits_for_another_has_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``serve`` and ``join`` are run in test_network.py; here their documented options exist."""
    found = [words for text in blocks_of(name, "sh") for words in commands_of(text) if words[1] in ("serve", "join")]
    assert {words[1] for words in found} == {"serve", "join"}
    for _, command, *arguments in found:
        cut(command, "--help")
        known = capsys.readouterr().out
        options = [word for word in arguments if word.startswith("--")]
        assert options
        assert all(f"{option} " in known for option in options), (command, options)


def test_readme_aggregator_is_the_median(place: Path) -> None:
    median = registry.create("aggregator", str(place / "median.py"))
    states = {name: {"w": torch.tensor([value, -value])} for name, value in {"a": 1.0, "b": 2.0, "c": 900.0}.items()}
    merged = median.merge({}, states, dict.fromkeys(states, 1 / 3))
    assert merged["w"].tolist() == [2.0, -2.0]
    del states["c"]
    assert median.merge({}, states, {})["w"].tolist() == [1.0, -2.0]
    between = registry.create("aggregator", str(place / "median.py"), {"lower": False})
    assert between.merge({}, states, {})["w"].tolist() == [1.5, -1.5]


def test_tables_follow_from_the_code() -> None:
    generate = load("docs/generate.py")
    assert {where for where, _ in generate.TABLES.values()} == {"README.md", "docs/runs.md"}
    for file in ("README.md", "docs/runs.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        assert text == generate.with_tables(file, text), "run: .venv/bin/python docs/generate.py"
    assert {*generate.CAUSAL, *generate.CLASSIFIERS} == EXACT
    assert len(generate.methods().splitlines()) == 2 + len(registry.cards())


def rows_of(file: str, heading: str = "") -> list[list[str]]:
    """The cells of the rows of the first table after a heading."""
    lines = (ROOT / file).read_text(encoding="utf-8").partition(heading or "\n")[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    cells = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


NESTED: dict[str, type[BaseModel]] = {
    "data": DataConfig, "clients": ClientConfig, "optimizer": OptimizerConfig, "early_stop": EarlyStop,
    "engine": EngineConfig, "codec": CodecConfig, "clients.data": type(ClientConfig(name="a", data="x").data),  # type: ignore[arg-type, dict-item]
}  # fmt: skip


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their defaults as the documentation writes them; ``...`` must be given."""
    for name, field in model.model_fields.items():
        key, default = f"{prefix}{name}", field.get_default(call_default_factory=True)
        if field.is_required() or key == "data.train":
            default = ...
        elif isinstance(default, Spec | EngineConfig):
            default = default.name
        elif isinstance(default, CodecConfig) or (
            default is None and (key in (*registry.FAMILIES, *OTHER_KEYS) or prefix == "codec.")
        ):
            default = "none"
        if key not in ("data", "optimizer"):  # only their parts are listed
            yield key, default
        if key in NESTED:
            yield from keys_of(NESTED[key], f"{key}.")


def test_every_key_of_a_run_is_documented_with_its_default() -> None:
    told = {}
    for key, default, about in rows_of("docs/runs.md"):
        assert about, key
        told[key.strip("`")] = ... if default == "must be given" else yaml.safe_load(default.strip("`"))
    expected = dict(keys_of(RunConfig))
    assert told.keys() == expected.keys()
    for key, default in expected.items():
        said = float(told[key]) if isinstance(default, float) else told[key]
        assert said == default, key


def test_every_key_of_a_policy_is_documented_with_its_default() -> None:
    told = {key.strip("`"): yaml.safe_load(default.strip("`")) for key, default, _ in rows_of("docs/policy.md")}
    expected: dict[str, Any] = {}
    for key, value in Policy().model_dump().items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        expected |= {f"{key}.{part}".rstrip("."): default for part, default in parts}
    for key, default in expected.items():
        given = (
            {name: bound for name, bound in default.items() if bound is not None}
            if isinstance(default, dict)
            else default
        )
        assert told[key] == given, key
    assert told.keys() == expected.keys()


def test_every_key_of_the_output_is_documented(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts(12)])
    out = tmp_path / "out"
    config: dict[str, Any] = {
        "model": str(make_model(tmp_path / "model", "llama")), "data": {"train": str(data), "eval": str(data)},
        "clients": 2, "rounds": 1, "profile": "laptop",
    }  # fmt: skip
    cutlayer.train({**config, "record_wire": str(tmp_path / "wire")}, out=out)
    cutlayer.train({**config, "framework": "async-sfl", "aggregator": "dt-asfl"}, out=tmp_path / "async")
    first = {
        "metrics.jsonl": out / "metrics.jsonl",
        "uploads.jsonl": tmp_path / "async/uploads.jsonl",
        "summary.json": out / "summary.json",
        "Recorded frames": tmp_path / "wire/frames.jsonl",
    }
    for heading, file in first.items():
        told = {
            name for keys, _ in rows_of("docs/outputs.md", f"## {heading}") for name in re.findall(r"`(\w+)`", keys)
        }
        text = file.read_text()
        line = json.loads(text) if file.suffix == ".json" else json.loads(text.splitlines()[0])
        # Of classifiers, parts of one's own, selections, unequal ranks, relays and defenses: their own tests look.
        only = {
            "summary.json": {"labels", "adapters", "arrangement", "cuts", "ranks", "bytes_repeated", "privacy"},
            "metrics.jsonl": {"bytes_between"},
        }
        others = only.get(heading, set())
        assert told - set(line) == others, heading
        assert set(line) <= told, heading
    said = (ROOT / "docs/outputs.md").read_text().split("```")[1]
    there = {path.name for path in out.iterdir()}
    told_of = set(re.findall(r"^  ([\w.]+)", said, re.MULTILINE))
    assert there == told_of - {"model", "adapters", "uploads.jsonl", "watermark"}


def test_contracts_are_named() -> None:
    """CONTRIBUTING's table has the Protocols of ``contracts.py``, and each family that has methods has one."""
    found = {}
    for name, value in vars(contracts).items():
        about = re.match(r"Family ``([a-z]+)``: ", value.__doc__ or "") if isinstance(value, type) else None
        if about:
            assert getattr(value, "_is_protocol", False), name
            found[about[1]] = name
    told = {
        family.strip("`"): protocol.strip("`") for family, protocol, _ in rows_of("CONTRIBUTING.md", "## The contracts")
    }
    assert told == found
    assert set(found) == {family for family in registry.FAMILIES if registry.names(family)}


def test_pins_cover_what_the_project_names() -> None:
    """Every dependency has an exact pin, without a machine's own suffix or place."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line)
            assert found, line
            pins[found[1]] = found[2]
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(one for extra in ("dev", "ray") for one in extras[extra])]
    for requirement in map(Requirement, named):
        name = requirement.name.lower()
        assert name in pins, f"no pin for {name}"
        assert requirement.specifier.contains(pins[name]), name
    assert pins["torch"] == "2.13.0"
    assert not {"pip", "setuptools", "cutlayer"} & set(pins)
    other = dict(line.split("==") for line in (ROOT / "constraints-flower.txt").read_text().splitlines()[1:])
    for requirement in map(Requirement, [*project["dependencies"], *extras["flower"]]):
        assert requirement.specifier.contains(other[requirement.name.lower().replace("_", "-")]), requirement


def tracked() -> list[Path]:
    """The files of the repository; without git, all that are not made by tools."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        found = [ROOT / name for name in done.stdout.splitlines()]
    else:
        made = re.compile(r"/(\.venv|\.git|[^/]*cache[^/]*|outputs|[^/]*\.egg-info)/")
        found = [path for path in ROOT.rglob("*") if not made.search(f"{path}/")]
    return [path for path in found if path.is_file()]


FOREIGN = re.compile(
    r"(?<![\w.~}])/(?:work|root|home|opt|mnt)/\w"  # a path of one machine
    r"|file://(?:localhost)?/\w|--(?:extra-)?index-url|--find-links"
    r"|BEGIN (?:[A-Z]+ )*PRIVATE KEY"
    r"|\bissues show\b|\bpeers\.md\b|\bengine\.md\b|\bdesign\.md\b|\bstyle\.md\b"
)


def test_nothing_of_one_machine_is_in_the_repository() -> None:
    files = [path for path in tracked() if path.suffix not in (".safetensors", ".png")]
    assert len(files) > 100
    for path in files:
        if path != Path(__file__):
            found = FOREIGN.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_links_lead_somewhere() -> None:
    count = 0
    for file in DOCS:
        for target in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / file).read_text(encoding="utf-8")):
            if "://" not in target:
                assert (ROOT / file).parent.joinpath(target).exists(), f"{file}: {target}"
                count += 1
    assert count >= 6


def test_ci_and_make_have_what_they_name() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    for target in ("demo", "test", "check", "bench", "venv"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for script in re.findall(r"bin/python (\S+\.py)", done.stdout):
            assert (ROOT / script).is_file()
