"""A comparison: several runs on the same model, data and seeds, each made once, and what they gave side by side.

``compare`` proves that the runs agree in what must be equal, makes each with each seed in a folder of its own, and
writes the report. A run that is complete is not made again and one that was interrupted is taken up, so the same call
goes on after a stop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cutlayer import checkpoint
from cutlayer.config import RunConfig, load_config, resolved
from cutlayer.config_types import NAME
from cutlayer.config_words import show
from cutlayer.config_write import tree_of
from cutlayer.errors import CheckpointError, ConfigError, CutlayerError, MethodError, NonFinite, OutputError
from cutlayer.identity import identity_of
from cutlayer.outputs import alone, is_empty
from cutlayer.preflight import preflight
from cutlayer.report.comparison import Trial, summarize
from cutlayer.report.comparison_page import markdown, page
from cutlayer.report.progress import Reporter, reporter
from cutlayer.report.summary import PACKAGES
from cutlayer.run import Interrupted, train

Source = str | Path | Mapping[str, Any] | RunConfig
MADE_OF = "made_of.json"  # what each run was begun with: settings, and checksums of methods, model and data

# What makes an evaluation loss another quantity, or the task another task, so that a table of both means nothing.
EQUAL_DATA = ("train", "eval", "eval_fraction", "format", "columns", "max_length", "append_eos", "completion_only")
# What may well be the thing compared, but changes what a number beside another one means.
DOUBTS = {
    "data.division": "the texts are divided differently over the clients",
    "data.packing": "a row does not hold the same text",
    "data.shuffle": "the order of the examples differs",
    "data.padding_side": "the rows differ in form",
    "clients": "the clients differ in name, device or cut",
    "profile": "virtual times are of other devices and links",
    "batch_size": "a step is not the same number of rows",
    "gradient_accumulation": "a step is not the same number of rows",
    "precision": "memory, bytes and rounding differ with it",
    "eval_every": "evaluations are in the bytes and in the virtual time",
    "early_stop": "the runs may end at other steps",
}


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave. ``summary`` is the content of ``comparison.json``; ``page`` the file to open."""

    out: Path
    summary: Mapping[str, Any]

    @property
    def page(self) -> Path:
        """The HTML page, with the table and the plots."""
        return self.out / "comparison.html"


def compare(
    runs: Sequence[str | Path] | Mapping[str, Source],
    *,
    out: str | Path | None = None,
    seeds: int = 1,
    target: float | None = None,
    allow_different: bool = False,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    progress: bool | Reporter | None = None,
) -> Comparison:
    """Make runs that differ in what is compared, and write what they gave side by side.

    Args:
        runs: run files, each named by its file's name; or runs of any kind by name.
        out: the folder of the comparison. By default one in ``outputs`` with the runs' names.
        seeds: how many; the first is that of the run files.
        target: the loss whose virtual time is asked for. By default one that every run reached.
        allow_different: let model, data, the number of clients and the length differ; the report then says so.
        overrides: ``key=value`` texts, or a mapping, for all runs.
        progress: as for ``train``.

    Raises:
        CutlayerError: anything that a user can mend. What was made so far stays, and is not made again.
        Interrupted: the user stopped it; the same call goes on.
    """
    if seeds < 1 or (target is not None and not math.isfinite(target)):
        raise ConfigError(["seeds must be at least 1, and target a finite number."], "the call")
    named = _named(runs)
    configs = {name: _loaded(name, source, overrides) for name, source in named.items()}
    notes = _agree(configs, allow_different=allow_different)
    folder = Path(out) if out is not None else Path("outputs") / f"compare-{'-'.join(configs)}"[:120]
    shown = reporter(progress)
    if (folder / "run.yaml").exists() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is {'a run' if folder.is_dir() else 'a file'}. Give another --out.")
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {folder} cannot be written: {error}. Give another --out.") from error
    command = _command(runs, folder, seeds, target, allow_different, overrides)
    try:
        with alone(folder):
            trials = _carry_out(configs, seeds, folder, shown)
            summary = summarize(
                trials,
                target=target,
                differences=_differences(configs),
                notes=notes,
                command=command,
                versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            )
            texts = {"json": json.dumps(summary, indent=2) + "\n", "md": markdown(summary), "html": page(summary)}
            for suffix, text in texts.items():
                _write(folder / f"comparison.{suffix}", text)
    except KeyboardInterrupt as stop:
        raise Interrupted("what was done is kept. Give the same command again, and it goes on from there.") from stop
    return Comparison(folder, summary)


