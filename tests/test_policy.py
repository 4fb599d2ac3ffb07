"""The policy: ordinary runs pass, what they send can be refused, and an offered run is judged before it starts."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cutlayer import registry
from cutlayer.build import layouts_of
from cutlayer.config import RunConfig, load_config
from cutlayer.config_types import Spec
from cutlayer.driver import Run
from cutlayer.entitled import entitled
from cutlayer.errors import ConfigError, PolicyRefused
from cutlayer.guard import Guard, held_by
from cutlayer.guarded import guarded
from cutlayer.links import local
from cutlayer.parties.client import ClientParty
from cutlayer.policy import Policy, load_policy
from cutlayer.released import Counts, Log
from cutlayer.wire import Header, read_frames
from spine import TWO, U, caught, model, often, resumed, train  # noqa: F401
from tiny import text_rows, write_rows

FOUR = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}
PAIRS = [(name, kind) for name in registry.names("framework") for kind in ("two-part", "u-shape")]
QUICK = {("sfl-v2", "two-part"), ("sequential-sl", "u-shape"), ("clicooper", "two-part")}
CUTS = {"two-part": TWO, "u-shape": U}


@pytest.fixture
def guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: list[Run]) -> Callable[..., dict[str, Guard]]:
    """Puts a guard between each client and its link, with one policy, from the next run on; they are made as they are
    needed."""

    def put(policy: Policy | None = None) -> dict[str, Guard]:
        made: dict[str, Guard] = {}
        answers: dict[str, Any] = {}

        def answer(party: ClientParty, header: Header, tensors: Any) -> Any:
            name = party.name
            if name not in made:
                run = caught[-1]
                blocks = run.parts.base.anatomy.num_blocks
                use = entitled(run.config, layouts_of(run.config, blocks)[name], hosts=True)
                log, counts = Log(tmp_path / f"{name}.jsonl"), Counts.load(tmp_path / f"{name}.json")
                made[name] = Guard(
                    policy or Policy(),
                    log,
                    counts,
                    client=name,
                    entitled=use,
                    held=lambda: held_by(party),
                    planned=10**6,
                )
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


PLANNER = """from dataclasses import dataclass
from cutlayer.contracts import Planner
from cutlayer.registry import method


@method("planner")
@dataclass
class There(Planner):
    every: int = 1
    asked: int = 0

    def bounds(self, now):
        return {client: range(0, now.most(client) + 1) for client in now.layouts}

    def start(self, now):
        return {client: 2 for client in now.layouts}

    def plan(self, now):
        self.asked += 1
        return {client: 2 - self.asked % 2 for client in now.layouts}

    def state(self):
        return {"asked": float(self.asked)}

    def restore(self, state):
        self.asked = int(state["asked"])
