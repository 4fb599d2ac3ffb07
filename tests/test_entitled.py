"""What of a run asks for what: no run asks a client for more than it is entitled to, and what it is not is refused."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cutlayer import registry
from cutlayer.build import layouts_of
from cutlayer.config import RunConfig, load_config
from cutlayer.driver import Run
from cutlayer.entitled import ASKED_BY, Entitled, entitled
from cutlayer.errors import PolicyRefused
from cutlayer.leaving import ANSWERS, HOST_VERBS, TRUNK_VERBS
from cutlayer.links import local
from cutlayer.wire import Header
from spine import TWO, U, caught, model, often, train  # noqa: F401
from tiny import text_rows, write_rows

FOUR = {name: text_rows(6, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
FAMILIES = ("framework", "selection", "planner", "exchange", "mixing", "aggregator", "peft")  # that may ask clients

REPLAY = {"name": "multisfl", "replay": True, "p0": 1.0, "p_min": 1.0, "p_max": 1.0}
MARKS = {"name": "clicooper", "watermark": 0.1, "mark_bits": 16, "mark_weights": 64}
GROUPS = {"name": "gsfl", "groups": "selection"}
LATE = {"framework": "async-sfl", "aggregator": "dt-asfl", "profile": "laptop"}
RANKS = {"name": "hsplitlora", "ranks": [1, 2], "alpha": 8, "warm_up": 1, "refresh": 1}
RUNS: dict[str, dict[str, Any]] = {
    "sequential-sl": {},
    "sequential-sl, reset": {"framework": {"name": "sequential-sl", "optimizer_state": "reset"}},
    "sfl-v1": {"framework": {"name": "sfl-v1", "moments": "reset"}},
    "sfl-v2, two-part": {"framework": "sfl-v2", "partition": TWO},
    "sfl-v2, clipped": {"framework": "sfl-v2", "max_grad_norm": 0.1},
    "psl": {"framework": "psl"},
    "psl, joint": {"framework": {"name": "psl", "grad_scale": "joint", "joint": "concatenate"}},
    "p-sl": {"framework": "p-sl"},
    "p-sl, parallel": {"framework": {"name": "p-sl", "form": "parallel"}},
    "hsfl": {"framework": "hsfl", "rounds": 2},
    "gsfl": {"framework": "gsfl"},
    "gsfl, joint": {"framework": {"name": "gsfl", "intra": "psl"}},
    "gsfl, taking turns": {"framework": {"name": "gsfl", "outer": "sequential", "intra": "psl"}},
    "multisfl": {"framework": "multisfl"},
    "multisfl, replay": {"framework": REPLAY, "partition": TWO},
    "multisfl, reset": {"framework": {"name": "multisfl", "optimizer_state": "reset"}},
    "async-sfl": LATE,
    "ringsfl": {"framework": "ringsfl"},
    "pairingfl": {"framework": "pairingfl"},
    "clicooper": {"framework": MARKS},
    "clicooper, unmarked": {"framework": "clicooper", "max_grad_norm": 0.1},
    "csfl": {"framework": "sfl-v1", "selection": {"name": "csfl", "sketch": "features", "threshold": 1e-6, "band": 0}},
    "gsfl-hash-grouping": {"framework": GROUPS, "selection": {"name": "gsfl-hash-grouping", "refresh": 1}},
    "pairingfl-selection": {
        "framework": {"name": "pairingfl", "pairs": "selection"}, "profile": "laptop",
        "selection": {"name": "pairingfl-selection", "sketch": "tokens"},
    },
    "parallelsfl": {"framework": {**GROUPS, "intra": "psl"}, "selection": {"name": "parallelsfl", "sketch": "tokens"}},
    "capability-cut": {"framework": "sfl-v1", "planner": "capability-cut", "profile": "laptop"},
    "splitft-adaptive-cut": {
        "framework": "sfl-v2", "planner": {"name": "splitft-adaptive-cut", "every": 1}, "rounds": 4,
        "aggregator": "lora-products", "peft": {"name": "splitft-cut-rank", "rank": 4, "cut_rank": 2, "alpha": 4},
    },
    "hsplitlora": {"framework": "sfl-v1", "aggregator": "lora-products", "peft": RANKS, "rounds": 4},
    "full": {"framework": "sfl-v2", "peft": "full"},
    "mu-splitfed": {"framework": "sfl-v1", "partition": TWO, "exchange": {"name": "mu-splitfed", "perturbations": 2}},
    "splitfrozen": {"framework": "sfl-v2", "exchange": {"name": "splitfrozen", "cache": True}, "partition": TWO},
    "minibatch-sfl": {"framework": "sfl-v1", "mixing": "minibatch-sfl"},
    "three-tier-sl": {"framework": "sfl-v1", "mixing": "three-tier-sl"},
    "safsl-window": {**LATE, "aggregator": "safsl-window"},
    "mhsl": {"framework": "sfl-v2", "aggregator": "mhsl"},
    "sfl-leo": {**LATE, "aggregator": "sfl-leo"},
    "splitlpf": {"framework": "sfl-v1", "aggregator": "splitlpf"},
}  # fmt: skip
QUICK = ("multisfl, replay", "mu-splitfed", "clicooper")


def of(run: Run, name: str) -> Entitled:
    """What a run may ask a client, whoever the client hosts now."""
    stops = (stop for route in run.parts.routes.values() for stop in route)
    blocks = run.parts.base.anatomy.num_blocks
    return entitled(run.config, layouts_of(run.config, blocks)[name], hosts=any(stop.party == name for stop in stops))


@pytest.mark.parametrize("case", often(RUNS, *QUICK))
def test_a_run_asks_for_no_more_than_its_clients_expect(
    case: str, tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request of a whole run passes, with an evaluation; what the run has a use for is asked for."""
    asked: set[str] = set()
    answer = local.answer

    def checked(party: Any, header: Header, tensors: Any) -> Any:
        of(caught[-1], party.name).check(header)
        asked.add(header.verb)
        return answer(party, header, tensors)

    monkeypatch.setattr(local, "answer", checked)
    data = {"eval": str(write_rows(tmp_path / "eval.jsonl", text_rows(3)))}
    train(model(num_hidden_layers=8), tmp_path / "out", FOUR, **{"data": data, "rounds": 2, **RUNS[case]})
    may = of(caught[-1], "ann")
    hosted = {*HOST_VERBS, *TRUNK_VERBS, "retime"}  # within one process nobody is asked for these
    assert {verb for verb, (use, _) in ASKED_BY.items() if use(may)} - hosted - asked <= {
        "get_state",
        "set_state",
        "move",
    }


