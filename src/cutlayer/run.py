"""A run, top to bottom: configuration, parts, rounds, result.

``Run`` is what a framework drives. ``train`` makes one from a run file, drives it round by round, and writes the
result; ``dry_run`` and ``plan`` tell what it would be without reading a weight.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cutlayer import checkpoint
from cutlayer.assembly import Parts, assemble
from cutlayer.audit.known import warnings
from cutlayer.build import Data, load_base, open_model, prepare_data, tokenizer_of
from cutlayer.clock import VirtualClock
from cutlayer.config import RunConfig, dump, load_config, resolved
from cutlayer.driver import Links, Run
from cutlayer.engine import Engine
from cutlayer.errors import CheckpointError, ConfigError, CutlayerError, Gone, OutputError
from cutlayer.models.adapters import save_adapter
from cutlayer.models.loading import device_named
from cutlayer.models.placement import gpus_of
from cutlayer.models.verify import check_unknown_family
from cutlayer.outputs import OURS, alone, holds_a_run, undoing
from cutlayer.preflight import preflight
from cutlayer.report import division
from cutlayer.report.progress import Reporter, reporter
from cutlayer.report.summary import summarize
from cutlayer.wire import Meter, keep_lines


@dataclass(frozen=True)
class Result:
    """What a run gave. ``summary`` is the content of ``summary.json``; ``adapter`` the folder to load."""

    out: Path
    adapter: Path
    summary: Mapping[str, Any]


class Interrupted(KeyboardInterrupt):
    """The user stopped a run that has an output folder; the message says how to go on with it."""

    code = 130  # that the command ends with


def total_rounds(config: RunConfig) -> int:
    """How many rounds a run has at most. ``steps`` and ``epochs`` go on until every client has made its own."""
    kind, count = config.length
    return count if kind == "rounds" else sys.maxsize


def train(
    source: str | Path | Mapping[str, Any] | RunConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    progress: bool | Reporter | None = None,
    warn: bool = True,
) -> Result:
    """Make a run, or go on with one.

    Args:
        source: a run file, a mapping of its keys, or a RunConfig.
        out: the folder that gets the result; new or empty. By default ``outputs/<name>-<time>``.
        resume: the folder of a run that was interrupted; then ``source`` is not needed.
        overrides: ``key=value`` texts, or a mapping.
        progress: told of every step. True shows a bar (without a terminal lines now and then), False nothing, None a
            bar where somebody may look at it: in a terminal or a notebook.
        warn: say what is known that the server can read of such a run.

    Raises:
        CutlayerError: anything that a user can mend; nothing half-written is left.
        Interrupted: the user stopped it; it can be resumed.
    """
    shown = reporter(progress)
    if resume is not None:
        if source is not None or out is not None or overrides:
            raise ConfigError(
                ["resume takes the run as it was: give no run, no out and no overrides with it."], "the call"
            )
        folder = Path(resume)
        config = _config_of(folder)
        if (folder / "summary.json").is_file():
            shown.note(f"The run in {folder} is complete; nothing is left to do.")
            return _finished(folder)
        preflight(config)
        with alone(folder):
            return _attempt(config, folder, shown, undo=None)
    if source is None:
        raise ConfigError(["give a run (a file or a mapping), or resume with an output folder."], "the call")
    config = resolved(load_config(source, overrides), _base_of(source))
    folder = Path(out) if out is not None else _new_folder(source)
    preflight(config, folder)
    places = [folder, *([Path(config.record_wire)] if config.record_wire else [])]
    undo = undoing(*places)
    try:
        for place in reversed(places):
            place.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(folder / "run.yaml", OURS + dump(config))
    except OSError as error:
        undo()
        which = "folder of record_wire" if place != folder else "output folder"
        other = "Name another" if place != folder else "Give another --out"
        raise OutputError(f"The {which} {place} cannot be written: {error}. {other}.") from error
    command = f"cutlayer audit {shlex.quote(str(folder / 'run.yaml'))} --out {shlex.quote(f'{folder}-audit')}"
    known = warnings(config, open_model(config)[1], command=command) if warn else ()
    with alone(folder):
        return _attempt(config, folder, shown, undo=undo, known=known)


def _attempt(
    config: RunConfig, folder: Path, progress: Reporter, *, undo: Callable[[], None] | None, known: Sequence[str] = ()
) -> Result:
    """Carry the run out; undo it if it fails before its first checkpoint, else say how to go on after a full disk.

    ``known`` is told once the run has begun: what is known of runs like it.
    """
    again = f"cutlayer train --resume {shlex.quote(str(folder))}"
    try:
        return _going_on(config, folder, progress, known)
    except KeyboardInterrupt as stop:
        raise Interrupted(f"nothing half-written is left. Take the run up where it was with: {again}") from stop
    except Exception as error:
        undone = undo is not None and checkpoint.newest(folder / "checkpoints") is None
        if undo is not None and undone:
            undo()
        if not isinstance(error, OSError | OutputError):
            raise
        said = str(error)
        if isinstance(error, OSError):
            # The frames are the only thing that is written all the time, by a buffer that does not know its name.
            where = error.filename or (
                f"The record of frames in {config.record_wire}" if config.record_wire else folder
            )
            said = f"{where} cannot be written: {error.strerror or error}."
        then = "start the run again" if undone else f"go on with: {again}"
        raise OutputError(f"{said} Free some space (or mend the rights), then {then}.") from error


def _going_on(config: RunConfig, folder: Path, progress: Reporter, known: Sequence[str]) -> Result:
    """Carry the run out; again from its newest checkpoint when an actor has died, as long as there is a newer one."""
    kept = folder / "checkpoints"
    while True:
        before = checkpoint.newest(kept)
        try:
            return _carry_out(config, folder, progress, known)
        except Gone as gone:
            if checkpoint.newest(kept) == before:
                raise
            progress.note(f"{gone} All go back to the newest checkpoint.")
            known = ()


def _config_of(folder: Path) -> RunConfig:
    if not (folder / "run.yaml").is_file():
        raise CheckpointError(f"There is no run to resume in {folder}: it has no run.yaml.")
    config = load_config(folder / "run.yaml")
    if not holds_a_run(folder):  # it may be anybody's folder
        raise CheckpointError(
            f"There is no run to resume in {folder}: its run.yaml was not written by a run. Start it with: "
            f"cutlayer train {shlex.quote(str(folder / 'run.yaml'))}"
        )
    return config


def _base_of(source: object) -> Path | None:
    """The folder of the run file, where relative paths are looked for that the current folder does not have."""
    is_file = isinstance(source, Path) or (isinstance(source, str) and "\n" not in source)
    return Path(str(source)).parent if is_file else None


def _new_folder(source: object) -> Path:
    name = Path(str(source)).stem if _base_of(source) is not None else "run"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("outputs") / f"{name}-{stamp}"


def _carry_out(config: RunConfig, out: Path, progress: Reporter, known: Sequence[str]) -> Result:
    """From a configuration and a folder to the result."""
    device = device_named("cpu" if config.engine.trunk_apart else config.device)  # else this process computes
    for gpu in gpus_of(device):
        torch.cuda.reset_peak_memory_stats(gpu)
    data: Data = prepare_data(config, tokenizer_of(config))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if gpus_of(device) else []):
        base = load_base(config, labels=data.labels, device=device)
        _ = config.identity  # of the files as they are now
        parts = assemble(config, base, data)
        for layout in dict.fromkeys(parts.layouts.values()):
            check_unknown_family(base, layout, when=config.verify)
        for line in (f"output folder: {out}", *known):
            progress.note(line)
        if config.planner:
            cuts = ", ".join(f"{client} {len(layout.head)}" for client, layout in parts.layouts.items())
            progress.note(f"head blocks, as planner '{config.planner.name}' begins: {cuts}")
        two_part = not next(iter(parts.layouts.values())).tail_at_client
        if base.peft_model is None and base.tied and two_part:
            progress.note(
                "the LM head and the embedding share one matrix in this model; client and server train a copy each, so "
                "the result is saved with two"
            )
        clock = VirtualClock()
        with _metered(config.record_wire) as meter, _elsewhere(config, parts, data, progress) as links:
            run = Run(config, parts, meter=meter, clock=clock, out=out, progress=progress, links=links)
            engine = Engine(run, data_fingerprint=data.fingerprint)
            found = checkpoint.newest(out / "checkpoints")
            keep = 0
            if found is not None:
                engine.restore(found)
                keep = run.counters.lines
                progress.note(f"going on after round {run.counters.rounds}")
            else:
                meter.restore(None)
            if not (out / "adapter_initial").exists():
                _adapter(run, out / "adapter_initial", state={n: p.detach() for n, p in base.initial.items()})
            if data.division is not None and division.save(data.division, out, anew=found is None):
                progress.note(division.told(data.division))
            keep_lines(out / "metrics.jsonl", keep)
            if run.framework.asynchronous:
                keep_lines(out / "uploads.jsonl", run.counters.uploads)
            left = sum(parts.foreseen.values()) - sum(run.counters.steps.values())
            progress.start(left)
            try:
                clock.run(engine.drive(rounds=total_rounds(config)))
            except BaseExceptionGroup as group:
                raise first_of(group) from group
            finally:
                progress.stop()
        kind = "adapter" if base.peft_model is not None else "model"
        if run.personal:
            for name in run.clients:
                _adapter(run, out / f"{kind}s" / name, name)
        adapter = _adapter(run, out / kind)
        summary = summarize(run, adapter=adapter, device=device)
        try:
            checkpoint.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            raise OutputError(f"{out / 'summary.json'} cannot be written: {error}.") from error
    return Result(out, adapter, summary)


@contextlib.contextmanager
def _elsewhere(config: RunConfig, parts: Parts, data: Data, progress: Reporter) -> Iterator[Links | None]:
    """The links to clients that are not in this process; none with ``engine: local``."""
    if config.engine.name == "local":
        yield None
        return
    from cutlayer.cluster import started

    with started(config, parts, data.pad_id, progress) as links:
        yield links


@contextlib.contextmanager
def _metered(record: str | None) -> Iterator[Meter]:
    """A meter that is closed at the end; a disk that is full then does not hide the error before."""
    meter = Meter(Path(record) if record else None)
    try:
        yield meter
    except BaseException:
        with contextlib.suppress(OSError):
            meter.close()
        raise
    meter.close()


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error behind a group of tasks that ended together."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _adapter(
    run: Run, folder: Path, client: str | None = None, *, state: Mapping[str, torch.Tensor] | None = None
) -> Path:
    """Write the model as it now is (of a client) as one adapter (full fine-tuning: one model), whole or not at all."""
    base = run.parts.base
    if base.peft_model is None and folder.name == "adapter_initial":
        return folder  # full fine-tuning starts from the base itself
    draft = folder.with_name(f".{folder.name}.draft")
    try:
        folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
        save_adapter(base, run.state(client) if state is None else state, draft, base_name=run.config.model)
        if base.peft_model is None:
            tokenizer_of(run.config).save_pretrained(draft)
        checkpoint.move(draft, folder)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, CutlayerError):
            raise
        if isinstance(error, OSError) or "os error" in str(error):  # safetensors' own error is no OSError
            raise OutputError(f"{folder} cannot be written: {error}.") from error
        raise
    return folder


def _finished(folder: Path) -> Result:
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Delete it; --resume {folder} then writes it anew."
        ) from error
    name = "adapter" if (folder / "adapter").is_dir() else "model"
    return Result(folder, folder / name, summary)


__all__ = ["Result", "Run", "dry_run", "plan", "train"]


def dry_run(source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Any:
    """Who would hold what, and what a step would move; no weight is read."""
    from cutlayer.report.plan import plan

    return plan(resolved(load_config(source, overrides), _base_of(source)))


def plan(source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Any:
    """``dry_run``, and the cuts that the run's planner would begin with; for these the data are read, but no weight."""
    from cutlayer.report.plan import plan_with_data

    return plan_with_data(resolved(load_config(source, overrides), _base_of(source)))
