"""The policy and the guard: ordinary runs pass, each rule refuses, counts survive, and the log says what left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cutlayer import registry
from cutlayer.config import RunConfig, load_config
from cutlayer.config_types import Spec
from cutlayer.errors import CheckpointError, ConfigError, OutputError, PolicyRefused
from cutlayer.guard import Guard, Held, guarded, held_by
from cutlayer.leaving import ANSWERS
from cutlayer.links import local
from cutlayer.parties.client import VERB_STEPS, ClientParty
from cutlayer.policy import MayLeave, Policy, load_policy
from cutlayer.released import WORDS, Counts, Log
from cutlayer.wire import Header, read_frames
from spine import TWO, U, model, train
from tiny import text_rows, write_rows

FOUR = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
PAIRS = [(name, kind) for name in registry.names("framework") for kind in ("two-part", "u-shape")]
QUICK = {("sfl-v2", "two-part"), ("sequential-sl", "u-shape"), ("sfl-v1", "u-shape"), ("clicooper", "two-part")}
CUTS = {"two-part": TWO, "u-shape": U}


@pytest.fixture
def guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Guard]]:
    """Puts a guard between each client and its link, with one policy, from the next run on; they are made as they are
    needed."""

    def put(policy: Policy | None = None) -> dict[str, Guard]:
        made: dict[str, Guard] = {}
        answers: dict[str, Any] = {}

        def answer(party: ClientParty, header: Header, tensors: Any) -> Any:
            name = party.name
            if name not in made:
                log, counts = Log(tmp_path / f"{name}.jsonl"), Counts.load(tmp_path / f"{name}.json")
                made[name] = Guard(policy or Policy(), log, counts, client=name, held=lambda: held_by(party))
                answers[name] = guarded(original, made[name])
            return answers[name](party, header, tensors)

        def abort(self: ClientParty) -> None:
            forget(self)
            if self.name in made:
                made[self.name].aborted()

        monkeypatch.setattr(local, "answer", answer)
        monkeypatch.setattr(ClientParty, "abort", abort)
        return made

    original, forget = local.answer, ClientParty.abort
    return put


def logged(tmp_path: Path, client: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / f"{client}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_an_ordinary_run_passes_and_is_told(name: str, kind: str, tmp_path: Path, guards: Any) -> None:
    """Under the default policy, with the bytes of the record; each client's counts and log are what it sent."""
    if (name, kind) == ("ringsfl", "two-part"):
        pytest.skip("ringsfl needs the U-shape")
    later = {"aggregator": "dt-asfl"} if registry.load("framework", name).asynchronous else {}
    made = guards()
    result = train(
        model(num_hidden_layers=8), tmp_path / "out", FOUR, partition=CUTS[kind], framework=name, rounds=2,
        record_wire=str(tmp_path / "wire"), profile="laptop",
        data={"eval": str(write_rows(tmp_path / "eval.jsonl", text_rows(3)))}, **later,
    )  # fmt: skip
    assert set(made) == set(FOUR)
    sent: dict[str, list[int]] = {client: [] for client in FOUR}
    for line, header, _ in read_frames(tmp_path / "wire"):
        if line["sender"] in sent and header.client == line["sender"]:
            sent[line["sender"]].append(line["length"])
    steps = 0
    for client, guard in made.items():
        counts, lines = guard.counts, logged(tmp_path, client)
        steps += counts.steps
        own = [line["bytes"] for line in lines]
        assert counts.frames == len(lines)
        assert counts.bytes == sum(own)
        if name not in ("ringsfl", "pairingfl", "clicooper", "hsfl"):  # these send to other clients too
            assert own == sent[client]
        assert Counts.load(tmp_path / f"{client}.json") == counts
        assert ("labels" in counts.kinds) == (kind == "two-part" and counts.micros + counts.evaluations > 0)
        assert ("gradients" in counts.kinds) == (kind == "u-shape" and counts.micros > 0)
        assert ("losses" in counts.kinds) == (kind == "u-shape" and counts.micros > 0)
        assert counts.repeats == 0
        assert f"left this machine for '{client}'" in guard.told()
    assert steps > 0
    assert result.summary["bytes_up"] > 0


