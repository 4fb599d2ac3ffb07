"""The same run by different paths gives the same numbers: with and without a profile, at any pace, in any session."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cutlayer.parties.client import ClientParty
from spine import MOSTLY_U, TWO, U, adapter, caught, equal, lines, losses, model, train  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(size, seed=i) for i, (name, size) in enumerate({"ann": 6, "bob": 3, "cid": 9}.items())}
PROFILES: dict[str, Mapping[str, str]] = {
    "none": {},
    "equal": dict.fromkeys(ROWS, "laptop+lan"),
    "unequal": {"ann": "phone+4g", "bob": "workstation+fibre", "cid": "edge-box+dsl"},
}


@pytest.mark.parametrize(
    ("partition", "more"),
    [
        pytest.param(TWO, {}, marks=pytest.mark.slow),
        pytest.param(U, {"gradient_accumulation": 2}, marks=pytest.mark.slow),
        (U, {"max_grad_norm": 0.1}),
    ],
    ids=["two-part", "u-shape-accumulation", "u-shape-clip"],
)
def test_a_profile_changes_the_time_and_nothing_else(
    partition: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    """Heads run ahead of their turn with a profile and just in time without; losses, weights and bytes are the same."""
    framework = {"name": "sfl-v2", "local_steps": 1}
    seen = {}
    for name, profiles in PROFILES.items():
        out = tmp_path / name
        result = train(
            model("gpt2", dropout=0.1), out, ROWS, partition=partition, framework=framework, profiles=profiles, **more
        )
        seen[name] = (
            sorted(
                (line["client"], line["step"], line["loss"], line["bytes_up"], line["bytes_down"])
                for line in lines(out)
            ),
            result.summary["bytes"],
            adapter(out),
        )
    for other in ("equal", "unequal"):
        assert seen[other][:2] == seen["none"][:2]
        assert equal(seen[other][2], seen["none"][2])
    assert all("virtual_time" in line for line in lines(tmp_path / "unequal"))
    assert not any("virtual_time" in line for line in lines(tmp_path / "none"))


@MOSTLY_U
def test_without_a_profile_at_most_one_head_graph_is_open(
    partition: dict[str, Any], tmp_path: Path, caught: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further simulated client must not cost its activations."""
    most = 0
    original = ClientParty.on_head_forward

    def counted(self: ClientParty, header: Any, tensors: Any) -> Any:
        nonlocal most
        answer = original(self, header, tensors)
        most = max(most, sum(len(party._open) for party in caught[-1].parts.clients.values()))
        return answer

    monkeypatch.setattr(ClientParty, "on_head_forward", counted)
    train(model(), tmp_path / "lazy", ROWS, partition=partition, framework="sfl-v2")
    assert most == 1
    train(model(), tmp_path / "eager", ROWS, partition=partition, framework="sfl-v2", profiles=PROFILES["equal"])
    assert most == 3  # with one, heads do run in parallel


def test_the_same_run_twice_gives_the_same_bits(tmp_path: Path) -> None:
    for name in ("first", "second"):
        train(
            model("gpt2", dropout=0.1), tmp_path / name, ROWS, framework={"name": "sfl-v2", "participation": 0.6},
            peft={"name": "lora", "rank": 2, "dropout": 0.2}, data={"shuffle": True}, rounds=3,
            record_wire=str(tmp_path / f"wire-{name}"),
        )  # fmt: skip
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert equal(adapter(tmp_path / "first"), adapter(tmp_path / "second"))
    bins = [(tmp_path / f"wire-{name}" / "frames.bin").read_bytes() for name in ("first", "second")]
    assert bins[0] == bins[1]


def test_one_client_is_the_same_in_every_framework(tmp_path: Path) -> None:
    for name in ("sequential-sl", "sfl-v2"):
        train(model(), tmp_path / name, {"ann": ROWS["cid"]}, framework=name, partition=U, rounds=5)
    assert losses(tmp_path / "sequential-sl") == losses(tmp_path / "sfl-v2")
    assert equal(adapter(tmp_path / "sequential-sl"), adapter(tmp_path / "sfl-v2"))
