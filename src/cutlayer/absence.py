"""Clients elsewhere that stay away: the run goes on without them as the framework's rule says, and takes them back.

A client that has not answered for longer than it is waited for is ``Lost``, as in a simulation (``presence.py``):
nothing that it has done in the round counts. It is then away. At the begin of a later round, if it is there again, it
sets itself back to the begin of the round in which it was lost, and goes on from there: its own process from what it
wrote down (the verb ``hold``), another one from the same folder. The server sets its slots of that client back at once.

A client that refuses a request, or breaks the protocol, has left: only as a new process can it come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer import checkpoint
from cutlayer.allotment import Allotter
from cutlayer.arrangement import Arranger, names_hosts
from cutlayer.comings_back import ComingsBack
from cutlayer.config_fit import batches_meet
from cutlayer.draining import Drained
from cutlayer.errors import AllLeft, CutlayerError, Gone, NetworkError, OutputError, RequestFailed, WireError
from cutlayer.files import write_text
from cutlayer.links.net.remote import Remote
from cutlayer.links.network import NetworkLink
from cutlayer.presence import Lost
from cutlayer.report.progress import Reporter
from cutlayer.schedule import Told

if TYPE_CHECKING:
    from cutlayer.driver import Run

LOOK = 0.2  # seconds between two looks whether somebody has come back
LATE = -1  # of who has nothing of the run any more: it begins as all did
FILE = "clients.json"  # beside the server's run: what each client said of its data


@dataclass(frozen=True)
class Outset:
    """Where a server goes on: the round, and who is away then, as at the begin of which round."""

    number: int
    away: Mapping[str, int]


class Absence:
    """Who of a served run's clients is away, for as long as the server lives.

    Args:
        out: the server's folder.
        remotes: the clients.
        rounds: which rounds a client said that it holds, when it last came.
        farewell: seconds for which those who are away are waited for when all is done.
        asked_to_stop: whether the server is to end, so that nobody is waited for.
        progress: is told what happens.
    """

    def __init__(
        self, out: Path, remotes: Mapping[str, Remote], rounds: Callable[[str], Sequence[int]], *, farewell: float,
        progress: Reporter, asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.out, self.remotes, self.rounds = out, remotes, rounds
        self.farewell, self.progress, self.asked_to_stop = farewell, progress, asked_to_stop
        self.told: dict[str, Told] = _read_told(out / FILE)
        self._left: dict[str, tuple[object, str]] = {}  # the process that has left, and why
        self._why: dict[str, str] = {}  # of who is away
        self._again = ComingsBack()
        self._begun = False  # a round has
        self._run: Run | None = None

    @property
    def begun(self) -> bool:
        """Whether all have once been there, so that the run goes on without who is lost."""
        return self.told.keys() == self.remotes.keys()

    def know(self, told: Mapping[str, Told]) -> None:
        """Write down what the clients said of their data: a server that is started again needs it of those away."""
        if dict(told) != self.told:
            self.told = dict(told)
            write_text(self.out / FILE, json.dumps({name: asdict(one) for name, one in told.items()}, indent=1))

    # ------------------------------------------------------------ on the network's loop

    async def gather(self) -> None:
        """Wait for everybody; for each as long as it is waited for, but until one is there."""

        async def come(name: str) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.remotes[name].waited_for):
                    await self.remotes[name].attached()

        await asyncio.gather(*map(come, self.remotes))
        said = False
        while not self.here():
            if not said:
                self.progress.note("nobody is there; the run waits for a client to come")
                said = True
            self._again.play()
            await asyncio.sleep(LOOK)

    def here(self) -> list[str]:
        """The clients that are there and have not left."""
        return [name for name in self.remotes if self._is_here(name)]

    def _is_here(self, name: str) -> bool:
        remote = self.remotes[name]
        if name in self._left and self._left[name][0] != remote.instance:
            del self._left[name]
        return remote.session is not None and name not in self._left and not self._sits_out(name)

    def _sits_out(self, name: str) -> bool:
        return self._run is not None and self._again.sits_out(name, self._run.counters.rounds)

    def _too_often(self, name: str) -> bool:
        return self._again.too_often(name, self.remotes[name].instance, self.run.counters.rounds)

    def outset(self, here: Sequence[str]) -> Outset:
        """The newest round that the server and all who are there hold, but for those who were away in it.

        Who holds no round, while others do, has lost its folder: it is away, and begins anew.
        """
        held = {name: set(self.rounds(name)) for name in here}
        fresh = {name for name in here if not held[name]} if any(held.values()) else set()
        for number in reversed(checkpoint.rounds(self.out / "checkpoints")):
            away = _away_in(self.out / "checkpoints" / f"round-{number:06d}")
            if all(number in held[name] or name in away or name in fresh for name in here):
                others = {name: number for name in self.remotes if name not in here}
                return Outset(number, {**others, **away, **dict.fromkeys(fresh, LATE)})
        return Outset(0, {name: 0 for name in self.remotes if name not in here})

    # ------------------------------------------------------------ in the run's thread

    def follow(self, run: Run, away: Mapping[str, int]) -> None:
        """From now on, say who is away in this run, which was set to where it goes on."""
        self._run, run.absence = run, self
        run.counters.away = dict(away)
        run.presence.by_themselves = True
        run.presence.away = set(away)
        for name in away:
            run.pass_back(name)
            if away[name] == LATE:
                self._anew(name)

    @property
    def run(self) -> Run:
        """The run."""
        assert self._run is not None
        return self._run

    def sizes(self, name: str) -> dict[str, float]:
        """What a client said of its data, as ``set_up`` asks."""
        return {"examples": float(self.told[name].examples), "label_tokens": float(self.told[name].label_tokens)}

    def goes_on(self, name: str, error: CutlayerError) -> bool:
        """Whether the round goes on without this client after an error of a request to it.

        Raises:
            Gone: the run goes on, but from the newest checkpoint: a step of such a run cannot lose one of its clients.
        """
        if isinstance(error, Gone):
            left, goes_on = error.kind == "left", error.kind in ("away", "left")
            if error.kind == "anew" and self._too_often(name):
                goes_on = True
        else:  # what it refuses before the first round it would refuse always: that is for the operator to mend
            begun = self._begun and not self.run.unsketched
            left = goes_on = isinstance(error, RequestFailed | WireError) and begun
        if goes_on:
            self._why[name] = str(error)
        if left:
            self._left[name] = (self.remotes[name].instance, str(error))
        if goes_on and self._goes_back:
            self._too_often(name)
            raise Gone(name, error.why if isinstance(error, Gone) else str(error), "left" if left else "away")
        return goes_on

    @property
    def _goes_back(self) -> bool:
        """Whether nobody can be left out of a round that has begun: where batches meet, where one's device has what
        others learn, and where cuts and ranks move or a selection arranges, as a client set back to its begin would
        have those from before."""
        run, parts = self.run, self.run.parts
        hosted = any(stop.party in parts.clients for route in parts.routes.values() for stop in route)
        moves = parts.planner is not None or isinstance(parts.peft, Allotter) or isinstance(run.selection, Arranger)
        return batches_meet(run.config) or hosted or moves

    def lost(self, name: str) -> None:
        """A client was lost just now.

        Raises:
            AllLeft: it was the last that had not left.
        """
        run, link = self.run, self._link(name)
        if name in run.counters.away:
            return
        run.counters.away[name] = link.held
        run.presence.away.add(name)
        fell = run.counters.fell.setdefault(name, [])
        if link.held not in fell:
            fell.append(link.held)
        self.progress.note(f"{self._why[name]} The others go on.")
        if name in self._left:
            run.presence.left.add(name)
        if self._left.keys() == self.remotes.keys():
            raise AllLeft(f"All clients have left, {name} as the last: {self._why[name]}")

    async def begin_round(self) -> None:
        """Take back who is there again, and wait until somebody can train; those who take part hold where they are."""
        run = self.run
        self._again.begins(run.counters.rounds, run.counters.away)
        await self._need(run.unsketched, "has told no sketch of its data yet")
        since = time.monotonic()
        number, self._begun, said = run.counters.rounds, True, False
        while True:
            await self.take_back()
            if self._trains():
                await run.reach(lambda name: self._link(name).hold(number), run.clients)
                if self._trains():
                    break
            if not any(map(run.steps_left, run.clients)):
                break
            self._again.play()
            if not said:
                said = True
                self.progress.note(f"round {number} waits for a client: {', '.join(sorted(run.counters.away))}")
            idle = not any(map(run.steps_left, run.present))  # else they wait for who runs blocks for them
            if run.present and idle and time.monotonic() - since > self.remotes[run.present[0]].patience:
                self.progress.note("the others have made all their steps, so nobody is waited for any more")
                run.presence.left |= run.presence.away
                break
            await self._pause()
        for name in run.counters.away:
            missed = run.counters.missed.setdefault(name, [])
            if number not in missed:
                missed.append(number)

    def _trains(self) -> bool:
        run = self.run
        return any(map(run.steps_left, run.presence.able(run.clients, run.counters.rounds)))

    async def somebody(self) -> None:
        """Wait until a client is there."""
        said = False
        while not self.run.present:
            if not said:
                said = True
                self.progress.note("nobody is there; the run waits for a client to come back")
            self._again.play()
            await self._pause()
            await self.take_back()

    async def hosts_of(self, names: Sequence[str]) -> None:
        """Wait until those are there who run blocks for these clients."""
        hosts = dict.fromkeys(host for name in names for host in self.run.presence.hosts(name))
        await self._need(list(hosts), "runs blocks of the model that is evaluated")

    async def _need(self, names: Collection[str], why: str) -> None:
        """Wait until all of these are there; ``why`` says what the run cannot do without."""
        said = False
        while missing := [name for name in names if name in self.run.counters.away]:
            if not said:
                said = True
                self.progress.note(f"the run waits for {', '.join(missing)}, who {why}")
            self._again.play(missing)
            await self._pause()
            await self.take_back()

    async def _pause(self) -> None:
        """Wait a moment for those who are away.

        Raises:
            Drained: the server is to end.
            Gone: it does.
        """
        if self.asked_to_stop():
            raise Drained
        if closed := next((name for name, remote in self.remotes.items() if remote.closed), None):
            raise Gone(closed, "the run is over.", "over")
        with self.run.clock.waiting("the run", f"clients that are away: {', '.join(sorted(self.run.counters.away))}"):
            await asyncio.sleep(LOOK)

    async def take_back(self) -> None:
        """Take back those who are there again: between two rounds."""
        for name in [name for name in self.run.counters.away if self._is_here(name)]:
            try:
                await self._return(name)
            except Lost:
                self.progress.note(f"client '{name}' came back, and is gone again: {self._why[name]}")

    async def _return(self, name: str) -> None:
        run, link = self.run, self._link(name)
        since, held = run.counters.away[name], self.rounds(name)
        self.remotes[name].renew()
        if since > 0 and since not in held:
            self.progress.note(f"client '{name}' does not hold round {since} any more, so it begins anew")
            self._anew(name)
            since = LATE
        await link.begin(max(since, 0), run.parts.lines[name])
        if max(since, 0) <= run.counters.led:  # it was away as groups were formed
            await run.retime(name)
        if names_hosts(run.config) and run.counters.arrangement is not None:
            await run.tell_place(name)
        await self._set_up(name)
        del run.counters.away[name]
        run.presence.away.discard(name)
        run.presence.left.discard(name)
        run.presence.lost.discard(name)
        if max(since, 0) <= run.counters.led:
            await run.give_trunk(name)
        run.keep([name])
        self.progress.note(
            f"client '{name}' is taken back, as it was "
            + ("before the first round" if since <= 0 else f"after round {since}")
        )

    async def _set_up(self, name: str) -> None:
        """Step 1 again, which was counted when the run began."""
        meter = self.run.meter
        before, folder = meter.state(), meter.folder
        meter.folder = None
        try:
            await self.run.ends[name].ask("set_up", self.run.told(name))
        finally:
            meter.folder = folder
            meter.restore(before)

    def _anew(self, name: str) -> None:
        """All of a client is as it was before the first round, as of one that joins late: it gets the last merge."""
        run = self.run
        for slot in run.own_slots(name):
            slot.reset_optimizer()
            slot.put({n: run.parts.base.initial[n].detach() for n in slot.get()}, version=0)
        run.counters.merged |= {name: 0, f"{name}/hosted": 0}
        run.counters.away[name] = LATE
        for earlier in run.counters.earlier.values():
            earlier[:] = [one for one in earlier if one != name]

    async def end(self) -> None:
        """All is done: who was away and is there again is taken back, for its part of what was learnt."""
        until = time.monotonic() + self.farewell
        while self._missing() and time.monotonic() < until:
            await self.take_back()
            if self._missing():
                await self._pause()
        await self.take_back()
        for name in self.run.counters.away:
            if self.remotes[name].session is not None:  # it has left, and waits for the end: it has its own part
                self.remotes[name].renew()
                with contextlib.suppress(Lost):
                    await self._link(name).begin(max(self.run.counters.away[name], 0), self.run.parts.lines[name])
                    await self._link(name).finish()

    def _missing(self) -> list[str]:
        return [name for name in self.run.counters.away if name not in self._left and not self._sits_out(name)]

    def summary(self, name: str) -> dict[str, Any]:
        """For ``summary.json``: the rounds in which a client was lost, and those that began without it."""
        counters = self.run.counters
        found: dict[str, Any] = {"lost": counters.fell.get(name, []), "away": counters.missed.get(name, [])}
        if name in counters.away:
            found["gone"] = self._why.get(name, "It was not there when the server was started.")
        return found

    def _link(self, name: str) -> NetworkLink:
        link = self.run.links[name]
        assert isinstance(link, NetworkLink)
        return link


def _away_in(folder: Path) -> dict[str, int]:
    """Who was away in a checkpoint; one that is damaged says so when it is loaded."""
    try:
        found = json.loads((folder / checkpoint.MANIFEST).read_text(encoding="utf-8"))["counters"].get("away", {})
        return {str(name): int(number) for name, number in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read_told(file: Path) -> dict[str, Told]:
    try:
        return {name: Told(**told) for name, told in json.loads(file.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        raise OutputError(f"{file.parent} cannot be the server's folder: a part of the path is a file.") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise NetworkError(f"{file} cannot be read ({error}). Delete it: the clients will tell anew.") from error