"""
LOOKS = {"exchange": "mu-splitfed", "framework": "sfl-v1", "partition": TWO}
FROZEN = {"exchange": {"name": "splitfrozen", "cache": True}, "partition": TWO}
GROUPS = {"framework": {"name": "gsfl", "groups": "selection"}, "selection": "gsfl-hash-grouping"}
REPLAY = {"framework": {"name": "multisfl", "replay": True, "p0": 1.0, "p_min": 1.0, "p_max": 1.0}, "partition": TWO}
RANKS = {
    "framework": "sfl-v1", "aggregator": "lora-products", "rounds": 4,
    "peft": {"name": "hsplitlora", "ranks": [1, 2], "alpha": 8, "warm_up": 1, "refresh": 1},
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    # a run, what the policy must allow besides the defaults, and a verb that it asks
    "looking around": (LOOKS, [], "probed"),
    "a frozen head": (FROZEN, ["sample_numbers"], "head_backward"),
    "groups by hashes": (GROUPS, ["sketches"], "sketch"),
    "replay": (REPLAY, ["sketches", "features"], "features"),
    "moving cuts": ({"planner": "there.py", "framework": "sfl-v1", "rounds": 3}, [], "move"),
    "ranks by importance": (RANKS, [], "importance"),
    "clipping": ({"max_grad_norm": 0.1}, [], "update"),
    "a client that is lost": ({"framework": "sfl-v2", "goings": {"dan": {"fails": [1]}}, "rounds": 4}, [], "set_state"),
    "accumulation": ({"gradient_accumulation": 2, "batch_size": 1}, [], "head_backward"),
}


QUICK_OTHERS = ("moving cuts", "a client that is lost")


@pytest.mark.parametrize("case", often(OTHERS, *QUICK_OTHERS))
def test_other_runs_pass_once_what_they_send_is_allowed(case: str, tmp_path: Path, guards: Any) -> None:
    changes, allowed, verb = OTHERS[case]
    if "planner" in changes:
        (tmp_path / "there.py").write_text(PLANNER)
        changes = {**changes, "planner": {"name": str(tmp_path / "there.py"), "every": 1}}
    if allowed:
        guards()
        with pytest.raises(PolicyRefused) as refused:
            train(model(num_hidden_layers=5), tmp_path / "refused", FOUR, **changes)  # not judged before: stopped then
        assert refused.value.rule == f"may_leave.{allowed[0]}"
        for file in [*tmp_path.glob("*.json"), *tmp_path.glob("*.jsonl")]:
            file.unlink()
    made = guards(load_policy({"may_leave": dict.fromkeys(allowed, True)}) if allowed else None)
    train(model(num_hidden_layers=5), tmp_path / "out", FOUR, **changes)
    assert verb in {line["verb"] for client in made for line in logged(tmp_path, client)}
    for kind in allowed:
        assert any(kind in guard.counts.kinds for guard in made.values())


def test_a_resumed_run_goes_on_counting_and_repeats_are_told(tmp_path: Path, guards: Any) -> None:
    """The last round is made again from an older checkpoint: its batches left twice, and are counted twice."""
    two = {"ann": FOUR["ann"], "bob": FOUR["bob"]}
    first = guards()
    train(model(), tmp_path / "out", two, rounds=3, framework="sfl-v1", checkpoint_every=1)
    before = {client: (guard.counts.bytes, guard.counts.micros) for client, guard in first.items()}
    second = guards()
    resumed(tmp_path / "out")
    for client, (size, micros) in before.items():
        counts = second[client].counts
        assert (counts.micros, counts.repeats, counts.furthest) == (micros + 1, 1, (2, 0))
        assert counts.bytes > size
        assert "(1 of them again)" in second[client].told()
    guards(load_policy({"most": {"repeats": 1}}))
    with pytest.raises(PolicyRefused, match=r"most\.repeats"):
        resumed(tmp_path / "out")


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
        pytest.param({}, "token_counts", marks=pytest.mark.slow),
        pytest.param({}, "gradients", marks=pytest.mark.slow),
        ({}, "activations"),
        pytest.param({}, "sizes", marks=pytest.mark.slow),
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
    "no such client": ({}, {"clients": [{"name": "bob"}]}, "the run has no client 'client-0'; it has: bob", {}),
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
    "sample numbers": (
        {}, {"exchange": {"name": "splitfrozen", "cache": True}}, "may_leave.sample_numbers is false",
        {"exchange": "splitfrozen"},
    ),
    "norms": ({"may_leave": {"gradient_norms": False}}, {"max_grad_norm": 1.0}, "may_leave.gradient_norms", {}),
    "rounds": ({"most": {"rounds": 5}}, {"rounds": 6}, "most.rounds: the run has 6; allowed: 5", {"rounds": 5}),
    "steps": ({"most": {"steps": 5}}, {"steps": 6}, "most.steps: the run has 6; allowed: 5", {"rounds": 6}),
    "epochs": ({"most": {"epochs": 5}}, {"epochs": 6}, "most.epochs: the run has 6; allowed: 5", {"epochs": 5}),
    "no defense": (
        {"defenses": [DP]}, {}, "the run lacks 'dp-forward'",
        {"defense": [{"name": "dp-forward", "epsilon": 8, "clip": 1.0}]},
    ),
    "a weak defense": (
        {"defenses": [DP]}, {"defense": [{"name": "dp-forward", "epsilon": 9, "clip": 1.0}]},
        "'dp-forward' has epsilon 9; allowed: at most 8",
        {"defense": [{"name": "dp-forward", "epsilon": 0.5, "clip": 1.0}]},
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
    "an option that is not named": (
        {"defenses": [DP]}, {"defense": [{"name": "dp-forward", "epsilon": 8, "clip": 1.0, "delta": 0.999999}]},
        "has delta 0.999999, of which the policy says nothing; allowed: 1e-05, the method's default",
        {"defense": [{"name": "dp-forward", "epsilon": 8, "clip": 1, "delta": 1e-5}]},
    ),
    "an option that is free": (
        {"defenses": [{**DP, "delta": {"at_most": 1e-4}, "project": "any"}]},
        {"defense": [{"name": "dp-forward", "epsilon": 8, "clip": 1.0, "delta": 0.5, "project": 4}]},
        "has delta 0.5; allowed: at most 0.0001",
        {"defense": [{"name": "dp-forward", "epsilon": 8.0, "clip": 1.0, "project": 4}]},
    ),
    "a defense that is emptied": (
        {"defenses": "dp-forward"}, {"defense": [{"name": "dp-forward", "noise": 0}]},
        "has noise 0, of which the policy says nothing; allowed: null", {"defense": [{"name": "dp-forward"}]},
    ),
    "numbers as numbers": (
        {"defenses": [{"name": "dp-forward", "epsilon": 8}]}, {"defense": [{"name": "dp-forward", "epsilon": 9.0}]},
        "has epsilon 9.0; allowed: 8", {"defense": [{"name": "dp-forward", "epsilon": 8.0}]},
    ),
    "a default that is not said": (
        {"defenses": [{"name": "dp-forward", "epsilon": {"at_most": 8}}]}, {"defense": [{"name": "dp-forward"}]},
        "has epsilon null, by the method's default; have the run say it; allowed: at most 8",
        {"defense": [{"name": "dp-forward", "epsilon": 8}]},
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
    plain = told.replace(":", "").lower()
    assert {load_policy({"server": form}).server for form in (told, plain, f"sha256:{plain}")} == {plain}


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
