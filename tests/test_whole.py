"""Split equals unsplit: losses and every trained tensor, against plain Transformers and PEFT (``unsplit.py``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cutlayer.seeds import segment_seed
from side_by_side import CLIENT, STEPS, both
from spine import model, often
from tiny import BLOCKS, CLASSIFIERS, CONFIGS, FAMILIES, text_rows

NAMES = TWO_PART, U_SHAPED = "two-part-split", "u-shaped-split"
CUTS = {
    TWO_PART: [{"head_blocks": k} for k in (0, 2, BLOCKS)],
    U_SHAPED: [{"head_blocks": head, "tail_blocks": tail} for head, tail in ((0, 0), (1, 1), (2, 0))],
}
EVERY_CUT = [(name, cut) for name, cuts in CUTS.items() for cut in cuts]
ALL_CUTS = ("llama",)  # of this family in the default suite; of the others one, of one partition or the other
CAUSAL = [family for family in FAMILIES if family not in CLASSIFIERS]
TIED = [family for family in CAUSAL if CONFIGS[family]().tie_word_embeddings]


def every_case() -> Iterator[Any]:
    """Families by cuts; where the ends are cut off too, of most families in the slow tests."""
    for number, family in enumerate(FAMILIES):
        for partition, cut in EVERY_CUT:
            middle = partition == NAMES[number % 2] and cut in CUTS[partition][1:2]
            name = f"{family}-{partition}-{'-'.join(map(str, cut.values()))}"
            quick = middle or family in ALL_CUTS
            yield pytest.param(family, partition, cut, id=name, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "partition", "cut"), list(every_case()))
def test_lora_equals_unsplit(family: str, partition: str, cut: dict[str, int], tmp_path: Path) -> None:
    """20 AdamW steps of LoRA, right padding, every family, both partitions, three cuts each: no difference at all."""
    pair = both(family, tmp_path / "out", partition={"name": partition, **cut})
    assert len(pair.ours) == len(pair.theirs) == STEPS == 20
    pair.identical()


FULL = [  # two parties would hold copies of a tied matrix, which drift apart: see test_tied_two_part
    (family, partition) for family in FAMILIES for partition in NAMES if family not in TIED or partition == U_SHAPED
]
SOME = [(f, U_SHAPED) for f in ("gpt2", "llama-tied", "opt-projected", "gemma3")]


@pytest.mark.parametrize(("family", "partition"), often(FULL, *SOME, ("llama", TWO_PART), ("bert", TWO_PART)))
def test_full_fine_tuning_equals_unsplit(family: str, partition: str, tmp_path: Path) -> None:
    """Every weight trained; a tied head too in the U-shape, where both its ends are the client's."""
    cut = {"name": partition, **CUTS[partition][1]}
    both(family, tmp_path / "out", partition=cut, peft="full", steps=8).identical()


def test_tied_two_part(tmp_path: Path) -> None:
    """Two copies of one matrix: the result says so (untied), and equals unsplit training of the untied model."""
    untied = tmp_path / "untied"
    whole = AutoModelForCausalLM.from_pretrained(model("llama-tied"))
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    whole.config.tie_word_embeddings = False
    whole.save_pretrained(untied)
    AutoTokenizer.from_pretrained(model("llama-tied")).save_pretrained(untied)
    out, partition = tmp_path / "out", {"name": "two-part-split", "head_blocks": 2}
    both("llama-tied", out, partition=partition, peft="full", folder=untied, steps=8).identical()
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    assert not saved.config.tie_word_embeddings
    assert not torch.equal(saved.lm_head.weight, saved.get_input_embeddings().weight)


LEFT = [("gpt2", TWO_PART), ("llama", U_SHAPED)]


@pytest.mark.parametrize(("family", "partition"), often(itertools.product(CAUSAL, NAMES), *LEFT))
def test_left_padding(family: str, partition: str, tmp_path: Path) -> None:
    """Positions count real tokens; the reference is given the same."""
    cut = {"name": partition, "head_blocks": 1}
    both(family, tmp_path / "out", partition=cut, side="left", steps=6).identical()


@pytest.mark.parametrize(
    ("peft", "partition"), often(itertools.product(("lora", "full"), NAMES), ("lora", TWO_PART), ("full", U_SHAPED))
)
def test_gradient_accumulation(peft: str, partition: str, tmp_path: Path) -> None:
    """Micro-batches of uneven label counts: the step's loss is the mean over all their label tokens, and one update.

    Nine rows are five micro-batches: the second step of each epoch has two only.
    """
    rows = text_rows(9, shortest=2, longest=30)
    cut = {"name": partition, "head_blocks": 1}
    both("llama", tmp_path / "out", rows=rows, partition=cut, peft=peft, size=2, accumulation=3, steps=6).identical()


