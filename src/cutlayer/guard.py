"""The client's guard: holds what it is asked, and what it answers, to its owner's policy.

It stands between the link and the party: ``request`` before a verb is handled, ``reply`` before the answer becomes
bytes. Both raise ``PolicyRefused`` with the rule's name. Whatever it does not know is refused: a verb, a tensor, a
value. A training micro-batch goes head_forward, tail_step (U-shape), head_backward, in ascending order; one that was
shown may be shown again only after an abort or in a new session, and it counts again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from cutlayer.errors import OutputError, PolicyRefused
from cutlayer.leaving import ANSWERS, BEGINNINGS, Held, held_by, is_training, kinds_of
from cutlayer.models.slots import parameter_of
from cutlayer.parties.client import ClientParty
from cutlayer.policy import Policy, Told
from cutlayer.released import Counts, Log
from cutlayer.wire import Header, frame_length

__all__ = ["Guard", "Held", "guarded", "held_by"]

Answer = tuple[Header, list[Tensor]]
KEPT_TURNS = 64  # of which it is known what they asked for
KEPT_ANSWERS = 4  # that can be given again
UNDER_WAY = 64  # micro-batches at a time, at most
BETWEEN = ("get_state", "set_state", "move", "begin_stage", "end_stage")
SHAPED = {"set_state": "owned", "features": "owned"}  # requests whose tensors are of the slot


@dataclass
class _Shown:
    """A micro-batch that is under way: what came last of it, and the shape of what was shown."""

    verb: str
    training: bool
    shape: tuple[int, ...] | None


class Guard:
    """One client's guard, for as long as its process lives.

    Args:
        policy: the owner's.
        log: of what leaves.
        counts: of what left, by this and earlier processes.
        client: the client's name.
        held: what its party holds now (``held_by``); it changes when cuts and ranks do.
    """

    def __init__(self, policy: Policy, log: Log, counts: Counts, *, client: str, held: Callable[[], Held]) -> None:
        self.policy, self.log, self.counts, self.client, self.held = policy, log, counts, client, held
        self._steps_per_epoch: int | None = None
        self.begin()

    def begin(self) -> None:
        """A new session: turns begin anew, and nothing is under way. What was released stays counted."""
        self._turns: dict[int, tuple[str, int, int]] = {}
        self._newest = 0
        self.aborted()

    def aborted(self) -> None:
        """What was under way is forgotten, and may be shown again; that counts as a repeat."""
        self._open: dict[tuple[int, int, bool], _Shown] = {}
        self._last = (-1, -1)
        self._step = -1

    def request(self, header: Header, tensors: Sequence[Tensor]) -> bool:
        """Judge a request before it is handled.

        Returns:
            whether it was sent before and answered, so that the answer is to be given ``again``, not made anew.

        Raises:
            PolicyRefused: with the rule.
        """
        if header.verb not in ANSWERS:
            self._refuse("verbs", f"'{header.verb}' is nothing that a client may be asked for.")
        if header.client not in ("", self.client):
            self._refuse("verbs", f"a request for client '{header.client}' came to '{self.client}'.")
        asked = (header.verb, header.step, header.micro)
        if header.turn and header.turn <= self._newest:
            if self._turns.get(header.turn) == asked:
                return True
            self._refuse("order", f"{self._named(header)} has the turn {header.turn}, which another request had.")
        held = self.held()
        self._check_numbers(header)
        self._check_tensors(header, tensors, held)
        if header.verb in BEGINNINGS:
            self._may_begin(header, held)
        elif header.verb in ("tail_step", "head_backward", "probed"):
            self._may_go_on(header, tensors, held)
        elif header.verb in BETWEEN and any(shown.training for shown in self._open.values()):
            self._refuse("order", f"'{header.verb}' came in the middle of a training step.")
        return False

    def reply(self, asked: Header, header: Header, tensors: Sequence[Tensor]) -> None:
        """Judge an answer before it becomes bytes; count it and write it down.

        Raises:
            PolicyRefused: with the rule; nothing is counted, and nothing may leave.
            OutputError: the counts or the log cannot be written; nothing may leave.
        """
        kinds = kinds_of(asked, header, tensors, self.held())
        for kind in kinds:
            if not getattr(self.policy.may_leave, kind):
                self._refuse(f"may_leave.{kind}", f"the answer to {self._named(asked)} holds such.")
        length = self._length(header, tensors)
        self._commit(asked, header, tensors)
        try:
            self._leave(asked, header, tensors, length, kinds, again=False)
        except OutputError:
            self.aborted()  # it was counted, but not shown: with room on the disk it may be asked for again
            raise
        if asked.turn:
            self._turns[asked.turn] = (asked.verb, asked.step, asked.micro)
            if len(self._turns) > KEPT_TURNS:
                del self._turns[next(iter(self._turns))]
            self._newest = asked.turn

    def again(self, asked: Header, header: Header, tensors: Sequence[Tensor]) -> None:
        """Count and write down an answer that is given once more: bytes, but no new release.

        Raises:
            PolicyRefused: the bytes are more than may leave.
        """
        length = self._length(header, tensors)
        self._leave(asked, header, tensors, length, kinds_of(asked, header, tensors, self.held()), again=True)

    def words(self, error: BaseException) -> str:
        """What the server may be told of an error: its words, or only its kind."""
        if not self.policy.may_leave.error_texts:
            return f"{type(error).__name__} (its words stay with the client)"
        self.counts.kinds.setdefault("error_texts", [0, 0])[0] += 1
        self.counts.save()
        return f"{type(error).__name__}: {error}"

    def told(self) -> str:
        """What left, in plain words."""
        return self.counts.told(self.client)

    # ------------------------------------------------------------ requests

    def _check_numbers(self, header: Header) -> None:
        told = self.policy.told
        for name, value in header.values.items():
            if isinstance(value, float) and not math.isfinite(value):
                self._refuse("told", f"{self._named(header)} tells {name} {value}, which is not finite.")
            bounds = getattr(told, name) if name in Told.model_fields else None
            if bounds is not None and not bounds.allow(self._number(header, name)):
                self._refuse(f"told.{name}", f"{self._named(header)} tells {name} {value}; allowed: {bounds}.")
        if header.verb in ("set_up", "move") and "head_blocks" in header.values:
            blocks = self._number(header, "head_blocks")
            if blocks < self.policy.head_blocks:
                self._refuse(
                    "head_blocks", f"the server gives {blocks:g} blocks; allowed: {self.policy.head_blocks} or more."
                )
        if header.verb == "set_up":
            self._check_set_up(header)
        if header.verb == "move" and not self.policy.may_leave.head_adapter:
            self._refuse(
                "may_leave.head_adapter", "blocks that move to the server take their trained tensors with them."
            )

    def _check_set_up(self, header: Header) -> None:
        allowed, most = self.policy.partitions, self.policy.most.steps
        partition = "two-part-split" if self._number(header, "tail_blocks") < 0 else "u-shaped-split"
        if allowed is not None and partition not in allowed:
            self._refuse("partitions", f"the server sets up '{partition}'; allowed: {', '.join(allowed)}.")
        steps = self._number(header, "steps")
        if most is not None and steps > most:
            self._refuse("most.steps", f"the server plans {steps:g} steps; allowed: {most}.")

    def _check_tensors(self, header: Header, tensors: Sequence[Tensor], held: Held) -> None:
        for name, tensor in zip(header.names, tensors, strict=True):
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                self._refuse("finite", f"{self._named(header)} brings '{name}' with values that are not finite.")
            if header.verb not in SHAPED:
                continue
            own = held.tensors.get(parameter_of(name))
            if own is None:
                self._refuse("owned", f"{self._named(header)} brings '{name}', which is not of this client's part.")
            shape, dtype = own
            if name != parameter_of(name):  # the optimizer's state of it, which may be one number, or a row
                fits = tensor.is_floating_point() and tensor.numel() <= math.prod(shape)
            else:
                fits = tuple(tensor.shape) == shape and tensor.dtype == dtype
            if not fits:
                self._refuse(
                    "owned",
                    f"{self._named(header)} brings '{name}' as {list(tensor.shape)} {tensor.dtype}; this client has "
                    f"{list(shape)} {dtype}.",
                )

    def _may_begin(self, header: Header, held: Held) -> None:
        """Steps 2 and 3 of a micro-batch or an evaluation batch."""
        training, place, most = is_training(header), (header.step, header.micro), self.policy.most
        if not training:
            if not self.policy.may_leave.evaluation:
                self._refuse("may_leave.evaluation", "the server asks for evaluation data.")
            if header.step >= held.evaluations:
                self._refuse("evaluation", f"batch {header.step} was asked for; there are {held.evaluations}.")
            self._bound("evaluations", self.counts.evaluations + 1)
            return
        if place <= self._last:
            self._refuse(
                "order",
                f"step {header.step}, micro-batch {header.micro} was asked for after step {self._last[0]}, micro-batch "
                f"{self._last[1]}, which was shown.",
            )
        if len(self._open) >= UNDER_WAY:
            self._refuse("order", f"{UNDER_WAY} micro-batches were shown and none of them was finished.")
        self._bound("rounds", self.counts.rounds + 1)
        steps = self.counts.steps + self._is_new(header)
        self._bound("steps", steps)
        if place <= self.counts.furthest:
            self._bound("repeats", self.counts.repeats + 1)
        if most.epochs is not None:
            if self._steps_per_epoch is None:
                self._refuse("order", "training began before the run was set up.")
            if steps > most.epochs * self._steps_per_epoch:
                self._refuse("most.epochs", f"{steps} steps are more than {most.epochs} passes over the data.")

    def _may_go_on(self, header: Header, tensors: Sequence[Tensor], held: Held) -> None:
        """Steps 6 and 10 of what was begun."""
        training = is_training(header)
        shown = self._open.get((header.step, header.micro, training))
        before = {"tail_step": "head_forward", "probed": "probe"}.get(
            header.verb, "tail_step" if held.has_tail else "head_forward"
        )
        if shown is None or shown.verb != before or (header.verb == "tail_step" and not held.has_tail):
            self._refuse("order", f"{self._named(header)} came without the {before} that goes before it.")
        if shown.shape is not None:
            for name, tensor in zip(header.names, tensors, strict=True):
                if name == "hidden" and tuple(tensor.shape) != shown.shape:
                    self._refuse(
                        "shape",
                        f"{self._named(header)} brings {list(tensor.shape)} where {list(shown.shape)} was shown.",
                    )

    def _bound(self, name: str, value: int) -> None:
        most = getattr(self.policy.most, name)
        if most is not None and value > most:
            self._refuse(f"most.{name}", f"this would be number {value}; allowed: {most} in all.")

    # ------------------------------------------------------------ answers

    def _length(self, header: Header, tensors: Sequence[Tensor]) -> int:
        length = frame_length(header, [t.shape for t in tensors], [t.dtype for t in tensors])
        most = self.policy.most.bytes
        if most is not None and self.counts.bytes + length > most:
            self._refuse(
                "most.bytes", f"{self.counts.bytes:,} bytes left, {length:,} more would; allowed: {most:,} in all."
            )
        return length

    def _is_new(self, header: Header) -> bool:
        """Whether a micro-batch is the first of its optimizer step."""
        return header.step != self._step

    def _commit(self, asked: Header, header: Header, tensors: Sequence[Tensor]) -> None:
        """Take note of what an answer changes."""
        counts, verb = self.counts, asked.verb
        place = (asked.step, asked.micro)
        if verb in BEGINNINGS:
            training = is_training(asked)
            shapes = dict(zip(header.names, (tuple(t.shape) for t in tensors), strict=True))
            self._open[(*place, training)] = _Shown(verb, training, shapes.get("hidden"))
            if training:
                counts.steps += self._is_new(asked)
                counts.micros += 1
                counts.repeats += place <= counts.furthest
                counts.furthest = max(counts.furthest, place)
                counts.trained = True
                self._last, self._step = place, asked.step
            else:
                counts.evaluations += 1
                if not self.held().has_tail:
                    del self._open[(*place, training)]
        elif verb == "tail_step":
            if is_training(asked):
                self._open[(*place, True)].verb = verb
            else:
                del self._open[(*place, False)]
        elif verb in ("head_backward", "probed"):
            del self._open[(*place, True)]
        elif verb in ("get_state", "set_state") and counts.trained:
            counts.rounds, counts.trained = counts.rounds + 1, False
        elif verb == "set_up":
            self._steps_per_epoch = int(header.values.get("steps_per_epoch", 0))
        elif verb == "abort":
            self.aborted()

    def _leave(
        self,
        asked: Header,
        header: Header,
        tensors: Sequence[Tensor],
        length: int,
        kinds: Mapping[str, int],
        *,
        again: bool,
    ) -> None:
        counts = self.counts
        counts.bytes += length
        counts.frames += 1
        for kind, size in kinds.items():
            pair = counts.kinds.setdefault(kind, [0, 0])
            pair[0], pair[1] = pair[0] + 1, pair[1] + size
        counts.save()
        self.log.write(asked, header, tensors, length, kinds, again)

    def _number(self, header: Header, name: str) -> float:
        """A number that a request tells; 0 where it tells none."""
        value = header.values.get(name, 0)
        if isinstance(value, str):
            self._refuse("told", f"{self._named(header)} tells {name} '{value}', which is no number.")
        return float(value)

    @staticmethod
    def _named(header: Header) -> str:
        return f"'{header.verb}' of step {header.step}, micro-batch {header.micro}"

    @staticmethod
    def _refuse(rule: str, message: str) -> NoReturn:
        raise PolicyRefused(rule, message)


def guarded(answer: Callable[..., Answer], guard: Guard) -> Callable[[ClientParty, Header, Sequence[Tensor]], Answer]:
    """``parties.client.answer``, held to a policy; a request that is sent again gets the same answer."""
    kept: dict[int, Answer] = {}

    def answered(party: ClientParty, header: Header, tensors: Sequence[Tensor]) -> Answer:
        if guard.request(header, tensors):
            if header.turn not in kept:
                raise PolicyRefused("order", f"turn {header.turn} was answered, and its answer is no longer kept.")
            guard.again(header, *kept[header.turn])
            return kept[header.turn]
        reply, shown = answer(party, header, tensors)
        guard.reply(header, reply, shown)
        for turn in [
            turn for turn, (old, _) in kept.items() if old.kind == "state" or turn <= header.turn - KEPT_ANSWERS
        ]:
            del kept[turn]  # a state is the slot's own tensors, which the next request may change
        kept[header.turn] = (reply, [tensor.detach() for tensor in shown])
        return reply, shown

    return answered
