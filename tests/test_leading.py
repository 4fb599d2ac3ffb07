"""Selections that say between rounds whose device runs whose blocks, over the network: the simulation's numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import cutlayer
from apart import Apart, Command, Trap, steps
from arranged import two_domains
from cutlayer.agreed import AgreedSecret, make_secret
from cutlayer.apart import check_routes, served
from cutlayer.errors import CutlayerError, PolicyRefused
from cutlayer.registry import load
from cutlayer.released import Counts
from cutlayer.wire import SEALED, Header, read_frames
from regrouping import Plan, regroup
from spine import TWO, U
from test_absence import simulated
from test_joining import ask, seat
from test_network import both

KINDS = {"two-part": TWO, "u-shape": U}
LINEAR = {"name": "adamw", "lr": 0.01, "schedule": "linear"}
STEADY = {"name": "adamw", "lr": 0.01}
PAIRED = {"name": "pairingfl", "pairs": "selection", "local_steps": 2}
CHOICE = {"name": "pairingfl-selection", "sketch": "tokens"}
GROUPED = {"name": "gsfl", "groups": "selection", "intra": "psl", "local_steps": 2}
TOPS = {"name": "parallelsfl", "sketch": "tokens"}
PLAN: Plan = {0: ("c1 c0", "c3 c2"), 2: ("c2 c0", "c3 c1")}  # one trunk stays where it is, another changes its host
SECRET = AgreedSecret(b"a" * 32)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The selection is itself again after each test."""
    selection: Any = load("selection", "parallelsfl")
    for name in ("arrange", "each_round"):
        monkeypatch.setattr(selection, name, getattr(selection, name))


class Led(Apart):
    """A run in which a selection leads clients to each other, who allow it; with a plan the groups are those of it."""

    def __init__(self, root: Path, kind: str, *, plan: Plan | None = None, count: int = 4, **changes: Any) -> None:
        about = {"rounds": 4, "eval_every": 1, "optimizer": LINEAR, **changes}
        super().__init__(root / "apart", two_domains(count), partition=KINDS[kind], **about)
        make_secret(root / "agreed")
        (root / "policy.yaml").write_text("may_leave: {sketches: true, peers: true}\n")
        self.how = ["--policy", str(root / "policy.yaml"), "--secret", str(root / "agreed")]
        if plan is not None:
            self.first = partial(regroup, plan)
            self.first()  # in the simulation, too

    @property
    def simulated(self) -> dict[str, Any]:
        """The same run with all clients in one process, which records nothing."""
        return {**super().simulated, "record_wire": None}

    def come(self, name: str, *traps: Trap) -> Command:
        """A client that allows it."""
        return self.join(name, *self.how, traps=traps)

    def all(self) -> dict[str, Command]:
        """All clients."""
        return {name: self.come(name) for name in self.files}


def paired(root: Path, kind: str, **changes: Any) -> Led:
    return Led(root, kind, **{"framework": PAIRED, "selection": CHOICE, **changes})


def grouped(root: Path, kind: str, plan: Plan | None = PLAN, **changes: Any) -> Led:
    framework = {**GROUPED, **changes.pop("framework", {})}
    return Led(root, kind, plan=plan, framework=framework, **{"selection": TOPS, **changes})


# ---------------------------------------------------------------- the simulation's numbers

PAIRS: list[dict[str, Any]] = [{}, {"max_grad_norm": 0.1, "gradient_accumulation": 2}]
GROUPS: list[dict[str, Any]] = [
    {}, {"max_grad_norm": 0.1, "gradient_accumulation": 2},
    {"framework": {"intra": "sfl-v2", "moments": "keep"}, "max_grad_norm": 0.1},
    {"framework": {"intra": "sequential", "moments": "reset"}},
    {"framework": {"participation": 0.5, "moments": "keep"}, "rounds": 6},
    {"peft": {"name": "lora", "rank": 2, "dropout": 0.1}},
]  # fmt: skip


@pytest.mark.slow  # of groups: the test above; that the server reads nothing of it: test_sealing.py
def test_pairs_of_a_selection_between_processes_are_the_simulation(tmp_path: Path) -> None:
    """Another client brings its data in another round, and another one helps it; the server reads nothing of it."""
    run = paired(tmp_path, "u-shape", count=3, rounds=3, eval_every=None, record_wire=str(tmp_path / "seen"))
    summary, _ = both(run, tmp_path / "one", *run.how)
    shown = [header for _, header, _ in read_frames(tmp_path / "seen") if header.kind in ("activations", "gradient")]
    assert shown
    assert {header.names for header in shown} == {(SEALED,)}
    assert len({frozenset((header.sender, header.receiver)) for header in shown}) > 1  # pairs of devices
    assert len([name for name, count in summary["steps"].items() if count]) > 1