def test_tied_accumulation(tmp_path: Path) -> None:
    """A matrix trained at both its ends, over micro-batches: its two gradients are summed in autograd's order."""
    rows = text_rows(8, shortest=12, longest=12)  # equal label counts, so that no weight is rounded
    cut = {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 1}
    pair = both("llama-tied", tmp_path / "out", rows=rows, partition=cut, peft="full", size=2, accumulation=2, steps=8)
    pair.identical()


@pytest.mark.parametrize("partition", often(NAMES, U_SHAPED))
def test_clipping(partition: str, tmp_path: Path) -> None:
    """One norm over both parties' gradients; it is summed in another order than PyTorch's, hence 1e-6."""
    cut, sgd = {"name": partition, "head_blocks": 1}, {"name": "sgd", "lr": 1.0, "momentum": 0.9}
    pair = both("gpt2", tmp_path / "out", partition=cut, clip=0.05, optimizer=sgd)
    assert sum(norm > 0.05 for norm in pair.reference.norms) > STEPS / 2  # it did clip
    assert pair.apart <= 1e-6
    pair.within(1e-6, share=1e-5)


def _border_seeds(partition: str, head_blocks: int, tail_blocks: int) -> Any:
    """Reseed the unsplit model where the split one enters a segment."""
    hooks: list[Any] = []

    def before(model: Any, step: int, micro: int) -> None:
        for hook in hooks:
            hook.remove()
        hooks.clear()

        def seed(segment: str) -> Any:
            return lambda *_: torch.manual_seed(segment_seed(0, segment, CLIENT, step, micro)) and None

        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner = core.base_model
        blocks = next(m for m in inner.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == BLOCKS)
        hooks.append(core.register_forward_pre_hook(seed("head")))
        if partition == TWO_PART:
            hooks.append(blocks[head_blocks].register_forward_pre_hook(seed("tail")))
        else:
            hooks.append(blocks[head_blocks].register_forward_pre_hook(seed("trunk")))
            if tail_blocks:
                hooks.append(blocks[BLOCKS - tail_blocks].register_forward_pre_hook(seed("tail")))

    return before


WITH_DROPOUT = ["gpt2", "opt", "llama", "bert"]
DROPOUT = list(itertools.product(WITH_DROPOUT, NAMES, [False, True]))
SOME_DROPOUT = [
    ("gpt2", U_SHAPED, False),
    ("opt", U_SHAPED, True),
    ("llama", TWO_PART, True),
    ("bert", TWO_PART, False),
]


@pytest.mark.parametrize(("family", "partition", "checkpointing"), often(DROPOUT, *SOME_DROPOUT))
def test_dropout(family: str, partition: str, checkpointing: bool, tmp_path: Path) -> None:
    """LoRA dropout and the model's own, seeded at the block borders; recomputation meets the same masks."""
    tail = {"tail_blocks": 1} if partition == U_SHAPED else {}
    both(
        family, tmp_path / "out", steps=4, checkpointing=checkpointing, dropout=0.2,
        partition={"name": partition, "head_blocks": 1, **tail}, peft={"name": "lora", "rank": 4, "dropout": 0.3},
        before=_border_seeds(partition, 1, len(tail)),
    ).identical()  # fmt: skip


KINDS = list(itertools.product(NAMES, ["eager", "sdpa"], ["float32", "bfloat16", "float16"]))


def _grid() -> list[Any]:
    """Every family, partition, attention and precision; often: those of Llama in the U-shape, and one a family."""
    cases = []
    for number, family in enumerate(FAMILIES):
        for place, kind in enumerate(KINDS):
            quick = place == 5 * number % len(KINDS) or (family == "llama" and kind[0] == U_SHAPED)
            cases.append(pytest.param(family, *kind, marks=() if quick else pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("family", "partition", "attention", "precision"), _grid())
def test_attention_and_precision(family: str, partition: str, attention: str, precision: str, tmp_path: Path) -> None:
    """A base in half precision with float32 adapters (PEFT's way); the hidden states cross in the base's precision.

    A classifier's last layer is trained as it is, in half precision, where AdamW's eps is 0 in float16 (and 0/0 comes
    of it, split or not).
    """
    sgd = {"name": "sgd", "lr": 1.0} if family in CLASSIFIERS and precision == "float16" else None
    both(
        family, tmp_path / "out", partition={"name": partition, "head_blocks": 1}, precision=precision,
        attn_implementation=attention, steps=4, optimizer=sgd,
    ).identical()  # fmt: skip
