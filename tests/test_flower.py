"""A run in a Flower federation: rounds and step 11 by a strategy, and the same numbers as a run of our own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="the extra [flower] is not installed; it has an environment of its own")

from flwr.serverapp.strategy import FedAvg, FedMedian

import cutlayer
from apart import ROWS, Apart, steps
from cutlayer.errors import ConfigError, Disconnected, Gone
from cutlayer.flower import client_app, train
from cutlayer.flower.records import reply_of
from cutlayer.links.net.connecting import connect
from cutlayer.links.net.session import Session
from cutlayer.seat import Seat
from flower_nodes import Nodes
from spine import TWO, U, adapter


def nodes_of(run: Apart, **more: dict[str, str]) -> Nodes:
    """A node for each client of a run."""
    configs = {}
    for number, name in enumerate(ROWS, start=1):
        own = {"name": name, "data": run.files[name], "eval": run.valid, "out": str(run.root / name)}
        configs[number] = {**own, "model": run.tree["model"], "device": "cpu", **more.get(name, {})}
    return Nodes(client_app(), configs)


def federated(run: Apart, nodes: Nodes, strategy: Any, **options: Any) -> Any:
    """The run, with its rounds by a strategy."""
    return train(
        nodes, run.tree, strategy=strategy, bind="localhost:0", address="localhost:0", out=run.root / "server",
        progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("partition", [TWO, U], ids=["two-part", "u-shape"])
def test_flower_s_average_is_ours(partition: dict[str, Any], tmp_path: Path) -> None:
    """FedAvg of Flower, weighted by examples: losses and weights up to the rounding of another average."""
    run = Apart(tmp_path, framework="sfl-v2", partition=partition)
    one = cutlayer.train(run.simulated, out=tmp_path / "one")
    nodes = nodes_of(run)
    two = federated(run, nodes, FedAvg(fraction_evaluate=0.0))
    assert nodes.errors == []
    ours, theirs = steps(one.out), steps(two.out)
    assert [line[:3] for line in ours] == [line[:3] for line in theirs]
    assert [line[3] for line in theirs] == pytest.approx([line[3] for line in ours], abs=1e-5)
    assert [line[4:] for line in theirs] == [line[4:] for line in ours], "the bytes of steps"
    whole, found = adapter(one.out), adapter(two.out)
    assert whole.keys() == found.keys()
    for name, tensor in whole.items():
        assert torch.allclose(tensor, found[name], atol=1e-4), name
    assert two.summary["rounds"] == 3
    assert two.summary["bytes"]["aggregate"] == 0, "step 11 is not on our wire"
    left = [json.loads(line) for line in (run.root / "ann" / "sent.jsonl").read_text().splitlines()]
    verbs = [line["verb"] for line in left]
    assert verbs.count("get_state") == 3, "what Flower gets passes the guard, too"
    assert verbs.count("hello") == 3, "each round begins with a greeting, which tells the sizes of the data"
    assert [line["leaves"] for line in left if line["verb"] == "hello"] == [["sizes"]] * 3
    counted = json.loads((run.root / "ann" / "sent.json").read_text())
    assert counted["bytes"] == sum(line["bytes"] for line in left), "most.bytes is held to all of it"


def test_over_tls_with_keys(tmp_path: Path) -> None:
    """Each node is who its keys say it is."""
    run = Apart(tmp_path, framework="sfl-v2", rounds=1)
    keys = tmp_path / "keys"
    clients = [word for name in ROWS for word in ("--client", name)]
    command = [sys.executable, "-m", "cutlayer", "keys", "--out", str(keys), "--host", "localhost", *clients]
    subprocess.run(command, check=True, capture_output=True)
    nodes = nodes_of(run, **{name: {"keys": str(keys / name)} for name in ROWS})
    result = federated(run, nodes, FedAvg(fraction_evaluate=0.0), keys=keys / "server")
    assert nodes.errors == []
    assert result.summary["steps"] == {"ann": 1, "bob": 1}


def test_any_strategy_and_evaluation(tmp_path: Path) -> None:
    run = Apart(tmp_path, framework="sfl-v2", rounds=2)
    nodes, said = nodes_of(run), list[Any]()
    strategy = FedMedian(fraction_evaluate=1.0)
    before = strategy.aggregate_evaluate

    def heard(number: int, replies: Any) -> Any:
        said.append(before(number, replies))
        return said[-1]

    strategy.aggregate_evaluate = heard  # type: ignore[method-assign]
    result = federated(run, nodes, strategy)
    assert nodes.errors == []
    assert [0 < metrics["eval_loss"] < 10 for metrics in said] == [True, True]
    assert result.summary["steps"] == {"ann": 2, "bob": 2}


def test_a_round_of_some(tmp_path: Path) -> None:
    """Flower draws one of two clients; the other goes on from where it was, with the newest merge."""
    run = Apart(tmp_path, framework="sfl-v2", rounds=4)
    nodes = nodes_of(run)
    result = federated(run, nodes, FedAvg(fraction_train=0.5, min_train_nodes=1, fraction_evaluate=0.0))
    assert nodes.errors == []
    assert sum(result.summary["steps"].values()) == 4


def test_a_client_that_refuses_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its owner's policy forbids what Flower would get: nothing of it leaves, and the others go on."""
    run = Apart(tmp_path, framework="sfl-v2", rounds=2)
    policy = tmp_path / "policy.yaml"
    policy.write_text("may_leave: {head_adapter: false}\n")
    nodes = nodes_of(run, ann={"policy": str(policy)})
    result = federated(run, nodes, FedAvg(fraction_evaluate=0.0))
    assert len(nodes.errors) == 2
    assert set(nodes.errors) == {"Told: PolicyRefused (its words stay with the client)"}
    assert caplog.text.count("The policy's rule may_leave.head_adapter refuses") == 2, "the owner reads it"
    assert result.summary["steps"] == {"ann": 0, "bob": 2}
    left = [json.loads(line) for line in (run.root / "ann" / "sent.jsonl").read_text().splitlines()]
    assert [(line["verb"], line["leaves"], line["tensors"]) for line in left] == [("error", [], [])] * 2


