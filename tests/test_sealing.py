"""Clients that run blocks for each other: what they seal from the server, which can neither read nor bend it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlayer
from apart import Apart, Command, steps
from cutlayer.agreed import AgreedSecret, make_secret
from cutlayer.errors import CheckpointError, CutlayerError, PolicyRefused, WireError
from cutlayer.links.local import send
from cutlayer.parties.client import secret_of
from cutlayer.sealing import About, Seals
from cutlayer.serving import serve
from cutlayer.wire import SEAL_BYTES, SEALED, Header, Limits, Meter, decode, frame_length, read_frames
from striking import Trap
from test_joining import ask, seat
from tiny import text_rows

U = {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 1}
TWO = {"name": "two-part-split", "head_blocks": 1}
ROWS = {"ann": text_rows(7, seed=1), "bob": text_rows(4, seed=2), "cyd": text_rows(5, seed=3)}
SECRET = AgreedSecret(b"a" * 32)
WAY = About("ann", "bob", "ann", "forward", 3, 1)
LIMITS = Limits()


def shown(about: About = WAY) -> tuple[Header, list[Tensor]]:
    header = Header(
        "send_activations", "activations", "", about.sender, about.receiver, about.owner, step=about.step,
        micro=about.micro, values={"last": True, "loss": 0.5}, names=("hidden",),
    )  # fmt: skip
    return header, [torch.arange(24.0).reshape(2, 3, 4)]


def seals(folder: Path, who: str, secret: AgreedSecret = SECRET, run: str = "run") -> Seals:
    return Seals(secret, run, folder / f"{who}.json")


def test_who_has_the_secret_opens_what_was_sealed_for_it(tmp_path: Path) -> None:
    header, (hidden,) = shown()
    sealed = seals(tmp_path, "ann").seal(header, [hidden], WAY)
    assert hidden.numpy().tobytes() not in sealed.numpy().tobytes()
    assert b"last" not in sealed.numpy().tobytes()
    with pytest.raises(WireError):
        decode(sealed.numpy().tobytes(), LIMITS)
    opened, (found,) = seals(tmp_path, "bob").open(sealed, WAY, LIMITS)
    assert opened == header
    assert torch.equal(found, hidden)


def test_a_sealed_frame_counts_as_the_one_inside_it(tmp_path: Path) -> None:
    header, tensors = shown()
    sealed = seals(tmp_path, "ann").seal(header, tensors, WAY)
    whole, outside = Meter(), Meter()
    send(whole, header, tensors, "ann")
    frame = send(outside, header.but(values={}, names=(SEALED,)), [sealed], "ann")
    assert whole.state()["by_pair"] == outside.state()["by_pair"]
    inside = frame_length(header, [t.shape for t in tensors], [t.dtype for t in tensors])
    assert len(sealed) == inside + SEAL_BYTES
    assert frame.length > frame.counted == inside


def test_what_was_changed_on_its_way_does_not_open(tmp_path: Path) -> None:
    sealed = seals(tmp_path, "ann").seal(*shown(), WAY)
    bob = seals(tmp_path, "bob")
    for place in (0, 12, 19, 20, 80, len(sealed) - 1):  # nonce, number, what is inside, tag
        bent = sealed.clone()
        bent[place] ^= 1
        with pytest.raises(WireError, match="from 'ann' does not open: on its way it was changed"):
            bob.open(bent, WAY, LIMITS)
    for short in (sealed[:-1], sealed[: SEAL_BYTES - 1], sealed[:0], sealed.reshape(1, -1), sealed.float()):
        with pytest.raises(WireError, match=r"does not open|is no sealed frame"):
            bob.open(short, WAY, LIMITS)
    bob.open(sealed, WAY, LIMITS)  # none of these has used it up


@pytest.mark.parametrize(
    "other",
    [
        {"receiver": "cyd"}, {"sender": "cyd"}, {"owner": "bob"}, {"leg": "backward"}, {"leg": "evaluation"},
        {"step": 4}, {"micro": 0},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_what_was_put_to_another_use_does_not_open(other: Mapping[str, Any], tmp_path: Path) -> None:
    sealed = seals(tmp_path, "ann").seal(*shown(), WAY)
    with pytest.raises(WireError, match="put in place of another one"):
        seals(tmp_path, "bob").open(sealed, replace(WAY, **other), LIMITS)


def test_another_secret_or_run_does_not_open(tmp_path: Path) -> None:
    sealed = seals(tmp_path, "ann").seal(*shown(), WAY)
    for who in (seals(tmp_path, "bob", AgreedSecret(b"b" * 32)), seals(tmp_path, "bob", run="another")):
        with pytest.raises(WireError, match="does not open"):
            who.open(sealed, WAY, LIMITS)


def test_a_frame_opens_once_and_in_its_order_also_after_a_restart(tmp_path: Path) -> None:
    ann, bob = seals(tmp_path, "ann"), seals(tmp_path, "bob")
    first, second = (ann.seal(*shown(WAY), WAY) for _ in range(2))
    ann.save()
    third = seals(tmp_path, "ann").seal(*shown(WAY), WAY)
    assert len({bytes(one[:20].tolist()) for one in (first, second, third)}) == 3
    bob.open(second, WAY, LIMITS)
    bob.save()
    for who in (bob, seals(tmp_path, "bob")):
        for old in (first, second):
            with pytest.raises(WireError, match="was passed on again, or after a later one"):
                who.open(old, WAY, LIMITS)
    seals(tmp_path, "bob").open(third, WAY, LIMITS)
    for damaged in (
        "{}",
        '{"sent": Infinity, "seen": {}}',
        '{"sent": 1, "seen": {"x": -1}}',
        f'{{"sent": {2**64}, "seen": {{}}}}',
    ):
        (tmp_path / "bob.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="numbers of sealed frames"):
            seals(tmp_path, "bob")


def test_what_is_inside_must_be_what_it_is_sealed_for(tmp_path: Path) -> None:
    header, tensors = shown()
    sealed = seals(tmp_path, "ann").seal(header.but(step=9), tensors, WAY)
    with pytest.raises(WireError, match="that says it is about something else"):
        seals(tmp_path, "bob").open(sealed, WAY, LIMITS)


def test_a_client_is_asked_whether_others_may_be_shown_anything(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match=r"runs blocks for bob and shows what it sends to bob.*peers: true"):
        seat(tmp_path, agreed=SECRET, framework="pairingfl")


HOST = {
    "owner": "bob", "stop": 0, "graph": True, "update": True, "head_weight": 1.0, "trunk_update": True,
    "trunk_weight": 1.0,
}  # fmt: skip


def hidden_of(rows: int = 3, length: int = 5, size: int = 16) -> Tensor:
    return torch.linspace(-1.0, 1.0, rows * length * size).reshape(rows, length, size)


class Host:
    """ann's seat in a run in which she runs a block for bob, and bob's seals."""

    def __init__(self, folder: Path) -> None:
        allowed = {"may_leave": {"peers": True, "error_texts": True}}
        self.seat, _ = seat(folder / "seat", allowed, agreed=SECRET, framework="pairingfl")
        self.seat.handle(ask("begin", 1, round=0, updates=3), [])
        assert self.seat.peers is not None
        assert self.seat.base is not None
        self.party = self.seat.peers.hosting.party
        self.bob = Seals(SECRET, self.seat.peers.seals._run, folder / "bob.json")
        self.size = int(self.seat.base.model.config.hidden_size)
        self.about, self.turn = About("bob", "ann", "bob", "forward", 0, 0), 0

    def asked(self, values: Mapping[str, Any], **tensors: Tensor) -> tuple[Header, list[Tensor]]:
        """A request of the server, with what bob has sealed."""
        self.turn += 1
        inside = Header(
            "send_activations", "activations", "", "bob", "ann", "bob", values=values, names=tuple(tensors)
        )  # fmt: skip
        sealed = self.bob.seal(inside, list(tensors.values()), self.about)
        return ask("host_forward", self.turn, **HOST).but(names=(SEALED,)), [sealed]

    def send_on(self, values: Mapping[str, Any], **tensors: Tensor) -> tuple[Header, list[Tensor]]:
        """What ann answers to such a request."""
        return self.seat.handle(*self.asked(values, **tensors))


GOOD = {"last": True, "needs_gradient": True}


def test_who_runs_blocks_judges_what_it_is_sent_and_names_the_sender(tmp_path: Path) -> None:
    host = Host(tmp_path)
    own, bob, about, size, send_on = host.seat, host.bob, host.about, host.size, host.send_on
    for wrong, said in (
        ({"hidden": hidden_of(size=size).fill_(torch.nan)}, "'bob' sealed 'hidden' with values that are not finite"),
        ({"hidden": hidden_of(rows=4, size=size)}, "'bob' sealed 'hidden' as .4, 5"),
        ({"hidden": hidden_of(size=size + 1)}, "'bob' sealed 'hidden' as"),
        ({"hidden": hidden_of(size=size).double()}, "'bob' sealed 'hidden' as"),
        ({"hidden": hidden_of(size=size), "labels": torch.zeros(3, 5, dtype=torch.int32)}, "the tensor 'labels'"),
        ({}, "no tensor 'hidden'"),
    ):
        with pytest.raises(CutlayerError, match=said):
            send_on(GOOD, **wrong)
    with pytest.raises(CutlayerError, match="needs_gradient 3"):
        send_on({**GOOD, "needs_gradient": 3}, hidden=hidden_of(size=size))
    told, (sealed,) = send_on(GOOD, hidden=hidden_of(size=size))
    assert (told.receiver, told.values, told.names) == ("bob", {}, (SEALED,))
    opened, _ = bob.open(sealed, replace(about, sender="ann", receiver="bob"), LIMITS)
    assert opened.verb == "tail_step"
    assert '"to": "bob"' in (tmp_path / "seat" / "ann" / "sent.jsonl").read_text().splitlines()[-1]
    assert "sealed from the server" in own.guard.told()
    for verb, values, said in (
        ("host_forward", {**HOST, "owner": "ann"}, "no work of 'ann'"),
        ("host_forward", {**HOST, "stop": 1}, "no work of 'ann'"),
        ("host_tail_step", HOST, "no work of 'ann'"),
        ("host_forward", {"owner": "bob", "stop": 0}, "how the step is to be made"),
    ):
        with pytest.raises(CutlayerError, match=said):
            own.handle(ask(verb, 90, **values).but(names=(SEALED,)), [sealed])
    plain = ask("tail_step", 91, graph=True).but(names=("hidden",))
    with pytest.raises(CutlayerError, match="must have sealed, and it is not"):
        own.handle(plain, [hidden_of(size=size)])


def test_what_is_under_way_for_others_is_forgotten_too(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.send_on(GOOD, hidden=hidden_of(size=host.size))
    assert host.party.open_graphs == 1
    host.seat.handle(ask("abort", 9), [])
    assert host.party.open_graphs == 0


def test_a_sealed_request_that_is_sent_again_gets_the_same_answer(tmp_path: Path) -> None:
    """It is not opened again, which a seal does not allow, and no new release."""
    host = Host(tmp_path)
    asked = host.asked(GOOD, hidden=hidden_of(size=host.size))
    first, (sealed,) = host.seat.handle(*asked)
    counts = host.seat.guard.counts
    left, kinds = counts.bytes, dict(counts.kinds)
    second, (again,) = host.seat.handle(*asked)
    assert second == first
    assert torch.equal(sealed, again)
    assert counts.bytes > left
    assert counts.kinds.keys() == kinds.keys()
    logged = (tmp_path / "seat" / "ann" / "sent.jsonl").read_text().splitlines()
    assert [json.loads(line)["again"] for line in logged[-2:]] == [False, True]
    assert host.party.open_graphs == 1


@pytest.mark.parametrize(
    ("outside", "said"),
    [
        ({"client": "bob"}, "a request for client 'bob' came to 'ann'"),
        ({"verb": "open_the_door"}, "nothing that a client may be asked for"),
        ({"step": 4, "turn": 1}, "has the turn 1, which another request had"),
        ({"values": {**HOST, "graph": 1}}, "tells graph 1; it must be true or false"),
        ({"values": {**HOST, "trunk_update": "no"}}, "tells trunk_update 'no'; it must be true or false"),
        ({"values": {**HOST, "trunk_weight": -1.0}}, "tells trunk_weight -1.0; allowed"),
        ({"values": {**HOST, "stop": -1}}, "tells stop -1; it must be between"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_server_says_is_judged_before_a_seal_is_opened(
    outside: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path)
    host.send_on(GOOD, hidden=hidden_of(size=host.size))
    header, sealed = host.asked(GOOD, hidden=hidden_of(size=host.size))
    opened: list[About] = []
    original = Seals.open

    def opens(self: Seals, box: Tensor, about: About, limits: Limits) -> Any:
        opened.append(about)
        return original(self, box, about, limits)

    monkeypatch.setattr(Seals, "open", opens)
    with pytest.raises(CutlayerError, match=re.escape(said)):
        host.seat.handle(header.but(**outside), sealed)
    assert not opened
    host.seat.handle(header, sealed)  # it was not used up
    assert len(opened) == 1


class Sealed(Apart):
    """A run whose clients have a secret, and policies that allow it."""

    def __init__(self, root: Path, count: int, **changes: Any) -> None:
        rows = {name: ROWS[name] for name in list(ROWS)[:count]}
        super().__init__(root, rows, clients=[{"name": name} for name in rows], **changes)
        make_secret(root / "agreed")
        (root / "policy.yaml").write_text("may_leave: {peers: true}\n")

    def come(self, name: str) -> Command:
        """A client with both."""
        return self.join(name, "--secret", str(self.root / "agreed"), "--policy", str(self.root / "policy.yaml"))

    def whole(self, one: Path) -> bool:
        """Whether what all have together is the adapter of the run in one process, bit for bit."""
        from safetensors.torch import load_file

        wanted = load_file(next((one / "adapter").glob("*.safetensors")))
        found = [self.adapter(who) for who in ("server", *self.files)]
        return set().union(*found) == wanted.keys() and all(
            torch.equal(tensor, wanted[name]) for part in found for name, tensor in part.items()
        )


def identical(run: Sealed, one: Path, **changes: Any) -> None:
    """The same losses, weights and bytes as in one process."""
    alone = cutlayer.train({**run.simulated, **changes}, out=one, progress=False)
    assert steps(run.root / "server") == steps(alone.out)
    assert run.whole(alone.out)
    summary = run.summary()
    for key in ("bytes", "bytes_up", "bytes_down", "frames", "steps"):
        assert summary[key] == alone.summary[key], key
    losses = [[e["loss"] for e in told["eval"]["history"]] for told in (summary, alone.summary)]
    assert losses[0] == losses[1]


def test_a_ring_between_processes_is_the_simulation_and_the_server_reads_nothing(tmp_path: Path) -> None:
    run = Sealed(tmp_path / "apart", 2, framework="ringsfl", rounds=2, record_wire=str(tmp_path / "seen"))
    server = run.serve()
    run.ended({**{name: run.come(name) for name in run.files}, "server": server})
    identical(run, tmp_path / "one", record_wire=str(tmp_path / "plain"))
    seen, plain = list(read_frames(tmp_path / "seen")), list(read_frames(tmp_path / "plain"))
    between = [one for one in seen if {one[1].sender, one[1].receiver} == {"ann", "bob"}]
    open_ones = [one for one in plain if {one[1].sender, one[1].receiver} == {"ann", "bob"}]
    assert len(between) == len(open_ones) > 0
    assert len(seen) == len(plain)
    assert {(header.names, tuple(header.values)) for _, header, _ in between} <= {
        ((SEALED,), ()), ((SEALED,), ("update", "graph", "head_weight")),
    }  # fmt: skip
    bytes_seen = (tmp_path / "seen" / "frames.bin").read_bytes()
    for _, _, (sealed,) in between:
        with pytest.raises(WireError):
            decode(sealed.numpy().tobytes()[20:])
    private = [t for _, _, tensors in open_ones for t in tensors if t.numel() > 8 and bool(t.any())]
    assert len(private) >= len(open_ones)
    assert not any(tensor.numpy().tobytes() in bytes_seen for tensor in private)
    secret = (tmp_path / "apart" / "agreed").read_text().strip()
    assert secret.encode() not in bytes_seen
    assert secret not in run.said("server")


CASES = [
    ("ringsfl", U, 3, {}),
    ("ringsfl", U, 3, {"max_grad_norm": 0.1, "gradient_accumulation": 2}),
    ("ringsfl", U, 2, {"peft": {"name": "lora", "rank": 2, "dropout": 0.1}}),
    ("pairingfl", U, 2, {}),
    ("pairingfl", TWO, 2, {"max_grad_norm": 0.1, "gradient_accumulation": 2}),
    ("clicooper", U, 3, {}),
    ("clicooper", TWO, 3, {"peft": {"name": "lora", "rank": 2, "dropout": 0.1}}),
    ({"name": "clicooper", "owners": 2, "watermark": 0.05, "mark_bits": 8, "mark_weights": 16}, TWO, 3, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "partition", "count", "changes"), CASES, ids=str)
def test_between_processes_is_the_simulation(
    framework: Any, partition: dict[str, Any], count: int, changes: dict[str, Any], tmp_path: Path
) -> None:  # fmt: skip
    run = Sealed(tmp_path / "apart", count, framework=framework, partition=partition, **changes)
    for name in run.files:  # which the marks are made from: as of a simulated client, in place of a drawn one
        (run.root / name).mkdir()
        (run.root / name / "secret").write_bytes(secret_of(0, name))
    server = run.serve()
    run.ended({**{name: run.come(name) for name in run.files}, "server": server})
    identical(run, tmp_path / "one")
    for file in (tmp_path / "one" / "watermark").glob("*"):
        assert (run.root / "server" / "watermark" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "partition"), [("ringsfl", U), ("clicooper", TWO)])
def test_killed_parties_change_nothing(framework: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """A client and the server are killed; the end has the same bits, and no frame is taken for an old one."""
    run = Sealed(tmp_path / "apart", 3, framework=framework, partition=partition, rounds=10)
    server = run.serve()
    clients = {name: run.come(name) for name in run.files}
    run.kill_after("bob", clients["bob"], 2)
    clients["bob"] = run.come("bob")
    run.kill_after("server", server, 5)
    server = run.serve()
    run.ended({**clients, "server": server})
    identical(run, tmp_path / "one")
    assert not any("passed on again" in run.said(name) for name in run.files)


@pytest.mark.slow
def test_a_ring_waits_for_who_is_away(tmp_path: Path) -> None:
    """A client stays away for longer than it is waited for: all go back and wait, and the end is the same."""
    run = Sealed(tmp_path / "apart", 2, framework="ringsfl", rounds=8)
    server = run.serve("--patience", "1")
    clients = {name: run.come(name) for name in run.files}
    run.kill_after("bob", clients["bob"], 2)
    run.until("server", "waits for a client: bob")
    clients["bob"] = run.come("bob")
    run.ended({**clients, "server": server})
    identical(run, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["head_forward", "tail_step", "host_forward", "host_backward"])
def test_who_leaves_open_what_is_for_another_is_told_so(verb: str, tmp_path: Path) -> None:
    """The run ends where its server would have seen what is not for it."""
    run = Sealed(tmp_path / "apart", 2, framework="ringsfl", rounds=4)
    server = run.serve("--absent", "end")
    options = ("--secret", str(run.root / "agreed"), "--policy", str(run.root / "policy.yaml"))
    bob = run.join("bob", *options, traps=[Trap(verb, 2, "open")])
    clients = [run.come("ann"), bob]
    assert server.wait() not in (0, None)
    for process in clients:
        process.kill()
        process.wait()
    assert f"'bob' answered '{verb}' with an open frame for another client; expected: a sealed one" in run.said(
        "server"
    )


@pytest.mark.slow
def test_clients_with_different_secrets_are_found_before_the_run_begins(tmp_path: Path) -> None:
    run = Sealed(tmp_path / "apart", 2, framework="ringsfl", rounds=1)
    server = run.serve()
    ann = run.come("ann")
    run.until("server", "client 'ann' is here")
    make_secret(tmp_path / "other")
    policy = ("--policy", str(run.root / "policy.yaml"))
    assert run.join("bob", "--secret", str(tmp_path / "other"), *policy).wait() == 2
    assert "The secret of 'bob' is another than that of 'ann'" in run.said("bob")
    assert "client 'bob' was turned away" in run.said("server")
    assert run.join("bob", *policy).wait() == 2
    assert "'cutlayer secret FILE'" in run.said("bob")
    run.ended({"ann": ann, "bob": run.come("bob"), "server": server})
    identical(run, tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mixing": "minibatch-sfl"}, "mixing"), ({"exchange": "mu-splitfed"}, "exchange"),
        ({"planner": {"name": "splitft-adaptive-cut", "every": 2}}, "planner"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_with_it_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", framework="pairingfl", partition=TWO, **changes)
    with pytest.raises(CutlayerError, match=said):
        serve(str(run.file), bind="localhost:0", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