def test_every_method_that_may_ask_clients_is_in_the_sweep() -> None:
    chosen = {family: {"none", "all", "plain", "lora", "fedavg"} for family in FAMILIES}
    for run in RUNS.values():
        for family in FAMILIES:
            if family in run:
                chosen[family].add(run[family] if isinstance(run[family], str) else run[family]["name"])
    chosen["framework"].add("sequential-sl")
    assert {(family, name) for family in FAMILIES for name in registry.names(family)} <= {
        (family, name) for family in FAMILIES for name in chosen[family]
    }


def test_every_verb_in_the_table_is_one_of_a_client() -> None:
    assert set(ASKED_BY) - set(ANSWERS) == {"retime"}
    assert set(ANSWERS) - set(ASKED_BY) == {"set_up", "head_forward", "tail_step", "abort"}


# ---------------------------------------------------------------- what is refused, and by what it is allowed


def config(**changes: Any) -> RunConfig:
    return load_config({"model": "m", "data": {"train": "x"}, "partition": U, "framework": "psl", **changes})


def asks(verb: str, *names: str, **values: Any) -> Header:
    return Header("partition", verb=verb, sender="server", receiver="client-0", values=values, names=names)


STATE = {"optimizer": False, "part": "own"}
PUT = {"version": -1, "reset": False}
SFL, TURNS, PSL = {"framework": "sfl-v1"}, {"framework": "sequential-sl"}, {"framework": "psl"}
PLAN = {"framework": "sfl-v1", "planner": {"name": "splitft-adaptive-cut", "every": 1}}
ALLOTS = {"framework": "sfl-v1", "aggregator": "lora-products", "peft": RANKS}
BOTH = {**ALLOTS, **PLAN}
LOOKS = {"framework": "sfl-v1", "partition": TWO, "exchange": {"name": "mu-splitfed", "perturbations": 2}}
REQUESTS: dict[str, tuple[Header, dict[str, Any], dict[str, Any], str]] = {
    # a request, a run that has no use for it, one that has, and the rule
    "a cut without a planner": (asks("move", head_blocks=0), SFL, PLAN, "verbs"),
    "the cut that it has, without anything that moves": (asks("move", head_blocks=1), SFL, ALLOTS, "verbs"),
    "a planner that plans once": (
        asks("move", head_blocks=0), {**PLAN, "planner": {"name": "capability-cut", "every": 0}, "profile": "laptop"},
        PLAN, "verbs",
    ),
    "a cut where only ranks change": (asks("move", "ranks", head_blocks=0), ALLOTS, BOTH, "told"),
    "ranks where only cuts change": (asks("move", "ranks", head_blocks=0), PLAN, BOTH, "told"),
    "another cut at the set-up": (asks("set_up", head_blocks=0, tail_blocks=1), SFL, PLAN, "told"),
    "another tail at the set-up": (asks("set_up", head_blocks=1, tail_blocks=0), SFL, PLAN, "told"),
    "the numbers of samples": (
        asks("set_up", cache=True), SFL, {**SFL, "exchange": {"name": "splitfrozen", "cache": True}}, "told",
    ),
    "the tokens of steps": (
        asks("set_up", tell_step_tokens=True), PSL, {"framework": {"name": "psl", "joint": "concatenate"}}, "told",
    ),
    "a look around": (asks("probe", directions=2), SFL, LOOKS, "verbs"),
    "a look in more directions": (
        asks("probe", directions=2), {**LOOKS, "exchange": "mu-splitfed"}, LOOKS, "told",
    ),
    "slopes": (asks("probed", "slopes"), SFL, LOOKS, "verbs"),
    "backpropagation": (asks("head_forward", graph=True), LOOKS, SFL, "told"),
    "a gradient": (asks("head_backward", "hidden"), LOOKS, SFL, "verbs"),
    "a part that is not merged": (asks("get_state", **STATE), PSL, SFL, "verbs"),
    "a part where only trunks are merged": (
        asks("get_state", **STATE), {"framework": {"name": "p-sl", "form": "parallel"}}, SFL, "verbs",
    ),
    "a part without an aggregator that merges": (
        asks("get_state", **STATE), {"framework": "sfl-v2", "aggregator": "mhsl"}, TURNS, "verbs",
    ),
    "another part": (asks("set_state", "a", **PUT), PSL, SFL, "verbs"),
    "the optimizer's state": (asks("get_state", **STATE | {"optimizer": True}), SFL, TURNS, "told"),
    "the optimizer's state, which begins anew": (
        asks("get_state", **STATE | {"optimizer": True}),
        {"framework": {"name": "sequential-sl", "optimizer_state": "reset"}}, TURNS, "told",
    ),
    "an optimizer's state": (asks("set_state", "optimizer/a/exp_avg", **PUT), SFL, PLAN, "told"),
    "a new optimizer": (asks("set_state", "a", **PUT | {"reset": True}), SFL, TURNS, "told"),
    "a number of updates": (asks("set_state", "a", **PUT | {"version": 7}), SFL, TURNS, "told"),
    "a sketch": (asks("sketch"), SFL, {**SFL, "selection": {"name": "csfl", "sketch": "tokens"}}, "verbs"),
    "another length": (
        asks("retime", ahead=9), SFL, {**SFL, "selection": {"name": "csfl", "sketch": "tokens"}}, "verbs",
    ),
    "a histogram": (asks("histogram"), {"framework": "multisfl"}, {"framework": REPLAY, "partition": TWO}, "verbs"),
    "features": (asks("features"), {"framework": "multisfl"}, {"framework": REPLAY, "partition": TWO}, "verbs"),
    "a norm": (asks("grad_norm"), SFL, {**SFL, "max_grad_norm": 1.0}, "verbs"),
    "an update": (asks("update", scale=1.0), PSL, {"framework": {"name": "psl", "grad_scale": "joint"}}, "verbs"),
    "an update where none is clipped": (asks("update", scale=1.0), PSL, {**PSL, "max_grad_norm": 1.0}, "verbs"),
    "importance": (asks("importance"), PLAN, ALLOTS, "verbs"),
    "a stage": (
        asks("begin_stage"), {"framework": "clicooper"}, {"framework": MARKS}, "verbs",
    ),
    "a stage's end": (asks("end_stage"), SFL, {"framework": MARKS}, "verbs"),
}  # fmt: skip


