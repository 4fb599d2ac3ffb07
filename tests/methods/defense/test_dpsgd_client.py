"""``dpsgd-client``: each text's gradient, its bound, the noise, what it spends, and a server that pulls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import PLDAccountant

import cutlayer
from apart import Apart, steps
from attacking import Hijack
from cutlayer.accounting import gaussian_epsilon
from cutlayer.defense import Sends
from cutlayer.errors import ConfigError, MethodError
from cutlayer.parties.by_example import row_of
from cutlayer.parties.client import ClientParty, secret_of
from cutlayer.registry import create
from cutlayer.wire import Header
from defending import ROWS, client, defending, trained
from spine import TWO, U, adapter, equal, losses, model, often, resumed
from tiny import text_rows, write_rows

NAME = "dpsgd-client"
BARE = {"name": NAME, "cut": False, "multiplier": 0}
SCALE = 0.02  # of the numbers in a random embedding
OWN = {"targets": r"model\.layers\.0\..*(q_proj|v_proj)"}  # the head's block alone


def answered(party: ClientParty, verb: str, tensors: dict[str, torch.Tensor], **values: Any) -> dict[str, torch.Tensor]:
    header = Header(
        "send_activations", "control", verb, "server", party.name, party.name, step=values.pop("step", 0),
        micro=values.pop("micro", 0), values={"graph": True, "head_weight": 1.0, "update": False, **values},
        names=tuple(tensors),
    )  # fmt: skip
    if verb == "head_backward":
        header = header.but(kind="gradient")
    reply, shown = party.handle(header, list(tensors.values()))
    return dict(zip(reply.names, shown, strict=True))


def step(party: ClientParty, *, number: int = 0, size: float = 1.0) -> dict[str, torch.Tensor]:
    """The gradient of what a client trains, of a step in which the trunk does nothing."""
    for micro in range(len(party.batches.rows(number))):
        shown = answered(party, "head_forward", {}, step=number, micro=micro)
        gradient = answered(party, "tail_step", {"hidden": shown["hidden"]}, step=number, micro=micro)["hidden"]
        answered(party, "head_backward", {"hidden": size * gradient}, step=number, micro=micro)
    found: dict[str, torch.Tensor] = party.slot._total()
    return found


@pytest.mark.parametrize(
    ("partition", "changes"),
    often([(TWO, {"gradient_accumulation": 1}), (TWO, {}), (U, {"gradient_accumulation": 1}), (U, {}),
           (U, {"exchange": "splitfrozen"}), (U, {"max_grad_norm": 0.05})], (U, {}), (U, {"exchange": "splitfrozen"})),
    ids=str,
)  # fmt: skip
def test_without_norm_and_noise_it_is_the_undefended_run(
    partition: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Padded batches of unequal texts, with accumulation; a head that is frozen and whose states the server keeps."""
    run = {"partition": partition, "optimizer": {"name": "sgd", "lr": 0.1}, **changes}
    plain = trained(tmp_path / "a", [], **run)
    same = trained(tmp_path / "b", [BARE], **run)
    for (_, one), (_, other) in zip(losses(plain.out), losses(same.out), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    for name, tensor in adapter(plain.out).items():
        torch.testing.assert_close(adapter(same.out)[name], tensor, rtol=0, atol=1e-6)
    assert plain.summary["bytes"] == same.summary["bytes"]


@pytest.mark.parametrize("family", often(["llama", "bert", "gpt2"], "gpt2"))
def test_gradients_are_those_of_batches_of_one(family: str, tmp_path: Path) -> None:
    """Of each text, of the sum over its labels, in head and tail; full fine-tuning with tied weights too."""
    changes: dict[str, Any] = {"model": str(model(family)), "gradient_accumulation": 1, "batch_size": 4}
    if family == "gpt2":
        changes["peft"] = "full"
    if family == "bert":
        rows = write_rows(tmp_path / "rows.jsonl", text_rows(8, seed=3))
        changes["data"] = {"train": str(rows), "format": "classification", "max_length": 24}
    party = client(tmp_path / "a", [BARE], **changes)
    assert party.tail is not None
    assert party.examples is not None
    batch = party.batches.step(0)[0]
    shown = answered(party, "head_forward", {})["hidden"]
    gradient = answered(party, "tail_step", {"hidden": shown})["hidden"]
    with party.head.entered(party.slot.params):
        back = (gradient * 3.0).to(shown)
        (rows_of,) = party.examples._open.values()
        assert rows_of.joined is not None
        rows_of.joined.backward(back)
        party.examples.head_backward((party.name, 0, 0), party.head.names)
    plain = client(tmp_path / "b", [], **changes)
    assert plain.tail is not None
    for row, found in enumerate(rows_of.gradients):
        one = row_of(batch, row)
        mask, positions = one.attention_mask, one.position_ids
        hidden = plain.head.forward(
            plain.params, input_ids=one.input_ids, attention_mask=mask, position_ids=positions, seed=1
        )
        leaf = hidden.detach().requires_grad_()
        loss = plain.tail.forward(
            plain.slot.params, hidden=leaf, attention_mask=mask, position_ids=positions, labels=one.labels, seed=1
        ).loss  # fmt: skip
        with plain.tail.entered(plain.slot.params):
            (loss * (one.label_tokens / batch.label_tokens)).backward()
        with plain.head.entered(plain.slot.params):
            hidden.backward(3.0 * leaf.grad)
        wanted = plain.slot.taken([*plain.head.names, *plain.tail.names])
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-7)
        assert any(tensor.any() for tensor in wanted.values())


