"""The client's defenses: where they act, that they act on all that leaves, and that they depend on no seed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cutlayer
from apart import LONG, Apart, steps
from cutlayer.config import load_config
from cutlayer.defense import Sends
from cutlayer.errors import CheckpointError, ConfigError, MethodError, OutputError
from cutlayer.parties.client import ClientParty, secret_of
from cutlayer.parties.releases import Releases
from cutlayer.wire import Header
from defending import ROWS, client, defending, frames, passing, run_of, trained, whole_batch
from spine import MOSTLY_U, PARTITIONS, TWO, U, adapter, equal, losses, resumed
from striking import Fate

NOTHING = {"name": "dp-forward", "noise": 0, "clip": None}
NOISE = {"name": "dp-forward", "noise": 0.5}
PROBES = {"exchange": "mu-splitfed", "framework": "sfl-v1", "gradient_accumulation": 1}
HEAD = """from dataclasses import dataclass, field
import torch
from cutlayer.contracts import Defense
from cutlayer.defense import Learned
from cutlayer.registry import method

"""
BODY = '''@method("defense")
@dataclass
class Own(Defense):
    """Mine."""
    protects = ()
    def spent(self, ground, sends): ...
'''


def own(root: Path, body: str, name: str = "own.py") -> str:
    """A defense of one's own, in a file."""
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(HEAD + BODY + body)
    return str(root / name)


@MOSTLY_U
def test_a_defense_that_does_nothing_changes_no_bit(partition: dict[str, Any], tmp_path: Path) -> None:
    """Padded batches, accumulation, evaluation."""
    plain = trained(tmp_path / "plain", [], partition=partition)
    same = trained(tmp_path / "same", [NOTHING], partition=partition)
    assert losses(plain.out) == losses(same.out)
    assert equal(adapter(plain.out), adapter(same.out))
    assert plain.summary["bytes"] == same.summary["bytes"]
    assert plain.summary["eval"]["after"] == same.summary["eval"]["after"]
    noisy = trained(tmp_path / "noisy", [NOISE], partition=partition)
    assert noisy.summary["bytes"] == plain.summary["bytes"]
    assert losses(noisy.out) != losses(plain.out)
    assert noisy.summary["eval"]["before"]["loss"] != plain.summary["eval"]["before"]["loss"], (
        "evaluation is noised too"
    )


def test_noise_is_of_the_secret_and_not_of_the_seed(tmp_path: Path) -> None:
    batch, hidden = whole_batch(2, 6), torch.randn(2, 6, 32)
    found = []
    for secret in (b"one", b"one", b"two"):
        made = defending(tmp_path / str(len(found)), [NOISE])
        made.secret = secret
        found.append(made.shown(hidden, passing(batch)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0] - hidden, made.shown(hidden, passing(batch, step=1)) - hidden)
    once, again = (defending(tmp_path / "x", [NOISE]) for _ in range(2))
    assert torch.equal(once.shown(hidden, passing(batch)), again.shown(hidden, passing(batch)))
    nudged = hidden.clone()
    nudged[0, 0, 0] += 1e-3
    shift = once.shown(nudged, passing(batch)) - once.shown(hidden, passing(batch))
    assert float(shift.abs().median()) > 0.1 * once.defenses[0].scale, (
        "the same noise under another message would cancel"
    )


@PARTITIONS
def test_padding_shows_nothing(partition: dict[str, Any], tmp_path: Path) -> None:
    """Behind a text's end a causal head still has states that depend on the text."""
    quiet = {"name": "dp-forward", "noise": 0.0, "clip": 1.0}
    trained(tmp_path / "a", [quiet], partition=partition, record_wire=str(tmp_path / "wire"))
    seen = 0
    for header, tensors in frames(tmp_path / "wire"):
        if header.step_name == "send_activations" and "mask" in tensors and header.sender != "server":
            padding = ~tensors["mask"]
            seen += int(padding.sum())
            assert not tensors["hidden"][padding].any()
            assert tensors["hidden"][tensors["mask"]].any(-1).all()
    assert seen > 0


