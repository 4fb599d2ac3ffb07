"""What a client elsewhere answers is judged: honest replies pass, and nothing else does."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apart import Apart, Trap, steps
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError, NonFinite, WireError
from cutlayer.judging import Bounds, Judge, bounds_of
from cutlayer.links.local import LocalLink
from cutlayer.links.network import NetworkLink
from cutlayer.models.slots import parameter_of
from cutlayer.parties.client import ClientParty
from cutlayer.presence import Lost
from cutlayer.schedule import Told
from cutlayer.wire import SEAL_BYTES, SEALED, Frame, Header, Meter, decode
from spine import TWO, U, model, often, train
from test_absence import MESSAGES, simulated
from tiny import text_rows, write_rows

INF, NAN = math.inf, math.nan
COMMON: dict[str, Any] = {
    "framework": "sfl-v1", "gradient_accumulation": 2, "max_grad_norm": 0.1,
    "data": {"eval": "", "format": "text", "max_length": 64}, "epochs": 1,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "u-shape": {**COMMON, "partition": U},
    "two-part": {**COMMON, "partition": TWO},
    "travels": {"framework": {"name": "sequential-sl", "optimizer_state": "travel"}},
    "cache": {"partition": TWO, "framework": "sfl-v1", "exchange": {"name": "splitfrozen", "cache": True}, "rounds": 5},
    "probe": {"partition": TWO, "framework": "sfl-v1", "exchange": "mu-splitfed"},
    "bfloat16": {"framework": "sfl-v2", "precision": "bfloat16"},
    "histogram": {"framework": "sfl-v2", "selection": {"name": "csfl", "sketch": "tokens"}, "rounds": 1},
    "feature": {"framework": "sfl-v2", "selection": {"name": "csfl", "sketch": "features"}, "rounds": 1},
    "hash": {
        "framework": {"name": "gsfl", "groups": "selection"},
        "selection": {"name": "gsfl-hash-grouping", "bits": 64},
        "rounds": 1,
    },
}


@dataclass
class Said:
    """A request to ann, and what it answered."""

    asked: Header
    given: Sequence[Tensor]
    reply: Header
    tensors: list[Tensor]

    def but(self, name: str, tensor: Tensor | None) -> Said:
        """With another tensor of this name, or without it."""
        found = dict(zip(self.reply.names, self.tensors, strict=True))
        found = {**found, name: tensor} if tensor is not None else {n: t for n, t in found.items() if n != name}
        return replace(self, reply=self.reply.but(names=tuple(found)), tensors=list(found.values()))

    def saying(self, **values: Any) -> Said:
        """With other values; None: without it."""
        said = {n: v for n, v in {**self.reply.values, **values}.items() if v is not None}
        return replace(self, reply=self.reply.but(values=said))

    def first(self) -> tuple[str, Tensor]:
        return self.reply.names[0], self.tensors[0].clone()


@dataclass
class Heard:
    """All that ann said in a run."""

    bounds: Bounds
    told: Told
    party: ClientParty
    all: list[Said]
    run: Run

    def judged(self, verb: str, change: Callable[[Said], Said] = lambda said: said, *, graph: bool = True) -> None:
        """Judge all up to the first answer to this verb, and that one changed."""
        judge = Judge("ann", self.bounds, self.told, self.party)
        for said in self.all:
            if said.asked.verb == verb and bool(said.asked.values.get("graph", graph)) == graph:
                return judge(*vars(change(said)).values())
            judge(*vars(said).values())
        raise AssertionError(f"nobody asked for {verb}")


@lru_cache
def heard(kind: str) -> Heard:
    """An honest run in one process."""
    found: list[Said] = []
    original = LocalLink._answer
    parties: dict[str, ClientParty] = {}
    runs: list[Run] = []
    begin = Run.__init__

    def answered(self: LocalLink, request: Frame, to: str) -> Frame:
        asked, given = decode(request)
        frame = original(self, request, to)
        if self.party.name == "ann":
            parties["ann"] = self.party
            found.append(Said(asked, given, *decode(frame)))
        return frame

    def begun(self: Run, *args: Any, **more: Any) -> None:
        begin(self, *args, **more)
        runs.append(self)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(LocalLink, "_answer", answered)
        patch.setattr(Run, "__init__", begun)
        changes = dict(RUNS[kind])
        if "eval" in changes.get("data", {}):
            valid = write_rows(Path(folder) / "valid.jsonl", text_rows(4, seed=9))
            changes["data"] = {**changes["data"], "eval": str(valid)}
        rows = {"ann": text_rows(7, seed=1), "bob": text_rows(4, seed=2)}
        train(model(num_hidden_layers=4), Path(folder) / "out", rows, **changes)
    party, run = parties["ann"], runs[0]
    told = Told(
        **{key: party.sizes[key] for key in ("examples", "label_tokens")},
        steps_per_epoch=party.batches.steps_per_epoch, evaluation_batches=len(party.evaluation),
    )  # fmt: skip
    return Heard(bounds_of(run.config, run.parts.base, "ann"), told, party, found, run)


@pytest.mark.parametrize("kind", often(RUNS, *(k for k in RUNS if k not in ("two-part", "travels", "bfloat16"))))
def test_honest_replies_pass(kind: str) -> None:
    said = heard(kind)
    judge = Judge("ann", said.bounds, said.told, said.party)
    for one in said.all:
        judge(*vars(one).values())
    verbs = {one.asked.verb for one in said.all}
    assert {"set_up", "probe" if kind == "probe" else "head_forward"} <= verbs


def test_a_sample_must_have_been_shown_before_its_number_stands_for_it() -> None:
    """As where a client's folder, or its mind, has changed: it is lost alone, and the server knows why."""
    said = heard("cache")
    judge = Judge("ann", said.bounds, said.told, said.party, lambda sample: sample != 3)
    with pytest.raises(WireError, match="only the number of sample 3; expected: a sample that it has shown before"):
        [judge(*vars(one).values()) for one in said.all]


