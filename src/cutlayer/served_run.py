"""One run that a server serves: it waits for its clients, drives the run, and parts from them.

A run goes on from the newest round that all hold. Whoever comes back as a new process (the server too) has lost what
it did since: then all go back to that round together, and the result is that of an undisturbed run.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlayer import checkpoint
from cutlayer.apart import known_classes, offer
from cutlayer.assembly import assemble_server, places_of
from cutlayer.build import load_base
from cutlayer.computing import Computing
from cutlayer.config import RunConfig, dump
from cutlayer.draining import PARTING, Drain, Drained
from cutlayer.driver import Run
from cutlayer.engine import Engine
from cutlayer.errors import Disconnected, Gone, MethodError, NonFinite, Refused
from cutlayer.frames import limits_of
from cutlayer.handing import WANTS, Handing
from cutlayer.identity import fingerprint
from cutlayer.links.local import Link
from cutlayer.links.net.handing import LIMITS
from cutlayer.links.net.remote import Remote, on_loop
from cutlayer.links.net.session import Session
from cutlayer.links.network import Carry, NetworkLink
from cutlayer.models.adapters import save_part
from cutlayer.models.loading import device_named
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.models.segment import Base
from cutlayer.models.sharing import SharedModels
from cutlayer.models.slots import parameter_of
from cutlayer.outputs import OURS, alone
from cutlayer.real_clock import RealClock
from cutlayer.report.progress import Reporter
from cutlayer.report.summary import summarize
from cutlayer.run import Result, first_of, total_rounds
from cutlayer.schedule import Told
from cutlayer.watching import State, Watch
from cutlayer.wire import Frame, Header, Limits, Meter, keep_lines

FAREWELL = 30.0  # seconds in which clients may fetch the news that the run is done
MOST_EXAMPLES = 2**40  # that a client may claim to have


@dataclass(frozen=True)
class _Ready:
    """What a client said when it came: of its data, and which rounds it holds."""

    told: Told
    rounds: Sequence[int]


class ServedRun:
    """One run that is being served.

    Args:
        name: what the server calls it; empty where it serves no other.
        config: the run.
        out: its folder.
        patience: seconds that a client may stay away in the middle of the run.
        progress: is told what happens.
        computing: the thread that computes for all runs of this server.
        models: what runs share of their models.
        drain: whether the server was asked to stop.
        label: what metrics call it, where it has no name.
    """

    def __init__(
        self, name: str, config: RunConfig, out: Path, *, patience: float, progress: Reporter, computing: Computing,
        models: SharedModels, drain: Drain | None = None, label: str = "",
    ) -> None:  # fmt: skip
        self.name, self.config, self.out = name, config, out
        self._drain = drain or Drain()
        self.files, self.handing = fingerprint(config.model), Handing(config)
        self.offered = offer(config)
        self._limits = limits_of(config, load_model_config(config.model))
        self.device = device_named(config.device)
        self.remotes = {client: Remote(client, patience=patience) for client in config.client_names}
        self.progress = self.watch = Watch(name or label, progress, self.remotes)
        self.ready: dict[str, _Ready] = {}
        self._computing, self._models = computing, models
        self._came = asyncio.Event()
        self._error: Exception | None = None
        self._base: Base | None = None
        self.parting = 0  # bytes by which clients got, when all was done, what they had not seen

    async def serve(self) -> Result:
        """Wait for all, drive, and part."""
        self.out.mkdir(parents=True, exist_ok=True)
        with alone(self.out):
            checkpoint.write_text(self.out / "run.yaml", OURS + dump(self.config))
            return await self._served()

    async def _served(self) -> Result:
        try:
            result = await self._driven()
            self.watch.state = "done"
            for remote in self.remotes.values():
                await remote.close("The run is done.")
            heard = [asyncio.ensure_future(remote.heard.wait()) for remote in self.remotes.values()]
            await asyncio.wait(heard, timeout=FAREWELL)  # who missed the goodbye comes back for it
            for task in heard:
                task.cancel()
            return result
        except Drained:
            await self.stop(PARTING)
            raise
        except Exception as error:
            self.watch.state, self._error = "failed", error
            self._base = None
            for remote in self.remotes.values():
                if remote.session is not None and self._hopeless:
                    await remote.session.refuse(self._failure)
                else:
                    await remote.close(self._failure, done=False)
            raise

    @property
    def state(self) -> State:
        """Whether it waits for its clients, trains, or has ended."""
        return self.watch.state

    @property
    def run(self) -> Run | None:
        """The run as it is driven now."""
        return self.watch.run

    @property
    def _hopeless(self) -> bool:
        """Whether it failed so that trying again would not help."""
        return isinstance(self._error, NonFinite | MethodError)

    @property
    def _failure(self) -> str:
        """What its clients are told when it has failed: not the words, which may be about another client."""
        return f"The run failed at the server: {type(self._error).__name__}."

    async def stop(self, words: str) -> None:
        """Let the clients go; they try again later."""
        for remote in self.remotes.values():
            await remote.close(words, done=False)

    async def _driven(self) -> Result:
        """Drive the run; again from the last common round when a client has come back without what it held."""
        while True:
            self.watch.state = "waiting"
            await self._drain.unless(self._all_here())
            self.watch.state = "training"
            for remote in self.remotes.values():
                remote.renew()
            network = asyncio.get_running_loop()
            attempt = asyncio.ensure_future(self._computing.do(self._attempt(network)))
            try:
                return await asyncio.shield(attempt)
            except Gone as gone:
                remote = self.remotes[gone.client]
                if remote.session is None and not remote.stale:
                    raise
                self.progress.note(f"{gone} All go back to the last round that everybody holds.")
            except asyncio.CancelledError:  # the attempt ends with the next thing that it asks a client
                await self.stop("The server was stopped.")
                await asyncio.gather(attempt, return_exceptions=True)
                raise
            finally:
                self.watch.run = None

    async def welcome(self, hello: dict[str, Any]) -> dict[str, Any]:
        """What to tell a client of this run that may come in.

        Raises:
            Refused: it may not.
            Disconnected: not now.
        """
        name = hello["client"]
        if self.state == "failed":
            raise (Refused if self._hopeless else Disconnected)(self._failure)
        if hello.get("wants") == "run":
            return {"run": self.offered, "name": self.name, "own_model": Path(self.config.model).is_dir()}
        if hello.get("wants") == WANTS:
            return {"client": name}
        model = hello.get("model")
        if model != self.files and not await self.handing.is_same(name, model):
            raise Refused(
                f"The model is another here: its files ({', '.join(self.files)}) have other checksums than those of "
                f"'{name}'. Use the same files of '{Path(self.config.model).name}' at both ends.",
                reason="model",
            )
        told = read_told(hello.get("data"), planned=self.config.planner is not None)
        ready = _Ready(told, read_rounds(hello.get("rounds")))
        before = self.ready.get(name)
        if before is not None and before.told != ready.told:
            raise Refused(
                "Your data are of another size than when you first joined this run. Bring the same data.", reason="data"
            )
        self.ready[name] = ready
        return {"client": name, "name": self.name}

    def limits(self, hello: dict[str, Any]) -> Limits:
        """The most that a frame of a client may hold that was admitted with this hello."""
        return LIMITS if hello.get("wants") else self._limits

    async def session(self, session: Session) -> None:
        """Serve a session that was admitted."""
        if session.hello.get("wants") == "run":
            await session.ended.wait()
            return
        if session.hello.get("wants") == WANTS:
            await self.handing.serve(session)
            return
        name = session.hello["client"]
        self.progress.note(f"client '{name}' is here")
        self._came.set()
        await self.remotes[name].serve(session)

    async def _all_here(self) -> None:
        while len(self.ready) < len(self.remotes):
            self._came.clear()
            await self._came.wait()
        for remote in self.remotes.values():
            await remote.attached()

    async def _attempt(self, network: asyncio.AbstractEventLoop) -> Result:
        """Drive the run from the newest round that all hold; in the thread that computes."""
        config, out = self.config, self.out
        if self._base is None:
            with torch.random.fork_rng(devices=[]):
                self._base = load_base(config, labels=known_classes(config), device=self.device, models=self._models)
        parts = assemble_server(config, self._base, {name: ready.told for name, ready in self.ready.items()})
        clock = RealClock()
        with Meter(Path(config.record_wire) if config.record_wire else None) as meter:
            run = Run(
                config, parts, meter=meter, clock=clock, out=out, progress=self.progress,
                links=lambda run: self._links(run, network),
            )  # fmt: skip
            engine, self.watch.run = Engine(run, asked_to_stop=self._drain.asked), run
            number = self._common()
            for newer in [n for n in checkpoint.rounds(out / "checkpoints") if n > number]:
                shutil.rmtree(out / "checkpoints" / f"round-{newer:06d}")  # not everybody has it
            if number:
                engine.restore(out / "checkpoints" / f"round-{number:06d}")
                self.progress.note(f"going on after round {number}")
            else:
                meter.restore(None)
            keep_lines(out / "metrics.jsonl", run.counters.lines)
            keep_lines(out / "uploads.jsonl", run.counters.uploads)
            self.progress.start(sum(parts.foreseen.values()) - sum(run.counters.steps.values()))
            try:
                await self._drive(run, engine)
            except BaseExceptionGroup as group:
                raise first_of(group) from group
            finally:
                self.progress.stop()
        adapter = self._save(run)
        summary = summarize(run, adapter=adapter, device=self.device)
        summary["parting_bytes"] = self.parting
        summary["network"] = {
            name: {
                "reconnects": remote.reconnects, "retries": remote.retries, "dropped": remote.dropped,
                "seconds_away": round(remote.seconds_away, 3), "model_bytes": self.handing.bytes[name],
            }
            for name, remote in self.remotes.items()
        }  # fmt: skip
        checkpoint.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        return Result(out, adapter, summary)

    async def _drive(self, run: Run, engine: Engine) -> None:
        if not await engine.drive(rounds=total_rounds(self.config)):
            raise Drained
        before = run.meter.state()
        await run.part()
        self.parting = run.meter.up + run.meter.down - before["up"] - before["down"]
        run.meter.restore(before)
        for link in run.links.values():
            assert isinstance(link, NetworkLink)
            await link.finish()

    def _links(self, run: Run, network: asyncio.AbstractEventLoop) -> dict[str, Link]:
        found: dict[str, Link] = {}
        for name, remote in self.remotes.items():
            carry = _carrier(remote, network)
            asked, turn = run.presence.asked, remote.last_turn
            bounds = run.parts.bounds
            found[name] = NetworkLink(
                name, carry, meter=run.meter, asked=asked, turn=turn, shadow=run.parts.clients[name],
                most=max(bounds[name]) if bounds else None,
            )  # fmt: skip
        return found

    def _common(self) -> int:
        """The newest round that the server and all clients hold; 0: none."""
        held = set(checkpoint.rounds(self.out / "checkpoints"))
        for ready in self.ready.values():
            held &= set(ready.rounds)
        return max(held, default=0)

    def _save(self, run: Run) -> Path:
        """What the server has of the adapter: what it trained, and what the framework's merges sent it."""
        kind = "adapter" if run.parts.base.peft_model is not None else "model"
        if run.personal:
            for name in run.clients:
                self._save_one(run, name, self.out / f"{kind}s" / name)
        return self._save_one(run, run.evaluators()[0], self.out / kind)

    def _save_one(self, run: Run, client: str, final: Path) -> Path:
        state: dict[str, Tensor] = {}
        if not run.personal:
            state |= {n: tensor for n, tensor in run.federated.before.items() if parameter_of(n) == n}
        stops, layout = run.parts.routes[client], run.parts.layouts[client]
        for stop, place in zip(stops, places_of(run.parts.base, layout, stops), strict=True):
            held = run.parts.slot(stop).get()  # of what it holds, that which it trains now
            state |= {name: held[name] for name in place.segment.names if name in held}
        draft = final.with_name(f".{final.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        save_part(run.parts.base, state, draft, base_name=Path(self.config.model).name)
        shutil.rmtree(final, ignore_errors=True)
        checkpoint.move(draft, final)
        return final


def _carrier(remote: Remote, network: asyncio.AbstractEventLoop) -> Carry:
    """Asks a client from the run's thread."""

    async def carry(frame: Frame) -> tuple[Header, list[Tensor]]:
        header, tensors, _ = await on_loop(network, remote.call(frame))
        return header, tensors

    return carry


def read_told(data: object, *, planned: bool = False) -> Told:
    """What a client says of its data, if it can be; ``planned``: to a planner."""
    names = [field.name for field in fields(Told)]
    if not isinstance(data, dict) or set(data) != set(names):
        raise Refused("The hello does not say what the data are. Both ends need the same version of cutlayer.")
    least = {"examples": 1, "steps_per_epoch": 1, "length": 1 if planned else 0}
    if any(type(data[n]) is not int or not least.get(n, 0) <= data[n] <= MOST_EXAMPLES for n in names):
        raise Refused("The hello says of the data what cannot be: counts are whole numbers, and not below one example.")
    return Told(**data)


def read_rounds(rounds: object) -> list[int]:
    """The rounds that a client says it holds, if they can be."""
    if not isinstance(rounds, list) or any(type(number) is not int or number < 1 for number in rounds):
        raise Refused("The hello names rounds that cannot be.")
    return rounds[-100:]
