"""The driver: what a framework sees and drives, and the loop around its rounds.

A framework composes ``run.step`` over clients and merges at the end; the loop around it is the engine's: checkpoint,
evaluation, early stop.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer import checkpoint
from cutlayer.build import SHARED, Parts
from cutlayer.clock import VirtualClock
from cutlayer.config import RunConfig
from cutlayer.contracts import How, StepResult
from cutlayer.errors import CheckpointError, MethodError, NonFinite, OutputError
from cutlayer.links.local import ClientEnd, LocalLink, ServerStation
from cutlayer.outputs import recorded
from cutlayer.pace import paces
from cutlayer.parties.federated import FederatedServer
from cutlayer.parties.hops import ServerTail, TrunkHop
from cutlayer.report.progress import Reporter
from cutlayer.step import split_evaluate, split_step, tallied
from cutlayer.wire import Meter, Value


@dataclass
class Counters:
    """What of a run's progress is no tensor; kept in its checkpoints."""

    rounds: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    lines: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    holder: str = ""
    merges: int = 0
    merged: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)  # requests sent to each client: they number the frames
    stopped: bool = False


class Run:
    """What a framework sees and drives."""

    def __init__(
        self, config: RunConfig, parts: Parts, *, meter: Meter, clock: VirtualClock, out: Path, progress: Reporter
    ) -> None:
        self.config, self.parts, self.meter, self.clock, self.out, self.progress = (
            config,
            parts,
            meter,
            clock,
            out,
            progress,
        )
        self.seed = config.seed
        self.clients = list(parts.clients)
        self.framework = config.build("framework")
        self.selection = config.build("selection")
        self.scheduler = config.build("scheduler")
        self.exchange = config.build("exchange")
        self.counters = Counters(steps=dict.fromkeys(self.clients, 0), holder=self.clients[0])
        client_paces, server_pace = paces(config, parts)
        self.ends = {
            name: ClientEnd(name, LocalLink(party, meter=meter, clock=clock, pace=client_paces[name]))
            for name, party in parts.clients.items()
        }
        self._station = ServerStation(clock, server_pace)
        self._metrics: list[dict[str, Any]] = []
        self.federated: FederatedServer | None = None

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped, so that the update is a verb of its own."""
        return self.config.max_grad_norm is not None

    @property
    def holder(self) -> str:
        """Of a travelling client's part: who has it."""
        return self.counters.holder

    def steps_left(self, client: str) -> int:
        """How many optimizer steps a client may still make in this run."""
        return self.parts.planned[client] - self.counters.steps[client]

    async def set_up(self) -> None:
        """Step 1: tell every client the cut and the length of the run, and learn its sizes."""
        layout = self.parts.layout
        weight_by = self.config.aggregator.options.get("weight_by", "examples")
        sizes: dict[str, float] = {}
        for name, end in self.ends.items():
            told: dict[str, Value] = {
                "head_blocks": len(layout.head),
                "tail_blocks": len(layout.tail) if layout.tail_at_client else -1,
                "steps": self.parts.planned[name],
            }
            header = (await end.ask("set_up", told)).header
            by = {"examples": "examples", "tokens": "label_tokens"}.get(weight_by)
            sizes[name] = float(header.value(by)) if by else 1.0
        self.federated = FederatedServer(self.config.build("aggregator"), sizes)

    async def step(self, client: str, *, wrap: Callable[[Any], Any] | None = None) -> StepResult:
        """One optimizer step of a client: all its micro-batches, then the updates.

        Args:
            client: its name.
            wrap: puts a framework's own wrapper around the server's stop (a turn, a pool).
        """
        end, number = self.ends[client], self.counters.steps[client]
        middle, tail, stop = self._route(client, wrap)
        how = How(update=not self.clips)
        done: list[StepResult] = []
        with tallied() as tally:
            try:
                while not done or not done[-1].last:
                    done.append(
                        await self.exchange.step(split_step, end, middle, tail, step=number, micro=len(done), how=how)
                    )
                if self.clips:
                    await self._clipped_update(end)
            except BaseException:
                self.parts.trunk.abort(client)
                self.parts.clients[client].abort()
                raise
            finally:
                await stop.leave(client)
        self.counters.steps[client] += 1
        result = StepResult(
            client,
            number,
            sum(d.loss for d in done),
            sum(d.tokens for d in done),
            sum(d.label_tokens for d in done),
            True,
        )
        record: dict[str, Any] = {
            "step": number, "round": self.counters.rounds, "client": client, "loss": result.loss,
            "tokens": result.tokens, "label_tokens": result.label_tokens,
            "bytes_up": tally.bytes_up, "bytes_down": tally.bytes_down,
            "seconds": {k: round(v, 6) for k, v in tally.seconds.items()},
        }  # fmt: skip
        if tally.virtual:
            record["virtual_seconds"] = dict(tally.virtual)
            record["virtual_time"] = self.clock.now()
        self._metrics.append(record)
        self.counters.tokens += result.tokens
        self.progress.update(record)
        return result

    def _route(self, client: str, wrap: Callable[[Any], Any] | None = None) -> tuple[list[Any], Any, Any]:
        """The hops, the tail, and of these the stop that is the server's."""
        kind = TrunkHop if self.parts.layout.tail_at_client else ServerTail
        stop: Any = kind(self.parts.trunk, SHARED, self._station)
        stop = self.scheduler.wrap(stop, client)
        if wrap is not None:
            stop = wrap(stop)
        if self.parts.layout.tail_at_client:
            return [stop], self.ends[client], stop
        return [], stop, stop

    async def _clipped_update(self, end: ClientEnd) -> None:
        """Scale the gradient of client and trunk by one factor, as ``clip_grad_norm_`` does, and update both."""
        slot = self.parts.trunk.slots[SHARED]
        theirs = float((await end.ask("grad_norm")).header.value("squared_norm"))
        norm = math.sqrt(theirs + slot.squared_norm())
        if not math.isfinite(norm):
            raise NonFinite(f"The gradient of client '{end.name}' is not finite. Lower optimizer.lr or check the data.")
        assert self.config.max_grad_norm is not None
        scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6))
        slot.update(scale=scale)
        await end.ask("update", {"scale": scale})

    async def merge(self, clients: Sequence[str]) -> None:
        """Step 11: merge the parts of ``clients``, and give each its own back."""
        if len(self.clients) == 1 or not clients:
            return  # nobody to average with
        assert self.federated is not None
        states = {}
        for name in clients:
            states[name] = (await self.ends[name].ask("get_state", {"optimizer": False})).tensors
        merged = self.federated.merge(states)
        self.counters.merges += 1
        for name in clients:
            await self.ends[name].put(dict(merged[name]))
            self.counters.merged[name] = self.counters.merges

    async def catch_up(self, clients: Sequence[str]) -> None:
        """Give the last merge to those that were not in it."""
        assert self.federated is not None
        for name in clients:
            if self.counters.merged.get(name, 0) < self.counters.merges:
                await self.ends[name].put(dict(self.federated.before))
                self.counters.merged[name] = self.counters.merges

    async def hand_over(self, giver: str, taker: str, *, optimizer: bool) -> None:
        """Step 11 of the sequential kind: ``taker`` goes on with the part of ``giver``."""
        if giver != taker:
            parcel = await self.ends[giver].ask("get_state", {"optimizer": optimizer})
            version = int(parcel.header.value("version"))
            await self.ends[taker].put(dict(parcel.tensors), version=version, reset=not optimizer)
        self.counters.holder = taker

    async def evaluate(self) -> dict[str, float] | None:
        """Mean loss over the label tokens of the evaluation data, and its perplexity; None without such data."""
        names = self.framework.evaluators(self)
        if not self.parts.clients[names[0]].evaluation:
            return None
        await self.catch_up(names)
        total = tokens = 0.0
        for name in names:
            middle, tail, _ = self._route(name)
            for number in range(len(self.parts.clients[name].evaluation)):
                result = await split_evaluate(self.ends[name], middle, tail, batch=number)
                total += result.loss * result.label_tokens
                tokens += result.label_tokens
        loss = total / tokens if tokens else math.nan
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def state(self) -> dict[str, Tensor]:
        """All trainable tensors of the model as it now is, by name: the trunk's slot and one evaluator's part."""
        client = self.parts.clients[self.framework.evaluators(self)[0]]
        slots = (client.slot, self.parts.trunk.slots[SHARED])
        return {name: parameter.detach() for slot in slots for name, parameter in slot.params.items()}

    # What follows is the engine's: the loop around the framework's rounds.

    async def drive(self, *, rounds: int) -> None:
        """Rounds until the run's length is reached, with evaluation, checkpoints and early stop between."""
        if self.counters.rounds == 0:
            await self.set_up_and_begin()
        else:
            await self.set_up_again()
        while self.counters.rounds < rounds and not self.counters.stopped and any(map(self.steps_left, self.clients)):
            before = time.perf_counter()
            made = sum(self.counters.steps.values())
            await self.framework.round(self, self.counters.rounds)
            if sum(self.counters.steps.values()) == made:
                raise MethodError(
                    f"Round {self.counters.rounds} made no step: the selection picked nobody with steps left."
                )
            self.counters.seconds += time.perf_counter() - before
            self.counters.rounds += 1
            assert self.parts.trunk.open_graphs == 0, "a framework left a graph open"
            ended = self.counters.rounds == rounds or not any(map(self.steps_left, self.clients))
            every = self.config.eval_every
            if ended:
                await self.catch_up(self.framework.evaluators(self))  # theirs is the result
            if ended or (every and self.counters.rounds % every == 0):
                await self._evaluate_and_judge()
            if ended or self.counters.stopped or self.counters.rounds % self.config.checkpoint_every == 0:
                self.save()
        self._flush()

    async def set_up_and_begin(self) -> None:
        """A run's first moments: set-up and the evaluation before any step."""
        await self.set_up()
        await self._evaluate_and_judge()

    async def set_up_again(self) -> None:
        """A resumed run meets its clients anew, but what that takes was counted when it began."""
        before, time_before = self.meter.state(), self.clock.state()
        folder, self.meter.folder = self.meter.folder, None
        merged = self.federated.before if self.federated else {}
        await self.set_up()
        assert self.federated is not None
        self.federated.before = merged
        self.meter.folder = folder
        self.meter.restore(before)
        self.clock.restore(time_before)
        for name, end in self.ends.items():
            end.link.turn = self.counters.turns[name]

    async def _evaluate_and_judge(self) -> None:
        try:
            found = await self.evaluate()
        except NonFinite as error:
            raise NonFinite(f"{error} That was in the evaluation {self._when()}.") from error
        if found is None:
            return
        if not math.isfinite(found["loss"]):
            raise NonFinite(f"The evaluation loss {self._when()} is not finite. Check the model and optimizer.lr.")
        record: dict[str, Any] = {"round": self.counters.rounds, **found}
        self.counters.evaluations.append(record)
        self.progress.note(
            f"round {self.counters.rounds}: eval loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
        )
        stop = self.config.early_stop
        if stop is None:
            return
        losses = [e["loss"] for e in self.counters.evaluations]
        best, since = losses[0], 0
        for loss in losses[1:]:
            best, since = (loss, 0) if loss < best - stop.min_delta else (best, since + 1)
        if since >= stop.patience:
            self.counters.stopped = True
            self.progress.note(f"early stop: {since} evaluations without a better loss")

    def _when(self) -> str:
        done = self.counters.rounds
        return f"after round {done}" if done else "before the first step, so the model itself gives such values"

    def _flush(self) -> None:
        """Write out metrics and the record of frames."""
        path = self.out / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in self._metrics)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
        self.counters.lines += len(self._metrics)
        self._metrics.clear()
        self.meter.flush()

    def save(self) -> None:
        """A checkpoint of everything, at the end of a round."""
        self._flush()
        self.counters.turns = {name: end.link.turn for name, end in self.ends.items()}
        states: dict[str, dict[str, Tensor]] = {"server": self.parts.trunk.slots[SHARED].get(optimizer=True)}
        versions = {"server": self.parts.trunk.slots[SHARED].version}
        for name, party in self.parts.clients.items():
            states[f"client-{name}"] = party.slot.get(optimizer=True)
            versions[f"client-{name}"] = party.slot.version
        if self.federated is not None and self.federated.before:
            states["federated"] = dict(self.federated.before)
        for holder, state in states.items():
            wrong = [key for key, tensor in state.items() if not tensor.isfinite().all()]
            if wrong:
                raise NonFinite(
                    f"After round {self.counters.rounds}, '{wrong[0]}' of {holder} is not finite, so it is not "
                    "saved. Lower optimizer.lr, set max_grad_norm, or use precision: float32 or bfloat16."
                )
        counters = {
            **identity(self.config),
            "counters": vars(self.counters), "versions": versions, "meter": self.meter.state(),
            "clock": self.clock.state(), "data": self.data_fingerprint,
        }  # fmt: skip
        checkpoint.save(self.out / "checkpoints", self.counters.rounds, states, counters)

    data_fingerprint = ""

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is damaged or of another run.
        """
        expect = {**identity(self.config), "data": self.data_fingerprint}
        manifest, states = checkpoint.load(path, expect=expect)
        try:
            self.counters = Counters(**manifest["counters"])
            self._prove_records(path, manifest["meter"])
            versions = manifest["versions"]
            self.parts.trunk.slots[SHARED].put(states["server"], version=versions["server"])
            for name, party in self.parts.clients.items():
                party.slot.put(states[f"client-{name}"], version=versions[f"client-{name}"])
            self.federated = FederatedServer(self.config.build("aggregator"), {})
            merged = states.get("federated", {})  # in the order of its file; frames carry the slots' order
            order = next(iter(self.parts.clients.values())).slot.get()
            self.federated.before = {key: merged[key] for key in order} if merged else {}
            self.meter.restore(manifest["meter"])
            self.clock.restore(manifest["clock"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint {path} does not fit this run: {error}") from error

    def _prove_records(self, path: Path, meter: Mapping[str, Any]) -> None:
        """What is to be continued must have its beginning, or it would get a hole."""
        wanted = {self.out / "metrics.jsonl": (self.counters.lines, "lines")}
        if self.meter.folder is not None:
            wanted[self.meter.folder / "frames.jsonl"] = (meter["frames"], "lines")
            wanted[self.meter.folder / "frames.bin"] = (meter["offset"], "bytes")
        for file, (count, unit) in wanted.items():
            found = recorded(file, unit)
            if found < count:
                raise CheckpointError(
                    f"{file} has {found} {unit}, but {count} of them were there when the checkpoint {path} was made. "
                    "Put the file back as it was, or start the run again with another --out."
                )


def identity(config: RunConfig) -> dict[str, str]:
    """What must be equal for a checkpoint to be of this run."""
    told = config.model_dump(mode="json", exclude={"record_wire", "device", "report_to", "checkpoint_every"})
    return {"settings": json.dumps(told, sort_keys=True)}
