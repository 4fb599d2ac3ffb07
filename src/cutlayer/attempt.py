"""One drive of a run that is served: from the newest round that all hold to its end.

There is another when a client has come back without what it held since.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from cutlayer import checkpoint
from cutlayer.absence import Absence
from cutlayer.assembly import assemble_server, places_of
from cutlayer.config import RunConfig
from cutlayer.draining import Drained
from cutlayer.driver import Run
from cutlayer.engine import Engine, unevaluated
from cutlayer.errors import DataError, Gone
from cutlayer.judging import Judge, bounds_of
from cutlayer.links.local import Link
from cutlayer.links.net.remote import Remote, on_loop
from cutlayer.links.network import Carry, NetworkLink
from cutlayer.models.adapters import save_part
from cutlayer.models.segment import Base
from cutlayer.models.slots import parameter_of
from cutlayer.presence import Lost
from cutlayer.real_clock import RealClock
from cutlayer.report.summary import summarize
from cutlayer.run import Result, first_of, total_rounds
from cutlayer.schedule import Told
from cutlayer.watching import Watch
from cutlayer.wire import Frame, Header, Meter, keep_lines

MOST_ROUNDS = 100  # of a client that are remembered


@dataclass
class Ready:
    """What a client said when it came: of its data, and which rounds it holds; and which it has written since."""

    told: Told
    rounds: list[int]

    def wrote(self, number: int) -> None:
        """It holds one more."""
        self.rounds[:] = [*self.rounds[1 - MOST_ROUNDS :], number]


@dataclass(frozen=True)
class Clients:
    """A run's clients as its server knows them.

    ``absence`` says who is away, where the run goes on without those; None: it does not.
    """

    remotes: Mapping[str, Remote]
    ready: dict[str, Ready]
    absence: Absence | None


class Attempt:
    """A drive of a run, in the thread that computes.

    Args:
        config: the run.
        out: its folder.
        base: the model.
        clients: its clients.
        here: those that are there as it begins.
        network: the loop of their sessions.
        watch: is told what happens, and shows the run.
        asked_to_stop: whether it is to end after the next checkpoint.
    """

    def __init__(
        self, config: RunConfig, out: Path, base: Base, clients: Clients, here: Sequence[str],
        network: asyncio.AbstractEventLoop, watch: Watch, asked_to_stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.config, self.out, self.base, self.clients, self.here = config, out, base, clients, list(here)
        self.network, self.watch, self.asked_to_stop = network, watch, asked_to_stop
        self._newest = ""  # the client whose model is the run's
        self.parting = 0  # bytes by which clients got, when all was done, what they had not seen

    async def drive(self, counted: Callable[[str], Mapping[str, float]]) -> Result:
        """To the end; ``counted``: what ``network`` in the summary says of a client's connections.

        Raises:
            Drained: it stopped as it was asked to.
            Gone: a client has come back without what it held, or is waited for no longer.
            CutlayerError: anything else that a user can mend.
        """
        config, absence, ready = self.config, self.clients.absence, self.clients.ready
        data = {name: one.told for name, one in ready.items()}
        parts = assemble_server(config, self.base, data)
        with Meter(Path(config.record_wire) if config.record_wire else None) as meter:
            run = Run(
                config, parts, meter=meter, clock=RealClock(), out=self.out, progress=self.watch, links=self._links
            )
            engine, self.watch.run = Engine(run, asked_to_stop=self.asked_to_stop), run
            self._check_early_stop(run)
            if absence is not None:
                absence.know(data)
                outset = absence.outset(self.here)
                self._go_back(engine, outset.number)
                absence.follow(run, dict(outset.away))
            else:
                self._go_back(engine, self._common())
            self.watch.start(sum(parts.foreseen.values()) - sum(run.counters.steps.values()))
            try:
                await self._drive(run, engine)
            except (BaseExceptionGroup, Lost) as error:
                first = first_of(error) if isinstance(error, BaseExceptionGroup) else error
                if isinstance(first, Lost):  # where the framework has no rule for it
                    raise Gone(first.client, "the others go on without it.") from error
                raise first from error
            finally:
                self.watch.stop()
        adapter = self._save(run)
        summary = summarize(run, adapter=adapter, device=str(self.base.device))
        summary["parting_bytes"] = self.parting
        summary["network"] = {
            name: {**counted(name), **(absence.summary(name) if absence else {})} for name in self.clients.remotes
        }
        checkpoint.write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        return Result(self.out, adapter, summary)

    def _check_early_stop(self, run: Run) -> None:
        """Refuse to begin a run that is to stop early, where who evaluates has nothing to evaluate on.

        Raises:
            DataError: so it is; nothing of what clients said is written down yet, so they may come again with more.
        """
        why = unevaluated(run)
        if why and self.config.early_stop is not None and not checkpoint.rounds(self.out / "checkpoints"):
            raise DataError(f"early_stop is given, but {why} Or leave early_stop out.")

    def _go_back(self, engine: Engine, number: int) -> None:
        """Be as after a round; 0: as at the begin."""
        kept, run = self.out / "checkpoints", engine.run
        for newer in [n for n in checkpoint.rounds(kept) if n > number]:
            shutil.rmtree(kept / f"round-{newer:06d}")  # not everybody has it
        if number:
            engine.restore(kept / f"round-{number:06d}")
            self.watch.note(f"going on after round {number}")
        else:
            run.meter.restore(None)
        keep_lines(self.out / "metrics.jsonl", run.counters.lines)
        keep_lines(self.out / "uploads.jsonl", run.counters.uploads)

    async def _drive(self, run: Run, engine: Engine) -> None:
        try:
            if not await engine.drive(rounds=total_rounds(self.config)):
                raise Drained
        except Drained:  # perhaps while it waited for clients, after rounds that are in no checkpoint
            if run.counters.rounds not in (0, *checkpoint.rounds(self.out / "checkpoints")):
                await engine.save()
            raise
        if self.clients.absence is not None:
            await self.clients.absence.end()
        self._newest = run.evaluators()[0]  # all have the last merge after parting, but not all trunks at the server
        before = run.meter.state()
        await run.part()
        self.parting = run.meter.up + run.meter.down - before["up"] - before["down"]
        run.meter.restore(before)

        async def finish(name: str) -> None:
            link = run.links[name]
            assert isinstance(link, NetworkLink)
            await link.finish()

        await run.reach(finish, run.clients)

    def _links(self, run: Run) -> dict[str, Link]:
        found: dict[str, Link] = {}
        for name, remote in self.clients.remotes.items():
            absence, bounds = self.clients.absence, run.parts.bounds
            found[name] = NetworkLink(
                name, _carrier(remote, self.network), meter=run.meter, asked=run.presence.asked,
                turn=remote.last_turn, goes_on=partial(absence.goes_on, name) if absence else lambda _: False,
                wrote=self.clients.ready[name].wrote, shadow=run.parts.clients[name],
                most=max(bounds[name]) if bounds else None,
                judge=Judge(
                    name, bounds_of(self.config, self.base, name), self.clients.ready[name].told,
                    run.parts.clients[name], partial(run.exchange.remembers, name), {*run.clients} - {name},
                ),
            )  # fmt: skip
        return found

    def _common(self) -> int:
        """The newest round that the server and all clients hold; 0: none."""
        held = set(checkpoint.rounds(self.out / "checkpoints"))
        for ready in self.clients.ready.values():
            held &= set(ready.rounds)
        return max(held, default=0)

    def _save(self, run: Run) -> Path:
        """What the server has of the adapter: what it trained, and what the framework's merges sent it."""
        kind = "adapter" if run.parts.base.peft_model is not None else "model"
        if run.personal:
            for name in run.clients:
                self._save_one(run, name, self.out / f"{kind}s" / name)
        return self._save_one(run, self._newest, self.out / kind)

    def _save_one(self, run: Run, client: str, final: Path) -> Path:
        state: dict[str, Tensor] = {}
        if not run.personal:
            state |= {n: tensor for n, tensor in run.federated.before.items() if parameter_of(n) == n}
        stops, layout = run.parts.routes[client], run.parts.layouts[client]
        for stop, place in zip(stops, places_of(run.parts.base, layout, stops), strict=True):
            if run.parts.own(stop):  # on a client's device, which stands here without its values
                continue
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
