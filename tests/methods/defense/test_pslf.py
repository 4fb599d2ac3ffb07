"""``pslf``: what is seen follows from flipped labels alone, and what predicts never leaves its client."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cutlayer
from apart import Apart, steps
from attacking import direction_auc
from cutlayer.asking import check_owned
from cutlayer.defense import Sends
from cutlayer.errors import ConfigError, MethodError, PolicyRefused
from cutlayer.leaving import held_by
from cutlayer.methods.defense._flips import kept_with
from cutlayer.methods.defense._two_classes import moments
from cutlayer.models.slots import PRIVATE
from cutlayer.parties.client import secret_of
from cutlayer.wire import Header
from defending import ROWS, client, defending, frames, passing, run_of, trained, whole_batch
from spine import PARTITIONS, TWO, U, adapter, equal, losses, model, resumed
from tiny import text_rows, write_rows

NAME = "pslf"
FIXED = '''from dataclasses import dataclass
import torch
from cutlayer.contracts import Defense
from cutlayer.registry import method

@method("defense")
@dataclass
class Fixed(Defense):
    """Has a tail learn what no label is in."""
    protects = ()
    two_tails = True
    def learned(self, labels, about):
        return (about.batch.input_ids[:, :1] % 2).repeat(1, 2)
    def spent(self, ground, sends): ...
'''


def classes(root: Path, rows: Sequence[Any], **changes: Any) -> dict[str, Any]:
    """A run of a classifier of two classes, in file order."""
    root.mkdir(parents=True, exist_ok=True)
    data = {
        "train": str(write_rows(root / "texts.jsonl", list(rows))), "format": "classification", "max_length": 24,
        "shuffle": False,
    }  # fmt: skip
    return {"model": str(model("bert")), "data": data, "gradient_accumulation": 1, "partition": U, **changes}


def seen(root: Path) -> list[dict[str, torch.Tensor]]:
    """The tensors of all frames of training, in order."""
    return [dict(tensors) for header, tensors in frames(root) if header.step_name != "partition"]


def private(out: Path, name: str = "client-0") -> dict[str, torch.Tensor]:
    """What a client of a simulation has under private names, with the optimizer's state."""
    last = sorted((out / "checkpoints").iterdir())[-1]
    return {n: t for n, t in load_file(last / f"client-{name}.safetensors").items() if PRIVATE in n}


def test_no_label_that_the_second_tail_learns_is_in_what_is_seen(tmp_path: Path) -> None:
    """The true labels turned round: all that leaves has the same bits, for as long as it is trained."""
    (tmp_path / "fixed.py").write_text(FIXED)
    rows, found = text_rows(18, seed=5), {}
    for name, turned in (("as they are", False), ("turned", True)):
        root = tmp_path / name.replace(" ", "-")
        labels = [{**row, "label": 1 - row["label"] if turned else row["label"]} for row in rows]
        run = classes(root, labels, record_wire=str(root / "wire"), steps=5)
        done = trained(root, [str(tmp_path / "fixed.py")], **run)
        found[name] = seen(root / "wire"), losses(done.out), private(done.out)
    (one, told, own), (other, also, their) = found.values()
    assert len(one) == len(other) > 10
    assert all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(one, other, strict=True)
    )
    assert told == also, "nor in the losses of training"
    assert own.keys() == their.keys()
    assert not equal(own, their), "the second tail has learned them"


def test_only_the_second_tail_predicts_and_stays(tmp_path: Path) -> None:
    """Two clients whose parts are merged: one first tail, two second ones, which are in no frame but in the result."""
    rows = {name: write_rows(tmp_path / f"{name}.jsonl", text_rows(9, seed=n)) for n, name in enumerate("ab", start=5)}
    clients = [{"name": name, "data": str(path)} for name, path in rows.items()]
    done = trained(
        tmp_path, [{"name": NAME, "epsilon": 1.0}], clients=clients, framework="sfl-v1", steps=2,
        record_wire=str(tmp_path / "wire"),
    )  # fmt: skip
    own = {name: private(done.out, name) for name in "ab"}
    assert not equal(own["a"], own["b"])
    last = sorted((done.out / "checkpoints").iterdir())[-1]
    first = {name: load_file(last / f"client-{name}.safetensors") for name in "ab"}
    tail = [n for n in first["a"] if not n.startswith("optimizer/") and PRIVATE + n in first["a"]]
    assert tail
    for n in tail:
        assert torch.equal(first["a"][n], first["b"][n]), "the first is merged"
        for name in "ab":
            assert torch.equal(adapter(done.out, f"adapters/{name}")[f"base_model.model.{n}".replace(".default", "")],
                               own[name][PRIVATE + n])  # fmt: skip
    leaving = [n for tensors in seen(tmp_path / "wire") for n in tensors]
    assert any(n in tail for n in leaving)
    assert not any(PRIVATE in n for n in leaving)


def test_a_server_can_neither_ask_for_the_second_tail_nor_set_it(tmp_path: Path) -> None:
    party = client(tmp_path, [NAME])
    own = [name for name in party.slot.params if name.startswith(PRIVATE)]
    assert own
    for part in ("own", "hosted", "all"):
        assert not party.names(part) & {*own}
    held = held_by(party)
    assert not {*own} & held.tensors.keys()
    asked = Header("aggregate", "state", "set_state", "server", party.name, party.name, names=(own[0],))
    with pytest.raises(PolicyRefused, match="which is not of this client's part"):
        check_owned(asked, [party.slot.params[own[0]].detach()], held.tensors)