def test_a_client_that_misbehaves_is_lost_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shows is judged, and Flower's strategy has one failure more; the others' round goes on."""
    answered = Seat._answered

    def wrong(self: Seat, *asked: Any) -> Any:
        reply, shown = answered(self, *asked)
        if self.name == "ann" and asked[1].verb == "head_forward":
            shown = [tensor * float("nan") if tensor.is_floating_point() else tensor for tensor in shown]
        return reply, shown

    monkeypatch.setattr(Seat, "_answered", wrong)
    run = Apart(tmp_path, framework="sfl-v2", rounds=2)
    nodes = nodes_of(run)
    result = federated(run, nodes, FedAvg(fraction_evaluate=0.0))
    assert nodes.errors == ["Told: NetworkError (its words stay with the client)"] * 2
    assert result.summary["steps"] == {"ann": 0, "bob": 2}
    assert result.summary["lost"] == {"ann": 2, "bob": 0}


@pytest.mark.parametrize("what", ["part", "count"])
def test_a_part_that_is_no_number_is_not_merged(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node gives to Flower for step 11 is judged before the strategy has it."""

    def wrong(key: str, state: Any, metrics: Any) -> Any:
        if metrics["num-examples"] == len(ROWS["ann"]):
            nothing = float("nan")
            state = {name: tensor * nothing for name, tensor in state.items()} if what == "part" else state
            metrics = {**metrics, "num-examples": nothing} if what == "count" else metrics
        return reply_of(key, state, metrics)

    monkeypatch.setattr("cutlayer.flower.client.reply_of", wrong)
    run = Apart(tmp_path, framework="sfl-v2", rounds=1)
    nodes = nodes_of(run)
    result = federated(run, nodes, FedAvg(fraction_evaluate=0.0))
    assert nodes.errors == []
    assert result.summary["steps"] == {"ann": 1, "bob": 1}
    assert all(tensor.isfinite().all() for tensor in adapter(result.out).values())


