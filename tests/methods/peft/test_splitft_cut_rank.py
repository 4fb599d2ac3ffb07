"""The row's check: what step 11 sends, where the low rank is, the quality, and ranks that follow a moving cut."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cutlayer.contracts import Layout
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from cutlayer.methods.peft.splitft_cut_rank import SplitFTCutRank
from cutlayer.wire import STEP_NAMES, read_frames
from spine import PARTITIONS, TWO, adapter, block_of, caught, equal, losses, model, often, train  # noqa: F401
from tiny import text_rows

CLIENTS = {name: text_rows(6, seed=i) for i, name in enumerate(("ann", "bob"))}
ATTENTION = ["c_attn", "attn.c_proj"]
H = 32  # of the tiny models
PUBLISHED = {(8, 2): 3475.4, (8, 4): 3534.4, (8, 10): 3711.4, (1, 2): 3462.5, (4, 2): 3468.0, (16, 2): 3490.1}  # MB


def cut_rank(low: int, high: int = 4, **more: Any) -> dict[str, Any]:
    return {"name": "splitft-cut-rank", "rank": high, "cut_rank": low, "alpha": 8, **more}


def at(cut: int, *, tail: int | None = None) -> dict[str, Any]:
    if tail is None:
        return {"name": "two-part-split", "head_blocks": cut}
    return {"name": "u-shaped-split", "head_blocks": cut, "tail_blocks": tail}


def adapter_bytes(wire: Path, client: str) -> int:
    """The tensor bytes of step 11 from a client to the server, as recorded frame by frame."""
    sent = 0
    for _, header, tensors in read_frames(wire):
        if header.step_name == "aggregate" and header.sender == client:
            sent += sum(t.numel() * t.element_size() for t in tensors)
    return sent


def test_where_the_low_rank_is() -> None:
    """The blocks on both sides of each cut, by number: block 1 of twelve is not block 10 or 11."""
    peft = SplitFTCutRank(rank=16, cut_rank=8)
    two = Layout(range(2), range(2, 2), range(2, 12), tail_at_client=False)
    u = Layout(range(2), range(2, 9), range(9, 12), tail_at_client=True)
    bare = Layout(range(2), range(2, 12), range(12, 12), tail_at_client=True)

    def low(layout: Layout, peft: SplitFTCutRank = peft) -> list[int]:
        return [block for block in range(12) if peft.rank_at(block, layout) == 8]

    assert low(two) == [1, 2]
    assert low(u) == [1, 2, 8, 9]
    assert low(bare) == [1, 2, 11]  # norm and head have no adapter
    assert low(two, SplitFTCutRank(rank=16, cut_rank=8, sides="client")) == [1]
    assert low(u, SplitFTCutRank(rank=16, cut_rank=8, sides="client")) == [1, 9]
    assert peft.rank_at("bottom", two) == 16


@pytest.mark.parametrize(
    ("partition", "low_blocks"), [(at(2), [1]), (at(2, tail=1), [1, 11])], ids=["two-part", "u-shape"]
)
def test_what_step_11_sends_and_what_it_does_not_change(
    partition: dict[str, Any], low_blocks: list[int], tmp_path: Path
) -> None:
    """Twelve blocks, two rounds: the difference is the named client blocks' factors, to the byte; steps 3 to 9 are the
    same."""
    folder, found = model("gpt2", n_layer=12), {}
    for low in (4, 2):
        wire = tmp_path / f"wire{low}"
        result = train(
            folder, tmp_path / f"out{low}", CLIENTS, partition=partition, framework="sfl-v2", record_wire=str(wire),
            peft=cut_rank(low, targets=ATTENTION),
        )  # fmt: skip
        found[low] = (adapter_bytes(wire, "ann"), result.summary["bytes"])
        ranks = {block_of(n): len(t) for n, t in adapter(tmp_path / f"out{low}").items() if ".lora_A." in n}
        both = sorted({*low_blocks, *({2} if 1 in low_blocks else ()), *({10} if 11 in low_blocks else ())})
        assert sorted(b for b, rank in ranks.items() if rank == 2) == ([] if low == 4 else both)
    per_rank = (H + 3 * H) + (H + H)  # c_attn and attn.c_proj: inputs + outputs
    assert found[4][0] - found[2][0] == 2 * per_rank * 4 * 2 * len(low_blocks)  # ranks, numbers, bytes, rounds, blocks
    for step in STEP_NAMES[2:9]:
        assert found[4][1][step] == found[2][1][step]


@pytest.mark.parametrize(
    "cases", [[(8, 2), (4, 2)], pytest.param(PUBLISHED, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_the_published_communication_on_gpt2_small_shapes(cases: Any, tmp_path: Path) -> None:
    """The paper's MB differ by 1.8432 (r_cut + 16 (cut - 1)), as its two tables have it; here counted frame by frame.

    4,608 numbers of 4 bytes for each unit of rank and client block, and 100 transfers: one round's transfer of a client
    up and down, scaled from one round to the hundred. (The tables' other part, a constant, is the smashed data.) Blocks
    have GPT-2 small's shapes, but the vocabulary is tiny.
    """
    folder = model("gpt2", n_layer=12, n_embd=768, n_head=12, n_positions=32)
    mb: dict[tuple[int, int], float] = {}
    rows = {name: text_rows(1, seed=i, longest=4) for i, name in enumerate(("ann", "bob"))}
    for low, cut in cases:
        wire, out = tmp_path / f"wire-{low}-{cut}", tmp_path / f"out-{low}-{cut}"
        train(
            folder, out, rows, partition=at(cut), framework="sfl-v2", record_wire=str(wire), rounds=1, batch_size=1,
            peft=cut_rank(low, 16, targets=ATTENTION), optimizer={"name": "sgd", "lr": 1e-3}, data={"max_length": 8},
        )  # fmt: skip
        mb[low, cut] = adapter_bytes(wire, "ann") * 100 / 1e6
    for (low, cut), found in mb.items():
        assert found == pytest.approx(1.8432 * (low + 16 * (cut - 1)), abs=1e-9)
    for key, found in mb.items():
        difference = PUBLISHED[key] - PUBLISHED[8, 2]
        assert difference == pytest.approx(found - mb[8, 2], abs=0.15)  # they are rounded to 0.1 each


@PARTITIONS
def test_the_result_is_an_ordinary_adapter(partition: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """With its ranks and one scaling; PEFT loads it and gives the split run's loss."""
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(f'{{"text": "{row["text"]}"}}\n' for row in text_rows(1, seed=9)))
    out = tmp_path / "out"
    result = train(
        model(num_hidden_layers=5), out, CLIENTS, partition=partition, framework="sfl-v1", peft=cut_rank(2),
        data={"eval": str(held_out)},
    )  # fmt: skip
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model(num_hidden_layers=5)), out / "adapter")
    from tiny import make_tokenizer

    ids = torch.tensor([make_tokenizer()(text_rows(1, seed=9)[0]["text"])["input_ids"] + [2]])
    with torch.no_grad():
        loss = float(plain.eval()(input_ids=ids, labels=ids).loss)
    assert result.summary["eval"]["after"]["loss"] == pytest.approx(loss, abs=1e-6)
    layers = [m for m in plain.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    assert {layer.scaling["default"] for layer in layers} == {2.0}
    assert {layer.r["default"] for layer in layers} == {2, 4}
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {len(t) for n, t in saved.items() if ".lora_A." in n} == {2, 4}


def test_equal_ranks_are_plain_lora(tmp_path: Path) -> None:
    """cut_rank = rank changes nothing."""
    plain: dict[str, Any] = {"name": "lora", "rank": 4, "alpha": 8}
    for name, peft in (("plain", plain), ("same", cut_rank(4))):
        train(model(), tmp_path / name, CLIENTS, partition=TWO, framework="sfl-v2", peft=peft)
    assert losses(tmp_path / "plain") == losses(tmp_path / "same")
    assert equal(adapter(tmp_path / "plain"), adapter(tmp_path / "same"))


@pytest.mark.parametrize("framework", often(["sfl-v1", "sfl-v2"], "sfl-v2"))
def test_ranks_follow_the_cut(framework: str, tmp_path: Path, caught: list[Run]) -> None:
    """Unequal and moving cuts: each client's blocks have the ranks of its own cut, after every move."""
    three = {**CLIENTS, "cid": text_rows(6, seed=7)}
    result = train(
        model(num_hidden_layers=6), tmp_path / "out", three, framework=framework, partition=at(1), rounds=5,
        peft=cut_rank(2), aggregator="lora-products",
        planner={"name": "splitft-adaptive-cut", "every": 1, "dead_band": 0.0, "gamma": 3.0, "shard": 0.4},
    )  # fmt: skip
    assert any(found["moves"] for found in result.summary["cuts"].values())
    parts = caught[0].parts
    for name, party in parts.clients.items():
        cut = len(parts.layouts[name].head)
        own = {n: len(t) for n, t in party.slot.get().items() if n in party.names("own") and ".lora_A." in n}
        assert {block_of(n) for n in own} == set(range(cut))
        assert all(rank == (2 if block_of(n) == cut - 1 else 4) for n, rank in own.items())
    if framework == "sfl-v1":
        for name, slot in parts.server.slots.items():
            cut = len(parts.layouts[name].head)
            ranks = {block_of(n): len(t) for n, t in slot.get().items() if ".lora_A." in n}
            assert {b for b, rank in ranks.items() if rank == 2 and b >= cut} == {cut}


def test_unequal_ranks_under_fedavg_are_refused(tmp_path: Path) -> None:
    """By a planner before anything is loaded, by given cuts at the merge."""
    with pytest.raises(CutlayerError, match="cannot merge unequal ranks"):
        train(model(), tmp_path / "out", CLIENTS, framework="sfl-v1", peft=cut_rank(2), planner="splitft-adaptive-cut")
    with pytest.raises(CutlayerError, match="other ranks in the same"):
        train(
            model(num_hidden_layers=6), tmp_path / "out", CLIENTS, framework="sfl-v1", partition=at(1),
            peft=cut_rank(2), cuts={"bob": 3},
        )  # fmt: skip


@pytest.mark.parametrize("wrong", [{"cut_rank": 0}, {"cut_rank": 20}, {"alpha": 0.0}, {"targets": []}])
def test_options_out_of_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SplitFTCutRank(**wrong)
