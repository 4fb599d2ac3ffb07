"""The guard, verb by verb: each rule refuses what it says, counts survive, and the log says what left."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cutlayer.entitled import Entitled
from cutlayer.errors import CheckpointError, OutputError, PolicyRefused
from cutlayer.guard import Guard, Held
from cutlayer.guarded import guarded
from cutlayer.leaving import ANSWERS, HOST_VERBS, TRUNK_VERBS
from cutlayer.links.net.messages import Type, pack_number
from cutlayer.parties.client import ClientParty
from cutlayer.parties.verbs import VERB_STEPS
from cutlayer.policy import MayLeave, Policy, load_policy
from cutlayer.released import WORDS, Counts, Log
from cutlayer.wire import Header, encode

# ---------------------------------------------------------------- one verb at a time

SHAPE, STEPS = (2, 3, 4), 100
HELD = Held(
    head=frozenset({"head.a"}), tail=frozenset({"tail.b"}), has_tail=True, evaluations=2,
    tensors={"head.a": ((2, 4), torch.float32), "tail.b": ((3,), torch.float32), "other.c": ((1,), torch.float32)},
)  # fmt: skip
TOLD = {"loss": 1.0, "tokens": 5, "label_tokens": 4, "last": True}
HOW = {"graph": True, "head_weight": 1.0, "update": True}
ANYTHING = Entitled(  # a run that asks for all that a run can ask for with backpropagation
    cuts=None, moves=True, allots=True, ranks=True, directions=0, exchanges=True, hands_on=True, resets=True,
    moments=True, trunk_moments="average", arranges=True, clips=True, caches=True, counts_steps=True, hosts=True,
    asks=frozenset({"histogram", "features", "begin_stage", "end_stage"}),
)  # fmt: skip


class Client:
    """A guard, with requests and answers as a driver and a party would make them."""

    def __init__(
        self, folder: Path, policy: Any = None, *, two_part: bool = False, held: Held = HELD, ready: bool = True
    ) -> None:
        if two_part:
            held = Held(held.head, frozenset(), held.tensors, False, held.evaluations)
        self.turn, self.two_part = 0, two_part
        counts = Counts.load(folder / "counts.json")
        self.guard = Guard(
            load_policy(policy) if policy else Policy(), Log(folder / "sent.jsonl"), counts, client="ann",
            entitled=ANYTHING, held=lambda: held, planned=STEPS,
        )  # fmt: skip
        if ready:
            self.set_up()

    def set_up(self) -> None:
        """As after a set-up, of which nothing is counted."""
        self.guard._steps_per_epoch = 1

    def asked(self, verb: str, step: int = 0, micro: int = 0, values: Any = None, **tensors: torch.Tensor) -> Header:
        self.turn += 1
        header = Header(
            VERB_STEPS.get(verb, "partition"), verb=verb, sender="server", receiver="ann", client="ann", step=step,
            micro=micro, turn=self.turn, values=HOW if values is None else values, names=tuple(tensors),
        )  # fmt: skip
        assert not self.guard.known(header)
        self.guard.request(header, list(tensors.values()))
        return header

    def gives(self, asked: Header, values: Any = None, **tensors: torch.Tensor) -> None:
        header = Header(
            asked.step_name, "ack", "", "ann", "server", "ann", "", asked.step, asked.micro, asked.turn, values or {},
            tuple(tensors),
        )  # fmt: skip
        self.guard.reply(asked, header, list(tensors.values()))

    def forward(self, step: int = 0, micro: int = 0, *, graph: bool = True) -> None:
        labels = {"labels": torch.zeros(2, 3, dtype=torch.int32)} if self.two_part else {}
        asked = self.asked("head_forward", step, micro, {**HOW, "graph": graph})
        self.gives(asked, {"last": True, "needs_gradient": True}, hidden=torch.zeros(SHAPE), **labels)

    def tail(self, step: int = 0, micro: int = 0, *, graph: bool = True, shape: Any = SHAPE) -> None:
        asked = self.asked("tail_step", step, micro, {**HOW, "graph": graph}, hidden=torch.zeros(shape))
        if graph:
            self.gives(asked, {"last": True}, hidden=torch.zeros(SHAPE))
        else:
            self.gives(asked, {**TOLD, "correct": 1})

    def backward(self, step: int = 0, micro: int = 0, *, shape: Any = SHAPE, **values: Any) -> None:
        asked = self.asked("head_backward", step, micro, {**HOW, **values}, hidden=torch.zeros(shape))
        self.gives(asked, TOLD)

    def gradient(self, **tensors: torch.Tensor) -> None:
        """The request of a backward, as it says that it has a gradient."""
        asked = Header(
            "return_gradients", "gradient", "head_backward", "server", "ann", "ann", turn=self.turn + 1, values=HOW,
            names=tuple(tensors),
        )  # fmt: skip
        self.guard.request(asked, list(tensors.values()))

    def probe(self, step: int = 0) -> None:
        """Look around in one direction, where the server computes the loss."""
        now = self.guard.held()
        self.guard.held = lambda: Held(now.head, frozenset(), now.tensors, False, now.evaluations)
        self.looks()
        shown = {name: torch.zeros(SHAPE) for name in ("hidden", "plus.0", "minus.0")}
        self.gives(self.asked("probe", step, values={"directions": 1}), **shown)

    def looks(self) -> None:
        """The run has no backpropagation."""
        self.guard.entitled = replace(ANYTHING, directions=1)

    def whole(self, step: int = 0, micro: int = 0) -> None:
        self.forward(step, micro)
        if not self.two_part:
            self.tail(step, micro)
        self.backward(step, micro)

    def put(self, **tensors: torch.Tensor) -> None:
        names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        self.gives(self.asked("set_state", values={"version": -1, "reset": False}, **names))

    def get(self, **tensors: torch.Tensor) -> None:
        names = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        self.gives(self.asked("get_state", values={"optimizer": False, "part": "own"}), {"version": 1}, **names)


def order_(*parts: tuple[str, int, int]) -> Callable[[Client], None]:
    """Does these in order."""

    def do(client: Client) -> None:
        for name, step, micro in parts:
            getattr(client, name)(step, micro)

    return do


GOOD, BAD = torch.zeros(2, 4), torch.tensor([[float("nan")] * 4] * 2)
HEAD = {"head.a": GOOD}
CASES: dict[str, tuple[Any, Callable[[Client], Any], str, Callable[[Client], Any]]] = {
    # the policy, what is refused, by which rule, and what of the same kind passes
    "tail before head": (None, lambda c: c.tail(), "order", order_(("forward", 0, 0), ("tail", 0, 0))),
    "backward before tail": (
        None, order_(("forward", 0, 0), ("backward", 0, 0)), "order", order_(("whole", 0, 0), ("whole", 1, 0)),
    ),
    "tail twice": (None, order_(("forward", 0, 0), ("tail", 0, 0), ("tail", 0, 0)), "order", lambda c: c.whole()),
    "backward twice": (None, order_(("whole", 0, 0), ("backward", 0, 0)), "order", lambda c: c.whole()),
    "the same again": (
        None, order_(("whole", 0, 0), ("whole", 0, 0)), "order", order_(("whole", 0, 0), ("whole", 0, 1)),
    ),
    "going back": (None, order_(("whole", 3, 0), ("whole", 2, 1)), "order", order_(("whole", 3, 0), ("whole", 5, 0))),
    "a state in a step": (
        None, lambda c: (c.forward(), c.put(head__a=GOOD)), "order", lambda c: (c.whole(), c.put(head__a=GOOD)),
    ),
    "too many at once": (
        None, lambda c: [c.forward(n) for n in range(65)], "order", lambda c: [c.forward(n) for n in range(64)],
    ),
    "an unknown verb": (None, lambda c: c.asked("open_the_door"), "verbs", lambda c: c.asked("grad_norm")),
    "a private name": (None, lambda c: c.asked("__init__"), "verbs", lambda c: c.asked("set_up", values={})),
    "an unknown tensor": (
        None, lambda c: c.gives(c.asked("head_forward"), input_ids=GOOD), "verbs",
        lambda c: c.gives(c.asked("head_forward"), hidden=GOOD),
    ),
    "an unknown value": (
        None, lambda c: c.gives(c.asked("grad_norm"), {"text": "a row"}), "verbs",
        lambda c: c.gives(c.asked("grad_norm"), {"squared_norm": 1.0}),
    ),
    "a stranger's tensor": (None, lambda c: c.get(trunk__d=GOOD), "verbs", lambda c: c.get(head__a=GOOD)),
    "another evaluation": (
        None, lambda c: c.forward(2, graph=False), "evaluation",
        lambda c: (c.forward(1, graph=False), c.tail(1, graph=False)),
    ),
    "evaluation of what is trained on": (
        None, lambda c: (c.forward(1), c.forward(1, graph=False)), "order",
        lambda c: (c.whole(1), c.forward(1, graph=False), c.tail(1, graph=False)),
    ),
    "training on what is evaluated": (
        None, lambda c: (c.forward(1, graph=False), c.forward(1)), "order",
        lambda c: (c.forward(1, graph=False), c.tail(1, graph=False), c.forward(1)),
    ),
    "evaluation": (
        {"may_leave": {"evaluation": False}}, lambda c: c.forward(0, graph=False), "may_leave.evaluation",
        lambda c: c.whole(),
    ),
    "a gradient of another shape": (
        None, lambda c: (c.forward(), c.tail(), c.backward(shape=(2, 3, 5))), "shape", lambda c: c.whole(),
    ),
    "hidden states of another shape": (None, lambda c: (c.forward(), c.tail(shape=(1,))), "shape", lambda c: c.whole()),
    "not finite": (None, lambda c: c.put(head__a=BAD), "finite", lambda c: c.put(head__a=GOOD)),
    "another's tensor": (None, lambda c: c.put(trunk__d=GOOD), "owned", lambda c: c.put(tail__b=torch.zeros(3))),
    "another shape": (None, lambda c: c.put(head__a=GOOD.T.contiguous()), "owned", lambda c: c.put(head__a=GOOD)),
    "another type": (None, lambda c: c.put(head__a=GOOD.double()), "owned", lambda c: c.put(head__a=GOOD)),
    "another's moments": (
        None, lambda c: c.put(**{"optimizer/trunk__d/exp_avg": GOOD}), "owned",
        lambda c: c.put(**{"optimizer/head__a/exp_avg": GOOD, "optimizer/head__a/step": torch.zeros(())}),
    ),
    "a weight below": (
        None, lambda c: (c.forward(), c.tail(), c.backward(head_weight=-1.0)), "told.head_weight", lambda c: c.whole(),
    ),
    "a weight above": (
        {"told": {"head_weight": {"at_most": 1}}}, lambda c: (c.forward(), c.tail(), c.backward(head_weight=2.0)),
        "told.head_weight", lambda c: c.whole(),
    ),
    "a weight above of what is trained for others": (
        {"told": {"head_weight": {"at_most": 1}}}, lambda c: c.asked("host_backward", values={"trunk_weight": 2.0}),
        "told.head_weight", lambda c: c.asked("host_backward", values={"trunk_weight": 1.0}),
    ),
    "a scale above": (
        {"told": {"scale": {"at_least": 0, "at_most": 1}}}, lambda c: c.asked("update", values={"scale": 1.5}),
        "told.scale", lambda c: c.asked("update", values={"scale": 0.5}),
    ),
    "a weight that is none": (
        None, lambda c: (c.forward(), c.tail(), c.backward(head_weight=float("inf"))), "told", lambda c: c.whole(),
    ),
    "a word for a number": (
        None, lambda c: c.asked("update", values={"scale": "model_fields"}), "told",
        lambda c: c.asked("update", values={"scale": 1, "model_fields": "x"}),
    ),
    "a smaller head": (
        {"head_blocks": 2}, lambda c: c.asked("move", values={"head_blocks": 1}), "head_blocks",
        lambda c: c.asked("move", values={"head_blocks": 2}),
    ),
    "a smaller head at set-up": (
        {"head_blocks": 2}, lambda c: c.asked("set_up", values={"head_blocks": 1}), "head_blocks",
        lambda c: c.asked("set_up", values={"head_blocks": 2}),
    ),
    "another partition": (
        {"partitions": "u-shaped-split"}, lambda c: c.asked("set_up", values={"tail_blocks": -1}), "partitions",
        lambda c: c.asked("set_up", values={"tail_blocks": 0}),
    ),
    "a longer plan": (
        {"most": {"steps": 5}}, lambda c: c.asked("set_up", values={"steps": 6}), "most.steps",
        lambda c: c.asked("set_up", values={"steps": 5}),
    ),
    "a move that takes tensors": (
        {"may_leave": {"head_adapter": False}}, lambda c: c.asked("move", values={"head_blocks": 2}),
        "may_leave.head_adapter", lambda c: c.get(tail__b=torch.zeros(3)),
    ),
    "the head": (
        {"may_leave": {"head_adapter": False}}, lambda c: c.get(head__a=GOOD), "may_leave.head_adapter",
        lambda c: c.get(tail__b=torch.zeros(3)),
    ),
    "the tail": (
        {"may_leave": {"tail_adapter": False}}, lambda c: c.get(tail__b=torch.zeros(3)), "may_leave.tail_adapter",
        lambda c: c.get(head__a=GOOD),
    ),
    "what is hosted": (
        {"may_leave": {"hosted": False}}, lambda c: c.get(other__c=torch.zeros(1)), "may_leave.hosted",
        lambda c: c.get(head__a=GOOD),
    ),
    "a sketch": (
        None, lambda c: c.gives(c.asked("sketch"), sketch=GOOD), "may_leave.sketches",
        lambda c: c.gives(c.asked("update")),
    ),
    "a histogram": (
        None, lambda c: c.gives(c.asked("histogram"), {"category/3": 4}), "may_leave.sketches",
        lambda c: c.gives(c.asked("histogram")),
    ),
    "features": (
        None, lambda c: c.gives(c.asked("features", **HEAD), {"category/3": 4}, hidden=GOOD), "may_leave.features",
        lambda c: c.gives(c.asked("features", **HEAD)),
    ),
    "sample numbers": (
        None, lambda c: c.gives(c.asked("head_forward"), samples=GOOD), "may_leave.sample_numbers",
        lambda c: c.forward(),
    ),
    "repeats": (
        {"most": {"repeats": 1}}, lambda c: [(c.whole(), c.guard.aborted()) for _ in range(3)], "most.repeats",
        lambda c: [(c.whole(), c.guard.aborted()) for _ in range(2)],
    ),
    "looking around is training": (
        {"most": {"steps": 1}}, lambda c: [c.probe(n) for n in range(2)], "most.steps", lambda c: c.probe(0),
    ),
    "looking around where the client has the loss": (
        None, lambda c: (c.looks(), c.asked("probe", values={"directions": 1})), "order", lambda c: c.probe(0),
    ),
    "slopes of other directions": (
        None, lambda c: (c.probe(), c.asked("probed", values={}, slopes=torch.zeros(3))), "shape",
        lambda c: (c.probe(), c.asked("probed", values={}, slopes=torch.zeros(1))),
    ),
    "no slopes": (
        None, lambda c: (c.probe(), c.asked("probed", values={})), "shape",
        lambda c: (c.probe(), c.asked("probed", values={}, slopes=torch.zeros(1))),
    ),
    "no hidden states": (None, lambda c: (c.forward(), c.asked("tail_step")), "shape", lambda c: c.whole()),
    "whole numbers for hidden states": (
        None, lambda c: (c.forward(), c.asked("tail_step", hidden=torch.zeros(SHAPE, dtype=torch.int64))), "shape",
        lambda c: c.whole(),
    ),
    "hidden states of another type": (
        None, lambda c: (c.forward(), c.asked("tail_step", hidden=torch.zeros(SHAPE).double())), "shape",
        lambda c: c.whole(),
    ),
    "a gradient that is none": (
        None, lambda c: (c.forward(), c.tail(), c.gradient()), "shape",
        lambda c: (c.forward(), c.tail(), c.gradient(hidden=torch.zeros(SHAPE))),
    ),
    "a gradient that is not finite": (
        None, lambda c: (c.forward(), c.tail(), c.gradient(hidden=torch.full(SHAPE, float("nan")))), "finite",
        lambda c: c.whole(),
    ),
    "features of a head without its tensors": (
        None, lambda c: c.asked("features", values={"number": 0}), "shape",
        lambda c: c.asked("features", values={"number": 0}, **HEAD),
    ),
    "a part that is none": (
        None, lambda c: c.asked("get_state", values={"part": "x"}), "told",
        lambda c: c.asked("get_state", values={"part": "hosted"}),
    ),
    "a version that is no number": (
        None, lambda c: c.asked("set_state", values={"version": "x"}), "told",
        lambda c: c.asked("set_state", values={"version": -1}),
    ),
    "a loss that is no number": (
        None, lambda c: (c.forward(), c.tail(), c.backward(loss="x")), "told",
        lambda c: (c.forward(), c.tail(), c.backward(loss=1.0)),
    ),
    "a flag that is none": (
        None, lambda c: c.asked("head_forward", values={**HOW, "graph": 1}), "told", lambda c: c.forward(),
    ),
    "a word for a flag": (
        None, lambda c: c.asked("set_state", values={"version": -1, "reset": "no"}), "told",
        lambda c: c.asked("set_state", values={"version": -1, "reset": False}),
    ),
    "half a block": (
        None, lambda c: c.asked("move", values={"head_blocks": 0.5}), "told",
        lambda c: c.asked("move", values={"head_blocks": 1}),
    ),
    "training before the set-up": (
        None, lambda c: (c.guard.begin(), c.forward()), "order",
        lambda c: (c.guard.begin(), c.forward(1, graph=False), c.gives(c.asked("set_up", values={})), c.forward()),
    ),
    "a step that the run does not have": (
        None, lambda c: c.forward(STEPS), "told", lambda c: c.forward(STEPS - 1),
    ),
    "epochs before set-up": (
        {"most": {"epochs": 1}}, lambda c: (c.guard.begin(), c.forward()), "order",
        lambda c: (c.guard.begin(), c.gives(c.asked("set_up"), {"steps_per_epoch": 1}), c.forward()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_rule_refuses_what_it_says_and_nothing_else(case: str, tmp_path: Path) -> None:
    policy, wrong, rule, right = CASES[case]
    right(Client(tmp_path, policy))
    (tmp_path / "counts.json").unlink(missing_ok=True)
    with pytest.raises(PolicyRefused) as refused:
        wrong(Client(tmp_path, policy))
    assert refused.value.rule == rule
    assert str(refused.value).startswith(f"The policy's rule {rule} refuses: ")


@pytest.mark.parametrize("kind", [name for name, on in MayLeave() if not on and name not in ("error_texts", "peers")])
def test_what_is_off_by_default_can_be_allowed(kind: str, tmp_path: Path) -> None:
    case = {"sketches": "a sketch", "features": "features", "sample_numbers": "sample numbers"}[kind]
    _, wrong, _, _ = CASES[case]
    client = Client(tmp_path, {"may_leave": {kind: True}})
    wrong(client)
    assert client.guard.counts.kinds[kind][0] == 1


def test_what_other_clients_are_shown_must_be_allowed(tmp_path: Path) -> None:
    """Whatever of it the server may see: an answer for another client is of the kind ``peers`` too."""
    client = Client(tmp_path)
    client.guard.others, client.guard.bytes_of = {"bob"}, lambda *_: 1000
    asked = client.asked("head_forward")
    reply = Header(asked.step_name, "ack", "", "ann", "bob", "ann", "", 0, 0, asked.turn, {"last": True}, ("hidden",))
    with pytest.raises(PolicyRefused, match=r"may_leave\.peers"):
        client.guard.reply(asked, reply, [torch.zeros(SHAPE)])
    assert client.guard.counts.bytes == 0
    client.guard.policy = load_policy({"may_leave": {"peers": True}})
    client.guard.reply(asked, reply, [torch.zeros(SHAPE)])
    kinds = client.guard.counts.kinds
    assert kinds["peers"] == kinds["activations"]
    assert client.guard.counts.bytes == 1000


def test_the_two_part_split_has_no_tail(tmp_path: Path) -> None:
    client = Client(tmp_path, two_part=True)
    client.whole()
    client.forward(1)
    with pytest.raises(PolicyRefused, match="order"):
        client.tail(1)
    kinds = client.guard.counts.kinds
    assert kinds["labels"] == [2, 2 * 2 * 3 * 4]
    assert "losses" not in kinds  # the server told it


def test_every_verb_of_a_client_is_known_to_the_guard() -> None:
    verbs = {name.removeprefix("on_") for name in dir(ClientParty) if name.startswith("on_")}
    assert verbs | {*HOST_VERBS, *TRUNK_VERBS} == set(VERB_STEPS)
    assert set(ANSWERS) == verbs | {"abort", *HOST_VERBS, *TRUNK_VERBS}
    kinds = {kind for pair in ANSWERS.values() for table in pair for kind in table.values()} - {"", "own"}
    assert kinds | {"head_adapter", "tail_adapter", "hosted", "error_texts"} == set(MayLeave.model_fields) == set(WORDS)


def test_another_clients_request_is_refused(tmp_path: Path) -> None:
    guard = Client(tmp_path).guard
    with pytest.raises(PolicyRefused, match="verbs refuses: a request for client 'bob' came to 'ann'"):
        guard.known(Header("head_forward", verb="head_forward", client="bob", turn=1, values=HOW))


# ---------------------------------------------------------------- sent again, aborted, killed


def test_a_request_that_is_sent_again_gets_the_same_answer_and_is_no_new_release(tmp_path: Path) -> None:
    client, made = Client(tmp_path), []

    def answer(party: Any, header: Header, tensors: Any) -> Any:
        made.append(header.turn)
        reply = Header(
            header.step_name, "activations", client="ann", step=header.step, turn=header.turn, names=("hidden",)
        )
        return reply, [torch.rand(SHAPE)]  # noise is drawn anew each time

    ask = guarded(answer, client.guard)
    header = Header("head_forward", verb="head_forward", client="ann", step=0, turn=1, values=HOW)
    party: Any = SimpleNamespace()
    first = ask(party, header, [])
    size = client.guard.counts.bytes
    second = ask(party, header, [])
    assert made == [1]
    assert torch.equal(first[1][0], second[1][0])
    counts = client.guard.counts
    assert (counts.steps, counts.micros, counts.repeats, counts.frames) == (1, 1, 0, 2)
    assert counts.bytes == 2 * size  # they did leave twice
    assert [line["again"] for line in map(json.loads, (tmp_path / "sent.jsonl").read_text().splitlines())] == [
        False,
        True,
    ]
    with pytest.raises(PolicyRefused, match="has the turn 1, which another request had"):
        ask(party, header.but(step=1), [])
    for turn in range(2, 8):
        ask(party, header.but(step=turn, turn=turn), [])
    with pytest.raises(PolicyRefused, match="turn 1 was answered, and its answer is no longer kept"):
        ask(party, header, [])


def test_a_request_whose_answer_failed_may_be_tried_again(tmp_path: Path) -> None:
    client, fails = Client(tmp_path), [True]

    def answer(party: Any, header: Header, tensors: Any) -> Any:
        if fails.pop() if fails else False:
            raise OSError("the power went out")
        return Header("send_activations", "activations", turn=header.turn, names=("hidden",)), [torch.zeros(SHAPE)]

    ask, party = guarded(answer, client.guard), SimpleNamespace()
    header = Header("head_forward", verb="head_forward", client="ann", turn=1, values=HOW)
    with pytest.raises(OSError, match="power"):
        ask(party, header, [])  # type: ignore[arg-type]
    assert client.guard.counts.frames == 0
    ask(party, header, [])  # type: ignore[arg-type]
    assert client.guard.counts.micros == 1


@pytest.mark.parametrize("how", ["abort", "aborted", "begin", "new process"])
def test_what_was_released_stays_counted(how: str, tmp_path: Path) -> None:
    client = Client(tmp_path)
    client.whole(0)
    client.forward(1)
    if how == "new process":
        client = Client(tmp_path)
    elif how == "abort":
        client.gives(client.asked("abort", values={}))
    else:
        getattr(client.guard, how)()
        client.set_up()
    before = client.guard.counts.bytes
    client.whole(0)
    client.whole(1)
    client.whole(2)
    counts = client.guard.counts
    assert (counts.steps, counts.micros, counts.repeats, counts.furthest) == (5, 5, 2, (2, 0))
    assert counts.bytes > before > 0


def killed(folder: Path) -> None:
    """Shows four batches, and is killed when the last one is about to leave."""
    client = Client(folder, two_part=True)
    for step in range(3):
        client.whole(step)
    (folder / "before").write_text(str(client.guard.counts.bytes))
    client.guard.log.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    client.forward(3)


def test_counts_survive_a_kill(tmp_path: Path) -> None:
    """They are on the disk before the bytes go out."""
    child = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path,))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    counts = Counts.load(tmp_path / "counts.json")
    assert (counts.steps, counts.micros, counts.furthest) == (4, 4, (3, 0))
    assert counts.bytes > int((tmp_path / "before").read_text())
    assert Client(tmp_path).guard.counts == counts


def test_nothing_leaves_that_cannot_be_counted_or_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(tmp_path)
    (tmp_path / "sent.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"log of what leaves cannot be written .*Nothing was sent"):
        client.forward()
    assert Counts.load(tmp_path / "counts.json").micros == 1  # counted first: never less than what left

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "sent.jsonl").rmdir()
    client.whole()  # the same again: nothing had left
    assert client.guard.counts.repeats == 1
    monkeypatch.setattr("cutlayer.released.write_text", full)
    with pytest.raises(OutputError, match=r"counts of what leaves cannot be written .*Nothing was sent"):
        client.forward(1)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', "[" * 100_000])
def test_damaged_counts_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"counts of what left, .* cannot be read"):
        Client(tmp_path)


def test_counts_of_another_version_are_refused(tmp_path: Path) -> None:
    Client(tmp_path).forward()
    path = tmp_path / "counts.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match="of version 2"):
        Client(tmp_path)


def test_the_log_has_no_values_and_is_bounded(tmp_path: Path) -> None:
    client = Client(tmp_path)
    client.guard.log = Log(tmp_path / "sent.jsonl", most=2000, keep=2)
    for step in range(30):
        client.whole(step)
    files = sorted(path.name for path in tmp_path.glob("sent.jsonl*"))
    assert files == ["sent.jsonl", "sent.jsonl.1", "sent.jsonl.2"]
    assert all((tmp_path / name).stat().st_size < 2600 for name in files)
    last = json.loads((tmp_path / "sent.jsonl").read_text().splitlines()[-1])
    assert set(last) == {
        "time", "turn", "verb", "kind", "to", "step", "micro", "tensors", "values", "leaves", "bytes", "again"
    }  # fmt: skip
    assert last["values"] == ["label_tokens", "last", "loss", "tokens"]
    assert (last["verb"], last["step"], last["leaves"]) == ("head_backward", 29, ["losses", "token_counts"])


def test_what_left_is_told_in_plain_words(tmp_path: Path) -> None:
    client = Client(tmp_path)
    assert client.guard.told() == "Nothing left this machine for 'ann'."
    client.whole()
    client.forward(0, graph=False)
    said = client.guard.told().splitlines()
    size = client.guard.counts.bytes
    assert said[0] == (
        f"What left this machine for 'ann': {size} bytes in 4 messages; 1 training step of 1 batch, "
        "1 evaluation batch, 0 rounds."
    )
    assert "  activations: 2 times, 192 bytes" in said
    assert "  losses: 1 time" in said
    assert said[-1].startswith("  never: labels, ")


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log."""
    return [json.loads(line) for line in (folder / "sent.jsonl").read_text().splitlines()]


