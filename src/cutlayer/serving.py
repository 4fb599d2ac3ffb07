"""A server that trains with clients who join over the network: it waits for them, drives the run, and parts from them.

Two threads: sessions live on the main thread's event loop, and the run has one of its own, so that a long step of the
trunk keeps no heartbeat waiting.

A run goes on from the newest round that all hold. Whoever comes back in time as a new process (this server too) has
lost what it did since: then all go back to that round together, and the result is that of an undisturbed run. Of who
does not come back in time, ``absence.py`` speaks.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cutlayer import checkpoint
from cutlayer.absence import Absence
from cutlayer.apart import check_routes, offer, served
from cutlayer.assembly import assemble_server
from cutlayer.build import load_base, open_model
from cutlayer.config import RunConfig, dump
from cutlayer.driver import Run
from cutlayer.engine import Engine
from cutlayer.errors import Gone, MethodError, NonFinite, OutputError, Refused
from cutlayer.identity import fingerprint
from cutlayer.keys import ServerKeys, server_keys
from cutlayer.links.local import Link
from cutlayer.links.net.listener import Listener
from cutlayer.links.net.remote import Remote, on_loop
from cutlayer.links.net.session import Session
from cutlayer.links.net.tls import Credentials
from cutlayer.links.network import Carry, NetworkLink
from cutlayer.models.adapters import save_part
from cutlayer.models.loading import device_named
from cutlayer.models.segment import Base
from cutlayer.models.slots import parameter_of
from cutlayer.outputs import OURS, alone, holds_a_run
from cutlayer.preflight import preflight
from cutlayer.presence import Lost
from cutlayer.real_clock import RealClock
from cutlayer.report.progress import Reporter, reporter
from cutlayer.report.summary import summarize
from cutlayer.run import Interrupted, Result, first_of, total_rounds
from cutlayer.schedule import Told
from cutlayer.wire import Frame, Header, Meter, keep_lines

FAREWELL = 30.0  # seconds in which clients may fetch the news that the run is done
PATIENCE = 600.0  # seconds that a client may stay away before the run gives it up
MOST_ROUNDS = 100  # of a client that are remembered
MOST_EXAMPLES = 2**40  # that a client may claim to have


def serve(
    source: str | Path | Mapping[str, Any],
    *,
    bind: str,
    out: str | Path,
    keys: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    patience: float = PATIENCE,
    absent: Literal["go-on", "end"] = "go-on",
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
        progress: as of ``cutlayer.train``.

    Raises:
        CutlayerError: anything that a user can mend.
        Gone: with ``absent="end"`` a client stayed away for too long; serving the same again goes on with the run.
    """
    shown, folder = reporter(progress), Path(out)
    config = _placed(served(source, overrides), source)
    own = server_keys(keys) if keys is not None else None
    begun = holds_a_run(folder)
    preflight(config, None if begun else folder)
    _, blocks = open_model(config)
    check_routes(config, blocks)
    text = OURS + dump(config)
    if begun and (folder / "run.yaml").read_text(encoding="utf-8") != text:
        raise OutputError(f"{folder} holds another run. Serve the run that it was made with, or give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        checkpoint.write_text(folder / "run.yaml", text)
        try:
            return asyncio.run(_until_stopped(_Service(config, folder, own, bind, patience, absent, shown)))
        except (KeyboardInterrupt, asyncio.CancelledError) as stop:
            raise Interrupted(
                "the server was stopped; its clients wait for it. The same command goes on with the run, from the last "
                "round that everybody holds"
            ) from stop


async def _until_stopped(service: _Service) -> Result:
    """Serve to the end, or until the operator (or the system, by SIGTERM) stops it."""
    task = asyncio.current_task()
    assert task is not None
    if threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await service.run()


def _placed(config: RunConfig, source: object) -> RunConfig:
    """The run with its model's folder made absolute, looked for here and beside the run file."""
    is_file = isinstance(source, Path) or (isinstance(source, str) and "\n" not in source)
    for root in [Path.cwd(), *([Path(str(source)).resolve().parent] if is_file else [])]:
        if (root / Path(config.model).expanduser()).is_dir():
            return config.model_copy(update={"model": str((root / Path(config.model).expanduser()).resolve())})
    return config


@dataclass(frozen=True)
class _Ready:
    """What a client said when it came: of its data, and which rounds it holds."""

    told: Told
    rounds: list[int]


class _Service:
    """One run that is being served."""

    def __init__(
        self, config: RunConfig, out: Path, keys: ServerKeys | None, bind: str, patience: float,
        absent: Literal["go-on", "end"], progress: Reporter,
    ) -> None:  # fmt: skip
        self.config, self.out, self.keys, self.bind, self.progress = config, out, keys, bind, progress
        self.files = fingerprint(config.model)
        self.device = device_named(config.device)
        self.remotes = {name: Remote(name, patience=patience) for name in config.client_names}
        self.ready: dict[str, _Ready] = {}
        self._came = asyncio.Event()
        self._base: Base | None = None
        self.absence: Absence | None = None
        if absent == "go-on":
            self.absence = Absence(
                out, self.remotes, lambda name: self.ready[name].rounds, farewell=min(FAREWELL, patience),
                progress=progress,
            )  # fmt: skip
            self.ready |= {name: _Ready(told, []) for name, told in self.absence.told.items()}
        self._here = list(self.remotes)  # of this attempt
        self.parting = 0  # bytes by which clients got, when all was done, what they had not seen

    async def run(self) -> Result:
        """Listen, wait for all, drive, and part."""
        credentials = Credentials(self.keys.ca, self.keys.certificate, self.keys.key) if self.keys else None
        revoked = self.keys.revoked if self.keys else lambda serial: False
        listener = Listener(self.bind, credentials, self._admit, self._session, revoked=revoked)
        port = await listener.start()
        host = self.bind.rpartition(":")[0]
        names = ", ".join(self.remotes)
        self.progress.note(f"listening at {host}:{port} for {len(self.remotes)} clients: {names}")
        rechecks = asyncio.ensure_future(self._recheck(listener))
        try:
            result = await self._driven()
            for remote in self.remotes.values():
                await remote.close("The run is done.")
            away = self.absence.run.counters.away if self.absence else ()
            heard = [
                asyncio.ensure_future(self.remotes[name].heard.wait()) for name in self.remotes if name not in away
            ]
            await asyncio.wait(heard, timeout=FAREWELL)  # who missed the goodbye comes back for it
            return result
        except (NonFinite, MethodError) as error:  # trying again would not help
            for remote in self.remotes.values():
                if remote.session is not None:
                    await remote.session.refuse(f"The run failed at the server: {type(error).__name__}.")
            raise
        finally:
            rechecks.cancel()
            await listener.stop()

    async def _driven(self) -> Result:
        """Drive the run; again from the last common round when a client has come back without what it held."""
        while True:
            await self._all_here()
            for name in self._here:
                self.remotes[name].renew()
            attempt = asyncio.ensure_future(asyncio.to_thread(self._attempt, asyncio.get_running_loop()))
            try:
                return await asyncio.shield(attempt)
            except Gone as gone:
                remote = self.remotes[gone.client]
                if remote.session is None and not remote.stale and self.absence is None:
                    raise
                self.progress.note(f"{gone} All go back to the last round that everybody holds.")
            except asyncio.CancelledError:  # its thread ends with the next thing that it asks a client
                for remote in self.remotes.values():
                    await remote.close("The server was stopped.", done=False)
                await asyncio.gather(attempt, return_exceptions=True)
                raise

    async def _recheck(self, listener: Listener) -> None:
        """End the sessions of clients that were revoked meanwhile."""
        while True:
            await asyncio.sleep(5.0)
            await listener.recheck()

    async def _admit(self, peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        """The welcome of a client that may come in."""
        name = hello.get("client")
        if not isinstance(name, str) or name not in self.remotes:
            raise Refused(f"This run has no client {name!r}. It has: {', '.join(self.remotes)}.")
        if self.keys is not None and (not hmac.compare_digest(peer, name) or not self.keys.token_ok(name, token)):
            raise Refused("The certificate and the token do not belong to this client, or were revoked.")
        if hello.get("wants") == "run":
            return {"run": offer(self.config)}
        if hello.get("model") != self.files:
            raise Refused(
                f"The model is another here: its files ({', '.join(self.files)}) have other checksums than those of "
                f"'{name}'. Use the same files of '{Path(self.config.model).name}' at both ends."
            )
        ready = _Ready(_told(hello.get("data")), _rounds(hello.get("rounds")))
        before = self.ready.get(name)
        if before is not None and before.told != ready.told:
            raise Refused("Your data are of another size than when you first joined this run. Bring the same data.")
        self.ready[name] = ready
        return {"client": name}

    async def _session(self, session: Session) -> None:
        """Serve a session that was admitted."""
        if session.hello.get("wants") == "run":
            await session.ended.wait()
            return
        name = session.hello["client"]
        self.progress.note(f"client '{name}' is here")
        self._came.set()
        await self.remotes[name].serve(session)

    async def _all_here(self) -> None:
        if self.absence is not None and self.absence.begun:
            await self.absence.gather()
            self._here = self.absence.here()
            return
        while len(self.ready) < len(self.remotes):
            self._came.clear()
            await self._came.wait()
        for remote in self.remotes.values():
            await remote.attached()

    def _attempt(self, network: asyncio.AbstractEventLoop) -> Result:
        """Drive the run from the newest round that all hold; in a thread of its own."""
        config, out = self.config, self.out
        if self._base is None:
            with torch.random.fork_rng(devices=[]):
                self._base = load_base(config, labels=None, device=self.device)
        parts = assemble_server(config, self._base, {name: ready.told for name, ready in self.ready.items()})
        clock = RealClock()
        with Meter(Path(config.record_wire) if config.record_wire else None) as meter:
            run = Run(
                config, parts, meter=meter, clock=clock, out=out, progress=self.progress,
                links=lambda run: self._links(run, network),
            )  # fmt: skip
            engine = Engine(run)
            number, away = self._common(), dict[str, int]()
            if self.absence is not None:
                self.absence.know({name: ready.told for name, ready in self.ready.items()})
                outset = self.absence.outset(self._here)
                number, away = outset.number, dict(outset.away)
            for newer in [n for n in checkpoint.rounds(out / "checkpoints") if n > number]:
                shutil.rmtree(out / "checkpoints" / f"round-{newer:06d}")  # not everybody has it
            if number:
                engine.restore(out / "checkpoints" / f"round-{number:06d}")
                self.progress.note(f"going on after round {number}")
            else:
                meter.restore(None)
            if self.absence is not None:
                self.absence.follow(run, away)
            keep_lines(out / "metrics.jsonl", run.counters.lines)
            keep_lines(out / "uploads.jsonl", run.counters.uploads)
            self.progress.start(sum(parts.foreseen.values()) - sum(run.counters.steps.values()))
            try:
                clock.run(self._drive(run, engine))
            except (BaseExceptionGroup, Lost) as error:
                first = first_of(error) if isinstance(error, BaseExceptionGroup) else error
                if isinstance(first, Lost):  # where the framework has no rule for it
                    raise Gone(first.client, "the others go on without it.") from error
                raise first from error
            finally:
                self.progress.stop()
        adapter = self._save(run)
        summary = summarize(run, adapter=adapter, device=self.device)
        summary["parting_bytes"] = self.parting
        summary["network"] = {
            name: {
                "reconnects": remote.reconnects, "retries": remote.retries, "dropped": remote.dropped,
                "seconds_away": round(remote.seconds_away, 3),
                **(self.absence.summary(name) if self.absence else {}),
            }
            for name, remote in self.remotes.items()
        }  # fmt: skip
        checkpoint.write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        return Result(out, adapter, summary)

    async def _drive(self, run: Run, engine: Engine) -> None:
        await engine.drive(rounds=total_rounds(self.config))
        if self.absence is not None:
            await self.absence.end()
        before = run.meter.state()
        await run.part()
        self.parting = run.meter.up + run.meter.down - before["up"] - before["down"]
        run.meter.restore(before)

        async def finish(name: str) -> None:
            link = run.links[name]
            assert isinstance(link, NetworkLink)
            await link.finish()

        await run.reach(finish, run.clients)

    def _links(self, run: Run, network: asyncio.AbstractEventLoop) -> dict[str, Link]:
        found: dict[str, Link] = {}
        for name, remote in self.remotes.items():
            carry = _carrier(remote, network)
            asked, turn = run.presence.asked, remote.last_turn
            goes_on = partial(self.absence.goes_on, name) if self.absence else lambda _: False
            found[name] = NetworkLink(
                name, carry, meter=run.meter, asked=asked, turn=turn, goes_on=goes_on, wrote=partial(self._wrote, name)
            )
        return found

    def _wrote(self, name: str, number: int) -> None:
        rounds = self.ready[name].rounds
        rounds[:] = [*rounds[1 - MOST_ROUNDS :], number]

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
            state |= {parameter_of(name): tensor for name, tensor in run.federated.before.items()}
        for slot in run.slots_of([client]):
            state |= slot.get()
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


def _told(data: object) -> Told:
    """What a client says of its data, if it can be."""
    names = ("examples", "label_tokens", "steps_per_epoch", "evaluation_batches")
    if not isinstance(data, dict) or set(data) != set(names):
        raise Refused("The hello does not say what the data are. Both ends need the same version of cutlayer.")
    least = {"examples": 1, "steps_per_epoch": 1}
    if any(type(data[n]) is not int or not least.get(n, 0) <= data[n] <= MOST_EXAMPLES for n in names):
        raise Refused("The hello says of the data what cannot be: counts are whole numbers, and not below one example.")
    return Told(**data)


def _rounds(rounds: object) -> list[int]:
    if not isinstance(rounds, list) or any(type(number) is not int or number < 1 for number in rounds):
        raise Refused("The hello names rounds that cannot be.")
    return rounds[-MOST_ROUNDS:]
