"""The row's check: sequential SL is unsplit training on the clients' batches in the order of turns."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting import forgetting

import unsplit
from spine import TWO, U, adamw, adapter, caught, equal, lines, losses, model, train  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(size, seed=i) for i, (name, size) in enumerate({"ann": 6, "bob": 3, "cid": 9}.items())}
TURNS = [client for _ in range(3) for client in ("ann", "ann", "bob", "bob", "cid", "cid")]
SGD = {"name": "sgd", "lr": 0.5, "momentum": 0.9}


def steps(turns: list[str]) -> list[list[dict[str, torch.Tensor]]]:
    of = {name: unsplit.text_batches(model(), rows, size=3) for name, rows in ROWS.items()}
    seen = dict.fromkeys(ROWS, 0)
    out = []
    for client in turns:
        out.append([of[client][seen[client] % len(of[client])]])
        seen[client] += 1
    return out


def sgd(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.9)


@pytest.mark.parametrize(
    ("partition", "optimizer", "make"), [(TWO, {"name": "adamw", "lr": 1e-2}, adamw), (U, SGD, sgd)],
    ids=["two-part-adamw", "u-shape-sgd"],
)  # fmt: skip
def test_equals_unsplit_on_the_concatenation(
    partition: dict[str, Any], optimizer: Any, make: Any, tmp_path: Path
) -> None:
    """Three clients, travelling moments: every loss and every tensor, bit for bit."""
    out = tmp_path / "out"
    framework = {"name": "sequential-sl", "local_steps": 2}
    train(model(), out, ROWS, partition=partition, framework=framework, optimizer=optimizer, rounds=3)
    reference = unsplit.train(model(), steps(TURNS), adapter=out / "adapter_initial", make_optimizer=make)
    assert losses(out) == list(zip(TURNS, reference.losses, strict=True))
    assert equal(adapter(out), reference.state)


def test_a_schedule_counts_the_steps_of_all(tmp_path: Path) -> None:
    """One live copy: its rate falls with every client's step."""
    from transformers import get_linear_schedule_with_warmup

    class Scheduled(torch.optim.AdamW):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1e-2)
            self.plan = get_linear_schedule_with_warmup(self, 0, 9)

        def step(self, closure: Any = None) -> None:
            super().step()
            self.plan.step()

    out, turns = tmp_path / "out", ["ann", "bob", "cid"] * 3
    train(model(), out, ROWS, rounds=3, optimizer={"name": "adamw", "lr": 1e-2, "schedule": "linear"})
    reference = unsplit.train(model(), steps(turns), adapter=out / "adapter_initial", make_optimizer=Scheduled)
    assert losses(out) == list(zip(turns, reference.losses, strict=True))
    assert equal(adapter(out), reference.state)


def test_reset_moments_are_another_run_with_less_traffic(tmp_path: Path) -> None:
    seen = {}
    for state in ("travel", "reset"):
        framework = {"name": "sequential-sl", "optimizer_state": state}
        seen[state] = train(model(), tmp_path / state, ROWS, framework=framework, rounds=2).summary["bytes"][
            "aggregate"
        ]
    assert not equal(adapter(tmp_path / "travel"), adapter(tmp_path / "reset"))
    assert losses(tmp_path / "travel")[0] == losses(tmp_path / "reset")[0]
    assert 0 < seen["reset"] < 0.5 * seen["travel"]  # two moments a weight stay behind


def test_all_have_what_the_last_one_had(tmp_path: Path, caught: list[Any]) -> None:
    """There is one live copy: the result is the holder's part, and the trunk counts every step."""
    train(model(), tmp_path / "out", ROWS, rounds=2)
    run = caught[0]
    assert run.holder() == "cid"
    assert run.framework.evaluators(run) == ["cid"]
    assert run.parts.server.slots["shared"].version == run.parts.clients["cid"].slot.version == 6
    assert set(run.parts.server.slots) == {"shared"}


def test_a_random_order_is_drawn_from_the_seed_each_round(tmp_path: Path) -> None:
    framework = {"name": "sequential-sl", "order": "random"}
    for name in ("a", "b"):
        train(model(), tmp_path / name, ROWS, framework=framework, rounds=4)
    turns = [line["client"] for line in lines(tmp_path / "a")]
    orders = {tuple(turns[i : i + 3]) for i in range(0, 12, 3)}
    assert all(sorted(order) == sorted(ROWS) for order in orders)
    assert len(orders) > 1
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_forgetting_falls_along_the_order_and_with_more_frequent_turns(tmp_path: Path) -> None:
    clients = ["ann", "bob", "cid"]
    rare = forgetting(tmp_path / "rare", clients, framework={"name": "sequential-sl", "local_steps": 12}, rounds=3)
    often = forgetting(tmp_path / "often", clients, framework={"name": "sequential-sl", "local_steps": 3}, rounds=12)
    assert rare["ann"] > rare["bob"] > rare["cid"] == pytest.approx(0.0, abs=1e-6)
    assert rare["ann"] > 0.1
    assert often["ann"] < 0.7 * rare["ann"]


def test_options_are_checked() -> None:
    from cutlayer.errors import MethodError
    from cutlayer.registry import create

    for options, said in (
        ({"local_steps": 0}, "local_steps is 0; it must be 1 or more"),
        ({"participation": 0.0}, "participation is 0.0; it must be above 0"),
        ({"order": "sorted"}, "option 'order'"),
        ({"optimizer_state": "lost"}, "option 'optimizer_state'"),
    ):
        with pytest.raises(MethodError, match=said):
            create("framework", "sequential-sl", options)