def test_what_leaves_again_is_counted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection breaks while a reply is on its way: the reply leaves twice, and so does a greeting."""
    run, broken = Apart(tmp_path, framework="sfl-v2", rounds=1), list[str]()

    async def connected(*arguments: Any, **options: Any) -> Session:
        session = await connect(*arguments, **options)
        sent = session.send

        async def send(packed: Any) -> None:
            if session.hello["client"] != "ann" or broken:
                return await sent(packed)
            broken.append("ann")
            session.drop("The cable was cut.")
            raise Disconnected("The cable was cut.")

        session.send = send  # type: ignore[method-assign]
        return session

    monkeypatch.setattr("cutlayer.offered.connect", connected)
    nodes = nodes_of(run)
    result = federated(run, nodes, FedAvg(fraction_evaluate=0.0))
    assert (nodes.errors, broken) == ([], ["ann"])
    assert result.summary["steps"] == {"ann": 1, "bob": 1}
    left = [json.loads(line) for line in (run.root / "ann" / "sent.jsonl").read_text().splitlines()]
    assert [line["again"] for line in left if line["verb"] == "hello"] == [False, True]
    assert [line["turn"] for line in left if line["again"] and line["verb"] != "hello"] == [1]


def test_nobody_comes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of why, the ServerApp reads the kind, and more only of a node whose policy allows it."""
    run = Apart(tmp_path, framework="sfl-v2", rounds=1)
    policy, nowhere = tmp_path / "policy.yaml", str(tmp_path / "nowhere.jsonl")
    policy.write_text("may_leave: {error_texts: true}\n")
    nodes = nodes_of(run, ann={"data": nowhere}, bob={"data": nowhere, "policy": str(policy)})
    with pytest.raises(Gone, match="nobody of those whom Flower drew has come"):
        federated(run, nodes, FedAvg(fraction_evaluate=0.0))
    hidden, told = sorted(nodes.errors, key=len)
    assert hidden == "Told: DataError (its words stay with the client)"
    assert nowhere in told
    assert caplog.text.count(nowhere) >= 2, "both owners read it"
    kinds = [json.loads((run.root / name / "sent.json").read_text())["kinds"] for name in ROWS]
    assert kinds == [{}, {"error_texts": [1, 0]}]


@pytest.mark.parametrize("lacks", ["data", "out"])
def test_a_node_without_places_tells_nothing(lacks: str, tmp_path: Path) -> None:
    """Before there is a policy, too, only the kind leaves."""
    run = Apart(tmp_path, framework="sfl-v2", rounds=1)
    nodes = nodes_of(run)
    for config in nodes.configs.values():
        del config[lacks]
    with pytest.raises(Gone):
        federated(run, nodes, FedAvg(fraction_evaluate=0.0))
    assert nodes.errors == ["Told: ConfigError (its words stay with the client)"] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"framework": "sfl-v1"}, "Flower merges the clients' parts once a round and no trunks"),
        ({"framework": "psl"}, "Flower merges the clients' parts once a round and no trunks"),
        ({"rounds": None, "epochs": 2}, "epochs is given, but Flower counts rounds"),
        ({"framework": {"name": "sfl-v2", "participation": 0.5}}, "Flower's strategy draws the clients"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_what_flower_cannot_carry_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = Apart(tmp_path, **changes)
    with pytest.raises(ConfigError, match=said):
        federated(run, nodes_of(run), FedAvg(fraction_evaluate=0.0))
    assert not (run.root / "server").exists()


@pytest.mark.parametrize(("name", "kind"), [("server_app", "ServerApp"), ("client_app", "ClientApp")])
def test_the_app_of_the_demo_loads(name: str, kind: str) -> None:
    file = Path(__file__).parents[1] / "demo" / "flower" / "cutlayer_federation" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert type(module.app).__name__ == kind
