"""A client's seat, without a network: what it answers, what it refuses, and what the server reads of a refusal."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apart import Apart, Noted
from cutlayer.agreed import AgreedSecret
from cutlayer.apart import offer, served, taken
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.offered import fetched
from cutlayer.policy import load_policy
from cutlayer.seat import Seat
from cutlayer.sketches import simulated_secrets
from cutlayer.wire import Header, encode


def seat(
    folder: Path, policy: dict[str, Any] | None = None, agreed: AgreedSecret | None = None, **changes: Any
) -> tuple[Seat, Noted]:  # fmt: skip
    run, noted = Apart(folder, **changes), Noted()
    config = taken(offer(served(run.file)), model=str(run.tree["model"]), device="cpu")
    (folder / "ann").mkdir(exist_ok=True)
    rules = load_policy(policy or {})
    return Seat(config, "ann", run.files["ann"], None, folder / "ann", rules, noted, agreed=agreed), noted


@pytest.mark.parametrize("family", ["monitor", "framework", "peft", "selection", "defense", "attack", "codec"])
def test_what_a_server_names_is_not_executed(family: str, tmp_path: Path) -> None:
    mark, method = tmp_path / "executed", tmp_path / "method.py"
    method.write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    tree = offer(served(Apart(tmp_path / "apart").file))
    tree[family] = [str(method)] if isinstance(tree[family], list) else str(method)
    with pytest.raises(CutlayerError, match="method"):
        taken(tree, model=None, device="cpu")
    assert not mark.exists()


def test_what_is_the_clients_own_is_not_the_servers_to_say(tmp_path: Path) -> None:
    tree = offer(served(Apart(tmp_path / "apart").file)) | {"record_wire": str(tmp_path / "frames"), "device": "cuda:7"}
    config = taken(tree, model=None, device="cpu")
    assert (config.record_wire, config.device) == (None, "cpu")
    with pytest.raises(CutlayerError, match="fails is for simulated clients"):
        taken({**tree, "fails": 0.5}, model=None, device="cpu")


def ask(verb: str, turn: int, **values: Any) -> Header:
    return Header("partition", verb=verb, sender="server", receiver="ann", client="ann", turn=turn, values=values)


def test_nothing_is_answered_before_the_client_knows_where_the_run_is(tmp_path: Path) -> None:
    own, _ = seat(tmp_path, {"may_leave": {"error_texts": True}})
    for turn, verb in enumerate(("get_state", "keep", "finish", "abort"), start=1):
        with pytest.raises(CutlayerError, match=f"'{verb}' came before 'begin'"):
            own.handle(ask(verb, turn, round=1), [])
    own.handle(ask("begin", 5, round=0, updates=3), [])
    assert own.handle(ask("keep", 6, round=1), [])[0].kind == "ack"


@pytest.mark.parametrize("may", [False, True])
def test_the_words_of_a_refusal_stay_unless_they_may_leave(may: bool, tmp_path: Path) -> None:
    own, noted = seat(tmp_path, {"may_leave": {"error_texts": may}})
    own.handle(ask("begin", 1, round=0, updates=3), [])
    with pytest.raises(CutlayerError) as caught:
        own.handle(ask("show_me_all", 2), [])
    assert ("nothing that a client may be asked for" in str(caught.value)) == may
    assert str(caught.value).startswith("PolicyRefused")
    assert "'show_me_all' is nothing that a client may be asked for" in noted.words[-1]


LINEAR: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": 0.01, "schedule": "linear"}}
ALLOWED = {"may_leave": {"sketches": True}}
BLURRED: dict[str, Any] = {"selection": {"name": "csfl", "sketch": "tokens", "noise": 0.1}, "framework": "sfl-v2"}


def test_a_length_of_the_run_is_taken_where_groups_may_change_it(tmp_path: Path) -> None:
    """From then on, and after a restart, the learning rate ends with it; no other run has such a request."""
    own, _ = seat(tmp_path / "arranged", ALLOWED, **LINEAR, **BLURRED)
    own.handle(ask("begin", 1, round=0, updates=10), [])
    assert [own.party.slot._rate(n) for n in (0, 5, 10)] == [1.0, 0.5, 0.0]
    own.party.slot.version = 2  # two steps were made
    own.handle(ask("retime", 2, ahead=2), [])
    assert [own.party.slot._rate(n) for n in (0, 2, 4)] == [1.0, 0.5, 0.0]
    own.handle(ask("keep", 3, round=1), [])
    own.handle(ask("begin", 1, round=1, updates=10), [])
    assert [own.party.slot._rate(n) for n in (0, 2, 4)] == [1.0, 0.5, 0.0]
    for values in ({"ahead": -1}, {"ahead": 2.5}, {}):
        with pytest.raises(CutlayerError, match="PolicyRefused"):
            own.handle(ask("retime", 4, **values), [])
    other, noted = seat(tmp_path / "other", **LINEAR)
    other.handle(ask("begin", 1, round=0, updates=10), [])
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        other.handle(ask("retime", 2, ahead=2), [])
    assert "it has no selection that arranges who trains with whom" in noted.words[-1]


def test_noise_of_a_sketch_is_from_the_client_s_own_secret(tmp_path: Path) -> None:
    """The same whenever it is asked, after a restart too; and not what follows from the seed, which others know."""

    def told(folder: str) -> torch.Tensor:
        own, _ = seat(tmp_path / folder, ALLOWED, **BLURRED)
        own.handle(ask("begin", 1, round=0, updates=3), [])
        (found,) = own.handle(ask("sketch", 2), [])[1]
        assert own.guard.counts.kinds["sketches"][0] > 0
        return found

    first = told("ann")
    assert torch.equal(first, told("ann"))
    assert not torch.equal(first, told("other"))
    by_seed = simulated_secrets(0, "ann")[1]
    own, _ = seat(tmp_path / "ann", ALLOWED, **BLURRED)
    assert own.party.teller is not None
    assert not torch.equal(first, replace(own.party.teller, own=by_seed).tell(own.party._look))


def test_a_sketch_is_told_between_steps_only(tmp_path: Path) -> None:
    own, noted = seat(tmp_path, ALLOWED, **BLURRED)
    own.handle(ask("begin", 1, round=0, updates=3), [])
    own.handle(ask("set_up", 2, head_blocks=1, tail_blocks=1, steps=3), [])
    own.handle(ask("head_forward", 3, graph=True), [])
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        own.handle(ask("sketch", 4), [])
    assert "'sketch' came in the middle of a training step" in noted.words[-1]


def shown(own: Seat, *steps: int) -> None:
    """Have training steps made whole, as a server asks for them (of the first client's head, with its tail)."""
    turn = own.guard._newest
    for step in steps:
        about = {"step": step, "names": ("hidden",), "values": {"graph": True, "head_weight": 1.0, "update": True}}
        made, tensors = own.handle(replace(ask("head_forward", turn + 1, graph=True), step=step), [])
        hidden = dict(zip(made.names, tensors, strict=True))["hidden"].detach().clone()
        up = replace(ask("tail_step", turn + 2), step_name="return_activations", kind="activations", **about)
        own.handle(up, [hidden])
        needed = made.values.get("needs_gradient")
        about["values"] = {**about["values"], "loss": 1.0}
        back = ask("head_backward", turn + 3)
        kind = "gradient" if needed else "no-gradient"
        about["names"] = ("hidden",) if needed else ()
        own.handle(replace(back, step_name="return_gradients", kind=kind, **about),
                   [torch.zeros_like(hidden)] if needed else [])  # fmt: skip
        turn += 3


def begun(folder: Path, defense: list[Any], **changes: Any) -> tuple[Seat, Noted]:
    """A client whose defenses can claim something, ready for its first step."""
    changes = {"exchange": "splitfrozen", "framework": "sfl-v2", "rounds": 50, **changes}
    own, noted = seat(folder, defense=defense, **changes)
    own.handle(ask("begin", 1, round=0, updates=50), [])
    own.handle(ask("set_up", 2, head_blocks=1, tail_blocks=1, steps=50, steps_per_epoch=4), [])
    return own, noted


def claimed(folder: Path) -> list[tuple[str, int | None, float | None, str]]:
    """What privacy.json says: defense, releases, epsilon, why."""
    found = json.loads((folder / "ann" / "privacy.json").read_text())
    return [(one["defense"], one.get("releases"), one["epsilon"], one["why"]) for one in found]


WEAK, STRONG = ([{"name": "dp-forward", "epsilon": epsilon}] for epsilon in (200, 0.5))


def test_what_left_under_other_settings_is_claimed_by_no_defense(tmp_path: Path) -> None:
    """Of one folder: a weak defense, a strong one, none, and the first again; and one that came after none."""
    own, _ = begun(tmp_path / "a", WEAK)
    shown(own, 0)
    ((_, releases, epsilon, why),) = claimed(tmp_path / "a")
    assert (releases, why) == (1, ""), "it is written when a message is new, not only at a checkpoint"
    assert epsilon == pytest.approx(200, rel=1e-3)
    own, _ = begun(tmp_path / "a", WEAK)
    shown(own, 0)
    assert claimed(tmp_path / "a") == [("dp-forward", 1, epsilon, "")], "the same messages again, after a restart"
    own, noted = begun(tmp_path / "a", STRONG)
    shown(own, 0)
    ((name, releases, epsilon, why),) = claimed(tmp_path / "a")
    assert (name, releases, epsilon) == ("dp-forward", 2, None)
    assert '"epsilon": 200' in why
    assert '"epsilon": 0.5' in why
    own.handle(ask("finish", 9), [])
    assert any("no epsilon is claimed, since messages left" in line for line in noted.words)
    own, _ = begun(tmp_path / "a", [])
    ((name, _, epsilon, why),) = claimed(tmp_path / "a")
    assert (name, epsilon) == ("none", None)
    assert "without a defense" in why
    begun(tmp_path / "a", WEAK)
    assert [(one[0], one[2]) for one in claimed(tmp_path / "a")] == [("dp-forward", None)]

    own, _ = begun(tmp_path / "b", [])
    shown(own, 0)
    assert not (tmp_path / "b/ann/privacy.json").exists()
    own, _ = begun(tmp_path / "b", STRONG)
    ((_, _, epsilon, why),) = claimed(tmp_path / "b")
    assert epsilon is None
    assert "not counted here" in why


MOVING: dict[str, Any] = {"planner": {"name": "splitft-adaptive-cut", "cut": 1}, "peft": "splitft-cut-rank"}
MOVING |= {"aggregator": "lora-products"}


def test_no_server_talks_a_client_into_a_claim_by_moving_the_cut(tmp_path: Path) -> None:
    """Messages of a head that was trained are not made good by one that has nothing to train."""
    own, _ = seat(tmp_path, defense=STRONG, framework="sfl-v2", rounds=50, **MOVING)
    for cut in (2, 0):
        own.handle(ask("begin", 1, round=0, updates=50, head_blocks=cut, most=2), [])
        own.handle(ask("set_up", 2, head_blocks=cut, tail_blocks=1, steps=50, steps_per_epoch=4), [])
        shown(own, 0)
        ((_, releases, epsilon, why),) = claimed(tmp_path)
        assert (releases, epsilon) == (1 if cut else 2, None)
        assert ("more than one setting" in why) == (cut == 0)
    assert "head_blocks 2 and 0" in why


def blocks_of(own: Seat) -> set[int]:
    """The blocks whose weights are loaded."""
    assert own.base is not None
    return {number for number in range(4) if own.base.model.model.layers[number].state_dict()}


def test_a_client_loads_what_a_planner_may_give_it_and_no_more(tmp_path: Path) -> None:
    """Nothing before the server says it; and a block that it has not loaded cannot come to be its own."""
    own, noted = seat(tmp_path, **MOVING)
    assert own.base is None
    own.handle(ask("begin", 1, round=0, updates=3, head_blocks=1, most=2), [])
    assert blocks_of(own) == {0, 1, 3}
    assert len(own.party.head.blocks) == 1
    own.handle(ask("move", 2, head_blocks=2), [])
    assert len(own.party.head.blocks) == 2
    with pytest.raises(CutlayerError):
        own.handle(ask("move", 3, head_blocks=3), [])
    assert "was given 3 head blocks, but it has loaded 2" in noted.words[-1]


@pytest.mark.parametrize(
    ("cut", "most", "said"),
    [
        (0, 2, "the server gives 0 blocks; allowed: 1 or more"), (-1, 2, "the server gives -1 blocks"),
        (2, 1, "2 head blocks, and 1 at most, which cannot"), (1, 3, "1 head blocks, and 3 at most, which cannot"),
    ],
)  # fmt: skip
def test_cuts_that_a_server_may_not_give(cut: int, most: int, said: str, tmp_path: Path) -> None:
    own, noted = seat(tmp_path, {"head_blocks": 1}, **MOVING)
    with pytest.raises(CutlayerError):
        own.handle(ask("begin", 1, round=0, updates=3, head_blocks=cut, most=most), [])
    assert said in noted.words[-1]
    assert own.base is None


def test_a_move_below_the_owner_s_smallest_head_is_refused(tmp_path: Path) -> None:
    own, noted = seat(tmp_path, {"head_blocks": 1}, **MOVING)
    own.handle(ask("begin", 1, round=0, updates=3, head_blocks=1, most=2), [])
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        own.handle(ask("move", 2, head_blocks=0), [])
    assert "the server gives 0 blocks; allowed: 1 or more" in noted.words[-1]
    assert len(own.party.head.blocks) == 1


@pytest.mark.parametrize("ranks", [[1], [99] * 14, [-1] * 14], ids=["too few", "too high", "negative"])
def test_ranks_that_a_server_may_not_give(ranks: list[int], tmp_path: Path) -> None:
    own, noted = seat(tmp_path, **MOVING)
    own.handle(ask("begin", 1, round=0, updates=3, head_blocks=1, most=2), [])
    before = {name: one.shape for name, one in own.party.slot.params.items()}
    with pytest.raises(CutlayerError):
        own.handle(ask("move", 2, head_blocks=1).but(names=("ranks",)), [torch.tensor(ranks, dtype=torch.int32)])
    assert "told" in noted.words[-1]
    assert {name: one.shape for name, one in own.party.slot.params.items()} == before


def test_a_client_knows_the_cut_that_it_had(tmp_path: Path) -> None:
    """A server whose folder is of another run gives another; the examples that are kept back are the same again."""
    own, _ = seat(tmp_path, **MOVING)
    own.handle(ask("begin", 1, round=0, updates=3, head_blocks=1, most=2), [])
    own.handle(ask("move", 2, head_blocks=2), [])
    own.handle(ask("keep", 3, round=1), [])
    again, noted = seat(tmp_path, **MOVING)
    with pytest.raises(CutlayerError):
        again.handle(ask("begin", 1, round=1, updates=3, head_blocks=1, most=2), [])
    assert "After round 1 this client had 2 head blocks, and the server says 1" in noted.words[-1]
    again.handle(ask("begin", 2, round=1, updates=3, head_blocks=2, most=2), [])
    assert again.party.names("own") == own.party.names("own")
    told, data = again.told(), own.told()
    assert told["data"] == data["data"]
    assert told["data"]["validation_batches"] == 1
    assert told["data"]["examples"] == 6
    assert told["data"]["length"] > 1


def shows(own: Seat, turn: int, step: int = 0) -> torch.Tensor:
    """The hidden states of a training step's first micro-batch."""
    return own.handle(ask("head_forward", turn, graph=True).but(step=step), [])[1][0]


def ready(folder: Path, policy: dict[str, Any] | None = None) -> tuple[Seat, Noted]:
    """A seat that has begun and is set up."""
    own, noted = seat(folder, policy)
    own.handle(ask("begin", 1, round=0, updates=3), [])
    own.handle(ask("set_up", 2, head_blocks=1, tail_blocks=1, steps=3), [])
    return own, noted


def test_an_aborted_step_is_shown_again_and_counts_as_a_repeat(tmp_path: Path) -> None:
    own, _ = ready(tmp_path)
    first = shows(own, 3)
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        shows(own, 4)
    own.handle(ask("abort", 5), [])
    assert torch.equal(shows(own, 6), first)
    assert (own.guard.counts.micros, own.guard.counts.repeats) == (2, 1)


def test_every_answer_is_in_the_record(tmp_path: Path) -> None:
    own, _ = ready(tmp_path)
    own.guard.greets(own.told(), 321)
    length = 321
    for turn, (verb, values) in enumerate((("hold", {"round": 0}), ("keep", {"round": 1}), ("abort", {})), start=3):
        before = own.guard.counts.bytes
        length = encode(*own.handle(ask(verb, turn, **values), [])).length
        assert own.guard.counts.bytes == before + length
    log = [json.loads(line) for line in (own.out / "sent.jsonl").read_text().splitlines()]
    assert [line["verb"] for line in log] == ["begin", "set_up", "hello", "hold", "keep", "abort"]
    assert sum(line["bytes"] for line in log) == own.guard.counts.bytes
    assert "sizes of the data: 2 times" in own.guard.told()


def test_a_client_that_may_send_no_more_does_not_acknowledge(tmp_path: Path) -> None:
    own, noted = ready(tmp_path)
    own.guard.policy = load_policy({"most": {"bytes": own.guard.counts.bytes}})
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        own.handle(ask("keep", 3, round=1), [])
    assert "most.bytes" in noted.words[-1]
    with pytest.raises(CutlayerError, match=r"^PolicyRefused$"):
        own.resent(2, 100)
    assert "the answer to request 2 does not leave again: The policy's rule most.bytes" in noted.words[-1]


def test_requests_that_make_no_sense_are_refused_in_words(tmp_path: Path) -> None:
    own, noted = seat(tmp_path)
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        own.handle(ask("begin", 1, round="x", updates=3), [])
    assert "tells round 'x', which is no whole number" in noted.words[-1]
    own.handle(ask("begin", 2, round=0, updates=3), [])
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        shows(own, 3)
    assert "before the run was set up" in noted.words[-1]
    own.handle(ask("set_up", 4, head_blocks=1, tail_blocks=1, steps=2**40), [])
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        shows(own, 5, step=2**32 - 1)
    assert "step 4294967295 was asked for; the run has 3 of this client" in noted.words[-1]
    hidden = shows(own, 6)
    tail = ask("tail_step", 7, graph=True, head_weight=1.0, update=True)
    for tensors, said in (
        ({}, "lacks the tensor 'hidden'"), ({"hidden": hidden.long()}, "brings 'hidden' as torch.int64"),
        ({"hidden": hidden * float("inf")}, "not finite"), ({"hidden": hidden.double()}, "brings torch.float64"),
    ):  # fmt: skip
        with pytest.raises(CutlayerError, match="PolicyRefused"):
            own.handle(tail.but(names=tuple(tensors)), list(tensors.values()))
        assert said in noted.words[-1]
    assert own.handle(tail.but(names=("hidden",)), [hidden.detach()])[0].kind == "gradient"
    with pytest.raises(CutlayerError):
        own.handle(ask("head_forward", 8, graph=False).but(step=2), [])
    assert "batch 2 was asked for; there are 0" in noted.words[-1]


def test_a_batch_that_is_trained_on_is_never_taken_for_one_of_an_evaluation(tmp_path: Path) -> None:
    """Of one number both may be; the guard lets no request begin the one while the other is open."""
    gradients = []
    for folder, between in (("alone", False), ("beside", True)):
        own, noted = ready(tmp_path / folder)
        party = own.party
        party.evaluation = [lambda party=party: party.batches.step(2)[0]]
        hidden = shows(own, 3)
        if between:
            with pytest.raises(CutlayerError, match="PolicyRefused"):
                own.handle(ask("head_forward", 4, graph=False), [])
            assert "is still open as one of training" in noted.words[-1]
            shown = party.handle(ask("head_forward", 4, graph=False), [])[1][0]  # as if no guard were there
            assert shown.shape != hidden.shape
        tail = ask("tail_step", 5, graph=True, head_weight=1.0, update=True).but(names=("hidden",))
        gradients.append(party.handle(tail, [hidden.detach()])[1][0])
        if between:
            reply, _ = party.handle(tail.but(values={"graph": False}), [shown])
            assert "correct" in reply.values
    assert torch.equal(*gradients)


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_run_is_done_when_its_part_was_written_and_not_before(peft: str, tmp_path: Path) -> None:
    """A folder of that name that something else made says nothing; another begin says that it goes on."""
    kind = {"peft": "full"} if peft == "full" else {}
    own, noted = seat(tmp_path, **kind)
    place = own.out / {"lora": "adapter", "full": "model"}[peft]
    place.mkdir()
    assert own.done is None
    own.handle(ask("begin", 1, round=0, updates=3), [])
    assert own.done is None
    own.handle(ask("finish", 2), [])
    assert own.done == place
    assert "the run is done" in noted.words[-1]
    assert any(place.glob("*.safetensors"))
    assert own.left is None
    other, _ = seat(tmp_path, seed=7, **kind)  # of another run, with the same folder
    assert other.done is None
    own.handle(ask("begin", 3, round=0, updates=3), [])
    assert own.done is None
    (own.out / "finished.json").write_text("{")
    assert own.done is None


def test_who_refused_has_left_the_run_and_has_its_part_as_of_then(tmp_path: Path) -> None:
    own, noted = ready(tmp_path)
    own.handle(ask("hold", 3, round=0), [])
    own.handle(ask("keep", 4, round=1), [])
    own.guard.policy = load_policy({"may_leave": {"activations": False}})
    with pytest.raises(CutlayerError, match="PolicyRefused"):
        shows(own, 5, step=1)
    own.handle(ask("begin", 6, round=1, updates=3), [])
    own.handle(ask("finish", 7), [])
    assert own.done is None
    assert not any("the run is done" in words for words in noted.words)
    said = str(own.left)
    assert "left the run in round 1" in said
    assert "may_leave.activations" in said
    assert f"Its own part as it was after 1 rounds is in {own.out / 'adapter'}" in said
    own.guard.policy = load_policy({})
    own.handle(ask("begin", 8, round=1, updates=3), [])
    own.handle(ask("set_up", 9, head_blocks=1, tail_blocks=1, steps=3), [])
    own.handle(ask("finish", 10), [])
    assert (own.left, own.done) == (None, own.out / "adapter"), "a server that was started again took it back"


class Greeted:
    """A session that has read what a server offers."""

    def __init__(self, welcome: dict[str, Any]) -> None:
        self.welcome = welcome

    async def close(self, words: str) -> None: ...


@pytest.mark.parametrize("own", [True, False])
def test_a_folder_that_only_has_the_name_of_the_model_is_told_from_a_copy(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the server's model is a folder of its own, or a name on the Hub."""
    tree = {**offer(served(Apart(tmp_path / "apart").file)), "model": "gpt2"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()

    def call(**more: Any) -> Any:
        async def opened(hello: Any, *_: Any) -> Any:
            return Greeted({"run": tree, "own_model": own})

        return asyncio.run(fetched(opened, "server:1", "ann", load_policy({}), progress=Noted(), **more))

    with pytest.raises(ConfigError, match=r"--model is gpt2, a folder without a config\.json") as caught:
        call(model="gpt2")
    with pytest.raises(ConfigError) as caught:
        call()
    said = str(caught.value)
    assert f"{tmp_path / 'gpt2'} is a folder of that name without a config.json" in said
    assert ("join with --model served" in said) == own
    assert ("rename that folder" in said) != own
