"""The loop around a framework's rounds: set-up, evaluation, checkpoints, early stop, and going on after an end."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer import allotting, checkpoint, moving
from cutlayer.arrangement import Arrangement
from cutlayer.assembly import own_trunks
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, SHARED
from cutlayer.driver import Run
from cutlayer.errors import CheckpointError, MethodError, NonFinite, OutputError
from cutlayer.merging import Counters
from cutlayer.models.slots import Slot
from cutlayer.outputs import recorded
from cutlayer.schedule import MOST_IDLE


class Engine:
    """Drives a run from its first round, or from a checkpoint, to its end, or until it is asked to stop."""

    def __init__(
        self, run: Run, *, data_fingerprint: str = "", asked_to_stop: Callable[[], bool] = lambda: False
    ) -> None:  # fmt: skip
        self.run, self.asked_to_stop = run, asked_to_stop
        self.data_fingerprint = data_fingerprint
        self._idle = 0  # rounds in a row without a step
        self._told = ""  # why nothing is evaluated
        initial = {name: parameter.detach() for name, parameter in run.parts.base.initial.items()}
        run.federated.begin(initial, own_trunks(run.parts))

    async def drive(self, *, rounds: int) -> bool:
        """Rounds until the run's length is reached, with evaluation, checkpoints and early stop between.

        False: it was asked to stop, and did after the checkpoint of a round.
        """
        run = self.run
        counters = run.counters
        if counters.rounds == 0:
            await self.set_up_and_begin()
        else:
            await self.set_up_again()
        while counters.rounds < rounds and not counters.stopped and any(map(run.steps_left, run.clients)):
            await self._round()
            ended = counters.rounds == rounds or not any(map(run.steps_left, run.clients))
            every = run.config.eval_every
            if ended:
                await run.make_ready(run.evaluators())  # theirs is the result
                run.book_outside()
            if ended or (every and counters.rounds % every == 0):
                await self._evaluate_and_judge()
            leaves = self.asked_to_stop()  # looked at once: a round after it is saved before anybody leaves, too
            if ended or leaves or counters.stopped or counters.rounds % run.config.checkpoint_every == 0:
                await self.save()
            if leaves and not ended and not counters.stopped:
                return False
            if ended and all(run.presence.over(client, counters.rounds) for client in run.clients):
                run.progress.note(f"after round {counters.rounds}: nobody is left who could train")
        if not any(counters.steps.values()):
            run.progress.note("nobody made a step in any round, so nothing was trained: the result is the start")
        self._flush()
        return True

    async def _round(self) -> None:
        run, counters = self.run, self.run.counters
        before, made, began = time.perf_counter(), sum(counters.steps.values()), run.clock.now()
        run.busy.clear()
        run.taking.clear()
        run.finished.clear()
        if run.absence is not None:
            await run.absence.begin_round()
        await run.arrange()
        planner = run.parts.planner
        if planner and planner.every and counters.rounds and counters.rounds % planner.every == 0:
            await moving.replan(run)
        await allotting.review(run)
        run.begin_round()
        await run.framework.round(run, counters.rounds)
        run.end_round()
        run.book_outside()
        self._idle = self._idle + 1 if sum(counters.steps.values()) == made else 0
        changing = run.presence.changing
        if self._idle and changing:
            run.progress.note(f"round {counters.rounds}: nobody made a step, it passes")
        passes = changing and run.config.length[0] == "rounds"
        if self._idle > (MOST_IDLE if changing else len(run.clients)) and not passes:
            raise MethodError(
                f"Round {counters.rounds} made no step, like the {self._idle - 1} before it: nobody who has steps left "
                "was picked. Look at selection, at who trains when in the framework, and at who is there (joins, "
                "leaves, availability, fails)."
            )
        took = run.clock.now() - began
        for client in run.clients:
            if client in run.taking or run.busy.get(client):
                waited = max(0.0, took - run.busy.get(client, 0.0))
                counters.waiting[client] = counters.waiting.get(client, 0.0) + waited
        if run.finished:
            last = max(run.finished, key=lambda client: (run.finished[client], client))
            counters.critical[last] = counters.critical.get(last, 0) + 1
        counters.seconds += time.perf_counter() - before
        counters.rounds += 1
        for party in run.parts.parties.values():
            assert party.open_graphs == 0, "a framework left a graph open"

    async def set_up_and_begin(self) -> None:
        """A run's first moments: set-up and the evaluation before any step."""
        await self._begin(0)
        await self.run.set_up()
        self.run.book_outside()
        await self._evaluate_and_judge()

    async def set_up_again(self) -> None:
        """A resumed run meets its clients anew, but what that takes was counted when it began."""
        run = self.run
        await self._begin(run.counters.rounds)
        before, time_before = run.meter.state(), run.clock.state()
        folder, run.meter.folder = run.meter.folder, None
        await run.set_up()
        run.meter.folder = folder
        run.meter.restore(before)
        run.clock.restore(time_before)
        run.forget_spent()
        for name, link in run.links.items():
            link.turn = max(link.turn, run.counters.turns[name]) if run.parts.apart else run.counters.turns[name]

    async def _begin(self, rounds: int) -> None:
        """Clients elsewhere go to where the run is; those in this process are in its checkpoint."""
        run = self.run
        await run.reach(lambda name: run.links[name].begin(rounds, run.parts.lines[name]), run.clients)
        await run.tell_places()

    async def _evaluate_and_judge(self) -> None:
        run, counters = self.run, self.run.counters
        try:
            found = await run.evaluate()
        except NonFinite as error:
            raise NonFinite(f"{error} That was in the evaluation {self._when()}.") from error
        if found is None:
            why = unevaluated(run)
            if why and why != self._told:
                run.progress.note(f"nothing is evaluated: {why}")
                self._told = why
            return
        if not math.isfinite(found["loss"]):
            raise NonFinite(f"The evaluation loss {self._when()} is not finite. Check the model and optimizer.lr.")
        record: dict[str, Any] = {
            "round": counters.rounds, **found, "steps": sum(counters.steps.values()),
            "bytes_up": run.meter.up, "bytes_down": run.meter.down,
        }  # fmt: skip
        if run.paces.profiles:
            record["virtual_time"] = run.clock.now()
        counters.evaluations.append(record)
        run.progress.note(
            f"round {counters.rounds}: eval loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
        )
        stop = run.config.early_stop
        if stop is None:
            return
        losses = [e["loss"] for e in counters.evaluations]
        best, since = losses[0], 0
        for loss in losses[1:]:
            best, since = (loss, 0) if loss < best - stop.min_delta else (best, since + 1)
        if since >= stop.patience:
            counters.stopped = True
            run.progress.note(f"early stop: {since} evaluations without a better loss")

    def _when(self) -> str:
        done = self.run.counters.rounds
        return f"after round {done}" if done else "before the first step, so the model itself gives such values"

    def _flush(self) -> None:
        """Write out metrics and the record of frames."""
        run = self.run
        _append(run.out / "metrics.jsonl", run.metrics)
        if run.uploads:
            _append(run.out / "uploads.jsonl", run.uploads)
        run.counters.lines += len(run.metrics)
        run.counters.uploads += len(run.uploads)
        run.metrics.clear()
        run.uploads.clear()
        run.meter.flush()

    def _slots(self) -> dict[str, Slot]:
        """Every slot that is here by the name of its file in a checkpoint; one that two parties share comes once."""
        parts = self.run.parts
        found: dict[str, Slot] = {}
        for name, client in parts.clients.items() if not parts.apart else ():
            found |= {f"{of}-{name}": slot for of, slot in client.slots.items()}
        known = {id(party.slot) for party in parts.clients.values()}  # elsewhere they write it themselves
        for name, party in parts.parties.items():
            for of, slot in party.slots.items():
                if id(slot) not in known:
                    known.add(id(slot))
                    found[SERVER if (name, of) == (SERVER, SHARED) else f"{name}-{of}"] = slot
        return found

    async def save(self) -> None:
        """A checkpoint of everything, at the end of a round.

        Clients elsewhere write their own first: whatever this one says is over, they have.
        """
        run = self.run
        await run.reach(lambda name: run.links[name].keep(run.counters.rounds), run.clients)
        self._flush()
        run.counters.turns = {name: link.turn for name, link in run.links.items()}
        slots = self._slots()
        states: dict[str, dict[str, Tensor]] = {name: slot.get(optimizer=True) for name, slot in slots.items()}
        if run.federated.before:
            states["federated"] = dict(run.federated.before)
        states |= {f"federated-{cluster}": dict(state) for cluster, state in run.federated.apart.items()}
        if run.sketches:
            states["sketches"] = dict(run.sketches)
        if kept := run.exchange.state():
            states["exchange"] = dict(kept)
        kept = run.framework.state()
        if tensors := {name: value for name, value in kept.items() if isinstance(value, Tensor)}:
            states["framework"] = tensors
        for holder, state in states.items():
            wrong = [key for key, tensor in state.items() if not tensor.isfinite().all()]
            if wrong:
                raise NonFinite(
                    f"After round {run.counters.rounds}, '{wrong[0]}' of {holder} is not finite, so it is not "
                    "saved. Lower optimizer.lr, set max_grad_norm, or use precision: float32 or bfloat16."
                )
        counters = {
            **identity(run.config),
            "counters": vars(run.counters), "versions": {name: slot.version for name, slot in slots.items()},
            "meter": run.meter.state(), "clock": run.clock.state(), "data": self.data_fingerprint,
            "importance": {name: slot.importance.state() for name, slot in slots.items() if slot.importance},
            "ranks": moving.ranks_elsewhere(run),
            "aggregator": dict(run.federated.aggregator.state()),
            "planner": dict(run.parts.planner.state()) if run.parts.planner else {},
            "framework": {name: value for name, value in kept.items() if name not in tensors},
        }  # fmt: skip
        checkpoint.save(run.out / "checkpoints", run.counters.rounds, states, counters)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it is damaged or of another run.
        """
        run = self.run
        expect = {**identity(run.config), "data": self.data_fingerprint}
        manifest, states = checkpoint.load(path, expect=expect)
        try:
            run.counters = Counters(**manifest["counters"])
            moving.restore(run, manifest["ranks"])
            self._prove_records(path, manifest["meter"])
            run.sketches = dict(states.get("sketches", {}))
            if run.counters.arrangement is not None:
                run.arrangement = Arrangement.from_json(run.counters.arrangement)
                run.lead()
            slots = self._slots()
            for name, slot in slots.items():
                slot.put(states[name], version=manifest["versions"][name], resize=True)
                if slot.importance is not None:
                    slot.importance.restore(manifest["importance"][name])
            held = [*(party.slot for party in run.parts.clients.values()), *slots.values()]
            order = dict.fromkeys(name for slot in held for name in slot.get())
            for holder, merged in states.items():  # in the order of its file; frames carry the slots' order
                if holder == "federated":
                    run.federated.before = {key: merged[key] for key in order if key in merged}
                elif holder.startswith("federated-"):
                    cluster = holder.removeprefix("federated-")
                    run.federated.apart[cluster] = {key: merged[key] for key in order if key in merged}
            run.federated.aggregator.restore(manifest["aggregator"])
            run.federated.aggregator.begin(own_trunks(run.parts))
            if run.parts.planner:
                run.parts.planner.restore(manifest["planner"])
            run.exchange.restore(states.get("exchange", {}))
            run.framework.restore({**manifest["framework"], **states.get("framework", {})})
            run.meter.restore(manifest["meter"])
            run.clock.restore(manifest["clock"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint {path} does not fit this run: {error}") from error

    def _prove_records(self, path: Path, meter: Mapping[str, Any]) -> None:
        """What is to be continued must have its beginning, or it would get a hole."""
        run = self.run
        wanted = {run.out / "metrics.jsonl": (run.counters.lines, "lines")}
        if run.counters.uploads:
            wanted[run.out / "uploads.jsonl"] = (run.counters.uploads, "lines")
        if run.meter.folder is not None:
            wanted[run.meter.folder / "frames.jsonl"] = (meter["frames"], "lines")
            wanted[run.meter.folder / "frames.bin"] = (meter["offset"], "bytes")
        for file, (count, unit) in wanted.items():
            found = recorded(file, unit)
            if found < count:
                raise CheckpointError(
                    f"{file} has {found} {unit}, but {count} of them were there when the checkpoint {path} was made. "
                    "Put the file back as it was, or start the run again with another --out."
                )


def _append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error


def unevaluated(run: Run) -> str | None:
    """Why a run that is to be evaluated is not, as it now is; None: it is, or need not be.

    Only over a network can it be so: there each client brings evaluation data, or none.
    """
    config, clients = run.config, run.parts.clients
    names = run.evaluators()
    asked = config.data.eval is not None or config.eval_every is not None
    if not asked or any(clients[name].evaluation for name in names):
        return None
    others = [name for name in run.clients if clients[name].evaluation]
    if not others:
        return "no client has brought evaluation data. Let them join with --eval FILE."
    who = " and ".join(f"'{name}'" for name in names)
    whose = "whose models are the run's, have" if len(names) > 1 else "whose model is now the run's, has"
    return f"{who}, {whose} brought no evaluation data. Let each client join with --eval FILE."


def identity(config: RunConfig) -> dict[str, str]:
    """What must be equal for a checkpoint to be of this run."""
    return dict(config.identity)