def test_flips_are_drawn_once_for_each_record(tmp_path: Path) -> None:
    """As often as was said; the same in each step and each order, others for the same text in another place."""
    options = {"name": NAME, "epsilon": 4.0, "flips": 4, "most": 60}
    made = defending(tmp_path, [options])
    batch = whole_batch(3, 24)
    one = made.learned(batch.labels, replace(passing(batch), records=[5, 6, 7]))
    assert one.shape == (3, 24, 4)
    again = defending(tmp_path / "again", [options])
    turned = replace(
        batch, input_ids=batch.input_ids.flip(0), labels=batch.labels.flip(0)
    )  # the same three in another order, in another step
    other = again.learned(turned.labels, replace(passing(turned, step=9), records=[7, 6, 5])).flip(0)
    assert torch.equal(one[:, 1:], other[:, 1:])
    elsewhere = again.learned(batch.labels, replace(passing(batch), records=[1, 2, 3]))
    assert not torch.equal(one[:, 1:], elsewhere[:, 1:])
    assert (one[:, 1:] != one[:, 1:, :1]).any(), "the flips of a label are independent"
    mask = torch.ones(3, 24, dtype=torch.int64)
    mask[:, :5] = 0  # behind padding at the left the first token is a label too, and nothing public stands before it
    left = replace(batch, attention_mask=mask, labels=batch.labels.masked_fill(mask == 0, -100))
    first = made.learned(left.labels, passing(left))[:, 5]
    assert (first != batch.labels[:, 5, None]).any()


def test_the_channel_of_a_classifier(tmp_path: Path) -> None:
    rows = text_rows(300, seed=2)
    party = client(tmp_path, [{"name": NAME, "epsilon": 2.0, "flips": 2}], **classes(tmp_path, rows, batch_size=300))
    assert party.defending is not None
    (batch,) = party.batches.step(0)
    found = party.defending.learned(batch.labels, replace(passing(batch), records=party.batches.rows(0)[0]))
    kept = (found == batch.labels[:, None]).float().mean(0)
    assert kept.tolist() == pytest.approx([kept_with(1.0, 2)] * 2, abs=0.09)
    (told,) = party.defending.told(Sends(30, 5))
    assert (told["epsilon"], told["delta"], told["releases"], told["kind"]) == (2.0, 0.0, 1, "local")


@pytest.mark.parametrize("epsilon", [2.0])
def test_a_direction_tells_what_flipped_labels_tell(epsilon: float, tmp_path: Path) -> None:
    """One flip: as much of the true classes as of label-dp-rr with the same epsilon; and of both what theory says."""
    rows, areas = text_rows(160, seed=4), {}
    first = torch.arange(160) % 2 == 1
    for name, options in ((NAME, {"flips": 1}), ("label-dp-rr", {}), ("plain", None)):
        root = tmp_path / name
        run = classes(root, rows, batch_size=160, steps=1, record_wire=str(root / "wire"))
        trained(root, [] if options is None else [{"name": name, "epsilon": epsilon, **options}], **run)
        (gradient,) = [t["hidden"] for h, t in frames(root / "wire") if h.step_name == "send_gradients"]
        flat = gradient.flatten(1)
        areas[name] = direction_auc(flat, first, moments(flat, first)[0])
    assert areas["plain"] == 1.0
    kept = kept_with(epsilon, 2)
    assert areas[NAME] == pytest.approx(kept, abs=0.08)
    assert areas["label-dp-rr"] == pytest.approx(areas[NAME], abs=0.1)


@pytest.mark.slow
def test_it_predicts_better_than_one_tail_that_learns_flipped_labels(tmp_path: Path) -> None:
    options, found = {"epsilon": 0.5, "most": 64}, {}
    for name in (NAME, "label-dp-rr"):
        defense = [{"name": name, **options, **({"flips": 1} if name == NAME else {})}]
        done = trained(tmp_path / name, defense, steps=24, seed=1)
        found[name] = done.summary["eval"]["after"]["loss"]
    assert found[NAME] < found["label-dp-rr"] - 0.05


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", [NAME], steps=2, checkpoint_every=1, max_grad_norm=0.1)
    kept, own, told = adapter(plain.out), private(plain.out), plain.summary["eval"]
    again = resumed(plain.out)
    assert equal(adapter(again.out), kept)
    assert equal(private(again.out), own)
    assert again.summary["eval"] == told


@pytest.mark.slow
def test_between_processes_is_the_simulation(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", {"ann": ROWS, "bob": ROWS[:5]}, defense=[NAME], rounds=2, framework="sfl-v1")
    for name in run.files:
        (run.root / name).mkdir()
        (run.root / name / "secret").write_bytes(secret_of(0, name))
    server = run.serve()
    run.ended({**{name: run.join(name) for name in run.files}, "server": server})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same(alone.out)
    assert run.same_state(alone.out)
    assert run.summary()["bytes"] == alone.summary["bytes"]
    for name in run.files:
        (told,) = json.loads((run.root / name / "privacy.json").read_text())
        assert (told["releases"], told["epsilon"]) == (1, 4.0)


@PARTITIONS
def test_what_it_needs(partition: dict[str, Any], tmp_path: Path) -> None:
    if partition == TWO:
        with pytest.raises(ConfigError, match="needs the tail at the client"):
            trained(tmp_path, [NAME], partition=partition)
        return
    with pytest.raises(MethodError, match="nothing in the tail is trained"):
        trained(tmp_path, [NAME], partition={**partition, "tail_blocks": 0})
    with pytest.raises(MethodError, match="'gradperturb' and 'pslf' each say what the tail learns"):
        client(tmp_path / "both", ["gradperturb", NAME])
    assert run_of(tmp_path / "x", [NAME])["partition"] == U