@pytest.mark.parametrize("size", [1.0, 1e12])
def test_what_the_server_sends_moves_nothing_further_than_the_norm(size: float, tmp_path: Path) -> None:
    """Whatever it makes up, head and tail together, over all micro-batches of a step."""
    party = client(tmp_path, [{"name": NAME, "multiplier": 0, "norm": 0.01}])
    batches = party.batches.step(0)
    examples, tokens = sum(len(b.input_ids) for b in batches), sum(b.label_tokens for b in batches)
    total = step(party, size=size)
    length = float(torch.stack([t.double().square().sum() for t in total.values()]).sum().sqrt())
    assert length <= 0.01 * examples / tokens * (1 + 1e-5)
    assert length > 0.1 * 0.01 * examples / tokens, "it is not all cut away"


def test_the_noise_has_its_size_and_comes_once_a_step(tmp_path: Path) -> None:
    """With several micro-batches too; the same when a step is made again, other noise for another step."""
    options = {"name": NAME, "multiplier": 5.0, "norm": 0.3}
    party, quiet = client(tmp_path / "a", [options]), client(tmp_path / "b", [{**options, "multiplier": 0}])
    tokens = sum(batch.label_tokens for batch in party.batches.step(0))
    clean = step(quiet)
    noisy = step(party)
    apart = torch.cat([(noisy[n] - clean[n]).flatten() for n in clean]) * tokens
    assert float(apart.std()) == pytest.approx(5.0 * 0.3, rel=0.05)
    assert abs(float(apart.mean())) < 4 * 1.5 / len(apart) ** 0.5
    again = client(tmp_path / "c", [options])
    assert equal(step(again), noisy)
    assert len(party.batches.rows(0)) == 2
    other = client(tmp_path / "d", [options])
    other.secret = b"another"
    assert other.defending is not None
    other.defending.secret = b"another"
    assert not equal(step(other), noisy)


def test_the_norm_is_the_median_of_public_gradients(tmp_path: Path) -> None:
    made = [defending(tmp_path / str(clip), [{"name": NAME, "clip": clip}]) for clip in (1.0, 0.5)]
    one, half = (defending.defenses[0].most for defending in made)
    assert one == pytest.approx(2 * half)
    ground = made[0].ground
    assert ground.measured is not None
    norms = ground.measured(torch.randint(3, 90, (16, ground.length), generator=torch.Generator().manual_seed(1)))
    assert 0.5 * one < float(norms.median()) < 2 * one, "as of other random texts"
    with pytest.raises(MethodError, match="clip and norm are both given"):
        create("defense", NAME, {"clip": 1.0, "norm": 1.0})
    with pytest.raises(MethodError, match="the noise is in parts of the norm"):
        create("defense", NAME, {"cut": False})


def test_a_claim_only_where_the_server_trains_nothing(tmp_path: Path) -> None:
    noise = {"name": NAME, "multiplier": 4.0, "norm": 0.5}
    (told,) = defending(tmp_path / "a", [noise]).told(Sends(3, 9))
    assert (told["kind"], told["epsilon"]) == ("empirical", None)
    assert "the server trains on the same texts in clear" in told["why"]
    alone = defending(tmp_path / "b", [noise], peft={"name": "lora", "rank": 2, **OWN})
    (told,) = alone.told(Sends(3, 9))
    assert (told["kind"], told["delta"], told["releases"]) == ("central", 1e-5, 3)
    assert told["epsilon"] == pytest.approx(gaussian_epsilon(2.0, 3, 1e-5))
    event = PLDAccountant().compose(GaussianDpEvent(2.0), 3)
    assert told["epsilon"] == pytest.approx(event.get_epsilon(1e-5), rel=0.01)
    assert (told["clip"], told["sensitivity"], told["scale"]) == (0.5, 1.0, 2.0)
    assert "the messages" in told["not_covered"]