def test_the_words_of_an_error_stay_unless_they_may_leave(tmp_path: Path) -> None:
    error, asked = ValueError("row 3: Mrs Smith has a cold"), Header("partition", verb="keep", turn=7)
    guard = Client(tmp_path).guard
    assert guard.words(error, asked) == "ValueError (its words stay with the client)"
    assert "error_texts" not in guard.counts.kinds
    assert guard.counts.bytes == len(pack_number(Type.ERROR, 7, "ValueError (its words stay with the client)"))
    guard = Client(tmp_path, {"may_leave": {"error_texts": True}}).guard
    assert guard.words(error, asked) == "ValueError: row 3: Mrs Smith has a cold"
    assert Counts.load(tmp_path / "counts.json").kinds["error_texts"] == [1, 0]
    assert [line["leaves"] for line in lines(tmp_path)] == [[], ["error_texts"]]
    assert sum(line["bytes"] for line in lines(tmp_path)) == guard.counts.bytes


def test_a_refusal_is_told_even_where_nothing_more_can_be_counted(tmp_path: Path) -> None:
    """Its kind, and not where the file is that cannot be written."""
    told = len(pack_number(Type.ERROR, 0, "ValueError: " + "a" * 99))
    guard = Client(tmp_path, {"may_leave": {"error_texts": True}, "most": {"bytes": 2 * told - 1}}).guard
    assert guard.words(ValueError("a" * 99), Header("partition")) == "ValueError: " + "a" * 99
    assert guard.words(ValueError("a" * 99), Header("partition")) == "ValueError"  # the rest would be too much
    assert guard.counts.kinds["error_texts"] == [1, 0]
    assert guard.counts.bytes == told + len(pack_number(Type.ERROR, 0, "ValueError")) < 2 * told - 1
    guard.policy = load_policy({"most": {"bytes": 1}})
    assert guard.words(ValueError("a"), Header("partition")) == "ValueError"  # beyond what may leave, but told
    (tmp_path / "sent.jsonl").unlink()
    (tmp_path / "sent.jsonl").mkdir()
    assert guard.words(OutputError("sent.jsonl is full"), Header("partition")) == "OutputError"


