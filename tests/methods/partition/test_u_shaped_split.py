"""The row's check: (a) equal to unsplit at every pair of cuts, (b) twice the two-part payload and no label in it."""

from __future__ import annotations

from pathlib import Path

import pytest

import unsplit
from cutlayer.errors import MethodError
from cutlayer.registry import create
from cutlayer.wire import read_frames
from spine import adamw, adapter, equal, losses, model, train
from tiny import BLOCKS, text_rows

ROWS = text_rows(9)
CUTS = [(head, tail) for head in range(BLOCKS) for tail in range(BLOCKS - head)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> unsplit.Unsplit:
    out = tmp_path_factory.mktemp("initial") / "out"
    train(model("gpt2"), out, {"ann": ROWS}, rounds=1)
    batches = unsplit.text_batches(model("gpt2"), ROWS, size=3)
    return unsplit.train(model("gpt2"), [[b] for b in batches], adapter=out / "adapter_initial", make_optimizer=adamw)


@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_a_equals_unsplit_at_every_pair_of_cuts(
    head: int, tail: int, reference: unsplit.Unsplit, tmp_path: Path
) -> None:
    assert len(CUTS) == 6
    out = tmp_path / "out"
    partition = {"name": "u-shaped-split", "head_blocks": head, "tail_blocks": tail}
    train(model("gpt2"), out, {"ann": ROWS}, partition=partition, rounds=3)
    assert [loss for _, loss in losses(out)] == reference.losses
    assert equal(adapter(out), reference.state)


def test_b_the_payload_is_twice_that_of_the_two_part_split(tmp_path: Path) -> None:
    """Its labels (and both masks) not counted; and every label stays (more on this in ``test_peers``)."""
    payload = {}
    for name in ("two-part-split", "u-shaped-split"):
        wire = tmp_path / name
        partition = {"name": name, "head_blocks": 2}
        train(model("gpt2"), tmp_path / f"out-{name}", {"ann": ROWS}, partition=partition, record_wire=str(wire))
        found = [(h.names, h.kind, t) for line, h, t in read_frames(wire) if h.kind in ("activations", "gradient")]
        payload[name] = sum(t[names.index("hidden")].nbytes for names, _, t in found)
        assert any("labels" in names for names, _, _ in found) == (name == "two-part-split")
    assert payload["u-shaped-split"] == 2 * payload["two-part-split"]


def test_layout() -> None:
    layout = create("partition", "u-shaped-split", {"head_blocks": 2, "tail_blocks": 3}).layout(12)
    assert (layout.head, layout.trunk, layout.tail, layout.tail_at_client) == (
        range(2),
        range(2, 9),
        range(9, 12),
        True,
    )
    for head, tail, said in (
        (7, 6, "head_blocks 7 and tail_blocks 6 overlap: the model has 12 blocks. Their sum may be at most 11"),
        (13, 0, "overlap"),
        (6, 6, "take all 12 blocks and leave the server none"),
    ):
        with pytest.raises(MethodError, match=said):
            create("partition", "u-shaped-split", {"head_blocks": head, "tail_blocks": tail}).layout(12)
    with pytest.raises(MethodError, match="tail_blocks is -1; it must be 0 or more"):
        create("partition", "u-shaped-split", {"tail_blocks": -1})