def _named(runs: Sequence[str | Path] | Mapping[str, Source]) -> dict[str, Source]:
    """The runs by name: a file's own name, with as many of its folders as tell it from the others."""
    if isinstance(runs, Mapping):
        wrong = [name for name in runs if not NAME.fullmatch(name)]
        if wrong or not runs:
            said = f"{show(wrong[0])} cannot be a run's name; use letters, digits, '-', '_' and '.'" if wrong else None
            raise ConfigError([f"{said or 'there is no run. Give at least one'}."], "the comparison")
        return dict(runs)
    if isinstance(runs, str | Path):
        runs = [runs]
    if not runs or not all(isinstance(run, str | Path) and "\n" not in str(run) for run in runs):
        raise ConfigError(["give run files, or a mapping of names to runs: {'first': {...}}."], "the comparison")
    paths = [Path(os.path.abspath(run)) for run in runs]
    twice = [str(run) for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise ConfigError([f"{twice[0]} is given twice. A run is compared with others."], "the comparison")
    for depth in range(max(len(path.parts) for path in paths)):
        names = ["-".join([*path.parts[1:-1][max(len(path.parts) - 2 - depth, 0) :], path.stem]) for path in paths]
        if len({name.lower() for name in names}) == len(paths):
            break
    else:
        raise ConfigError(["two run files have one name but for their ending. Rename one."], "the comparison")
    return dict(zip(names, runs, strict=True))


def _loaded(name: str, source: Source, overrides: Sequence[str] | Mapping[str, Any]) -> RunConfig:
    """A run, checked, with absolute paths."""
    is_file = isinstance(source, Path) or (isinstance(source, str) and "\n" not in source)
    try:
        return resolved(load_config(source, overrides), Path(str(source)).parent if is_file else None)
    except ConfigError as error:
        if is_file:
            raise
        raise ConfigError(error.problems, f"the run '{name}'") from error


def _essentials(config: RunConfig) -> dict[str, Any]:
    """What must be equal, by dotted key."""
    kind, count = config.length
    clients = config.client_list
    own = [client.data.model_dump(exclude_none=True) if client.data else None for client in clients]
    return {
        "model": config.model,
        **{f"data.{key}": getattr(config.data, key) for key in EQUAL_DATA},
        "the number of clients": len(clients),
        "the clients' own data": own if any(own) else None,
        "the length": f"{kind}={count}",
    }


def _agree(configs: Mapping[str, RunConfig], *, allow_different: bool) -> list[str]:
    """What is to be said of differences that are allowed.

    Raises:
        ConfigError: the runs differ in what must be equal.
    """
    essentials = {name: _essentials(config) for name, config in configs.items()}
    found = []
    for key in next(iter(essentials.values())):
        values = {name: essential[key] for name, essential in essentials.items()}
        if key == "the clients' own data" and len({e["the number of clients"] for e in essentials.values()}) > 1:
            continue  # that is said already
        if said := _grouped(key, values):
            found.append(said)
    seeds = _grouped("seed", {name: config.seed for name, config in configs.items()})
    if found and not allow_different:
        found[-1] += (
            " Make the files agree, or set the key for all runs (key=value, and rounds=null steps=20 for a length); "
            "--allow-different compares them as they are."
        )
    problems = [*([] if allow_different else found), *([f"{seeds} Set one for all, such as seed=0."] if seeds else [])]
    if problems:
        raise ConfigError(problems, "the comparison")
    notes = [f"NOT THE SAME TASK: {said}" for said in found]
    different = _differences(configs)
    for key, why in DOUBTS.items():
        if any(other == key or other.startswith(f"{key}.") for other in different):
            notes.append(f"The runs differ in {key}: {why}.")
    return notes


def _grouped(key: str, values: Mapping[str, Any]) -> str:
    """Who has which value, or nothing if all have the same."""
    groups: list[tuple[Any, list[str]]] = []
    for name, value in values.items():
        group = next((names for other, names in groups if other == value), None)
        if group is None:
            groups.append((value, [name]))
        else:
            group.append(name)
    if len(groups) < 2:
        return ""
    told = [f"{value if isinstance(value, str) else show(value)} in {', '.join(names)}" for value, names in groups]
    return f"{key} differs: {'; '.join(told)}."


def _differences(configs: Mapping[str, RunConfig]) -> dict[str, dict[str, Any]]:
    """Every setting that is not the same in all runs, by dotted key, with the value of each."""
    trees = {name: tree_of(config) for name, config in configs.items()}
    for tree in trees.values():
        for key in ("seed", "record_wire", "report_to"):
            tree.pop(key, None)
    return dict(_differing(trees, ""))


def _differing(values: Mapping[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    first, *rest = values.values()
    if all(value == first for value in rest):
        return
    if all(isinstance(v, Mapping) for v in values.values()) and len({v.get("name") for v in values.values()}) == 1:
        for inner in dict.fromkeys(inner for value in values.values() for inner in value):
            yield from _differing({n: v.get(inner) for n, v in values.items()}, f"{key}.{inner}" if key else inner)
    else:
        yield key, dict(values)


def _carry_out(configs: Mapping[str, RunConfig], seeds: int, folder: Path, progress: Reporter) -> list[Trial]:
    """Every run with every seed, the first seed of all runs first."""
    made_of = _made_of(folder)
    now = {name: _identity(config) for name, config in configs.items()}
    planned: list[tuple[Trial, RunConfig, str]] = []
    for number in range(seeds):
        for name, config in configs.items():
            seed = config.seed + number
            trial = Trial(name, seed, folder / "runs" / f"{name}-seed{seed}", None)
            wire = str(Path(config.record_wire) / trial.folder.name) if config.record_wire else None
            one = config.model_copy(update={"seed": seed, "record_wire": wire})
            planned.append((trial, one, _state(trial.folder, now[name], made_of)))
    for name, config in configs.items():  # what cannot work is refused before anything is trained
        if any(trial.name == name and state != "complete" for trial, _, state in planned):
            with _told(name):
                preflight(config)
    done = []
    for number, (trial, config, state) in enumerate(planned, start=1):
        doing = {"new": "starts", "begun": "goes on", "complete": "is complete"}[state]
        progress.note(f"run {number} of {len(planned)}: {trial.name}, seed {trial.seed} {doing} ({trial.folder})")
        if state == "new":
            made_of[trial.folder.name] = now[trial.name]
            _write(folder / MADE_OF, json.dumps(made_of, indent=1) + "\n")
        done.append(_made(trial, config, state, progress))
    return done


def _made(trial: Trial, config: RunConfig, state: str, progress: Reporter) -> Trial:
    """The trial with its summary.

    One whose numbers are no longer finite, or whose methods fail, has failed: a result too, and the others go on.
    """
    with _told(f"{trial.name}, seed {trial.seed}"):
        try:
            if state == "new":
                result = train(config, out=trial.folder, progress=progress)
            else:
                result = train(resume=trial.folder, progress=False if state == "complete" else progress)
        except (NonFinite, MethodError) as error:
            progress.note(f"{trial.name}, seed {trial.seed} failed: {error}")
            return dataclasses.replace(trial, failed=str(error))
    return dataclasses.replace(trial, summary=result.summary)


@contextlib.contextmanager
def _told(which: str) -> Iterator[None]:
    """Say in an error which run it is of."""
    try:
        yield
    except CutlayerError as error:
        raise CutlayerError(f"{which}: {error}") from error


def _identity(config: RunConfig) -> dict[str, str]:
    """What a run is but for its seed, and the content of its data files."""
    found = identity_of(config)
    settings = {key: value for key, value in json.loads(found["settings"]).items() if key != "seed"}
    sources = {f"data.{key}": getattr(config.data, key) for key in ("train", "eval")}
    sources |= {f"the data of {client.name}": client.data.train for client in config.client_list if client.data}
    digests = {key: [_digest(file) for file in _files(source)] for key, source in sources.items() if source}
    return {**found, "settings": json.dumps(settings, sort_keys=True), "data files": json.dumps(digests)}


def _files(source: str) -> list[str]:
    """The files of a resolved source; of a data set on the Hub, none."""
    return [source] if os.path.exists(source) else sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))


def _digest(file: str) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _made_of(folder: Path) -> dict[str, dict[str, str]]:
    """What each run in the folder was begun with, by the name of its own folder."""
    path = folder / MADE_OF
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {name: dict(parts) for name, parts in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Give another --out for a new comparison.") from error


def _state(folder: Path, now: Mapping[str, str], made_of: Mapping[str, Mapping[str, str]]) -> str:
    """Whether a run is ``new``, ``begun`` or ``complete``.

    Raises:
        CheckpointError: the folder holds another run, or what this one was begun with has changed.
    """
    if not folder.exists() or (folder.is_dir() and is_empty(folder)):
        return "new"
    remedy = "Give another --out, or delete it to make the run anew."
    before = made_of.get(folder.name)
    if before is None or not (folder / "run.yaml").is_file():
        raise CheckpointError(f"{folder} holds something that is not of this comparison. {remedy}")
    for part, content in now.items():
        if before.get(part) != content:
            both = {"before": json.loads(before.get(part, "{}")), "now": json.loads(content)}
            keys = ", ".join(key for key, _ in _differing(both, ""))
            raise CheckpointError(f"{folder} was begun with other {part} ({keys}). {remedy}")
    return "complete" if (folder / "summary.json").is_file() else "begun"


def _command(
    runs: Sequence[str | Path] | Mapping[str, Source], folder: Path, seeds: int, target: float | None,
    allow_different: bool, overrides: Sequence[str] | Mapping[str, Any],
) -> str:  # fmt: skip
    """The command that makes this comparison."""
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    options = ["--seeds", str(seeds), *([] if target is None else ["--target", str(target)]), "--out", str(folder)]
    options += ["--allow-different"] if allow_different else []
    if isinstance(runs, Mapping):
        return f"cutlayer.compare from Python, runs {', '.join(runs)}: {shlex.join([*overrides, *options])}"
    files = [str(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    return shlex.join(["cutlayer", "compare", *files, *overrides, *options])


def _write(path: Path, text: str) -> None:
    try:
        checkpoint.write_text(path, text)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Free some space (or mend the rights), then give the "
            "same command again; what was made is kept."
        ) from error