def test_acknowledgements_and_hellos_are_counted_and_bounded(tmp_path: Path) -> None:
    """What is no part of a step leaves too."""
    guard = Client(tmp_path).guard
    asked, done = Header("partition", verb="keep", turn=3, values={"round": 1}), Header("partition", "ack", turn=3)
    guard.housekeeping(asked)
    guard.acknowledged(asked, done)
    assert guard.counts.bytes == encode(done).length
    assert not guard.counts.kinds
    for _ in range(2):
        guard.greets({"client": "ann", "data": {"examples": 7}}, 500)
    guard.resent(3, 40)
    assert (guard.counts.bytes, guard.counts.frames) == (encode(done).length + 1040, 4)
    assert Counts.load(tmp_path / "counts.json").kinds == {"sizes": [2, 0]}
    assert [(line["verb"], line["leaves"], line["again"]) for line in lines(tmp_path)] == [
        ("keep", [], False), ("hello", ["sizes"], False), ("hello", ["sizes"], True), ("", [], True),
    ]  # fmt: skip
    assert "7" not in json.dumps(lines(tmp_path)[1]["values"])
    assert "sizes of the data" not in guard.told().partition("never: ")[2]
    with pytest.raises(PolicyRefused, match="holds more than"):
        guard.acknowledged(asked, done.but(values={"rows": 7}))
    guard.policy = load_policy({"most": {"bytes": guard.counts.bytes}})
    for leave in (lambda: guard.acknowledged(asked, done), lambda: guard.greets({}, 1), lambda: guard.resent(3, 1)):
        with pytest.raises(PolicyRefused, match=r"most\.bytes"):
            leave()
    guard.policy = load_policy({"may_leave": {"sizes": False}})
    with pytest.raises(PolicyRefused, match=r"may_leave\.sizes"):
        guard.greets({}, 1)
    assert len(lines(tmp_path)) == guard.counts.frames == 4