def wider(said: Said) -> Said:
    name, tensor = said.first()
    return said.but(name, torch.cat([tensor, tensor[:1]]))


def spoilt(value: float) -> Callable[[Said], Said]:
    def change(said: Said) -> Said:
        name, tensor = said.first()
        tensor.view(-1)[-1] = value
        return said.but(name, tensor)

    return change


def at(name: str, value: int) -> Callable[[Said], Said]:
    def change(said: Said) -> Said:
        tensor = dict(zip(said.reply.names, said.tensors, strict=True))[name].clone()
        tensor.view(-1)[-1] = value
        return said.but(name, tensor)

    return change


def whole(said: Said) -> Said:
    name, tensor = said.first()
    return said.but(name, tensor.long())


def away(said: Said) -> Said:
    return said.but(said.reply.names[0], None)


def more(said: Said) -> Said:
    return said.but("more", torch.zeros(1))


def says(**values: Any) -> Callable[[Said], Said]:
    return lambda said: said.saying(**values)


def header(**fields: Any) -> Callable[[Said], Said]:
    return lambda said: replace(said, reply=said.reply.but(**fields))


TENSORS = {"wider": wider, "nan": spoilt(NAN), "inf": spoilt(-INF), "whole": whole, "away": away, "more": more}
NUMBERS = [2**62, -5, 1.0, True, "1", None]
WRONG: list[tuple[str, str, bool, str, Callable[[Said], Said]]] = [
    *[("u-shape", "head_forward", True, n, c) for n, c in TENSORS.items()],
    *[("u-shape", "head_forward", False, n, c) for n, c in TENSORS.items()],
    *[("two-part", "head_forward", True, n, c) for n, c in TENSORS.items()],
    *[("u-shape", "tail_step", True, n, c) for n, c in TENSORS.items()],
    *[("u-shape", "get_state", True, n, c) for n, c in TENSORS.items()],
    *[("travels", "get_state", True, n, c) for n, c in TENSORS.items()],
    *[("probe", "probe", True, n, c) for n, c in TENSORS.items()],
    *[("cache", "head_forward", True, n, c) for n, c in TENSORS.items()],
    *[(kind, "sketch", True, n, c) for kind in ("histogram", "feature") for n, c in TENSORS.items()],
    *[("hash", "sketch", True, n, c) for n, c in TENSORS.items() if n not in ("nan", "inf")],
    *[(kind, "sketch", True, f"sum {n}", at("sketch", n)) for kind in ("histogram", "feature") for n in (-1, 2)],
    ("histogram", "sketch", True, "a value", says(other=1)),
    *[("two-part", "head_forward", True, f"label {n}", at("labels", n)) for n in (99999, -1, -101, 2**31 - 1)],
    *[("two-part", "head_forward", True, f"tokens {n}", says(tokens=n)) for n in NUMBERS],
    *[("two-part", "head_forward", True, f"label tokens {n}", says(label_tokens=n)) for n in [*NUMBERS, 1]],
    *[("two-part", "head_forward", True, f"weight {n}", says(weight=n)) for n in (-0.1, 1.1, NAN, INF, 1, None)],
    *[("cache", "head_forward", True, f"sample {n}", at("samples", n)) for n in (-1, 7)],
    *[("u-shape", "head_forward", True, f"last {n}", says(last=n)) for n in (1, None)],
    *[("u-shape", "tail_step", True, f"last {n}", says(last=n)) for n in (True, None)],
    *[("u-shape", "tail_step", False, f"loss {n}", says(loss=n)) for n in (NAN, INF, 1e300, 1, None)],
    *[("u-shape", "tail_step", False, f"correct {n}", says(correct=n)) for n in NUMBERS],
    *[("u-shape", "head_backward", True, f"loss {n}", says(loss=n)) for n in (NAN, INF, 1e300, "1", None)],
    *[("u-shape", "head_backward", True, f"tokens {n}", says(tokens=n)) for n in [*NUMBERS, 3 * 64 + 1]],
    *[("u-shape", "head_backward", True, f"label tokens {n}", says(label_tokens=n)) for n in NUMBERS],
    ("u-shape", "head_backward", True, "last", says(last=True)),
    ("two-part", "head_backward", True, "another loss", says(loss=0.5)),
    *[("u-shape", "grad_norm", True, f"norm {n}", says(squared_norm=n)) for n in (NAN, INF, -1.0, 1e300, 1, None)],
    *[("u-shape", "set_up", True, f"examples {n}", says(examples=n)) for n in (-15, 8, 7.0, None)],
    *[("u-shape", "set_up", True, f"label tokens {n}", says(label_tokens=n)) for n in (2**62, -5)],
    ("u-shape", "set_up", True, "evaluation", says(evaluation_batches=9)),
    ("u-shape", "set_up", True, "another value", says(other=1)),
    *[("u-shape", "get_state", True, f"version {n}", says(version=n)) for n in NUMBERS if n != 1],
    ("u-shape", "set_state", True, "a value", says(other=1)),
    ("u-shape", "set_state", True, "a tensor", more),
    ("u-shape", "update", True, "kind", header(kind="state")),
    ("u-shape", "head_forward", True, "client", header(client="bob")),
    ("u-shape", "head_forward", True, "step", header(step=5)),
    ("u-shape", "head_forward", True, "micro", header(micro=1)),
    ("u-shape", "tail_step", True, "kind", header(kind="no-gradient")),
    ("bfloat16", "head_forward", True, "dtype", lambda said: said.but("hidden", said.first()[1].float())),
    ("bfloat16", "tail_step", True, "dtype", lambda said: said.but("hidden", said.first()[1].float())),
]