def test_all_that_is_shown_of_texts_is_defended(tmp_path: Path) -> None:
    """Training and evaluation: no frame has a state that the frame of the undefended run has."""
    for name, defense in (("plain", []), ("noisy", [NOISE, {"name": "clip-noise", "multiplier": 0.5}])):
        trained(tmp_path / name, defense, steps=1, record_wire=str(tmp_path / f"{name}-wire"))
    plain, noisy = ([*frames(tmp_path / f"{name}-wire")] for name in ("plain", "noisy"))
    assert len(plain) == len(noisy)
    legs = []
    for (header, clean), (_, shown) in zip(plain, noisy, strict=True):
        if header.sender == header.client and "hidden" in clean:
            legs.append(header.step_name)
            assert not torch.isclose(clean["hidden"], shown["hidden"], rtol=1e-3).flatten(0, 1).all(-1).any()
    assert {"send_activations", "send_gradients"} == set(legs)
    assert legs.count("send_activations") > legs.count("send_gradients"), "evaluation shows activations too"


def test_a_resumed_run_has_the_same_noise(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", [NOISE], steps=4, checkpoint_every=1)
    kept, spent = adapter(plain.out), plain.summary["privacy"]
    again = resumed(plain.out)
    assert equal(adapter(again.out), kept)
    assert again.summary["privacy"] == spent


def test_the_gradient_goes_back_through_what_a_defense_did(tmp_path: Path) -> None:
    """Halved on the way out, the head gets half the gradient that it would have: as if the trunk began with a half."""
    half = own(tmp_path, "    def protect(self, shown, about): return shown * 0.5\n")

    def gradients(party: Any) -> dict[str, torch.Tensor]:
        name = party.name
        ask = Header("head_forward", "control", "head_forward", "server", name, name, values={"graph": True})
        _, shown = party.handle(ask, [])
        back = Header(
            "return_gradients", "gradient", "head_backward", "server", name, name,
            values={"head_weight": 1.0, "update": False, "loss": 0.0}, names=("hidden",),
        )  # fmt: skip
        (held,) = party._open.values()
        held.loss = 0.0
        party.handle(back, [torch.ones_like(shown[0])])
        found: dict[str, torch.Tensor] = party.slot._total()
        return found

    defended, plain = gradients(client(tmp_path / "a", [half])), gradients(client(tmp_path / "b", []))
    assert defended.keys() == plain.keys()
    assert defended
    for name in plain:
        torch.testing.assert_close(defended[name], plain[name] * 0.5, rtol=1e-5, atol=1e-9)


def test_a_penalty_is_added_to_the_heads_loss(tmp_path: Path) -> None:
    """One that is the task's own gradient, linearised, doubles it; none with weight 0."""
    zero = own(tmp_path, "    def penalty(self, hidden, about): return hidden.sum() * 0.0", "zero.py")
    some = own(tmp_path, "    def penalty(self, hidden, about): return hidden.square().mean()", "some.py")
    plain = trained(tmp_path / "plain", [])
    same = trained(tmp_path / "zero", [zero])
    other = trained(tmp_path / "some", [some])
    assert equal(adapter(plain.out), adapter(same.out))
    assert not equal(adapter(plain.out), adapter(other.out))
    twice = own(tmp_path, "    def penalty(self, hidden, about): return 0.5 * hidden.square().mean()", "half.py")
    halves = trained(tmp_path / "halves", [twice, twice])
    for name, tensor in adapter(other.out).items():
        torch.testing.assert_close(adapter(halves.out)[name], tensor, rtol=1e-4, atol=1e-6)


LEARNS = """    learning = True
    lr: float = 0.01
    def learns(self, ground):
        width = ground.look(torch.zeros(1, 1, dtype=torch.long)).shape[-1]
        self.map = torch.nn.Linear(width, width)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(width)); self.map.bias.zero_()
        return Learned(self.map, self.lr)
"""
SHOWS = (
    LEARNS
    + "    def protect(self, shown, about): return self.map(shown) if about.leg == 'send_activations' else shown\n"
)
GETS = LEARNS + "    def received(self, hidden, about): return self.map(hidden)\n"


@pytest.mark.parametrize("body", [SHOWS, GETS], ids=["shown", "received"])
def test_what_a_defense_learns_is_trained_beside_the_model(body: str, tmp_path: Path) -> None:
    """With no rate an identity stays one, and nothing but rounding is changed; with one it and the run are others."""
    file = own(tmp_path, body)
    still = {"name": file, "lr": 0.0}
    plain, same = trained(tmp_path / "plain", []), trained(tmp_path / "same", [still])
    for name, tensor in adapter(plain.out).items():
        torch.testing.assert_close(adapter(same.out)[name], tensor, rtol=1e-4, atol=1e-6)
    other = trained(tmp_path / "other", [file], steps=4, checkpoint_every=1)
    kept = adapter(other.out)
    assert not equal(kept, adapter(trained(tmp_path / "long", [still], steps=4).out))
    state = load_file(sorted((other.out / "checkpoints").glob("*/defense-client-0.safetensors"))[-1])
    assert {name for name in state if not name.startswith("optimizer/")} == {"0.weight", "0.bias"}
    assert not torch.equal(state["0.weight"], torch.eye(32))
    assert equal(adapter(resumed(other.out).out), kept), "it is in the checkpoints"


@pytest.mark.parametrize("body", [SHOWS, GETS], ids=["shown", "received"])
def test_the_gradient_of_what_is_learned_is_that_of_the_loss(body: str, tmp_path: Path) -> None:
    """Against the change of the loss when a number of the map is nudged."""
    made = client(tmp_path, [own(tmp_path, body)], precision="float32", gradient_accumulation=1)
    assert made.defending is not None
    assert made.defending.aside is not None
    batch, _, _ = made._draw(0, 0)

    ask = Header("head_forward", "control", "head_forward", "server", "c", "c", values={"graph": True})
    _, shown = made.handle(ask, [])  # goes straight into the tail
    up = Header(
        "tail_step", "activations", "tail_step", "server", "c", "c", values={"graph": True, "head_weight": 1.0},
        names=("hidden",),
    )  # fmt: skip
    _, back = made.handle(up, [shown[0].detach()])
    down = Header(
        "return_gradients", "gradient", "head_backward", "server", "c", "c", names=("hidden",),
        values={"head_weight": 1.0, "update": False, "loss": 0.0},
    )  # fmt: skip
    made.handle(down, [back[0]])
    for name, gradient in made.defending.aside._total().items():
        numbers, steepest = made.defending.aside.params[name].view(-1), int(gradient.abs().flatten().argmax())
        told = []
        with torch.no_grad():
            for nudge in (1e-2, -1e-2):
                numbers[steepest] += nudge
                told.append(_evaluated(made, batch))
                numbers[steepest] -= nudge
        assert float(gradient.flatten()[steepest]) == pytest.approx((told[0] - told[1]) / 2e-2, rel=0.02)


def _evaluated(made: ClientParty, batch: Any) -> float:
    """The loss of a training batch without dropout, the head's output straight into the tail."""
    made.evaluation = [lambda: batch]
    ask = Header("head_forward", "control", "head_forward", "server", "c", "c", values={"graph": False})
    _, shown = made.handle(ask, [])
    up = Header("tail_step", "activations", "tail_step", "server", "c", "c", values={"graph": False}, names=("hidden",))
    told, _ = made.handle(up, [shown[0].detach()])
    return float(told.values["loss"])


def test_who_learns_needs_gradients_and_checkpoints(tmp_path: Path) -> None:
    file = own(tmp_path, SHOWS)
    with pytest.raises(ConfigError, match="sends no gradient back"):
        load_config(run_of(tmp_path / "frozen", [file], exchange="splitfrozen"))
    with pytest.raises(ConfigError, match="actors of engine 'ray' do not keep"):
        load_config(run_of(tmp_path / "ray", [file], engine="ray"))


def test_the_gradient_at_the_logits_can_be_replaced(tmp_path: Path) -> None:
    """By its own: softmax minus one-hot at each position that predicts a label."""
    body = """    def coefficients(self, logits, labels, about):
        found = torch.zeros_like(logits)
        counted = labels[:, 1:] != -100
        found[:, :-1] = torch.softmax(logits[:, :-1], -1) - torch.nn.functional.one_hot(
            labels[:, 1:].clamp(min=0), logits.shape[-1])
        found[:, :-1] *= counted[..., None]
        return found
"""
    plain, same = trained(tmp_path / "plain", []), trained(tmp_path / "same", [own(tmp_path, body)])
    for (_, one), (_, other) in zip(losses(plain.out), losses(same.out), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for name, tensor in adapter(plain.out).items():
        torch.testing.assert_close(adapter(same.out)[name], tensor, rtol=1e-3, atol=1e-4)


def test_examples_are_changed_before_they_are_trained_with(tmp_path: Path) -> None:
    body = """    def example(self, example, noise):
        from dataclasses import replace
        ids = [7] * len(example.input_ids)
        return replace(example, input_ids=ids)
"""
    path = own(tmp_path, body)
    party = client(tmp_path / "a", [path])
    for batch in party.batches.step(0):
        real = (
            batch.attention_mask.bool() if batch.attention_mask is not None else torch.ones_like(batch.input_ids).bool()
        )
        assert (batch.input_ids[real] == 7).all()
    (shown, *_) = [make() for make in party.evaluation]
    assert (shown.input_ids[shown.attention_mask.bool()] == 7).all()
    assert set(shown.labels.flatten().tolist()) - {-100, 7}, "at home it is scored by the truth"
    body = body.replace("[7] * len(example.input_ids)", "[7]")
    fewer = own(tmp_path, body, "fewer.py")
    with pytest.raises(MethodError, match="changed where an example has tokens or labels"):
        client(tmp_path / "b", [fewer]).batches.step(0)


def test_what_was_spent_is_told(tmp_path: Path) -> None:
    """Two epochs, or the evaluations before and after, are two releases of a record; a trained head claims nothing."""
    noise = {"name": "dp-forward", "epsilon": 8}

    def spent(name: str, partition: dict[str, Any]) -> dict[str, Any]:
        done = trained(tmp_path / name, [noise], steps=4, partition=partition)
        (told,) = done.summary["privacy"]["client-0"]
        assert json.loads((done.out / "summary.json").read_text())["privacy"]["client-0"] == [told]
        found: dict[str, Any] = told
        return found

    told = spent("trained", U)
    assert (told["defense"], told["kind"], told["epsilon"]) == ("dp-forward", "empirical", None)
    assert "trained on raw texts" in told["why"]
    told = spent("frozen", {**U, "head_blocks": 0})
    assert (told["kind"], told["releases"], told["delta"]) == ("local", 2, 1e-5)
    assert 8 < told["epsilon"] < 16
    assert "step 7" in told["not_covered"]
    rows = {**run_of(tmp_path / "rows", [])["data"], "packing": True}
    done = trained(tmp_path / "packed", [noise], steps=1, partition={**U, "head_blocks": 0}, data=rows)
    (told,) = done.summary["privacy"]["client-0"]
    assert (told["kind"], told["epsilon"]) == ("empirical", None)
    assert "rows are packed" in told["why"]
    told = spent("two-part", {**TWO, "head_blocks": 0})
    assert told["epsilon"] is None
    assert "sent as they are" in told["why"]


def test_a_planner_may_move_the_cut_so_that_nothing_is_claimed(tmp_path: Path) -> None:
    moving = {"planner": {"name": "splitft-adaptive-cut", "cut": 1}, "peft": "splitft-cut-rank"}
    done = trained(
        tmp_path, [{"name": "dp-forward", "epsilon": 8}], **moving, aggregator="lora-products", framework="sfl-v2",
        steps=None, rounds=1,
    )  # fmt: skip
    (told,) = done.summary["privacy"]["client-0"]
    assert (told["kind"], told["epsilon"]) == ("empirical", None)
    assert "the planner moves the cut" in told["why"]


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in the two-part split the client shows no gradient"):
        cutlayer.train(run_of(tmp_path, ["clip-noise"], partition=TWO), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="epsilon and noise are both given"):
        cutlayer.train(run_of(tmp_path, [{"name": "dp-forward", "epsilon": 1, "noise": 1}]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "defense", [[NOISE, "clip-noise"], pytest.param([{"name": "mi-regularization"}, "nopeek"], marks=pytest.mark.slow)],
    ids=["noise", "learned"],
)  # fmt: skip
def test_between_processes_is_the_simulation(defense: list[Any], tmp_path: Path) -> None:
    """The noise of a client that joins is of its own secret: with the simulated one's, all bits are the same."""
    run = Apart(tmp_path / "apart", {"ann": ROWS, "bob": ROWS[:5]}, defense=defense, rounds=2)
    for name in run.files:
        (run.root / name).mkdir()
        (run.root / name / "secret").write_bytes(secret_of(0, name))
    server = run.serve()
    run.ended({**{name: run.join(name) for name in run.files}, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)
    for key in ("bytes", "bytes_up", "bytes_down"):
        assert run.summary()[key] == alone.summary[key]
    for name in run.files:
        for own, bound in zip(
            json.loads((run.root / name / "privacy.json").read_text()), alone.summary["privacy"][name], strict=True
        ):
            assert 0 < own["releases"] <= bound["releases"], "a simulation counts as if each client evaluated"
            assert {**own, "releases": 0} == {**bound, "releases": 0}
        assert "no epsilon is claimed" in run.said(name)


def test_a_client_that_is_interrupted_says_what_left_and_what_was_spent(tmp_path: Path) -> None:
    run = Apart(
        tmp_path, {"ann": ROWS}, defense=[{"name": "dp-forward", "epsilon": 8}], exchange="splitfrozen", rounds=10**5,
        framework={"name": "sfl-v2", "local_steps": 8}, checkpoint_every=10**4,
    )  # fmt: skip
    server, ann = run.serve(), run.join("ann")
    try:
        released, end = run.root / "ann" / "released.jsonl", time.monotonic() + LONG
        while not (released.exists() and len(released.read_text().splitlines()) > 8):
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(int((run.root / "ann.pid").read_text()), signal.SIGINT)
        assert ann.wait()
    finally:
        ann.kill()
        server.kill()
    said, (told,) = " ".join(run.said("ann").split()), json.loads((run.root / "ann" / "privacy.json").read_text())
    assert Releases(released).sends().most == told["releases"] > 0, "it is never behind what left"
    (count,) = re.findall(r"epsilon [\d.]+ \(delta 1e-05\) .* after at most (\d+) releases", said)
    assert 1 <= int(count) <= told["releases"], (
        "what was being made at the interrupt is written down, and did not leave"
    )
    assert "What left this machine for 'ann'" in said


@pytest.mark.slow
def test_what_a_client_has_learned_is_there_again_after_it_was_killed(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", {"ann": ROWS, "bob": ROWS[:5]}, defense=["mi-regularization"], rounds=3)
    for name in run.files:
        (run.root / name).mkdir()
        (run.root / name / "secret").write_bytes(secret_of(0, name))
    server = run.serve()
    fate = Fate("head_backward", after=run.root / "ann" / "checkpoints" / "round-000001")
    bob, ann = run.join("bob"), run.join("ann", fate=fate)
    assert ann.wait() == -9
    run.ended({"ann": run.join("ann"), "bob": bob, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert run.same(alone.out)
    assert (run.root / "ann" / "checkpoints" / "round-000003" / "defense.safetensors").is_file()


def test_a_message_counts_once_and_before_it_leaves(tmp_path: Path) -> None:
    file, one, other, under = tmp_path / "released.jsonl", torch.zeros(2, 3), torch.ones(2, 3), {"defenses": ["a"]}
    made = Releases(file)
    for tensor in (one, one, other):
        made.add("send_activations", True, [4, 7], tensor, under)
    made.add("send_gradients", True, [4], one, under)
    made.add("send_activations", False, [0], one, under)
    assert made.sends() == Sends(2, 1)
    assert len(file.read_text().splitlines()) == 1 + 4
    with file.open("a") as more:
        more.write('["send_activations", true, [4')  # killed while it wrote: that message never left
    again = Releases(file)
    assert again.sends() == Sends(2, 1)
    again.add("send_activations", True, [7], one, under)
    assert again.sends() == Sends(2, 1), "a process that came back makes the same message again"
    again.add("send_activations", True, [7], one + 2, under)
    assert again.sends() == Releases(file).sends() == Sends(3, 1)
    assert again.mixed() == Releases(file).mixed() == ""
    file.write_text("what\n")
    with pytest.raises(CheckpointError, match="what the defenses have spent is not known"):
        Releases(file)
    made.path = tmp_path / "gone/released.jsonl"
    with pytest.raises(OutputError, match="Nothing was sent"):
        made.add("send_activations", True, [1], one, under)


def test_a_message_that_could_not_be_written_down_does_not_leave_when_it_is_asked_for_again(tmp_path: Path) -> None:
    file, one, under = tmp_path / "released.jsonl", torch.ones(2, 3), {"defenses": ["a"]}
    made = Releases(file)
    made.add("send_activations", True, [1], one * 5, under)
    made.path = Path("/dev/full")
    for _ in range(2):
        with pytest.raises(OutputError, match="Nothing was sent"):
            made.add("send_activations", True, [1], one, under)
    assert made.sends() == Sends(1, 0)
    made.path = file
    made.add("send_activations", True, [1], one, under)
    assert made.sends() == Releases(file).sends() == Sends(2, 0)


def test_half_a_line_is_cut_off_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, one, under = tmp_path / "released.jsonl", torch.ones(2, 3), {"defenses": ["a"]}
    made = Releases(file)
    made.add("send_activations", True, [1], one * 5, under)

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            made.add("send_activations", True, [1], one, under)
    assert len(file.read_text().splitlines()) == 2
    made.add("send_activations", True, [1], one, under)
    assert Releases(file).sends() == Sends(2, 0)


def test_messages_under_more_than_one_setting_are_told(tmp_path: Path) -> None:
    file, one = tmp_path / "released.jsonl", torch.ones(2, 3)
    made = Releases(file, {"data_and_model": "x"})
    weak, strong = ({"defenses": [{"name": "dp-forward", "epsilon": e}], "head_blocks": 0} for e in (200, 0.5))
    made.add("send_activations", True, [1], one, weak)
    assert made.mixed() == ""
    made.add("send_activations", True, [1], one, strong)  # the same bits, under other settings
    for found in (made, Releases(file)):
        assert '"epsilon": 200' in found.mixed()
        assert '"epsilon": 0.5' in found.mixed()
        assert "head_blocks" not in found.mixed(), "what is the same is not named"
    file.write_text('["send_activations", true, [1], "abc"]\n')
    assert "not counted here" in Releases(file).mixed(), "written before settings were"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (PROBES, "exchange 'mu-splitfed' shows each batch at several points"),
        ({"framework": {"name": "multisfl", "replay": True}, "clients": 2}, "has idle clients show features"),
        *(
            (
                {"selection": {"name": "csfl", "sketch": kind}, "clients": 2, "framework": "sfl-v2"},
                f"selection 'csfl' has each client tell a sketch \\({kind}\\) of its texts",
            )
            for kind in ("tokens", "hash")
        ),
    ],
)
def test_what_a_defense_does_not_see_is_refused_with_it(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, ["dp-forward"], partition=TWO, **changes)
    with pytest.raises(ConfigError, match=words):
        load_config(run)
    load_config({**run, "defense": []})