def test_a_policy_without_labels_refuses_the_two_part_split(tmp_path: Path, guards: Any) -> None:
    """Before it starts by the run, and should the server do otherwise, before a label is sent."""
    policy = load_policy("may_leave:\n  labels: false")
    config = load_config({"model": "m", "data": {"train": "x"}, "partition": TWO})
    assert [said.split(" is")[0] for said in policy.problems(config, "client-0")] == ["may_leave.labels"]
    assert policy.problems(load_config({"model": "m", "data": {"train": "x"}, "partition": U}), "client-0") == []
    made = guards(policy)
    with pytest.raises(PolicyRefused, match=r"rule may_leave\.labels refuses: the answer to 'head_forward'"):
        train(model(), tmp_path / "out", {"ann": FOUR["ann"]}, partition=TWO)
    assert "labels" not in made["ann"].counts.kinds
    assert all("labels" not in [name for name, *_ in line["tensors"]] for line in logged(tmp_path, "ann"))
    made = guards(policy)
    train(model(), tmp_path / "u", {"bob": FOUR["bob"]}, partition=U)
    assert made["bob"].counts.micros > 0


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"framework": "sfl-v1"}, "head_adapter"),
        ({"framework": "sfl-v1"}, "tail_adapter"),
        ({"max_grad_norm": 1.0}, "gradient_norms"),
        ({}, "losses"),
        ({}, "token_counts"),
        ({}, "gradients"),
        ({}, "activations"),
        ({}, "sizes"),
        ({"data": {"eval": "rows"}}, "evaluation"),
    ],
)
def test_each_kind_that_a_run_sends_can_be_refused(
    changes: dict[str, Any], kind: str, tmp_path: Path, guards: Any
) -> None:
    if "data" in changes:
        changes = {"data": {"eval": str(write_rows(tmp_path / "eval.jsonl", text_rows(3)))}}
    two = {"ann": FOUR["ann"], "bob": FOUR["bob"]}
    made = guards(load_policy({"may_leave": {kind: False}}))
    with pytest.raises(PolicyRefused) as refused:
        train(model(), tmp_path / "out", two, rounds=1, **changes)
    assert refused.value.rule == f"may_leave.{kind}"
    assert all(kind not in guard.counts.kinds for guard in made.values())
    made = guards()
    for file in tmp_path.glob("*.json"):
        file.unlink()
    train(model(), tmp_path / "again", two, rounds=1, **changes)
    assert any(kind in guard.counts.kinds for guard in made.values())


@pytest.mark.parametrize(
    ("most", "rule"),
    [
        ({"bytes": "20 kB"}, "most.bytes"),
        ({"steps": 2}, "most.steps"),
        ({"rounds": 2}, "most.rounds"),
        ({"epochs": 2}, "most.epochs"),
        ({"evaluations": 1}, "most.evaluations"),
    ],
)
def test_bounds_hold_over_a_whole_run(most: dict[str, Any], rule: str, tmp_path: Path, guards: Any) -> None:
    made = guards(load_policy({"most": most}))
    (name,) = most
    with pytest.raises(PolicyRefused) as refused:
        train(
            model(), tmp_path / "out", {"ann": FOUR["ann"], "bob": FOUR["bob"]}, rounds=3, framework="sfl-v1",
            data={"eval": str(write_rows(tmp_path / "eval.jsonl", text_rows(3)))},
        )  # fmt: skip
    assert refused.value.rule == rule
    counts = made["ann"].counts
    left = {"bytes": counts.bytes, "steps": counts.steps, "rounds": counts.rounds, "epochs": counts.steps,
            "evaluations": counts.evaluations}[name]  # fmt: skip
    assert (left > 0) == (name != "steps")  # the plan that set-up tells has too many already
    assert left <= load_policy({"most": most}).most.model_dump()[name]


# ---------------------------------------------------------------- one verb at a time

SHAPE = (2, 3, 4)
HELD = Held(
    head=frozenset({"head.a"}), tail=frozenset({"tail.b"}), has_tail=True, evaluations=2,
    tensors={"head.a": ((2, 4), torch.float32), "tail.b": ((3,), torch.float32), "other.c": ((1,), torch.float32)},
)  # fmt: skip
TOLD = {"loss": 1.0, "tokens": 5, "label_tokens": 4, "last": True}
HOW = {"graph": True, "head_weight": 1.0, "update": True}