@pytest.mark.parametrize(
    ("verb", "values", "rule"),
    [
        ("begin", {"round": "x", "updates": 1}, "told"), ("begin", {"round": 1}, "told"),
        ("begin", {"round": -1, "updates": 1}, "told"), ("begin", {"round": 0, "updates": 1.5}, "told"),
        ("begin", {"round": 0, "updates": 2**62}, "told"), ("begin", {"round": True, "updates": 1}, "told"),
        ("begin", {"round": 0, "updates": 1, "head_blocks": "1", "most": 1}, "told"),
        ("keep", {"round": float("nan")}, "told"), ("hold", {}, "told"), ("open", {}, "verbs"),
    ],
)  # fmt: skip
def test_housekeeping_that_makes_no_sense_is_refused(
    verb: str, values: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    with pytest.raises(PolicyRefused) as refused:
        Client(tmp_path).guard.housekeeping(Header("partition", verb=verb, client="ann", values=values))
    assert refused.value.rule == rule


def test_a_server_that_asks_anything_gets_an_answer_or_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random requests: never another error, and nothing that the rules would not let pass."""
    monkeypatch.setattr(Counts, "save", lambda self: None)
    draw, passed = random.Random(0), 0
    client = Client(tmp_path, {"most": {"steps": 40}, "told": {"head_weight": {"at_most": 1}}})
    values: list[Any] = [True, False, -1, 0, 1, 2**62, -0.5, 0.5, float("nan"), float("inf"), "", "x", "__class__"]
    names = ["graph", "head_weight", "scale", "head_blocks", "tail_blocks", "steps", "model_fields", "mu", "x"]
    tensors = {"hidden": torch.zeros(SHAPE), "head.a": GOOD, "x": BAD, "optimizer/": GOOD, "optimizer/head.a": GOOD}
    for number in range(3000):
        chosen = draw.sample(sorted(tensors), draw.randrange(3))
        turn = draw.choice([number, number, number, 0, draw.randrange(3000)]) if number < 2500 else 0
        header = Header(
            "partition", verb=draw.choice([*ANSWERS, "", "x", "__init__"]),
            client=draw.choice(["ann", "ann", "", "bob"]),
            step=draw.randrange(4), micro=draw.randrange(3), turn=turn,
            values={name: draw.choice(values) for name in draw.sample(names, draw.randrange(5))}, names=tuple(chosen),
        )  # fmt: skip
        try:
            if not client.guard.known(header):
                client.guard.request(header, [tensors[name] for name in chosen])
                client.guard.reply(header, Header("partition", "ack", turn=header.turn), [])
                passed += 1
        except PolicyRefused:
            pass
    assert passed > 50
    assert client.guard.counts.steps <= 40
