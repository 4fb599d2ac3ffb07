"""The server of a run whose rounds and step 11 are another system's (Flower's): the trunk, and our stream to clients.

That system draws the clients of a round and waits for their parts. Meanwhile they open our stream (served by a thread
of its own), and another thread drives the round's steps with whoever has come. A client that is lost in a round, or
answers what cannot be, is lost alone: what it has done in the round does not count for it, and the others go on.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from cutlayer import checkpoint
from cutlayer._judging import finite
from cutlayer.apart import known_classes, offer
from cutlayer.assembly import assemble_server
from cutlayer.build import load_base
from cutlayer.config import RunConfig
from cutlayer.driver import Run
from cutlayer.engine import Engine
from cutlayer.errors import AllLeft, CutlayerError, Gone, Refused, RequestFailed, WireError
from cutlayer.frames import limits_of
from cutlayer.identity import fingerprint, other_model, tokenizer_of
from cutlayer.judging import Judge, bounds_of
from cutlayer.keys import ServerKeys
from cutlayer.links.local import Link
from cutlayer.links.net.handing import LIMITS
from cutlayer.links.net.listener import Listener
from cutlayer.links.net.remote import Remote, on_loop
from cutlayer.links.net.session import Session
from cutlayer.links.net.tls import Credentials
from cutlayer.links.network import Carry, NetworkLink
from cutlayer.models.adapters import save_part
from cutlayer.models.loading import device_named
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.presence import Lost
from cutlayer.real_clock import RealClock
from cutlayer.report.progress import Reporter
from cutlayer.report.summary import summarize
from cutlayer.run import Result, first_of
from cutlayer.schedule import Told
from cutlayer.served_run import read_rounds, read_told
from cutlayer.service import RECHECK
from cutlayer.step import split_evaluate
from cutlayer.wire import Frame, Header, Limits, Meter

T = TypeVar("T")
UNKNOWN = Told(1, 1, 1, 0)  # of a client that has not come yet; in a run of so many rounds nothing depends on it


class _Merged(Run):
    """A run whose clients' parts are merged elsewhere."""

    async def merge(self, clients: Sequence[str], **how: Any) -> None:
        """Step 11 is not ours."""

    async def catch_up(self, clients: Sequence[str], *, trunks: bool = False) -> None:
        """Each client of a round begins with what was merged."""