@pytest.mark.parametrize(
    ("kind", "verb", "graph", "change"),
    [(kind, verb, graph, change) for kind, verb, graph, _, change in WRONG],
    ids=[f"{kind}-{verb}-{'train' if graph else 'evaluate'}-{name}" for kind, verb, graph, name, _ in WRONG],
)
def test_a_reply_that_cannot_be_is_refused(
    kind: str, verb: str, graph: bool, change: Callable[[Said], Said]
) -> None:  # fmt: skip
    heard(kind).judged(verb, graph=graph)
    with pytest.raises(WireError, match=rf"Client 'ann' answered '{verb}' with .*; expected: .*the client misbehaves"):
        heard(kind).judged(verb, change, graph=graph)


def test_no_step_is_endless() -> None:
    said = heard("u-shape")
    judge = Judge("ann", replace(said.bounds, micros=1), said.told, said.party)
    first = next(number for number, one in enumerate(said.all) if one.reply.values.get("last") is False)
    for one in said.all[:first]:
        judge(*vars(one).values())
    with pytest.raises(WireError, match="a micro-batch 2; expected: at most 1"):
        judge(*vars(said.all[first]).values())


def given_up(change: Callable[[dict[str, Tensor]], None]) -> Said:
    """What ann answers when its block goes to the server."""
    party = heard("u-shape").party
    own = set(party.head.names)
    state = {n: t.clone() for n, t in party.slot.get(optimizer=True).items() if parameter_of(n) in own}
    assert any(name.startswith("optimizer/") for name in state)
    change(state)
    reply = Header("partition", "state", sender="ann", client="ann", names=tuple(state))
    return Said(Header("partition", verb="move", values={"head_blocks": 0}), [], reply, list(state.values()))


def moment(state: dict[str, Tensor]) -> str:
    return next(name for name in state if name.endswith("/exp_avg"))


