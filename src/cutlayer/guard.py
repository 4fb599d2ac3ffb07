"""The client's guard: holds what it is asked, and what it answers, to its owner's policy.

It stands between the link and the party: ``known`` and ``request`` before a verb is handled, ``reply`` before the
answer becomes bytes. They raise ``PolicyRefused`` with the rule's name. Whatever it does not know is refused: a verb, a
tensor, a value. A training micro-batch goes head_forward, tail_step (U-shape), head_backward, in ascending order; one
that was shown may be shown again only after an abort or in a new session, and it counts again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from cutlayer.asking import HOUSEKEEPING, check_like, check_owned, check_tensors, check_told, check_values, named
from cutlayer.contracts import SERVER
from cutlayer.entitled import Entitled
from cutlayer.errors import OutputError, PolicyRefused
from cutlayer.leaving import ANSWERS, BEGINNINGS, HOST_VERBS, Held, held_by, is_training, kinds_of, length_of
from cutlayer.links.net.messages import Type, pack_number
from cutlayer.policy import Policy
from cutlayer.released import Counts, Log
from cutlayer.wire import Header

__all__ = ["Guard", "Held", "held_by"]

KEPT_TURNS = 64  # of which it is known what they asked for
UNDER_WAY = 64  # micro-batches at a time, at most
BETWEEN = ("get_state", "set_state", "move", "begin_stage", "end_stage", "sketch", "host_get", "host_put")
SHAPED = ("set_state", "features")  # requests whose tensors are of the slot


@dataclass
class _Shown:
    """A micro-batch that is under way: what came last of it, and the shape of what was shown."""

    verb: str
    training: bool
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    directions: int  # in which it was looked around


class Guard:
    """One client's guard, for as long as its process lives.

    Args:
        policy: the owner's.
        log: of what leaves.
        counts: of what left, by this and earlier processes.
        client: the client's name.
        entitled: what the run, as it was offered, asks of the client.
        held: what its party holds now (``held_by``); it changes when cuts and ranks do.
        planned: the most optimizer steps that the run, as it was offered, gives the client.
        others: the clients that it shows something, which is sealed for them.
        bytes_of: of an answer, as it leaves.
    """

    def __init__(
        self, policy: Policy, log: Log, counts: Counts, *, client: str, entitled: Entitled, held: Callable[[], Held],
        planned: int, others: Collection[str] = (), bytes_of: Callable[[Header, Sequence[Tensor]], int] = length_of,
    ) -> None:  # fmt: skip
        self.policy, self.log, self.counts, self.client, self.held = policy, log, counts, client, held
        self.entitled, self.planned, self.others, self.bytes_of = entitled, planned, others, bytes_of
        self._greeted = False
        self._lock = threading.RLock()  # a connection is opened again while a request is answered
        self.begin()

    def begin(self) -> None:
        """A new session: turns begin anew, and nothing is under way. What was released stays counted."""
        self._turns: dict[int, tuple[str, int, int]] = {}
        self._newest = 0
        self._steps_per_epoch: int | None = None  # None: the run is not set up
        self.aborted()

    def aborted(self) -> None:
        """What was under way is forgotten, and may be shown again; that counts as a repeat."""
        self._open: dict[tuple[int, int, bool], _Shown] = {}
        self._last = (-1, -1)
        self._step = -1

    def known(self, header: Header) -> bool:
        """Judge a request's header as it came, before anything that was sealed in it is opened.

        Returns:
            whether it was sent before and answered, so that the answer is to be given ``again``, not made anew.

        Raises:
            PolicyRefused: with the rule.
        """
        if header.verb not in ANSWERS:
            self._refuse("verbs", f"'{header.verb}' is nothing that a client may be asked for.")
        self._check_client(header)
        asked = (header.verb, header.step, header.micro)
        if header.turn and header.turn <= self._newest:
            if self._turns.get(header.turn) == asked:
                return True
            self._refuse("order", f"{named(header)} has the turn {header.turn}, which another request had.")
        check_values(header)
        check_told(header, self.policy)
        return False

    def request(self, header: Header, tensors: Sequence[Tensor]) -> None:
        """Judge a new request, without its seal if it had one, before it is handled.

        Raises:
            PolicyRefused: with the rule.
        """
        if header.verb not in HOST_VERBS or header.client not in self.others:
            self._check_client(header)
        held = self.held()
        check_values(header)
        check_told(header, self.policy)
        self.entitled.check(header)
        check_tensors(header, tensors, held.head)
        if header.verb in SHAPED:
            check_owned(header, tensors, held.tensors)
        if header.verb == "host_update":
            self._bound("rounds", self.counts.trunk_rounds + 1)
        if header.verb in BEGINNINGS:
            self._may_begin(header, held)
        elif header.verb in ("tail_step", "head_backward", "probed"):
            self._may_go_on(header, tensors, held)
        elif header.verb in BETWEEN and any(shown.training for shown in self._open.values()):
            self._refuse("order", f"'{header.verb}' came in the middle of a training step.")

    def reply(self, asked: Header, header: Header, tensors: Sequence[Tensor]) -> None:
        """Judge an answer before it becomes bytes; count it and write it down.

        Raises:
            PolicyRefused: with the rule; nothing is counted, and nothing may leave.
            OutputError: the counts or the log cannot be written; nothing may leave.
        """
        kinds = self._kinds(asked, header, tensors)
        for kind in kinds:
            if not getattr(self.policy.may_leave, kind):
                self._refuse(f"may_leave.{kind}", f"the answer to {named(asked)} holds such.")
        with self._lock:
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
        with self._lock:
            length = self._length(header, tensors)
            self._leave(asked, header, tensors, length, self._kinds(asked, header, tensors), again=True)

    def housekeeping(self, header: Header) -> None:
        """Judge a request that keeps the two processes together, before it is carried out.

        Raises:
            PolicyRefused: with the rule.
        """
        if header.verb not in HOUSEKEEPING:
            self._refuse("verbs", f"'{header.verb}' is nothing that a client may be asked for.")
        self._check_client(header)
        check_values(header)
        self.entitled.check(header)
        if header.verb == "lead" and any(shown.training for shown in self._open.values()):
            self._refuse("order", "'lead' came in the middle of a training step.")

    def acknowledged(self, asked: Header, header: Header) -> None:
        """Count and write down the acknowledgement of such a request, which holds nothing but that it was done.

        Raises:
            PolicyRefused: the bytes are more than may leave.
            OutputError: the counts or the log cannot be written; nothing may leave.
        """
        if header.values or header.names:
            self._refuse("verbs", f"the answer to '{asked.verb}' holds more than that it was done.")
        with self._lock:
            self._leave(asked, header, [], self._length(header, []), {}, again=False)

    def greets(self, told: Mapping[str, Any], length: int) -> None:
        """Count and write down a hello that tells the sizes of the data, and is about to leave.

        Args:
            told: what it tells.
            length: its bytes.

        Raises:
            PolicyRefused: sizes may not leave, or no more bytes.
            OutputError: the counts or the log cannot be written; nothing may leave.
        """
        if not self.policy.may_leave.sizes:
            self._refuse("may_leave.sizes", "a run needs to know how much data each client has.")
        with self._lock:
            self._bytes(length)
            asked = Header("partition", verb="hello")
            header = Header("partition", receiver=SERVER, values=dict.fromkeys(told, ""))
            self._leave(asked, header, [], length, {"sizes": 0}, again=self._greeted)
            self._greeted = True

    def resent(self, turn: int, length: int) -> None:
        """Count and write down a reply that leaves once more, as a connection broke: bytes, but no new release.

        Raises:
            PolicyRefused: the bytes are more than may leave.
            OutputError: the counts or the log cannot be written; nothing may leave.
        """
        with self._lock:
            self._bytes(length)
            asked, header = Header("partition", turn=turn), Header("partition", "ack", receiver=SERVER)
            self._leave(asked, header, [], length, {}, again=True)

    def words(self, error: BaseException, asked: Header) -> str:
        """What the server may be told of an error: its words, or only its kind, which is never refused. It is counted.

        Where the words would be more than may leave in all, only the name of its kind does.
        """
        may, kind, most = self.policy.may_leave.error_texts, type(error).__name__, self.policy.most.bytes
        said = f"{kind}: {error}" if may else f"{kind} (its words stay with the client)"
        with self._lock:
            length = len(pack_number(Type.ERROR, asked.turn, said))
            if most is not None and self.counts.bytes + length > most:
                may, said, length = False, kind, len(pack_number(Type.ERROR, asked.turn, kind))
            header = Header("partition", receiver=SERVER)
            try:
                self._leave(asked, header, [], length, {"error_texts": 0} if may else {}, again=False)
            except OutputError:  # it may be what the error is about; the server waits for an answer in any case
                return kind
        return said

    def told(self) -> str:
        """What left, in plain words."""
        return self.counts.told(self.client)

    # ------------------------------------------------------------ requests

    def _check_client(self, header: Header) -> None:
        if header.client not in ("", self.client):
            self._refuse("verbs", f"a request for client '{header.client}' came to '{self.client}'.")

    def _may_begin(self, header: Header, held: Held) -> None:
        """Steps 2 and 3 of a micro-batch or an evaluation batch."""
        training, place, most = is_training(header), (header.step, header.micro), self.policy.most
        if (*place, not training) in self._open:
            other = "an evaluation" if training else "training"
            self._refuse("order", f"{named(header)} is still open as one of {other}.")
        if not training:
            if not self.policy.may_leave.evaluation:
                self._refuse("may_leave.evaluation", "the server asks for evaluation data.")
            if header.step >= held.evaluations:
                self._refuse("evaluation", f"batch {header.step} was asked for; there are {held.evaluations}.")
            self._bound("evaluations", self.counts.evaluations + 1)
            return
        if header.verb == "probe" and held.has_tail:
            self._refuse("order", "'probe' needs a loss that the server computes, and here the client does.")
        if self._steps_per_epoch is None:
            self._refuse("order", "training began before the run was set up.")
        if header.step >= self.planned:
            self._refuse("told", f"step {header.step} was asked for; the run has {self.planned} of this client.")
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
        if most.epochs is not None and steps > most.epochs * self._steps_per_epoch:
            self._refuse("most.epochs", f"{steps} steps are more than {most.epochs} passes over the data.")

    def _may_go_on(self, header: Header, tensors: Sequence[Tensor], held: Held) -> None:
        """Steps 6 and 10 of what was begun."""
        training = is_training(header)
        shown = self._open.get((header.step, header.micro, training))
        before = {"tail_step": "head_forward", "probed": "probe"}.get(
            header.verb, "tail_step" if held.has_tail else "head_forward"
        )
        if shown is None or shown.verb != before or (header.verb == "tail_step" and not held.has_tail):
            self._refuse("order", f"{named(header)} came without the {before} that goes before it.")
        check_like(header, tensors, shown.shape, shown.dtype, shown.directions)

    def _bound(self, name: str, value: int) -> None:
        most = getattr(self.policy.most, name)
        if most is not None and value > most:
            self._refuse(f"most.{name}", f"this would be number {value}; allowed: {most} in all.")

    # ------------------------------------------------------------ answers

    def _kinds(self, asked: Header, header: Header, tensors: Sequence[Tensor]) -> dict[str, int]:
        kinds = kinds_of(asked, header, tensors, self.held())
        if header.receiver == self.client:  # it stays
            return {}
        if header.receiver in self.others:
            kinds.setdefault("peers", sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        computed = asked.sender == self.client or asked.sender in self.others
        if computed and asked.verb == "head_backward" and "loss" in header.values:
            kinds.setdefault("losses", 0)  # of the two-part split too: a client computed it, not the server
        return kinds

    def _length(self, header: Header, tensors: Sequence[Tensor]) -> int:
        return self._bytes(self.bytes_of(header, tensors))

    def _bytes(self, length: int) -> int:
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
            hidden = dict(zip(header.names, tensors, strict=True)).get("hidden")
            shape, dtype = (None, None) if hidden is None else (tuple(hidden.shape), hidden.dtype)
            directions = sum(name.startswith("plus.") for name in header.names)
            self._open[(*place, training)] = _Shown(verb, training, shape, dtype, directions)
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
        elif verb == "host_update":
            counts.trunk_trained = True
        elif verb in ("host_get", "host_put") and counts.trunk_trained:
            counts.trunk_rounds, counts.trunk_trained = counts.trunk_rounds + 1, False
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
        if header.receiver == self.client:  # of what stays here the server is only told that it is there
            header, tensors = header.but(values={}, names=()), []
        counts.bytes += length
        counts.frames += 1
        for kind, size in kinds.items():
            pair = counts.kinds.setdefault(kind, [0, 0])
            pair[0], pair[1] = pair[0] + 1, pair[1] + size
        counts.save()
        self.log.write(asked, header, tensors, length, kinds, again)

    @staticmethod
    def _refuse(rule: str, message: str) -> NoReturn:
        raise PolicyRefused(rule, message)
