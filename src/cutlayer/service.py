"""A server: it listens, lets clients in to the runs that they belong to, and serves all its runs at a time.

Sessions live on the main thread's event loop and all runs compute in one other thread, so that a long step of a trunk
keeps no heartbeat waiting, of its own run or of another's. A run that fails leaves the others alone.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from cutlayer.computing import Computing
from cutlayer.config import RunConfig
from cutlayer.draining import Drained
from cutlayer.errors import CutlayerError, NetworkError, Refused
from cutlayer.keys import ServerKeys
from cutlayer.links.net.listener import Listener
from cutlayer.links.net.room import SPARE
from cutlayer.links.net.session import Session
from cutlayer.links.net.tls import Credentials
from cutlayer.models.sharing import SharedModels
from cutlayer.report.progress import Reporter, labelled
from cutlayer.run import Result
from cutlayer.served_run import Patience, ServedRun
from cutlayer.watching import House

LOG = getLogger("cutlayer.net")
FILES = 256  # open files that are kept for all but connections: checkpoints, models, logs
CONNECTIONS = 1024  # at least, where files allow it
WANTED = ("", "run", "model")  # what the sessions of a client in a run are for
RECHECK = 5.0  # seconds between two looks at who was revoked


class Service:
    """A server's runs, and whom it lets in to them.

    ``results`` and ``failures`` say, by the runs' names, how those ended that have.

    Args:
        bind: ``HOST:PORT`` to listen at.
        keys: the server's; None: plain text, on this machine only.
        progress: is told what happens.
        stay: do not end when all runs have.
        house: what the operator sees of the server.
        label: what metrics call a run that has no name.
    """

    def __init__(
        self, bind: str, keys: ServerKeys | None, progress: Reporter, *, stay: bool = False, house: House | None = None,
        label: str = "",
    ) -> None:  # fmt: skip
        self.house, self.label = house or House(), label
        self.drained: set[str] = set()  # runs that stopped as they were asked to
        self.bind, self.keys, self.progress, self.stay = bind, keys, progress, stay
        self.computing, self.models = Computing(), SharedModels()
        self.runs: dict[str, ServedRun] = {}
        self.results: dict[str, Result] = {}
        self.failures: dict[str, Exception] = {}
        credentials = Credentials(keys.ca, keys.certificate, keys.key) if keys else None
        revoked = keys.revoked if keys else lambda serial: False
        self.listener = Listener(
            bind, credentials, self._admit, self._session, limits=lambda hello: self._run_of(hello).limits(hello),
            revoked=revoked, max_sessions=lambda: len(WANTED) * self._clients(), max_each=self._streams,
        )  # fmt: skip
        self.port = 0  # once it listens
        self._serving: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def _bound(self) -> None:
        """Bound connections, so that those who only knock leave files to be opened.

        Raises:
            NetworkError: the clients of all runs are more than this process can have connections.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        files = hard if hard != resource.RLIM_INFINITY else 1 << 20
        needed = 2 * self._clients()  # a client may be back before its first connection has ended
        if needed > files - FILES:
            raise NetworkError(
                f"{self._clients()} clients need {needed + FILES} open files, and this process may have {files}. Raise "
                "that limit (ulimit -Hn; LimitNOFILE in a systemd unit), or serve fewer clients at a time."
            )
        self.listener.max_connections = min(max(CONNECTIONS, 2 * needed), files - FILES)

    def _clients(self) -> int:
        """Clients of all runs."""
        return sum(len(run.remotes) for run in self.runs.values())

    def _streams(self, name: str) -> int:
        """How many streams a client may have open: its sessions twice, as it may be back before one has ended."""
        return SPARE + 2 * len(WANTED) * sum(name in run.remotes for run in self.runs.values())

    def begin(self, name: str, config: RunConfig, out: Path, patience: Patience) -> None:
        """Serve one more run, whose name is empty where it is the only one.

        Args:
            name: of the run.
            config: the run, as far as it can be checked without its clients.
            out: its folder.
            patience: with a client that stays away in the middle of it.
        """
        self._add(self._made(name, config, out, patience))

    async def begin_beside(self, runs: Mapping[str, tuple[RunConfig, Path]], patience: Patience) -> None:
        """The same of several, while others are served: the thread that computes reads files, not that of sessions.

        Raises:
            CutlayerError: a folder or a model cannot be read; none is begun.
        """

        async def made() -> list[ServedRun]:
            return [self._made(name, config, out, patience) for name, (config, out) in runs.items()]

        found = await self.computing.do(made())
        clients, most = sum(len(run.remotes) for run in found), self.listener.max_connections
        if most is not None and 2 * (self._clients() + clients) > most:
            raise NetworkError(
                f"{clients} clients more are too many for the {most} connections that the server began with. Stop it "
                "and start it again: it goes on with all its runs."
            )
        for run in found:
            self._add(run)

    def _made(self, name: str, config: RunConfig, out: Path, patience: Patience) -> ServedRun:
        return ServedRun(
            name, config, out, patience=patience, progress=labelled(self.progress, name), computing=self.computing,
            models=self.models, drain=self.house.drain, label=self.label,
        )  # fmt: skip

    def _add(self, run: ServedRun) -> None:
        assert run.name not in self.runs
        self.runs[run.name] = run
        self.house.runs.append(run.watch)
        if self.port:
            self._tell(run)
        self._changed.set()

    async def remove(self, name: str) -> None:
        """Serve a run no longer; its clients are told, and its folder stays as it is."""
        run = self.runs.pop(name)
        self.house.runs.remove(run.watch)
        if task := self._serving.pop(name, None):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await run.stop("The server does not serve this run any more.")

    async def run(self) -> None:
        """Listen, and serve until all runs have ended (or, where it is to stay, until it is cancelled)."""
        try:
            self._bound()
            self.port = await self.listener.start()
            self.house.listener, self.house.loop = self.listener, asyncio.get_running_loop()
            for run in self.runs.values():
                self._tell(run)
            recheck = asyncio.ensure_future(self._recheck())
            try:
                await self._serve_all()
            finally:
                recheck.cancel()
                for task in self._serving.values():
                    task.cancel()
                await asyncio.gather(*self._serving.values(), return_exceptions=True)
                await self.listener.stop()
        finally:
            self.computing.close()

    def _tell(self, run: ServedRun) -> None:
        where = f"{self.bind.rpartition(':')[0]}:{self.port}"
        run.progress.note(f"listening at {where} for {len(run.remotes)} clients: {', '.join(run.remotes)}")

    async def _serve_all(self) -> None:
        while True:
            self._changed.clear()
            for name, run in self.runs.items():
                if name not in self._serving:
                    self._serving[name] = asyncio.ensure_future(self._serve(run))
            changed = asyncio.ensure_future(self._changed.wait())
            going = [task for task in self._serving.values() if not task.done()]
            draining = self.house.drain.asked()
            if not going and (draining or not self.stay):
                changed.cancel()
                return
            asked = asyncio.ensure_future(self.house.drain.wait())
            waits = {changed, *going, *([] if draining else [asked])}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            asked.cancel()

    async def _serve(self, run: ServedRun) -> None:
        try:
            self.results[run.name] = await run.serve()
        except Drained:
            self.drained.add(run.name)
        except CutlayerError as error:
            self.failures[run.name] = error
            if run.name:  # of the only run it is what the server ends with
                run.progress.note(f"the run has ended: {error}")
        except OSError as error:  # of the machine, such as a full disk: the command says what to do
            self.failures[run.name] = error
            LOG.debug("Run '%s' failed.", run.name, exc_info=True)
            if run.name:
                run.progress.note(f"the run has ended: {error}")
        except Exception as error:
            self.failures[run.name] = error
            LOG.exception("Run '%s' failed.", run.name)

    async def _recheck(self) -> None:
        """End the sessions of clients that were revoked meanwhile."""
        while True:
            await asyncio.sleep(RECHECK)
            await self.listener.recheck()

    async def _admit(self, peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        """The welcome of a client that may come in."""
        name = hello.get("client")
        assert isinstance(name, str), "the listener has seen to it"
        if self.keys is not None and not self.keys.belong(peer, name, token):
            raise Refused("The certificate and the token do not belong to this client, or were revoked.", reason="keys")
        return await self._run_of(hello).welcome(hello)

    async def _session(self, session: Session) -> None:
        """Serve a session that was admitted."""
        await self._run_of(session.hello).session(session)

    def _run_of(self, hello: Mapping[str, Any]) -> ServedRun:
        """The run that a client is in. Of others it learns nothing, not even that they are there.

        Raises:
            Refused: it is in none that it can mean, or in several.
        """
        client, asked = hello["client"], hello.get("run", "")
        own = [run for run in self.runs.values() if client in run.remotes]
        found = [run for run in own if run.name == asked] if asked else own
        if len(found) == 1:
            return found[0]
        names = ", ".join(f"'{run.name}'" for run in own)
        if found:
            raise Refused(
                f"Client '{client}' is in several runs here: {names}. Say which (cutlayer join --run).", reason="client"
            )
        if asked and own:
            where = f"It is in: {names}." if own[0].name else "The run that it is in has no name here: leave out --run."
            raise Refused(f"No run {asked!r} here has a client '{client}'. {where}", reason="client")
        raise Refused(
            f"No run here has a client {client!r}. The operator knows the names in the run file.", reason="client"
        )
