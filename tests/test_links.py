"""The local link and the parties behind it: virtual time by the cost model, order of verbs, failures."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.contracts import How, Parcel
from cutlayer.costs import (
    Training,
    Work,
    profile_from,
    queue_finish,
    queue_step,
    sequential_step,
    shape_of,
    two_part_stages,
)
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError, WireError
from cutlayer.links.local import LocalLink
from cutlayer.methods.framework.sfl_v2 import SFLV2
from cutlayer.parties.client import ClientParty
from cutlayer.parties.trunk import Place, TrunkParty
from cutlayer.wire import Header, Meter, read_frames
from spine import TWO, U, caught, equal, lines, model, often, train  # noqa: F401
from tiny import BLOCKS, text_rows

ROWS = {name: text_rows(size, seed=i) for i, (name, size) in enumerate({"ann": 3, "bob": 3, "cid": 3}.items())}
PROFILES = {"ann": "phone+4g", "bob": "laptop+dsl", "cid": "edge-box+fibre"}


# ---------------------------------------------------------------- virtual time


def stages(folder: Path, run: Any, cut: int) -> dict[str, Any]:
    """The cost model's stages of each client's first step, from the sizes of its frames."""
    shape = shape_of(run.parts.base.model.config, task="causal")
    server = profile_from("server")
    assert server is not None
    found = {}
    frames = [(line, header) for line, header, _ in read_frames(folder) if line["step"] == 0]
    for name in run.clients:
        up = next(line for line, h in frames if line["step_name"] == "send_activations" and h.client == name)
        down = next(line for line, h in frames if line["step_name"] == "return_gradients" and h.client == name)
        rows, length, _ = up["shapes"][0]
        client = profile_from(PROFILES[name])
        assert client is not None
        found[name] = two_part_stages(
            Work(shape, length=length, training=Training(rank=2)), shape, cut=cut, tokens=rows * length,
            up_bytes=up["length"], down_bytes=down["length"], client=client, server=server,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("client", PROFILES)
def test_sequential_time_is_the_closed_form(client: str, cut: int, tmp_path: Path, caught: list[Any]) -> None:
    train(
        model(), tmp_path / "out", {client: ROWS[client]}, partition={**TWO, "head_blocks": cut}, profiles=PROFILES,
        rounds=3, record_wire=str(tmp_path / "wire"),
    )  # fmt: skip
    expected = sequential_step([stages(tmp_path / "wire", caught[0], cut)[client]])
    times = [line["virtual_time"] for line in lines(tmp_path / "out")]
    assert times[1] - times[0] == pytest.approx(expected, rel=1e-6)
    assert times[2] - times[1] == pytest.approx(expected, rel=1e-6)
    assert sum(lines(tmp_path / "out")[1]["virtual_seconds"].values()) == pytest.approx(expected, rel=1e-6)


def test_sfl_v2_time_is_a_queue_in_the_order_of_turns(
    tmp_path: Path, caught: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = []
    original = SFLV2.round

    async def watched(self: SFLV2, run: Any, number: int) -> None:
        began.append(run.clock.now())
        await original(self, run, number)

    monkeypatch.setattr(SFLV2, "round", watched)
    train(
        model(), tmp_path / "out", ROWS, partition=TWO, profiles=PROFILES, rounds=1,
        framework={"name": "sfl-v2", "order": "listed"}, record_wire=str(tmp_path / "wire"),
    )  # fmt: skip
    found = stages(tmp_path / "wire", caught[0], 1)
    ends = {line["client"]: line["virtual_time"] - began[0] for line in lines(tmp_path / "out")}
    expected = queue_finish(list(found.values()))
    for (name, one), end in zip(found.items(), expected, strict=True):
        assert ends[name] == pytest.approx(end + one.delivery, rel=1e-6)
    assert max(ends.values()) == pytest.approx(queue_step(list(found.values())), rel=1e-6)
    assert max(ends.values()) < sequential_step(list(found.values()))


def finish(framework: str, tmp_path: Path, caught: list[Any], workers: int) -> tuple[float, dict[str, Any]]:
    """Virtual seconds of the first round, and each client's stages."""
    out = tmp_path / f"{framework}-{workers}"
    train(
        model(), out, ROWS, partition=TWO, profiles=PROFILES, rounds=1, framework=framework,
        record_wire=str(tmp_path / f"{framework}-{workers}-wire"),
        profiles_of_others={"server": {"device": "server", "workers": workers}},
    )  # fmt: skip
    found = stages(tmp_path / f"{framework}-{workers}-wire", caught[-1], 1)
    return max(line["virtual_time"] for line in lines(out)) - caught[-1].began, found