MOVES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a moment of one number": lambda s: s.update({moment(s): torch.zeros(())}),
    "a moment too few": lambda s: s.pop(moment(s)),
    "a whole moment": lambda s: s.update({moment(s): s[moment(s)].long()}),
    "a moment of nothing": lambda s: s.update({"optimizer/other/exp_avg": torch.zeros(2)}),
    "a tensor too few": lambda s: s.pop(parameter_of(moment(s))),
    "a tensor of another": lambda s: s.update(other=torch.zeros(2)),
    "nan": lambda s: s[moment(s)].fill_(NAN),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_a_client_gives_up_is_as_it_is_here(name: str) -> None:
    said = heard("u-shape")
    judge = Judge("ann", said.bounds, said.told, said.party)
    judge(*vars(given_up(lambda _: None)).values())
    with pytest.raises(WireError, match="answered 'move'"):
        judge(*vars(given_up(MOVES[name])).values())


def features(told: dict[str, Any], rows: int) -> Said:
    bounds = heard("two-part").bounds
    found = {"hidden": torch.zeros(rows, 5, bounds.hidden), "labels": torch.zeros(rows, 5, dtype=torch.int32)}
    if not rows:
        found = {}
    reply = Header(
        "send_activations", "activations" if rows else "ack", client="ann", values=told, names=tuple(found)
    )  # fmt: skip
    asked = Header("head_forward", verb="features", values={"number": 1, "category/3": 4, "category/4": 1})
    return Said(asked, [], reply, list(found.values()))


def test_rows_for_others_are_those_that_were_asked_for() -> None:
    said = heard("two-part")
    judge = Judge("ann", said.bounds, said.told, said.party)
    for told, rows in ({"category/3": 4, "category/4": 1}, 5), ({"category/3": 2}, 2), ({}, 0):
        judge(*vars(features(told, rows)).values())
    for told, rows in ({"category/3": 5}, 5), ({"category/3": 2}, 3), ({"category/9": 1}, 1), ({"category/3": -1}, 0):
        with pytest.raises(WireError, match="answered 'features'"):
            judge(*vars(features(told, rows)).values())


def test_counts_by_category() -> None:
    said = heard("two-part")
    judge, asked = Judge("ann", said.bounds, said.told, said.party), Header("partition", verb="histogram")
    judge(asked, [], Header("partition", "ack", client="ann", values={"category/3": 5, "category/4": 2}), [])
    for wrong in ({"category/3": 8}, {"category/3": 5, "category/4": 5}, {"category/x": 1}, {"category/3": -1}):
        with pytest.raises(WireError, match="answered 'histogram'"):
            judge(asked, [], Header("partition", "ack", client="ann", values=wrong), [])


def test_importances() -> None:
    said = heard("u-shape")
    judge, asked = Judge("ann", said.bounds, said.told, said.party), Header("partition", verb="importance")
    own = sum(".lora_A." in name for name in said.party.names("own"))
    reply = Header("partition", "state", client="ann", names=("importance",))
    right = torch.tensor([-1.0, *range(own - 1)], dtype=torch.float64)
    judge(asked, [], reply, [right])
    for wrong in right[1:], right.float(), right - 0.5, right + INF:
        with pytest.raises(WireError, match="answered 'importance'"):
            judge(asked, [], reply, [wrong])


