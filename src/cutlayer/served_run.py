"""One run that a server serves: it waits for its clients, drives the run, and parts from them.

A run goes on from the newest round that all hold. Whoever comes back in time as a new process (the server too) has
lost what it did since: then all go back to that round together, and the result is that of an undisturbed run. Of who
does not come back in time, ``absence.py`` speaks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from cutlayer import checkpoint
from cutlayer.absence import Absence
from cutlayer.agreed import Agreement
from cutlayer.apart import known_classes, needs_secret, offer
from cutlayer.attempt import MOST_ROUNDS, Attempt, Clients, Ready
from cutlayer.build import load_base
from cutlayer.computing import Computing
from cutlayer.config import RunConfig, dump
from cutlayer.draining import PARTING, Drain, Drained
from cutlayer.driver import Run
from cutlayer.errors import AllLeft, DataError, Disconnected, Gone, MethodError, NonFinite, Refused
from cutlayer.files import make_folder
from cutlayer.frames import limits_of
from cutlayer.handing import WANTS as MODEL
from cutlayer.handing import Handing
from cutlayer.identity import fingerprint, other_model, tokenizer_of
from cutlayer.links.net.handing import LIMITS
from cutlayer.links.net.remote import Remote
from cutlayer.links.net.session import Session
from cutlayer.models.families import number_of_blocks
from cutlayer.models.loading import device_named
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.models.segment import Base
from cutlayer.models.sharing import SharedModels
from cutlayer.outputs import OURS, alone
from cutlayer.report.progress import Reporter
from cutlayer.run import Result
from cutlayer.schedule import Told
from cutlayer.tally import Tally
from cutlayer.watching import State, Watch
from cutlayer.wire import Limits

RUN = "run"  # in a hello's ``wants``
FAREWELL = 30.0  # seconds in which clients may fetch the news that the run is done
MOST_AGAIN = (
    5  # times that all go back with a client while no round is written down; then a run that ends with one does
)
MOST_EXAMPLES = 2**40  # that a client may claim to have


@dataclass(frozen=True)
class Patience:
    """With a client that stays away in the middle of a run: for so many seconds, and ``then`` the others go on without
    it, or the run ends."""

    seconds: float
    then: Literal["go-on", "end"] = "go-on"


class ServedRun:
    """One run that is being served.

    Args:
        name: what the server calls it; empty where it serves no other.
        config: the run.
        out: its folder.
        patience: with a client that stays away in the middle of the run.
        progress: is told what happens.
        computing: the thread that computes for all runs of this server.
        models: what runs share of their models.
        drain: whether the server was asked to stop.
        label: what metrics call it, where it has no name.
    """

    def __init__(
        self, name: str, config: RunConfig, out: Path, *, patience: Patience, progress: Reporter, computing: Computing,
        models: SharedModels, drain: Drain | None = None, label: str = "",
    ) -> None:  # fmt: skip
        make_folder(out)
        self.name, self.config, self.out = name, config, out
        self._drain = drain or Drain()
        self.files, self.handing = fingerprint(config.model), Handing(config)
        self.tokenizer = tokenizer_of(config.model)
        self.offered = offer(config)
        model_config = load_model_config(config.model)
        self._limits = limits_of(config, model_config)
        self._agreement = Agreement(needs_secret(config, number_of_blocks(model_config)))
        self.device = device_named(config.device)
        self.remotes = {client: Remote(client, patience=patience.seconds) for client in config.client_names}
        self._tally = Tally(out, self.remotes, self.handing.bytes)
        self.progress = self.watch = Watch(name or label, progress, self.remotes)
        self.ready: dict[str, Ready] = {}
        absence = None
        if patience.then == "go-on":
            absence = Absence(
                out, self.remotes, lambda name: self.ready[name].rounds, farewell=min(FAREWELL, patience.seconds),
                progress=self.watch, asked_to_stop=self._drain.asked,
            )  # fmt: skip
            self.ready |= {name: Ready(told, []) for name, told in absence.told.items()}
        self.clients = Clients(self.remotes, self.ready, absence)
        self._computing, self._models = computing, models
        self._came = asyncio.Event()
        self._error: Exception | None = None
        self._base: Base | None = None

    async def serve(self) -> Result:
        """Wait for all, drive, and part."""
        with alone(self.out):
            checkpoint.write_text(self.out / "run.yaml", OURS + dump(self.config))
            counting = asyncio.ensure_future(self._tally.keep())
            try:
                return await self._served()
            finally:
                counting.cancel()
                self._tally.write()

    async def _served(self) -> Result:
        try:
            result = await self._driven()
            self.watch.state, self._base = "done", None  # others may be served for long
            for remote in self.remotes.values():
                await remote.close("The run is done.")
            absence = self.clients.absence
            there = [name for name in self.remotes if absence is None or name not in absence.run.counters.away]
            heard = [asyncio.ensure_future(self.remotes[name].heard.wait()) for name in there]
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
        return isinstance(self._error, NonFinite | MethodError | DataError | AllLeft)

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
        again, newest = Counter[str](), 0
        while True:
            if (last := max(checkpoint.rounds(self.out / "checkpoints"), default=0)) > newest:
                again, newest = Counter[str](), last  # a round was finished
            self.watch.state = "waiting"
            here = await self._drain.unless(self._all_here())
            self.watch.state = "training"
            for name in here:
                self.remotes[name].renew()
            network = asyncio.get_running_loop()
            attempt = asyncio.ensure_future(self._computing.do(self._attempt(here, network)))
            try:
                return await asyncio.shield(attempt)
            except Gone as gone:
                remote = self.remotes[gone.client]
                if self.clients.absence is None:
                    again[gone.client] += 1
                    if (remote.session is None and not remote.stale) or again[gone.client] > MOST_AGAIN:
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
        name, wants = hello["client"], hello.get("wants")
        if wants not in (None, RUN, MODEL):
            raise Refused(f"A client may want '{RUN}' or '{MODEL}', and nothing else.", reason="protocol")
        if self.state == "failed":
            raise (Refused if self._hopeless else Disconnected)(self._failure)
        if wants == RUN:
            return {"run": self.offered, "name": self.name, "own_model": Path(self.config.model).is_dir()}
        if wants == MODEL:
            return {"client": name, "name": self.name}
        model = hello.get("model")
        other = other_model(self.files, self.tokenizer, model, name)
        if other and not await self.handing.is_same(name, model):
            raise Refused(
                f"{other} Use the same files of '{Path(self.config.model).name}' at both ends.", reason="model"
            )
        self._compare(hello)
        told = read_told(hello.get("data"), planned=self.config.planner is not None)
        ready = Ready(told, read_rounds(hello.get("rounds")))
        before = self.ready.get(name)
        if before is not None and before.told != ready.told:
            raise Refused(
                "Your data are of another size than when you first joined this run. Bring the same data.", reason="data"
            )
        self.ready[name] = ready
        return {"client": name, "name": self.name}

    def _compare(self, hello: dict[str, Any]) -> None:
        """Whether a client has the secret of those who are there.

        Raises:
            Refused: it has not.
        """
        here = [name for name, remote in self.remotes.items() if remote.session is not None]
        try:
            self._agreement.compare(hello["client"], hello.get("secret_check"), here)
        except Refused as error:
            self.progress.note(f"client '{hello['client']}' was turned away: {error}")
            raise

    def limits(self, hello: dict[str, Any]) -> Limits:
        """The most that a frame of a client may hold that was admitted with this hello."""
        return LIMITS if hello.get("wants") else self._limits

    async def session(self, session: Session) -> None:
        """Serve a session that was admitted."""
        if session.hello.get("wants") == RUN:
            await session.ended.wait()
            return
        if session.hello.get("wants") == MODEL:
            await self.handing.serve(session)
            return
        name = session.hello["client"]
        self._compare(session.hello)  # another may have come in since
        self.progress.note(f"client '{name}' is here")
        self._came.set()
        await self.remotes[name].serve(session)

    async def _all_here(self) -> list[str]:
        """Wait for the clients; those that are there."""
        absence = self.clients.absence
        if absence is not None and absence.begun:
            await absence.gather()
            return absence.here()
        while len(self.ready) < len(self.remotes):
            self._came.clear()
            await self._came.wait()
        for remote in self.remotes.values():
            await remote.attached()
        return list(self.remotes)

    async def _attempt(self, here: Sequence[str], network: asyncio.AbstractEventLoop) -> Result:
        """Drive the run; in the thread that computes."""
        if self._base is None:
            with torch.random.fork_rng(devices=[]):
                self._base = load_base(
                    self.config, labels=known_classes(self.config), device=self.device, models=self._models
                )
        attempt = Attempt(
            self.config, self.out, self._base, self.clients, here, network, self.watch, self._drain.asked
        )  # fmt: skip
        return await attempt.drive(counted=self._tally.told)


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
    return rounds[-MOST_ROUNDS:]
