"""The row's check: a round is an SGD step on the weighted joint loss, fitting lengths are faster, labels stay home."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import joint
import unsplit
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from cutlayer.methods.framework.ringsfl import shared_out
from cutlayer.wire import read_frames
from spine import TWO, U, adapter, caught, model, train  # noqa: F401
from tiny import text_rows

CLIENTS = {"ann": 6, "bob": 3, "cid": 9}
ROWS = {name: text_rows(size, seed=i) for i, (name, size) in enumerate(CLIENTS.items())}
SGD = {"name": "sgd", "lr": joint.LR}


def ring(out: Path, lengths: list[int] | None, **changes: Any) -> Any:
    return train(
        model(num_hidden_layers=6), out, ROWS, partition=U, framework={"name": "ringsfl", "lengths": lengths}, **changes
    )


@pytest.mark.parametrize("lengths", [[3, 2, 1], [1, 1, 4], [2, 3, 1]], ids=str)
def test_a_round_is_a_step_on_the_weighted_loss(lengths: list[int], tmp_path: Path) -> None:
    """Two rounds: the sum of the devices' changes is unsplit SGD on sum_i a_i CE_i."""
    out = tmp_path / "out"
    ring(out, lengths, optimizer=SGD, rounds=2)
    reference = joint.load(model(num_hidden_layers=6), out / "adapter_initial")
    params = {n.replace(".default", ""): p for n, p in reference.named_parameters() if p.requires_grad}
    batches = {n: unsplit.text_batches(model(num_hidden_layers=6), rows, size=3) for n, rows in ROWS.items()}
    for number in range(2):
        loss = sum(reference(**batches[n][number % len(batches[n])]).loss * (size / 18) for n, size in CLIENTS.items())
        loss.backward()
        with torch.no_grad():
            for p in params.values():
                p -= joint.LR * p.grad
                p.grad = None
    found = adapter(out)
    assert found.keys() == params.keys()
    assert max(float((found[n] - params[n].detach()).abs().max()) for n in found) <= 1e-5


def test_lengths_by_speed_are_faster(tmp_path: Path, caught: list[Run]) -> None:
    """Speeds 3:2:1: the shares (3, 2, 1), which the default finds, against (2, 2, 2)."""
    quick = {"up_mbps": 1e6, "down_mbps": 1e6, "rtt_ms": 0}
    profiles = {name: {"flops": speed * 1e8, **quick} for name, speed in zip(ROWS, (3, 2, 1), strict=True)}
    ring(tmp_path / "even", [2, 2, 2], profiles=profiles, rounds=1)
    ring(tmp_path / "fit", None, profiles=profiles, rounds=1)
    even, fit = caught
    assert [len(layout.head) for layout in fit.parts.layouts.values()] == [3, 2, 1]
    assert fit.clock.now() < even.clock.now()


def test_a_round_has_so_many_local_steps(tmp_path: Path, caught: list[Run]) -> None:
    framework = {"name": "ringsfl", "local_steps": 2}
    train(model(num_hidden_layers=3), tmp_path / "out", ROWS, partition=U, framework=framework, rounds=1)
    assert caught[0].counters.steps == dict.fromkeys(ROWS, 2)


def test_shares() -> None:
    assert shared_out(6, [3, 2, 1]) == [3, 2, 1]
    assert shared_out(8, [1, 1, 1]) == [3, 3, 2]
    assert shared_out(4, [100, 1, 1]) == [2, 1, 1]
    assert shared_out(5, [7, 2]) == [4, 1]  # of 3 and 1 the first has less to do for its speed: 3 / 7 against 1 / 2
    assert sum(shared_out(12, [1e11, 5e11, 1e13])) == 12


def test_labels_stay_home_and_peers_talk_to_each_other(tmp_path: Path) -> None:
    ring(tmp_path / "out", [3, 2, 1], rounds=1, record_wire=str(tmp_path / "wire"))
    pairs = set()
    for line, header, tensors in read_frames(tmp_path / "wire"):
        if line["kind"] in ("activations", "gradient"):
            pairs.add((line["sender"], line["receiver"]))
        for name, tensor in zip(header.names, tensors, strict=True):
            assert name in ("mask", "positions") or tensor.is_floating_point(), (line, name)
    assert pairs == {(a, b) for a in ROWS for b in ROWS if a != b}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partition": TWO}, "computes the loss at the owner"),
        (
            {"cuts": {"ann": 4}},
            "client 'ann' has head_blocks, but framework 'ringsfl' sets the cuts itself: this client's head would have "
            "2 of 6 blocks. Leave that out; options of the framework: lengths",
        ),
        ({"framework": {"name": "ringsfl", "lengths": [3, 3]}}, r"lengths \[3, 3\] do not fit 3 clients"),
        ({"framework": {"name": "ringsfl", "lengths": [4, 4, 0]}}, "each client runs at least one block"),
    ],
)
def test_what_cannot_be_a_ring_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=said):
        train(model(num_hidden_layers=6), tmp_path / "out", ROWS, **{"framework": "ringsfl", **changes})


def test_more_clients_than_blocks_are_refused(tmp_path: Path) -> None:
    rows = {f"c{i}": text_rows(3) for i in range(5)}
    with pytest.raises(CutlayerError, match="5 clients, but the model has 3 blocks"):
        train(model(), tmp_path / "out", rows, framework="ringsfl")


def test_it_has_a_rule_of_its_own_for_merges(tmp_path: Path) -> None:
    """Another aggregator would be ignored, so it is refused."""
    rows = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob"))}
    for aggregator in ("mhsl", "lora-products"):
        with pytest.raises(CutlayerError, match=r"ringsfl' adds the changes of all devices|lives by what is merged"):
            train(model(num_hidden_layers=4), tmp_path / "out", rows, framework="ringsfl", aggregator=aggregator)