class Client:
    """A guard, with requests and answers as a driver and a party would make them."""

    def __init__(self, folder: Path, policy: Any = None, *, two_part: bool = False, held: Held = HELD) -> None:
        if two_part:
            held = Held(held.head, frozenset(), held.tensors, False, held.evaluations)
        self.turn, self.two_part = 0, two_part
        counts = Counts.load(folder / "counts.json")
        self.guard = Guard(
            load_policy(policy) if policy else Policy(), Log(folder / "sent.jsonl"), counts, client="ann",
            held=lambda: held,
        )  # fmt: skip

    def asked(self, verb: str, step: int = 0, micro: int = 0, values: Any = None, **tensors: torch.Tensor) -> Header:
        self.turn += 1
        header = Header(
            VERB_STEPS.get(verb, "partition"), verb=verb, sender="server", receiver="ann", client="ann", step=step,
            micro=micro, turn=self.turn, values=HOW if values is None else values, names=tuple(tensors),
        )  # fmt: skip
        assert not self.guard.request(header, list(tensors.values()))
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
        None, lambda c: c.gives(c.asked("features"), {"category/3": 4}, hidden=GOOD), "may_leave.features",
        lambda c: c.gives(c.asked("features")),
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
        {"most": {"steps": 1}},
        lambda c: [c.gives(c.asked("probe", n, values={}), hidden=GOOD) for n in range(2)], "most.steps",
        lambda c: c.gives(c.asked("probe", 0, values={}), hidden=GOOD),
    ),
    "epochs before set-up": (
        {"most": {"epochs": 1}}, lambda c: c.forward(), "order",
        lambda c: (c.gives(c.asked("set_up"), {"steps_per_epoch": 1}), c.forward()),
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


@pytest.mark.parametrize("kind", [name for name, on in MayLeave() if not on and name != "error_texts"])
def test_what_is_off_by_default_can_be_allowed(kind: str, tmp_path: Path) -> None:
    case = {"sketches": "a sketch", "features": "features", "sample_numbers": "sample numbers"}[kind]
    _, wrong, _, _ = CASES[case]
    client = Client(tmp_path, {"may_leave": {kind: True}})
    wrong(client)
    assert client.guard.counts.kinds[kind][0] == 1


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
    assert verbs == set(VERB_STEPS)
    assert set(ANSWERS) == verbs | {"abort"}
    kinds = {kind for pair in ANSWERS.values() for table in pair for kind in table.values()} - {"", "own"}
    assert kinds | {"head_adapter", "tail_adapter", "hosted", "error_texts"} == set(MayLeave.model_fields) == set(WORDS)


def test_another_clients_request_is_refused(tmp_path: Path) -> None:
    guard = Client(tmp_path).guard
    with pytest.raises(PolicyRefused, match="verbs refuses: a request for client 'bob' came to 'ann'"):
        guard.request(Header("head_forward", verb="head_forward", client="bob", turn=1, values=HOW), [])


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
    before = client.guard.counts.bytes
    client.whole(0)
    client.whole(1)
    client.whole(2)
    counts = client.guard.counts
    assert (counts.steps, counts.micros, counts.repeats, counts.furthest) == (5, 5, 2, (2, 0))
    assert counts.bytes > before > 0


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import test_policy
client = test_policy.Client(Path(sys.argv[1]), two_part=True)
for step in range(3):
    client.whole(step)
print(client.guard.counts.bytes, flush=True)
client.forward(3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_counts_survive_a_kill(tmp_path: Path) -> None:
    """They are on the disk before the bytes go out."""
    code = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr
    counts = Counts.load(tmp_path / "counts.json")
    assert (counts.steps, counts.micros, counts.furthest) == (4, 4, (3, 0))
    assert counts.bytes > int(done.stdout)
    assert Client(tmp_path).guard.counts == counts


def test_nothing_leaves_that_cannot_be_counted_or_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(tmp_path)
    (tmp_path / "sent.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"log of what leaves cannot be written .*Nothing was sent"):
        client.forward()
    assert Counts.load(tmp_path / "counts.json").micros == 1  # counted first: never less than what left

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

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


def test_the_words_of_an_error_stay_unless_they_may_leave(tmp_path: Path) -> None:
    error = ValueError("row 3: Mrs Smith has a cold")
    guard = Client(tmp_path).guard
    assert guard.words(error) == "ValueError (its words stay with the client)"
    assert "error_texts" not in guard.counts.kinds
    guard = Client(tmp_path, {"may_leave": {"error_texts": True}}).guard
    assert guard.words(error) == "ValueError: row 3: Mrs Smith has a cold"
    assert Counts.load(tmp_path / "counts.json").kinds["error_texts"] == [1, 0]


def test_a_server_that_asks_anything_gets_an_answer_or_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random requests: never another error, and nothing that the rules would not let pass."""
    import random

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
            if not client.guard.request(header, [tensors[name] for name in chosen]):
                client.guard.reply(header, Header("partition", "ack", turn=header.turn), [])
                passed += 1
        except PolicyRefused:
            pass
    assert passed > 50
    assert client.guard.counts.steps <= 40


# ---------------------------------------------------------------- the run that is offered


def offered(**changes: Any) -> RunConfig:
    defense = changes.pop("defense", [])
    config = load_config({"model": "m", "data": {"train": "x"}, **changes})
    return config.model_copy(update={"defense": [Spec.model_validate(one) for one in defense]})


DP = {"name": "dp-forward", "epsilon": {"at_most": 8}, "clip": 1.0}
OFFERS: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    # the policy, a run that it refuses, what it says, and a run that it lets pass
    "partition": (
        {"partitions": ["u-shaped-split"]}, {"partition": TWO}, "partitions: the run has 'two-part-split'", {},
    ),
    "head": ({"head_blocks": 2}, {"partition": U}, "head_blocks: the run gives 'client-0' 1 blocks", {}),
    "a client's own head": (
        {"head_blocks": 2}, {"clients": [{"name": "client-0", "head_blocks": 0}]}, "0 blocks; allowed: at least 2", {},
    ),
    "model": ({"models": "m"}, {"model": "other"}, "models: the run's model is 'other'; allowed: m", {}),
    "labels": ({"may_leave": {"labels": False}}, {"partition": TWO}, "may_leave.labels is false", {"partition": U}),
    "losses": ({"may_leave": {"losses": False}}, {"partition": U}, "may_leave.losses is false", {"partition": TWO}),
    "evaluation": (
        {"may_leave": {"evaluation": False}}, {"data": {"train": "x", "eval_fraction": 0.1}},
        "may_leave.evaluation is false", {},
    ),
    "sketches": (
        {}, {"framework": {"name": "gsfl", "groups": "selection"}, "selection": "gsfl-hash-grouping"},
        "may_leave.sketches is false", {"framework": "gsfl"},
    ),
    "merges": (
        {"may_leave": {"head_adapter": False}}, {"framework": "sfl-v1"}, "may_leave.head_adapter is false",
        {"framework": "psl"},
    ),
    "norms": ({"may_leave": {"gradient_norms": False}}, {"max_grad_norm": 1.0}, "may_leave.gradient_norms", {}),
    "rounds": ({"most": {"rounds": 5}}, {"rounds": 6}, "most.rounds: the run has 6; allowed: 5", {"rounds": 5}),
    "steps": ({"most": {"steps": 5}}, {"steps": 6}, "most.steps: the run has 6; allowed: 5", {"rounds": 6}),
    "epochs": ({"most": {"epochs": 5}}, {"epochs": 6}, "most.epochs: the run has 6; allowed: 5", {"epochs": 5}),
    "no defense": (
        {"defenses": [DP]}, {}, "the run lacks 'dp-forward'", {"defense": [{"name": "dp-forward", "epsilon": 8, "clip": 1.0}]},
    ),
    "a weak defense": (
        {"defenses": [DP]}, {"defense": [{"name": "dp-forward", "epsilon": 9, "clip": 1.0}]},
        "'dp-forward' has epsilon 9; allowed: at most 8", {"defense": [{"name": "dp-forward", "epsilon": 0.5, "clip": 1.0}]},
    ),
    "another option": (
        {"defenses": [DP]}, {"defense": [{"name": "dp-forward", "epsilon": 8, "clip": 2.0}]},
        "has clip 2.0; allowed: 1.0",
        {"defense": [{"name": "dp-forward"}, {"name": "dp-forward", "epsilon": 8, "clip": 1.0}]},
    ),
    "an option that is not given": (
        {"defenses": [DP]}, {"defense": [{"name": "dp-forward", "clip": 1.0}]}, "has epsilon null",
        {"defense": [{"name": "dp-forward", "epsilon": 1, "clip": 1.0}, {"name": "other"}]},
    ),
    "a defense by name": ({"defenses": "dp-forward"}, {}, "the run lacks", {"defense": [{"name": "dp-forward"}]}),
}  # fmt: skip


@pytest.mark.parametrize("case", OFFERS)
def test_an_offered_run_is_judged_before_anything_is_loaded(case: str) -> None:
    policy, wrong, said, right = OFFERS[case]
    rules = load_policy(policy) if policy else Policy()
    (problem,) = rules.problems(offered(**wrong), "client-0")
    assert said in problem
    assert rules.problems(offered(**right), "client-0") == []


def test_a_model_may_be_allowed_by_the_checksum_of_its_weights() -> None:
    import hashlib

    folder = model()
    told = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    policy = load_policy({"models": [f"sha256:{told}"]})
    assert policy.problems(offered(model=str(folder)), "client-0") == []
    (said,) = policy.problems(offered(model=str(model(seed=1))), "client-0")
    assert "Its weights are sha256:" in said
    (said,) = policy.problems(offered(model="not/here"), "client-0")
    assert f"allowed: sha256:{told}" in said
    assert (
        policy.problems(offered(model="not/here"), "client-0", files={"model.safetensors": told, "config.json": "x"})
        == []
    )


def test_the_servers_fingerprint() -> None:
    told = ":".join(["3D", "B7"] * 16)
    policy = load_policy({"server": told})
    assert policy.server_problems(told) == []
    assert load_policy({"server": f"sha256:{told.replace(':', '').lower()}"}).server_problems(told) == []
    (said,) = policy.server_problems(told.replace("3D", "3E"))
    assert said.startswith("server: the certificate has the fingerprint 3E:B7")
    assert Policy().server_problems(told) == []


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"may_leaf": {}}, "a policy has no key 'may_leaf'. Did you mean 'may_leave'?"),
        ({"may_leave": {"label": False}}, "may_leave has no key 'label'. Did you mean 'labels'?"),
        ({"may_leave": {"labels": "no"}}, "may_leave.labels is 'no': must be true or false"),
        ({"most": {"bytes": "10 gigs"}}, "most.bytes is '10 gigs': must be a number of bytes, or one with a unit"),
        ({"most": {"steps": 0}}, "most.steps is 0: must be at least 1"),
        ({"server": "3D:B7"}, "server is '3D:B7': must be a SHA-256 fingerprint"),
        ({"told": {"head_weight": {"at_mots": 1}}}, "told.head_weight has no key 'at_mots'. Did you mean 'at_most'?"),
        ({"defenses": [{"epsilon": 8}]}, "defenses.0 does not say which method"),
        ({"defenses": [{"name": "dp", "epsilon": {"most": 8}}]}, "epsilon has most; allowed: at_least, at_most"),
        ({"defenses": [{"name": "dp", "epsilon": {"at_most": "8"}}]}, "epsilon.at_most must be a finite number"),
        ("a: 1\na: 2\n", "the key 'a' is given twice"),
        ("\n", "it is empty. Name at least one rule"),
    ],
)
def test_mistakes_in_a_policy_are_said_in_words(tree: Any, said: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        load_policy(tree)
    assert said in str(wrong.value)


def test_a_policy_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("most: {bytes: 1.5 GB}\nmodels: m\ndefenses: [a, {name: b, epsilon: {at_most: 8}}]\n")
    policy = load_policy(path)
    assert (policy.most.bytes, policy.models, [one.name for one in policy.defenses]) == (
        1_500_000_000,
        ["m"],
        ["a", "b"],
    )
    path.write_text("mots: {}")
    with pytest.raises(ConfigError, match=r"1 mistake in .*policy.yaml"):
        load_policy(path)