def test_blocks_may_have_residuals_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Mamba do in a run in bfloat16; what their embeddings give is not."""
    said = heard("bfloat16")
    monkeypatch.setattr(said.run.parts.base.model.config, "residual_in_fp32", True, raising=False)
    bounds = bounds_of(said.run.config, said.run.parts.base, "ann")
    assert bounds.dtypes == (torch.bfloat16, torch.float32)
    wider_bounds = replace(said, bounds=bounds)
    for dtype in bounds.dtypes:
        wider_bounds.judged("head_forward", lambda one, to=dtype: one.but("hidden", one.first()[1].to(to)))
    with pytest.raises(WireError, match=r"expected: \[rows, length, \d+\] torch.bfloat16 or torch.float32"):
        wider_bounds.judged("head_forward", lambda one: one.but("hidden", one.first()[1].half()))


PASSED_ON = {  # by verb, in which step its answer goes on to another client, and of which kind it is
    "head_forward": ("send_activations", "activations"), "tail_step": ("send_gradients", "gradient"),
    "host_forward": ("return_activations", "activations"), "host_backward": ("return_gradients", "gradient"),
    "host_tail_step": ("return_gradients", "gradient"),
}  # fmt: skip


@pytest.mark.parametrize("verb", PASSED_ON)
def test_what_is_for_another_client_is_sealed(verb: str) -> None:
    """An open frame would be read here, and changed."""
    said = heard("u-shape")
    judge = Judge("ann", said.bounds, said.told, said.party, others=["bob"])
    asked = Header("partition", verb=verb, values={"graph": True}, names=(SEALED,))
    box = torch.zeros(SEAL_BYTES + 9, dtype=torch.uint8)
    reply = Header(*PASSED_ON[verb], "", "ann", "bob", "ann", names=(SEALED,))
    judge(asked, [box], reply, [box])
    for wrong, shown in ((reply, box[:SEAL_BYTES]), (reply, box.int()), (reply.but(values={"last": True}), box)):
        with pytest.raises(WireError, match=f"answered '{verb}' with"):
            judge(asked, [box], wrong, [shown])
    hidden = torch.zeros(1, 4, said.bounds.hidden)
    for values in ({}, {"last": True, "needs_gradient": True}, {"last": True}):
        with pytest.raises(WireError, match=f"'{verb}' with an open frame for another client; expected: a sealed one"):
            judge(asked, [hidden], reply.but(values=values, names=("hidden",)), [hidden])


@pytest.mark.parametrize("verb", ["head_forward", "tail_step"])
def test_what_is_for_the_server_is_not_sealed(verb: str) -> None:
    said = heard("u-shape")
    judge = Judge("ann", said.bounds, said.told, said.party, others=["bob"])
    asked = Header("partition", verb=verb, values={"graph": True}, names=(SEALED,))
    box = torch.zeros(SEAL_BYTES + 9, dtype=torch.uint8)
    with pytest.raises(WireError, match=f"answered '{verb}' with"):
        judge(asked, [box], Header(*PASSED_ON[verb], "", "ann", "server", "ann", names=(SEALED,)), [box])


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_cannot_be_computed_with_is_as_if_it_were_refused(goes_on: bool) -> None:
    """The run goes on without the client, which is asked nothing more; or it ends with what was wrong."""
    why: list[str] = []

    def decides(error: CutlayerError) -> bool:
        why.append(f"{type(error).__name__}: {error}")
        return goes_on

    async def carry(frame: Frame) -> Any:
        raise AssertionError("it is asked")

    link = NetworkLink("ann", carry, meter=Meter(), goes_on=decides)
    with pytest.raises(Lost if goes_on else NonFinite):
        link.refuse(NonFinite("The loss is nan."))
    assert why == ["WireError: What client 'ann' sent cannot be computed with: The loss is nan."]
    with pytest.raises(Lost if goes_on else AssertionError):
        asyncio.run(link.tell("abort"))


# ---------------------------------------------------------------- between processes


@pytest.mark.slow
@pytest.mark.parametrize("verb", MESSAGES["u-shape"])
def test_a_client_that_misbehaves_is_lost_alone(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers with NaN, in its step 2; the others go on as in a simulation in which it is lost there."""
    run = Apart(tmp_path / "apart", framework="sfl-v2", partition=U, rounds=4)
    server = run.serve("--patience", "2")
    clients = {"ann": run.join("ann", traps=[Trap(verb, 2, "lie")]), "bob": run.join("bob")}
    run.ended({"server": server, **clients})
    found = run.summary()["network"]["ann"]
    assert (found["lost"], found["away"]) == ([2], [3])
    assert "the client misbehaves" in found["gone"]
    simulated(run, tmp_path / "one", monkeypatch, MESSAGES["u-shape"].index(verb))
    assert run.same(tmp_path / "one", names=["bob"])
    assert [s[:4] for s in steps(run.root / "server")] == [s[:4] for s in steps(tmp_path / "one")]
    assert "NaN" not in (run.root / "server" / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "kind", "verb", "clip"),
    [
        ("sfl-v2", "u-shape", "tail_step", None),
        ("sfl-v2", "two-part", "head_forward", 1.0),
        ("sfl-v1", "u-shape", "tail_step", 1.0),
    ],
)
def test_what_overflows_at_the_server_costs_nobody_else(
    framework: str, kind: str, verb: str, clip: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that are finite pass the judge; what they make of the trunk's gradient or the loss does not."""
    family = str(model("gpt2", num_hidden_layers=4))
    run = Apart(
        tmp_path / "apart", framework=framework, partition=U if kind == "u-shape" else TWO, rounds=4, model=family,
        max_grad_norm=clip,
    )  # fmt: skip
    server = run.serve("--patience", "2")
    clients = {"ann": run.join("ann", traps=[Trap(verb, 2, "swell")]), "bob": run.join("bob")}
    run.ended({"server": server, **clients})
    found = run.summary()["network"]["ann"]
    assert (found["lost"], found["away"]) == ([2], [3])
    assert "What client 'ann' sent cannot be computed with" in found["gone"]
    simulated(run, tmp_path / "one", monkeypatch, MESSAGES[kind].index(verb))
    assert run.same(tmp_path / "one", names=["bob"])
    assert [s[:4] for s in steps(run.root / "server")] == [s[:4] for s in steps(tmp_path / "one")]