def judge(run: dict[str, Any], request: Header, *, hosts: bool = False) -> None:
    made = config(**run)
    entitled(made, layouts_of(made, 4)["client-0"], hosts=hosts).check(request)


@pytest.mark.parametrize("case", REQUESTS)
def test_what_a_run_has_no_use_for_is_refused(case: str) -> None:
    request, without, having, rule = REQUESTS[case]
    with pytest.raises(PolicyRefused) as refused:
        judge(without, request)
    assert refused.value.rule == rule
    judge(having, request)


@pytest.mark.parametrize("verb", [*HOST_VERBS, *TRUNK_VERBS])
def test_only_who_runs_blocks_for_others_is_asked_to(verb: str) -> None:
    with pytest.raises(PolicyRefused, match="nothing that this run asks for"):
        judge({"framework": "clicooper"}, asks(verb))
    clips = {"max_grad_norm": 1.0} if verb == "host_norm" else {}
    judge({"framework": "clicooper", **clips}, asks(verb), hosts=True)
    state = asks("get_state", **STATE | {"part": "all"})
    with pytest.raises(PolicyRefused, match="asks for the part 'all'"):
        judge(SFL, state)
    judge(SFL, state, hosts=True)


TRUNKS: dict[str, tuple[Header, set[str]]] = {  # a request, and with which moments it is asked for
    "the optimizer's state": (asks("host_get", optimizer=True), {"average"}),
    "no optimizer's state": (asks("host_get", optimizer=False), {"average", "keep", "reset"}),
    "brings an optimizer's state": (asks("host_put", "optimizer/a/exp_avg", reset=False), {"average"}),
    "a new optimizer": (asks("host_put", "a", reset=True), {"reset"}),
}


@pytest.mark.parametrize("case", TRUNKS)
def test_the_optimizer_of_a_trunk_is_asked_for_where_the_framework_has_a_use_for_it(case: str) -> None:
    request, used = TRUNKS[case]
    for moments in ("average", "keep", "reset"):
        run = {"framework": {"name": "gsfl", "intra": "psl", "moments": moments}}
        if moments in used:
            judge(run, request, hosts=True)
            continue
        with pytest.raises(PolicyRefused) as refused:
            judge(run, request, hosts=True)
        assert refused.value.rule == "told"


def test_every_verb_that_not_every_run_has_is_refused_by_a_run_without_all() -> None:
    made = config()
    bare = replace(entitled(made, layouts_of(made, 4)["client-0"], hosts=False), directions=0)
    for verb in set(ASKED_BY) - {"head_backward"}:
        with pytest.raises(PolicyRefused, match="nothing that this run asks for"):
            bare.check(asks(verb))