@pytest.mark.parametrize("framework", often(["psl", "sfl-v1"], "psl"))
def test_parallel_time_is_the_slowest_client_or_a_queue(
    framework: str, tmp_path: Path, caught: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a worker a client: max of head + s + q. With one worker: a queue in the order of arrival."""
    original = Run.together

    async def watched(self: Any, work: Any, clients: Any) -> None:
        self.began = self.clock.now()
        await original(self, work, clients)

    monkeypatch.setattr(Run, "together", watched)
    took, found = finish(framework, tmp_path, caught, workers=3)
    assert took == pytest.approx(max(one.release + one.server + one.delivery for one in found.values()), rel=1e-6)
    took, found = finish(framework, tmp_path, caught, workers=1)
    arrivals = sorted(found.values(), key=lambda one: one.release)
    assert took == pytest.approx(queue_step(arrivals), rel=1e-6)


def test_waiting_and_who_was_critical(tmp_path: Path, caught: list[Any]) -> None:
    """In a parallel round whoever is slowest is critical, and waits least: only for the server's own work."""
    result = train(model(), tmp_path / "out", ROWS, partition=TWO, profiles=PROFILES, rounds=2, framework="sfl-v1")
    waiting, critical = result.summary["waiting"], result.summary["critical"]
    assert critical == {"ann": 2, "bob": 0, "cid": 0}
    assert min(waiting, key=waiting.__getitem__) == "ann"
    assert all(seconds >= 0 for seconds in waiting.values())
    by_step = result.summary["virtual_by_step"]
    assert by_step["head_forward"] > 0
    assert by_step["tail_step"] == 0  # the server's, in the two-part split
    outside = ("partition", "aggregate")  # no step's
    assert all(by_step[name] > 0 for name in outside)
    assert sum(seconds for name, seconds in by_step.items() if name not in outside) == pytest.approx(
        sum(s for line in lines(tmp_path / "out") for s in line["virtual_seconds"].values())
    )


# ---------------------------------------------------------------- verbs out of order


@pytest.fixture
def party(tmp_path: Path, caught: list[Any], request: pytest.FixtureRequest) -> tuple[ClientParty, TrunkParty]:
    train(model(), tmp_path / "out", {"ann": ROWS["ann"]}, partition=request.param, rounds=1)
    return caught[0].parts.clients["ann"], caught[0].parts.server


both = pytest.mark.parametrize("party", [TWO, U], ids=["two-part", "u-shape"], indirect=True)
HEADS = {"graph": True, "head_weight": 1.0, "update": True, "loss": 0.0}


@both
def test_a_client_refuses_verbs_out_of_order(party: tuple[ClientParty, TrunkParty]) -> None:
    client, _ = party
    before = {n: t.clone() for n, t in client.slot.get().items()}
    hidden = [torch.zeros(3, 8, 32)]
    for header, tensors, said in (
        (Header("partition", verb="open_the_door"), [], "no verb of a client"),
        (Header("partition", verb="__init__"), [], "no verb of a client"),
        (
            Header("head_backward", "gradient", "head_backward", step=5, values=HEADS, names=("hidden",)),
            hidden,
            "did not begin",
        ),
        (Header("head_forward", verb="head_forward", micro=7, values=HEADS), [], "micro-batches in step 0"),
        (Header("head_forward", verb="head_forward"), [], "lacks the value 'graph'"),
    ):
        with pytest.raises(WireError, match=said):
            client.handle(header, tensors)
    header, _ = client.handle(Header("head_forward", verb="head_forward", step=1, values=HEADS), [])
    assert header.turn == 0
    client.abort()
    with pytest.raises(WireError, match="did not begin"):
        client.handle(Header("head_backward", "no-gradient", "head_backward", step=1, values=HEADS), [])
    assert equal(client.slot.get(), before)


@pytest.mark.parametrize("party", [U], indirect=True)
def test_a_server_has_no_graph_twice(party: tuple[ClientParty, TrunkParty]) -> None:
    client, trunk = party
    header, tensors = client.handle(Header("head_forward", verb="head_forward", step=1, values=HEADS), [])
    place = Place(client.head.base.segment("trunk", range(U["head_blocks"], BLOCKS - U["tail_blocks"])), "shared")
    shown = trunk.forward(Parcel(header, [t.detach().clone() for t in tensors]), How(), place)
    assert trunk.open_graphs == 1
    back = Header("send_gradients", "gradient", client="ann", step=1, values={"last": True}, names=("hidden",))
    gradient = torch.ones_like(shown.tensors["hidden"])
    trunk.backward(Parcel(back, [gradient]), How(), place)
    assert trunk.open_graphs == 0
    with pytest.raises(WireError, match="no open graph of client 'ann', step 1, micro-batch 0"):
        trunk.backward(Parcel(back, [gradient]), How(), place)


@pytest.mark.parametrize("party", [U], indirect=True)
def test_a_gradient_is_of_what_went_out(party: tuple[ClientParty, TrunkParty]) -> None:
    """One of another shape, or none, is refused in words, and nothing of it is trained on."""
    client, trunk = party
    place = Place(client.head.base.segment("trunk", range(U["head_blocks"], BLOCKS - U["tail_blocks"])), "shared")
    before = {n: t.clone() for n, t in trunk.slots["shared"].get().items()}
    for step, wrong in enumerate(({}, {"hidden": torch.ones(1)}, {"hidden": torch.ones(3, 8, 31)}), start=1):
        header, tensors = client.handle(Header("head_forward", verb="head_forward", step=step, values=HEADS), [])
        shown = trunk.forward(Parcel(header, [t.detach().clone() for t in tensors]), How(), place)
        size = list(shown.tensors["hidden"].shape)
        back = Header(
            "send_gradients", "gradient", client="ann", step=step, values={"last": True}, names=tuple(wrong)
        )  # fmt: skip
        came = f"a gradient of {list(wrong['hidden'].shape)}" if wrong else "nothing"
        said = re.escape(f"was given {came} for what went out as {size}, of client 'ann', step {step}, micro-batch 0.")
        with pytest.raises(WireError, match=said):
            trunk.backward(Parcel(back, list(wrong.values())), How(), place)
        client.abort()
        assert trunk.open_graphs == 0
    assert equal(trunk.slots["shared"].get(), before)


def test_turns_number_the_requests_of_a_client(tmp_path: Path) -> None:
    train(model(), tmp_path / "out", ROWS, framework="sfl-v2", rounds=2, record_wire=str(tmp_path / "wire"))
    turns: dict[str, list[int]] = {name: [] for name in ROWS}
    for _, header, _ in read_frames(tmp_path / "wire"):
        if header.sender == "server" and header.receiver in turns:
            turns[header.receiver].append(header.turn)
    assert all(found == list(range(1, len(found) + 1)) and len(found) > 6 for found in turns.values())


def test_everything_that_crosses_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum over metrics, summary, index and file are one number."""
    counted = []
    original = Meter.count
    monkeypatch.setattr(Meter, "count", lambda self, frame: (counted.append(frame.length), original(self, frame))[1])
    result = train(model(), tmp_path / "out", ROWS, framework="sfl-v2", record_wire=str(tmp_path / "wire"))
    size = (tmp_path / "wire" / "frames.bin").stat().st_size
    by_step: dict[str, int] = {}
    for line, header, _ in read_frames(tmp_path / "wire"):
        by_step[line["step_name"]] = by_step.get(line["step_name"], 0) + line["length"]
        assert (line["sender"] == "server") != (line["receiver"] == "server")
        assert header.client in ROWS
    assert sum(counted) == size == sum(by_step.values()) == result.summary["bytes_up"] + result.summary["bytes_down"]
    assert {k: v for k, v in result.summary["bytes"].items() if v} == by_step
    in_steps = sum(line["bytes_up"] + line["bytes_down"] for line in lines(tmp_path / "out"))
    assert in_steps == size - by_step["partition"] - by_step["aggregate"]


# ---------------------------------------------------------------- failures

BREAK = {
    "head forward": (ClientParty, "on_head_forward", "in step 2 head_forward"),
    "head backward": (ClientParty, "on_head_backward", "in step 10 head_backward"),
    "tail": (ClientParty, "on_tail_step", "in step 6 tail_step"),
    "trunk": (TrunkParty, "_settle", "in step 8 trunk_backward"),
}


@pytest.mark.parametrize("profiles", [{}, PROFILES], ids=["lazy", "eager"])
@pytest.mark.parametrize("name", BREAK)
def test_a_client_that_fails_leaves_nothing_behind(
    name: str, profiles: dict[str, str], tmp_path: Path, caught: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with the client's own error, which names the step; no graph and no gradient is left, at anyone."""
    cls, attribute, note = BREAK[name]
    original = getattr(cls, attribute)
    calls = 0

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second round, when another client has been served and a third waits
            raise RuntimeError("the power went out")
        return original(self, *args, **options)

    monkeypatch.setattr(cls, attribute, broken)
    with pytest.raises(RuntimeError, match="the power went out") as raised:
        train(model(), tmp_path / "out", ROWS, framework="sfl-v2", rounds=3, profiles=profiles)
    assert note in raised.value.__notes__
    parts = caught[0].parts
    assert parts.server.open_graphs == 0
    assert all(party._open == {} for party in parts.clients.values())
    assert all(party.slot.idle for party in parts.clients.values())
    assert parts.server.slots["shared"].idle


def test_the_first_error_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that are cancelled because another failed do not hide its error."""
    original = LocalLink.call

    async def call(self: LocalLink, header: Header, tensors: Any = (), **options: Any) -> Any:
        if header.verb == "head_backward" and self.party.name == "bob":
            raise LookupError("bob has lost his key")
        return await original(self, header, tensors, **options)

    monkeypatch.setattr(LocalLink, "call", call)
    for profiles in ({}, PROFILES):
        with pytest.raises(LookupError, match="bob has lost his key"):
            train(model(), tmp_path / f"{len(profiles)}", ROWS, framework="sfl-v2", profiles=profiles)


@pytest.mark.parametrize(
    "framework",
    often(["sfl-v1", "psl", {"name": "psl", "grad_scale": "joint"}], {"name": "psl", "grad_scale": "joint"}),
    ids=["sfl-v1", "psl", "psl-joint"],
)
def test_a_whole_round_of_equal_clients_takes_what_one_of_them_takes(framework: Any, tmp_path: Path) -> None:
    """Each has a link of its own, so set-up, step and merge take as long for six as for two: I * step + A.

    Nobody waits, and all seconds have a name.
    """
    slow = {"flops": 1e12, "up_mbps": 1, "down_mbps": 1, "rtt_ms": 1000}
    found = {}
    for count in (2, 6):
        clients = {f"c{i}": text_rows(3, seed=0) for i in range(count)}
        server = {"flops": 1e15, "up_mbps": 1e6, "down_mbps": 1e6, "rtt_ms": 0, "workers": 100}
        found[count] = train(
            model(), tmp_path / str(count), clients, framework=framework, rounds=2, profile=slow,
            profiles_of_others={"server": server},
        ).summary  # fmt: skip
    two, six = found[2], found[6]
    assert six["virtual_seconds"] == pytest.approx(two["virtual_seconds"], rel=1e-9)
    for count, summary in found.items():
        named = sum(summary["virtual_by_step"].values())
        assert named == pytest.approx(count * summary["virtual_seconds"], rel=1e-3)  # all are busy all the time
        assert all(waited <= 1e-3 * summary["virtual_seconds"] for waited in summary["waiting"].values())
    if framework == "sfl-v1":
        assert two["virtual_by_step"]["aggregate"] > 0
    assert two["virtual_by_step"]["partition"] > 0


def test_a_profile_of_a_party_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=r"profiles.servr: .*Did you mean 'server'"):
        train(model(), tmp_path / "out", ROWS, profile="laptop", profiles_of_others={"servr": "server"})
