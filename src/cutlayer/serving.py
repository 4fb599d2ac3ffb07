"""``cutlayer serve`` from Python: one run of a run file, or the runs of a service file, for clients who join."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cutlayer.apart import check_routes, known_classes, offer, served
from cutlayer.build import open_model
from cutlayer.config import RunConfig, dump
from cutlayer.draining import DRAIN, Drain, Drained, Paused
from cutlayer.errors import ConfigError, CutlayerError, NetworkError, OutputError
from cutlayer.keys import server_keys
from cutlayer.links.net.messages import WELCOME
from cutlayer.outputs import OURS, holds_a_run
from cutlayer.preflight import preflight
from cutlayer.report.progress import Reporter, reporter
from cutlayer.run import Interrupted, Result
from cutlayer.served_run import Patience
from cutlayer.service import Service
from cutlayer.service_file import Entry, ServiceFile, load_service
from cutlayer.status import status_server
from cutlayer.watching import House

ABOUT = 4096  # bytes of a welcome for all but the run
PATIENCE = 600.0  # seconds that a client may stay away before the run gives it up


def serve(
    source: str | Path | Mapping[str, Any],
    *,
    bind: str,
    out: str | Path,
    keys: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    patience: float = PATIENCE,
    absent: Literal["go-on", "end"] = "go-on",
    drain: float = DRAIN,
    status: str | None = None,
    progress: bool | Reporter | None = None,
) -> Result:
    """Serve one run to its end. Where ``out`` holds it already, it goes on.

    Args:
        source: a run file or its keys; what it says of data files is only their form, for each client brings its own.
        bind: ``HOST:PORT`` to listen at; port 0: any that is free, which is then said.
        out: the server's folder.
        keys: its folder of ``cutlayer keys``; None: plain text, on this machine only.
        overrides: as of ``cutlayer.train``.
        patience: seconds that a client may stay away in the middle of the run.
        absent: what is done when it stays away for longer: the others ``go-on`` without it and take it back when it
            comes, or the run is at its ``end``.
        drain: seconds that the round under way gets after a SIGTERM; 0: the server stops at once.
        status: ``HOST:PORT`` for metrics, health and readiness: plain text, for the operator's own machine.
        progress: as of ``cutlayer.train``.

    Raises:
        CutlayerError: anything that a user can mend.
        Gone: with ``absent="end"`` a client stayed away for too long; serving the same again goes on with the run.
        Interrupted: it was stopped; ``Paused``: by SIGTERM, after a round.
    """
    shown, folder = reporter(progress), Path(out)
    config = _checked(source, overrides, folder)
    own = server_keys(keys) if keys is not None else None
    house = House(Drain(drain), own.until if own else None)
    service = Service(bind, own, shown, house=house, label=_label(source))
    _finished(service, {"": (config, folder)}, Patience(patience, absent), status)
    for error in service.failures.values():
        raise error
    return service.results[""]


def serve_all(
    source: str | Path,
    *,
    bind: str,
    out: str | Path,
    keys: str | Path | None = None,
    patience: float = PATIENCE,
    absent: Literal["go-on", "end"] = "go-on",
    drain: float = DRAIN,
    status: str | None = None,
    progress: bool | Reporter | None = None,
) -> dict[str, Result]:
    """Serve the runs of a service file at a time, each in a folder of its own name in ``out``; their results by name.

    While it serves, SIGHUP has it read the file again: runs that are new there begin, and those that have gone from it
    are no longer served.

    Args:
        source: the service file.
        bind, out, keys, patience, absent, drain, status, progress: as of ``serve``.

    Raises:
        CutlayerError: anything that a user can mend; of the runs, when all have ended.
    """
    shown, folder = reporter(progress), Path(out)
    found = load_service(source)
    configs = {entry.name: (_entry(entry, folder), folder / entry.name) for entry in found.runs}
    own = server_keys(keys) if keys is not None else None
    service = Service(bind, own, shown, stay=found.stay, house=House(Drain(drain), own.until if own else None))
    waits, turn = Patience(patience, absent), asyncio.Lock()
    _finished(service, configs, waits, status, again=lambda: _reload(service, source, folder, waits, turn))
    if service.failures:
        said = " ".join(f"'{name}': {error}" for name, error in service.failures.items())
        raise NetworkError(f"{len(service.failures)} of {len(service.runs)} runs did not end well. {said}")
    return service.results


def _finished(
    service: Service, runs: Mapping[str, tuple[RunConfig, Path]], patience: Patience, status: str | None,
    again: Callable[[], Awaitable[None]] | None = None,
) -> None:  # fmt: skip
    """Serve to the end, or until the operator (or the system, by SIGTERM) stops it; ``again`` is for SIGHUP."""

    async def all_of_it() -> None:
        task = asyncio.current_task()
        assert task is not None
        for name, (config, folder) in runs.items():
            service.begin(name, config, folder, patience)
        if threading.current_thread() is threading.main_thread():
            loop, reading = asyncio.get_running_loop(), set[asyncio.Future[None]]()
            if again is not None:
                # Held, as asyncio has no strong hold of its tasks.
                loop.add_signal_handler(signal.SIGHUP, lambda: reading.add(asyncio.ensure_future(again())))
        with service.house.drain.on_sigterm(task, service.progress.note):
            await service.run()
        if service.drained:
            raise Drained

    try:
        with status_server(status, service.house, service.progress.note):
            asyncio.run(all_of_it())
    except Drained as stop:
        raise Paused(
            "the server finished its round as it was asked to. The same command goes on with the run"
        ) from stop
    except (KeyboardInterrupt, asyncio.CancelledError) as stop:
        raise Interrupted(
            "the server was stopped; its clients wait for it. The same command goes on with the run, from the last "
            "round that everybody holds"
        ) from stop


def _label(source: object) -> str:
    """What metrics call a run that has no name."""
    return Path(str(source)).stem if isinstance(source, str | Path) and "\n" not in str(source) else "run"


@dataclass(frozen=True)
class _Reading:
    """What a service file says: all of it, the runs that are new, and those that are served already."""

    found: ServiceFile
    fresh: Mapping[str, RunConfig]
    known: Mapping[str, RunConfig]


async def _read_again(source: str | Path, out: Path, runs: Collection[str]) -> _Reading:
    """A service file as it is now; ``runs`` are served already."""
    found = load_service(source)
    fresh = {e.name: _entry(e, out) for e in found.runs if e.name not in runs}
    known = {e.name: _placed(served(e.run, e.set), e.run) for e in found.runs if e.name in runs}
    return _Reading(found, fresh, known)


async def _reload(service: Service, source: str | Path, out: Path, patience: Patience, turn: asyncio.Lock) -> None:
    """Serve what the service file says now; where that cannot be, what it said before.

    Models are looked at by the thread that computes, between two verbs: sessions stay alive meanwhile, and what
    Transformers sets for a moment in all of PyTorch (the type of new tensors) is seen by no other run.
    """
    async with turn:  # a second SIGHUP waits
        try:
            if not service.house.drain.asked():
                reading = await service.computing.do(_read_again(source, out, set(service.runs)))
            if service.house.drain.asked():
                service.progress.note("the server is about to stop; the service file is read when it is started again")
                return
            await _follow(service, reading, out, patience)
        except CutlayerError as error:
            service.progress.note(f"the service file was read again, and nothing is changed: {error}")


async def _follow(service: Service, reading: _Reading, out: Path, patience: Patience) -> None:
    """Begin with what is new, and end what has gone."""
    found, fresh, known = reading.found, reading.fresh, reading.known
    await service.begin_beside({name: (config, out / name) for name, config in fresh.items()}, patience)
    for name, config in known.items():
        if dump(config) != dump(service.runs[name].config):
            service.progress.note(f"run '{name}' is another now, and goes on as it was begun; a new one has a new name")
    names = {entry.name for entry in found.runs}
    for name in [name for name in service.runs if name not in names]:
        await service.remove(name)
        service.progress.note(f"run '{name}' is not served any more")
    service.stay = found.stay


def _entry(entry: Entry, out: Path) -> RunConfig:
    """The run of an entry of a service file."""
    try:
        return _checked(entry.run, entry.set, out / entry.name)
    except ConfigError:
        raise  # it names the file
    except CutlayerError as error:
        error.args = (f"Run '{entry.name}': {error}",)
        raise


def _checked(source: Any, overrides: Sequence[str] | Mapping[str, Any], folder: Path) -> RunConfig:
    """A run that can be served from this folder."""
    config = _placed(served(source, overrides), source)
    begun = holds_a_run(folder)
    preflight(config, None if begun else folder)
    _, blocks = open_model(config)
    check_routes(config, blocks)
    known_classes(config)
    _check_offer(config)
    if begun and (folder / "run.yaml").read_text(encoding="utf-8") != OURS + dump(config):
        raise OutputError(f"{folder} holds another run. Serve the run that it was made with, or give another --out.")
    return config


def _check_offer(config: RunConfig) -> None:
    """Whether the run can be told to a client.

    Raises:
        ConfigError: it is too long.
    """
    length, most = len(json.dumps(offer(config)).encode()), WELCOME - ABOUT
    if length > most:
        raise ConfigError(
            [
                f"the run with its {len(config.client_list)} clients is {length} bytes as it is told to each of them, "
                f"and {most} are accepted. Serve fewer clients in one run, or give them shorter names and named "
                "profiles."
            ],
            "the run",
        )


def _placed(config: RunConfig, source: object) -> RunConfig:
    """The run with its model's folder made absolute, looked for here and beside the run file."""
    is_file = isinstance(source, Path) or (isinstance(source, str) and "\n" not in source)
    for root in [Path.cwd(), *([Path(str(source)).resolve().parent] if is_file else [])]:
        if (root / Path(config.model).expanduser()).is_dir():
            return config.model_copy(update={"model": str((root / Path(config.model).expanduser()).resolve())})
    return config