def hijacked(root: Path, defense: list[Any], steps: int) -> list[float]:
    """The share of tokens that a hijacking server reads of each step, of a head that is an embedding alone."""
    shares, rows, length = torch.tensor([8, 4, 2, 1]) / 15, 4, 20
    draw = torch.Generator().manual_seed(5)
    words = torch.multinomial(shares, 16 * length, replacement=True, generator=draw).reshape(16, length)
    texts = [{"text": " ".join(f"w{3 + int(word)}" for word in row)} for row in words]
    data = {"train": str(write_rows(root / "texts.jsonl", texts)), "format": "text", "append_eos": False}
    party = client(
        root, defense, data=data, partition={**U, "head_blocks": 0}, peft="full", batch_size=rows,
        gradient_accumulation=1, optimizer={"name": "sgd", "lr": float(rows * length)},
    )  # fmt: skip
    server, found = Hijack(shares, 32, seed=0), []
    for number in range(steps):
        shown = answered(party, "head_forward", {}, step=number)["hidden"].detach() / SCALE
        found.append(float((server.read(shown) == party.batches.step(number)[0].input_ids - 3).float().mean()))
        gradient = server.pull(shown) * SCALE / (rows * length)
        answered(party, "head_backward", {"hidden": gradient}, step=number, update=True)
    return found


@pytest.mark.parametrize("steps", [30, pytest.param(120, marks=pytest.mark.slow)])
def test_a_server_that_pulls_the_head_is_slowed_down_and_not_stopped(steps: int, tmp_path: Path) -> None:
    """It reads less while it pulls, and in the end as much."""
    found = {}
    for name, defense in (("plain", []), ("slow", [{"name": NAME, "norm": 0.06 * SCALE, "multiplier": 1.0}])):
        (tmp_path / name).mkdir()
        found[name] = torch.tensor(hijacked(tmp_path / name, defense, steps))
    early = slice(5, 15)
    gap = float(found["plain"][early].mean() - found["slow"][early].mean())
    assert gap > 0.15
    if steps > 100:
        later = float(found["plain"][-30:].mean() - found["slow"][-30:].mean())
        assert later < gap / 2
        assert float(found["slow"][-30:].mean()) > 8 / 15 + 0.2, "more than the most frequent token"


@pytest.mark.parametrize(("multiplier", "releases", "epsilon"), [(2.0, 3, 3.7188), (1.0, 10, 17.8673)])
def test_the_epsilon_is_that_of_opacus(multiplier: float, releases: int, epsilon: float) -> None:
    """The numbers are those of the PRV accountant of opacus 1.6.0, without sampling (sample_rate=1), at delta 1e-5."""
    assert gaussian_epsilon(multiplier, releases, 1e-5) == pytest.approx(epsilon, rel=0.01)


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", [{"name": NAME, "norm": 1.0}], steps=2, checkpoint_every=1)
    kept = adapter(plain.out)
    again = resumed(plain.out)
    assert equal(adapter(again.out), kept)


@pytest.mark.slow
def test_between_processes_is_the_simulation(tmp_path: Path) -> None:
    """With a defense of the gradients of step 7 beside it, and clients that are merged."""
    both = [{"name": NAME, "multiplier": 0.5}, {"name": "marvell", "sensitive": [f"w{n}" for n in range(3, 40)]}]
    run = Apart(tmp_path / "apart", {"ann": ROWS, "bob": ROWS[:5]}, defense=both, rounds=2, framework="sfl-v2")
    for name in run.files:
        (run.root / name).mkdir()
        (run.root / name / "secret").write_bytes(secret_of(0, name))
    server = run.serve()
    run.ended({**{name: run.join(name) for name in run.files}, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)
    assert run.same_state(alone.out)
    for name in run.files:
        told = json.loads((run.root / name / "privacy.json").read_text())
        assert [one["defense"] for one in told] == [NAME, "marvell"]
        assert [one["epsilon"] for one in told] == [None, None]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="nothing that the client trains"):
        client(tmp_path / "none", [NAME], partition={**U, "head_blocks": 0, "tail_blocks": 0})
    with pytest.raises(ConfigError, match="needs norm: in the two-part split"):
        trained(tmp_path / "a", [NAME], partition=TWO)
    with pytest.raises(MethodError, match="'pslf' cannot be on with"):
        client(tmp_path / "b", [NAME, "pslf"])
    assert client(tmp_path / "c", [{"name": NAME, "norm": 1.0}, "gradperturb"], partition=U).examples is not None