class Federation:
    """The trunk of a run, the clients of its present round, and the threads that serve them."""

    def __init__(
        self, config: RunConfig, out: Path, keys: ServerKeys | None, meter: Meter, patience: float, progress: Reporter
    ) -> None:
        self.config, self.out, self.keys, self.patience, self.progress = config, out, keys, patience, progress
        self.tokenizer = tokenizer_of(config.model)
        self.files, self.device = fingerprint(config.model), device_named(config.device)
        with torch.random.fork_rng(devices=[]):
            base = load_base(config, labels=known_classes(config), device=self.device)
        parts = assemble_server(config, base, dict.fromkeys(config.client_names, UNKNOWN))
        self.run = _Merged(config, parts, meter=meter, clock=RealClock(), out=out, progress=progress, links=self._links)
        self.engine = Engine(self.run)
        self.last = dict.fromkeys(config.client_names, 0)  # by client: the last round that it was in
        self.told: dict[str, Told] = {}
        self._limits = limits_of(config, load_model_config(config.model))
        self._judges: dict[str, Judge] = {}  # of the present round's clients
        self._why: dict[str, str] = {}  # by client: why it was lost in the present round
        self._like = {name: (tensor.shape, tensor.dtype) for name, tensor in self.initial().items()}
        self.number, self._count = 0, 0
        self.remotes: dict[str, Remote] = {}
        self._network = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._network.run_forever, name="cutlayer-network", daemon=True)
        self._driver = ThreadPoolExecutor(1, "cutlayer-run")
        self._runner = asyncio.Runner()
        self._listener: Listener | None = None
        self._rechecking: Future[None] | None = None

    def __enter__(self) -> Federation:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._rechecking is not None:
            self._rechecking.cancel()
        if self._listener is not None:
            self._soon(self._listener.stop()).result()
        self._driver.submit(self._runner.close).result()
        self._driver.shutdown()
        self._network.call_soon_threadsafe(self._network.stop)
        self._thread.join()
        self._network.close()

    def listen(self, bind: str) -> int:
        """Take sessions; the port."""
        own = self.keys
        credentials = Credentials(own.ca, own.certificate, own.key) if own else None
        self._listener = Listener(
            bind, credentials, self._admit, self._session, limits=self.limits,
            revoked=own.revoked if own else lambda serial: False,
        )  # fmt: skip
        port = self._soon(self._listener.start()).result()
        self._rechecking = self._soon(self._recheck(self._listener))
        return port

    def limits(self, hello: Mapping[str, Any]) -> Limits:
        """The most that a frame of a client may hold that was admitted with this hello."""
        return LIMITS if hello.get("wants") else self._limits

    def unfit(self, part: Mapping[str, torch.Tensor]) -> str | None:
        """What is wrong with a part that a client gives to be merged; None: nothing."""
        if part.keys() != self._like.keys():
            other = sorted(part.keys() ^ self._like.keys())
            return f"it has not the tensors of the clients' part: '{other[0]}'"
        for name, tensor in part.items():
            shape, dtype = self._like[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                return f"'{name}' is {list(tensor.shape)} {tensor.dtype}, not {list(shape)} {dtype}"
            if not finite(tensor):
                return f"'{name}' has values that are not finite"
        return None

    def initial(self) -> dict[str, torch.Tensor]:
        """What every client's part begins with."""
        party = self.run.parts.clients[self.config.client_names[0]]
        own = party.names("own")
        return {name: tensor for name, tensor in party.slot.get().items() if name in own}

    def open(self, count: int, *, training: bool) -> tuple[int, Future[None]]:
        """A round begins with so many clients: its number, and its end."""
        self.number += 1
        self._soon(self._opened(count)).result()
        return self.number, self._driver.submit(self._driven, training)

    async def _opened(self, count: int) -> None:
        self._count = count
        self._came, self._closed = asyncio.Event(), asyncio.Event()
        self.remotes = {name: Remote(name, patience=self.patience) for name in self.config.client_names}

    def lacks_one(self) -> None:
        """One client fewer will come; if it is here already, its session says so."""

        def told() -> None:
            self._count -= 1
            self._came.set()

        self._network.call_soon_threadsafe(told)

    def over(self) -> None:
        """All replies that there will be are here: nobody else is waited for."""
        self._network.call_soon_threadsafe(self._closed.set)

    def finished(self, merged: dict[str, torch.Tensor]) -> Result:
        """Write the result: the strategy's arrays and the trunk, as one adapter."""
        run, base = self.run, self.run.parts.base
        run.clients = self.config.client_names
        final = self.out / ("adapter" if base.peft_model is not None else "model")
        state = dict(merged)
        for slot in run.slots_of(run.clients):
            state |= slot.get()
        save_part(base, state, final, base_name=Path(self.config.model).name)
        summary = summarize(run, adapter=final, device=self.device)
        checkpoint.write_text(self.out / "summary.json", json.dumps(summary, indent=2) + "\n")
        return Result(self.out, final, summary)

    # ------------------------------------------------------------ the thread of sessions

    def _soon(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._network)

    async def _admit(self, peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        """The welcome of a client that may come in."""
        name = hello.get("client")
        assert isinstance(name, str), "the listener has seen to it"
        if self.keys is not None and not self.keys.belong(peer, name, token):
            raise Refused("The certificate and the token do not belong to this client, or were revoked.", reason="keys")
        if name not in self.config.client_names:
            raise Refused(f"This run has no client {name!r}. The operator knows the names.", reason="client")
        if hello.get("wants") == "run":
            return {"run": offer(self.config)}
        if hello.get("wants"):
            raise Refused("In a federation the server does not hand its model. Name the client's own by model.")
        if other := other_model(self.files, self.tokenizer, hello.get("model"), name):
            raise Refused(other, reason="model")
        if hello.get("round") != self.number:
            raise Refused(f"'{name}' comes for round {hello.get('round')!r}, but this is round {self.number}.")
        if self.last[name] and self.last[name] not in read_rounds(hello.get("rounds")):
            raise Refused(f"'{name}' has no checkpoint of round {self.last[name]}, the last that it was in.")
        told = read_told(hello.get("data"))
        if told != self.told.setdefault(name, told):
            raise Refused("Your data are of another size than when you first came. Bring the same data.", reason="data")
        self.run.parts.clients[name].evaluation = range(told.evaluation_batches)
        return {"client": name}

    async def _session(self, session: Session) -> None:
        if session.hello.get("wants") == "run":
            await session.ended.wait()
            return
        self._came.set()
        await self.remotes[session.hello["client"]].serve(session)

    async def _gathered(self) -> list[str]:
        """The clients of this round, once all are here, or no more will come."""
        closed = asyncio.ensure_future(self._closed.wait())
        until = asyncio.get_running_loop().time() + self.patience
        while True:
            here = [name for name, remote in self.remotes.items() if remote.session is not None]
            left = until - asyncio.get_running_loop().time()
            if len(here) >= self._count or closed.done() or left <= 0:
                closed.cancel()
                return here
            self._came.clear()
            came = asyncio.ensure_future(self._came.wait())
            await asyncio.wait({came, closed}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            came.cancel()

    async def _dismissed(self, words: Mapping[str, Mapping[str, float]]) -> None:
        """Tell the clients of a round that it is over, and what was measured of them.

        Who was lost, or comes too late, is told that the others went on.
        """
        for name, remote in self.remotes.items():
            why = self._why.get(name, "it came too late.")
            said = json.dumps(words[name]) if name in words else f"the others go on without '{name}': {why}"
            await remote.close(said)

    async def _recheck(self, listener: Listener) -> None:
        """End the sessions of clients that were revoked meanwhile."""
        while True:
            await asyncio.sleep(RECHECK)
            await listener.recheck()

    async def _refused(self, error: BaseException) -> None:
        for remote in self.remotes.values():
            if remote.session is not None:
                await remote.session.refuse(f"The round failed at the server: {type(error).__name__}.")

    # ------------------------------------------------------------ the thread of the run

    def _links(self, run: Run) -> dict[str, Link]:
        return {
            name: NetworkLink(
                name, self._carry(name), meter=run.meter, goes_on=partial(self._goes_on, name),
                judge=partial(self._judge, name),
            )
            for name in run.clients
        }  # fmt: skip

    def _judge(self, name: str, *exchanged: Any) -> None:
        self._judges[name](*exchanged)

    def _goes_on(self, name: str, error: CutlayerError) -> bool:
        """Whether the others go on without this client after an error of a request to it."""
        if not isinstance(error, Gone | RequestFailed | WireError):
            return False
        self._say(name, str(error))
        return True

    def _say(self, name: str, why: str) -> None:
        """Note why a client is lost; it is told so, too."""
        self._why[name] = why
        self.progress.note(f"{why} The others go on.")

    def _carry(self, name: str) -> Carry:
        async def carry(frame: Frame) -> tuple[Header, list[torch.Tensor]]:
            header, tensors, _ = await on_loop(self._network, self.remotes[name].call(frame))
            return header, tensors

        return carry

    def _driven(self, training: bool) -> None:
        """The steps of one round."""
        try:
            clients = self._soon(self._gathered()).result()
            if not clients:
                raise Gone("of the round", "nobody of those whom Flower drew has come.")
            work: Callable[[], Coroutine[Any, Any, dict[str, dict[str, float]]]]
            work = self._trained if training else self._evaluated
            self._why = {}
            self.run.presence.end()
            self.run.clients = clients  # a round is of those whom Flower drew
            words = self._runner.run(work())
            self._soon(self._dismissed(words)).result()
        except BaseException as error:
            found = first_of(error) if isinstance(error, BaseExceptionGroup) else error
            self._soon(self._refused(found)).result()
            raise found from error

    def _go_on(self) -> None:
        """From here on the round is of those who are not lost.

        Raises:
            AllLeft: nobody is left.
        """
        run = self.run
        lost, run.clients = run.presence.lost, [name for name in run.clients if name not in run.presence.lost]
        if not run.clients:
            raise AllLeft(f"No client of the round is left. {' '.join(self._why[name] for name in sorted(lost))}")

    async def _begun(self) -> None:
        run, base = self.run, self.run.parts.base
        for name in run.clients:
            told = self.told[name]
            self._judges[name] = Judge(
                name, bounds_of(self.config, base, name), told, run.parts.clients[name],
                partial(run.exchange.remembers, name), {*self.config.client_names} - {name},
            )  # fmt: skip
            run.sizes[name] = {"examples": float(told.examples), "label_tokens": float(told.label_tokens)}

        async def begin(name: str) -> None:
            link = run.links[name]
            assert isinstance(link, NetworkLink)
            await link.begin(self.last[name], run.parts.lines[name])

        await run.reach(begin, run.clients)
        self._go_on()
        await run.set_up()
        self._go_on()
        run.book_outside()

    async def _trained(self) -> dict[str, dict[str, float]]:
        run, counters = self.run, self.run.counters
        await self._begun()
        run.begin_round()
        await run.framework.round(run, counters.rounds)
        self._go_on()
        run.end_round()
        counters.rounds += 1
        found = {name: _mean([line for line in run.metrics if line["client"] == name]) for name in run.clients}
        await self.engine.save()
        self._go_on()
        self.last |= dict.fromkeys(run.clients, counters.rounds)
        return {name: {**found[name], "num-examples": run.sizes[name]["examples"]} for name in run.clients}

    async def _evaluated(self) -> dict[str, dict[str, float]]:
        run = self.run
        await self._begun()
        found = {}
        for name in run.clients:
            end, middle, tail, _ = run.route(name)
            count = len(run.parts.clients[name].evaluation)
            if not count:
                self._say(name, f"'{name}' has nothing to evaluate on. Give its node 'eval', or evaluate nobody.")
                run.lose(name)
                continue
            try:
                lines = [await split_evaluate(end, middle, tail, batch=number) for number in range(count)]
            except Lost:
                run.lose(name)
                continue
            tokens = sum(line.label_tokens for line in lines)
            loss = sum(line.loss * line.label_tokens for line in lines) / tokens if tokens else math.nan
            found[name] = {"eval_loss": loss, "num-examples": float(tokens)}
        self._go_on()
        return found


def _mean(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    tokens = sum(line["label_tokens"] for line in lines)
    loss = sum(line["loss"] * line["label_tokens"] for line in lines) / tokens if tokens else math.nan
    return {"train_loss": loss, "label-tokens": float(tokens)}
