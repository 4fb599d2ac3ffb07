"""The row's check: equal to unsplit at every cut, bytes that do not depend on it, NO_GRADIENT for a bare head."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import unsplit
from cutlayer.errors import MethodError
from cutlayer.parties.client import ClientParty
from cutlayer.registry import create
from cutlayer.wire import read_frames
from spine import adapter, caught, equal, lines, losses, model, train  # noqa: F401
from tiny import BLOCKS, text_rows

ROWS = text_rows(10)
SGD = {"name": "sgd", "lr": 0.5, "momentum": 0.9}


def sgd(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.9)


def reference(initial: Path, steps: int) -> unsplit.Unsplit:
    batches = unsplit.text_batches(model("gpt2"), ROWS, size=3)
    plan = [[batches[i % len(batches)]] for i in range(steps)]
    return unsplit.train(model("gpt2"), plan, adapter=initial, make_optimizer=sgd)


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
def test_equals_unsplit_at_every_cut(cut: int, tmp_path: Path) -> None:
    """Fifty steps at one cut, five at the others."""
    out, steps = tmp_path / "out", 50 if cut == 2 else 5
    partition = {"name": "two-part-split", "head_blocks": cut}
    train(model("gpt2"), out, {"ann": ROWS}, partition=partition, steps=steps, optimizer=SGD)
    expected = reference(out / "adapter_initial", steps)
    assert [loss for _, loss in losses(out)] == expected.losses
    assert equal(adapter(out), expected.state)


def test_traffic_does_not_depend_on_the_cut(tmp_path: Path) -> None:
    """Up: hidden states, mask and labels; down: one gradient."""
    seen = set()
    for cut in (1, 2, 3):
        partition = {"name": "two-part-split", "head_blocks": cut}
        train(
            model("gpt2"),
            tmp_path / f"{cut}",
            {"ann": ROWS},
            partition=partition,
            record_wire=str(tmp_path / f"w{cut}"),
        )
        seen.add(tuple((line["bytes_up"], line["bytes_down"]) for line in lines(tmp_path / f"{cut}")))
        for line, header, tensors in read_frames(tmp_path / f"w{cut}"):
            if line["step_name"] == "send_activations":
                batch, length, hidden = tensors[0].shape
                assert header.names in (("hidden", "mask", "labels"), ("hidden", "labels"))
                assert sum(t.nbytes for t in tensors) == batch * length * (4 * hidden + 4 + (len(tensors) == 3))
            elif line["step_name"] == "return_gradients":
                assert [list(t.shape) for t in tensors] == [[batch, length, hidden]]
    assert len(seen) == 1


def test_a_head_without_a_trained_tensor_gets_no_gradient(
    tmp_path: Path, caught: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """k = 0 with adapters on blocks: a NO_GRADIENT frame in place of the tensor, and no backward in step 10."""
    updates = []
    original = ClientParty.on_head_backward

    def watched(self: ClientParty, header: Any, tensors: Any) -> Any:
        updates.append((header.kind, dict(tensors)))
        return original(self, header, tensors)

    monkeypatch.setattr(ClientParty, "on_head_backward", watched)
    partition = {"name": "two-part-split", "head_blocks": 0}
    train(
        model("gpt2"),
        tmp_path / "out",
        {"ann": ROWS},
        partition=partition,
        rounds=4,
        record_wire=str(tmp_path / "wire"),
    )
    assert updates == [("no-gradient", {})] * 4
    assert caught[0].parts.clients["ann"].slot.params == {}
    returned = [line for line, _, _ in read_frames(tmp_path / "wire") if line["step_name"] == "return_gradients"]
    assert [line["kind"] for line in returned] == ["no-gradient"] * 4
    assert all(line["shapes"] == [] and line["length"] < 250 for line in returned)


def test_a_trained_embedding_does_get_one(tmp_path: Path) -> None:
    partition = {"name": "two-part-split", "head_blocks": 0}
    train(
        model("llama"), tmp_path / "out", {"ann": ROWS}, partition=partition, peft="full", rounds=1,
        record_wire=str(tmp_path / "wire"),
    )  # fmt: skip
    kinds = [line["kind"] for line, _, _ in read_frames(tmp_path / "wire") if line["step_name"] == "return_gradients"]
    assert kinds == ["gradient"]


def test_layout() -> None:
    layout = create("partition", "two-part-split", {"head_blocks": 3}).layout(12)
    assert (layout.head, len(layout.trunk), layout.tail, layout.tail_at_client) == (range(3), 0, range(3, 12), False)
    assert create("partition", "two-part-split", {"head_blocks": 12}).layout(12).tail == range(12, 12)
    with pytest.raises(MethodError, match=r"head_blocks is 13, but the model has 12 blocks. Choose 0 to 12"):
        create("partition", "two-part-split", {"head_blocks": 13}).layout(12)
    with pytest.raises(MethodError, match="head_blocks is -1; it must be 0 or more"):
        create("partition", "two-part-split", {"head_blocks": -1})