def test_groups_that_change_their_hosts_between_processes_are_the_simulation(tmp_path: Path) -> None:
    """A host goes on with its trunk, another one begins, one has none any more; the numbers are the simulation's."""
    run = grouped(tmp_path, "two-part", {0: ("c1 c0", "c2"), 1: ("c2 c0", "c1")}, count=3, rounds=3, eval_every=None)
    summary, alone = both(run, tmp_path / "one", *run.how)
    assert summary["arrangement"] == json.loads(json.dumps(alone["arrangement"]))
    last = run.root / "c0" / "checkpoints" / "round-000003"
    assert not (last / "trunk.safetensors").exists()
    assert (run.root / "c2" / "checkpoints" / "round-000003" / "trunk.safetensors").exists()
    log = [json.loads(line) for line in (run.root / "c2" / "sent.jsonl").read_text().splitlines()]
    stays = [line for line in log if line["to"] == "c2"]
    assert stays  # its own blocks come next, and of its own texts nothing left
    assert all(line["tensors"] == line["values"] == line["leaves"] == [] for line in stays)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", PAIRS, ids=str)
def test_pairs_are_the_simulation(changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    run = paired(tmp_path, kind, rounds=5, **changes)
    summary, alone = both(run, tmp_path / "one", *run.how)
    assert summary["arrangement"] == json.loads(json.dumps(alone["arrangement"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", GROUPS, ids=str)
def test_groups_are_the_simulation(changes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    run = grouped(tmp_path, kind, **changes)
    summary, alone = both(run, tmp_path / "one", *run.how)
    assert summary["arrangement"] == json.loads(json.dumps(alone["arrangement"]))


@pytest.mark.slow
def test_tops_by_what_devices_can_do(tmp_path: Path) -> None:
    """The groups are the selection's own; each top is among the strongest of its group."""
    speeds = [
        {"name": f"c{i}", "profile": {"flops": 1e6 * (1 + 3 * i), "up_mbps": 10, "down_mbps": 10, "rtt_ms": 5}}
        for i in range(4)
    ]
    run = grouped(tmp_path, "two-part", None, clients=speeds, selection={**TOPS, "size": 2})
    summary, alone = both(run, tmp_path / "one", *run.how)
    assert summary["arrangement"] == json.loads(json.dumps(alone["arrangement"]))
    assert len(summary["arrangement"]["groups"]) > 1


@pytest.mark.slow
def test_a_model_that_is_handed_has_what_a_client_may_come_to_run(tmp_path: Path) -> None:
    run = grouped(tmp_path, "two-part")
    server = run.serve()
    run.ended({"server": server, **{name: run.join(name, *run.how, model=False) for name in run.files}})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)


# ---------------------------------------------------------------- who is killed, away, or has lost its folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["pairs", "groups"])
def test_killed_parties_find_their_places_again(how: str, kind: str, tmp_path: Path) -> None:
    """A client that runs others' blocks is killed, then the server: routes, trunks and rates are as they were."""
    plan: Plan = {0: ("c1 c0", "c3 c2"), 4: ("c2 c0", "c3 c1"), 8: ("c0 c3", "c1 c2")}
    run = paired(tmp_path, kind, rounds=12) if how == "pairs" else grouped(tmp_path, kind, plan, rounds=12)
    server, clients = run.serve(), run.all()
    run.kill_after("c3", clients["c3"], 2)
    clients["c3"] = run.come("c3")
    run.kill_after("server", server, 6)
    run.ended({**clients, "server": run.serve()})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert "going on after round" in run.said("c0")
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)
    assert run.same_state(alone.out)
    assert not any("passed on again" in run.said(name) for name in run.files)


AWAY: dict[str, Plan] = {
    "a host that stays one": {0: ("c1 c0", "c3 c2"), 2: ("c2 c0", "c3 c1")},
    "a host for the first time": {0: ("c1 c0", "c2 c3"), 2: ("c2 c0", "c3 c1")},
    "a host no more": {0: ("c1 c0", "c3 c2"), 2: ("c2 c0", "c1 c3")},
    "a host of all": {0: ("c1 c0", "c2 c3"), 2: ("c3 c0 c1 c2",)},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", AWAY)
def test_groups_change_while_a_host_is_away(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who needs it sits out; when it is back, it and its trunk are where the others' arrangement has them."""
    run = grouped(tmp_path, "u-shape", AWAY[case], rounds=6, optimizer=STEADY)
    server = run.serve("--patience", "2")
    back = tmp_path / "back"
    alone = case == "a host of all"  # then nobody can evaluate without it, and the round that nobody trains in waits
    waits = {} if alone else {"c0": [Trap("keep", 3, "wait", str(back))]}
    traps = {**waits, "c3": [Trap("head_forward", 2, "kill")]}
    clients = {name: run.come(name, *traps.get(name, [])) for name in run.files}
    run.until("server", "Client 'c3' is gone")
    clients["c3"].wait()
    if alone:
        run.until("server", "the run waits for c3, who runs blocks of the model that is evaluated")
    else:
        run.reached(back)
    clients["c3"] = run.come("c3")
    run.until("server", "client 'c3' is here", 2)
    back.touch()
    run.ended({**clients, "server": server})
    assert run.summary()["network"]["c3"]["away"] == [1, 2]
    simulated(run, tmp_path / "one", monkeypatch, 0)
    assert [s[:4] for s in steps(run.root / "server")] == [s[:4] for s in steps(tmp_path / "one")]
    assert run.same(tmp_path / "one")


@pytest.mark.slow
def test_pairs_go_on_while_a_client_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = paired(tmp_path, "u-shape", rounds=6, optimizer=STEADY)
    server = run.serve("--patience", "2")
    back = tmp_path / "back"
    traps = {"c0": [Trap("keep", 3, "wait", str(back))], "c3": [Trap("keep", 2, "kill")]}
    clients = {name: run.come(name, *traps.get(name, [])) for name in run.files}
    run.until("server", "Client 'c3' is gone")
    clients["c3"].wait()
    run.reached(back)
    clients["c3"] = run.come("c3")
    run.until("server", "client 'c3' is here", 2)
    back.touch()
    run.ended({**clients, "server": server})
    assert run.summary()["network"]["c3"]["away"] == [1, 2]
    simulated(run, tmp_path / "one", monkeypatch, 0)
    assert [s[:4] for s in steps(run.root / "server")] == [s[:4] for s in steps(tmp_path / "one")]
    assert run.same(tmp_path / "one")


@pytest.mark.slow
def test_a_host_whose_folder_is_gone_gets_the_trunk_of_the_last_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins anew, as one that joins late; what it trains for others has not been at the start since."""
    run = grouped(tmp_path, "u-shape", {0: ("c1 c0", "c3 c2")}, rounds=6, optimizer=STEADY)
    server = run.serve("--patience", "2")
    back = tmp_path / "back"
    traps = {"c0": [Trap("keep", 3, "wait", str(back))], "c3": [Trap("head_forward", 4, "kill")]}
    clients = {name: run.come(name, *traps.get(name, [])) for name in run.files}
    run.until("server", "Client 'c3' is gone")
    clients["c3"].wait()
    run.reached(back)
    shutil.rmtree(run.root / "c3")
    clients["c3"] = run.come("c3")
    run.until("server", "client 'c3' is here", 2)
    back.touch()
    run.ended({**clients, "server": server})
    assert "does not hold round" in run.said("server")
    last = "checkpoints/round-000006"
    own = load_file(run.root / "c3" / last / "trunk.safetensors")
    merged = load_file(run.root / "server" / last / "federated.safetensors")
    assert own.keys() & merged.keys()
    assert all(torch.equal(own[name], merged[name]) for name in own if name in merged)
    simulated(run, tmp_path / "one", monkeypatch, 0)  # in which it was merely away
    here, there = (
        [step for step in steps(out) if step[0] == 3 and step[1] == "c2"]
        for out in (run.root / "server", tmp_path / "one")
    )
    assert here[0][:4] == there[0][:4]  # its own part was not lost, and the trunk has what it had there


# ---------------------------------------------------------------- what a client refuses


def led(root: Path, policy: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """The seat of ann, in a run of ann and bob."""
    allowed = {"sketches": True, "peers": True, "error_texts": True}
    about = {"framework": GROUPED, "selection": TOPS, "partition": TWO, **changes}
    own, _ = seat(root, policy or {"may_leave": allowed}, agreed=SECRET, **about)
    own.handle(ask("begin", 1, round=0, updates=9), [])
    own.handle(ask("set_up", 2, head_blocks=1, tail_blocks=-1, steps=6), [])
    return own


HERE = {"to": "ann", "for/ann": True, "for/bob": True, "slot": "group-0", "born": 0, "version": 0, "total": 4}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"to": "server"}, "names 'server', which is no client"),
    ({"to": "cyd"}, "names 'cyd', which is no client"),
    ({}, "does not tell to"),
    ({"to": "bob", "for/cyd": True}, "names 'cyd', which is no client"),
    ({"to": "bob", "for/ann": 3}, "does not say that its blocks are to be run"),
    ({"to": "bob", "slot": "group-0", "born": 0, "version": 0, "total": 4}, "which trunk is to be trained for whom"),
    ({**HERE, "blocks": 3}, "which trunk is to be trained for whom"),
    ({**HERE, "born": -1}, "born -1"),
    ({name: value for name, value in HERE.items() if name != "total"}, "which trunk is to be trained for whom"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), BAD, ids=[said for _, said in BAD])
def test_a_place_that_cannot_be_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    own = led(tmp_path)
    with pytest.raises(CutlayerError, match=said):
        own.handle(ask("lead", 3, **values), [])
    assert own.peers.stops == []


def test_who_may_not_run_blocks_for_others_never_does(tmp_path: Path) -> None:
    """Not joined at all; and if the owner's word were another by then, the request is refused, and nothing loaded."""
    with pytest.raises(PolicyRefused, match=r"may run blocks for any other client.*peers: true"):
        led(tmp_path / "one", {"may_leave": {"sketches": True}})
    own = led(tmp_path / "two")
    may = own.guard.policy.may_leave.model_copy(update={"peers": False})
    own.guard.policy = own.guard.policy.model_copy(update={"may_leave": may})
    with pytest.raises(CutlayerError, match=r"may_leave\.peers refuses"):
        own.handle(ask("lead", 3, **HERE), [])
    assert own.peers.stops == []
    assert not own._part.owns(2)


def test_a_run_in_which_nothing_says_it_takes_no_place(tmp_path: Path) -> None:
    for folder, changes in (
        ("fixed", {"framework": "pairingfl", "selection": "all"}),
        ("alone", {"framework": "sfl-v2", "selection": "all"}),
    ):
        own = led(tmp_path / folder, **changes)
        with pytest.raises(CutlayerError, match=r"rule told refuses: the server tells who runs blocks for whom"):
            own.handle(ask("lead", 3, to="bob"), [])


def test_nothing_of_a_step_goes_to_the_server_before_it_has_said_whose_blocks_are_where(tmp_path: Path) -> None:
    own = led(tmp_path)
    with pytest.raises(CutlayerError, match="training began before the server said which client runs whose blocks"):
        own.handle(ask("head_forward", 3, graph=True), [])
    own.handle(ask("lead", 4, to="bob"), [])
    told, (sealed,) = own.handle(ask("head_forward", 5, graph=True), [])
    assert (told.receiver, told.names, told.values) == ("bob", (SEALED,), {})
    assert sealed.dtype == torch.uint8
    with pytest.raises(CutlayerError, match="'lead' came in the middle of a training step"):
        own.handle(ask("lead", 6, **HERE), [])


def test_blocks_are_loaded_when_they_are_to_be_run_and_no_sooner(tmp_path: Path) -> None:
    """What was trained by then stays as it is; a trunk that was told to be another one is another one."""
    own = led(tmp_path)
    assert [own._part.owns(block) for block in range(4)] == [True, False, False, False]
    before = {name: tensor.clone() for name, tensor in own.party.slot.get().items()}
    own.handle(ask("lead", 3, **HERE), [])
    assert all(own._part.owns(owner) for owner in (*range(4), "top"))
    after = own.party.slot.get()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    trunk = own.peers.hosting.trunk
    own.handle(ask("lead", 4, **{**HERE, "total": 7}), [])
    assert own.peers.hosting.trunk is trunk
    own.handle(ask("lead", 5, **{**HERE, "born": 1}), [])
    assert own.peers.hosting.trunk is not trunk
    own.handle(ask("lead", 6, to="bob"), [])
    assert own.peers.hosting.trunk is None
    with pytest.raises(CutlayerError, match="which is not trained at 'ann'"):
        own.handle(about("host_get", 7, optimizer=False), [])


def about(verb: str, turn: int, **values: Any) -> Header:
    return ask(verb, turn, **values).but(slot="group-0")


def test_what_is_trained_for_others_is_asked_for_and_given_within_bounds(tmp_path: Path) -> None:
    own = led(tmp_path, max_grad_norm=1.0)
    own.handle(ask("lead", 3, **HERE), [])
    told, found = own.handle(about("host_get", 4, optimizer=True), [])
    state: dict[str, Tensor] = dict(zip(told.names, found, strict=True))
    assert (told.kind, told.slot, told.values) == ("state", "group-0", {"version": 0})
    assert own.guard.counts.kinds["hosted"][0] == 1
    name = next(iter(state))

    def put(turn: int, key: str, tensor: Tensor) -> None:
        own.handle(about("host_put", turn, reset=False).but(names=(key,), kind="state"), [tensor])

    put(5, name, torch.ones_like(state[name]))
    trunk = own.peers.hosting.trunk.slot
    assert torch.equal(trunk.params[name].detach(), torch.ones_like(state[name]))
    for turn, (key, tensor, said) in enumerate(
        (
            ("strange", torch.zeros(2), "which is not as 'group-0' has it"),
            (name, torch.zeros(1), "which is not as 'group-0' has it"),
            (name, torch.full_like(state[name], torch.nan), "not finite"),
            (f"optimizer/{name}/exp_avg", torch.zeros(10_000), "which is not as 'group-0' has it"),
        ),
        start=6,
    ):
        with pytest.raises(CutlayerError, match=said):
            put(turn, key, tensor)
    trunk.add({name: torch.ones_like(state[name])}, key=("bob", 0, 0))
    with pytest.raises(CutlayerError, match="while gradients wait"):
        put(20, name, state[name])
    how = {"scale": 1.0, "rate": 1.0, "by_tensor": True}
    for turn, (wrong, said) in enumerate(
        (
            ({**how, "weight/ann": 1.0}, "says nothing of 'bob'"), ({**how, "weight/bob": -1.0}, "told.head_weight"),
            ({**how, "weight/bob": "much"}, "which is no number"), ({**how, "scale": -1.0}, "told.scale"),
            ({"scale": 1.0}, "lacks the value 'rate'"),
        ),
        start=30,
    ):  # fmt: skip
        with pytest.raises(CutlayerError, match=said):
            own.handle(about("host_update", turn, **wrong), [])
    norm, _ = own.handle(about("host_norm", 40, by_tensor=False, **{"weight/bob": 2.0}), [])
    assert norm.values == {"squared_norm": 4.0 * state[name].numel()}
    done, _ = own.handle(about("host_update", 41, **how, **{"weight/bob": 2.0}), [])
    assert done.values == {"version": 1}
    assert trunk.idle


def test_a_trunk_is_given_once_a_round_and_no_more_often_than_there_may_be_rounds(tmp_path: Path) -> None:
    allowed = {"sketches": True, "peers": True, "error_texts": True}
    own = led(tmp_path, {"may_leave": allowed, "most": {"rounds": 2}})
    own.handle(ask("lead", 3, **HERE), [])
    trunk = own.peers.hosting.trunk.slot
    name, turn = next(iter(trunk.params)), 4

    def update() -> None:
        nonlocal turn
        trunk.add({name: torch.ones_like(trunk.params[name])}, key=("bob", turn, 0))
        turn += 1
        own.handle(about("host_update", turn, scale=1.0, rate=1.0, by_tensor=True, **{"weight/bob": 1.0}), [])

    for rounds in (1, 2):
        update()
        update()
        for _ in range(2):  # a merge, and that it is asked for again
            turn += 1
            own.handle(about("host_get", turn, optimizer=True), [])
            assert Counts.load(own.guard.counts.path).trunk_rounds == rounds
    with pytest.raises(CutlayerError, match=r"most.rounds refuses: this would be number 3; allowed: 2 in all"):
        update()


@pytest.mark.parametrize(
    ("made", "changes", "said"),
    [
        (grouped, {"exchange": "splitfrozen"}, "which the selection says who runs blocks for whom"),
        (grouped, {"clients": [{"name": "c0"}]}, "there is one client"),
    ],
    ids=["exchange", "one client"],
)
def test_what_cannot_be_with_it_is_refused(
    made: Callable[..., Led], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:  # fmt: skip
    run = made(tmp_path, "two-part", **changes)
    with pytest.raises(CutlayerError, match=said):
        check_routes(served(run.file), 4)
