"""Split equals unsplit: losses and every trained tensor, against plain Transformers and PEFT (``unsplit.py``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cutlayer
import unsplit
from cutlayer.seeds import segment_seed
from tiny import BLOCKS, CLASSIFIERS, FAMILIES, make_model, text_rows, write_rows

STEPS = 20
ROWS = 10
SIZE = 3
LR = 1e-2
CUTS = {
    "two-part-split": [{"head_blocks": k} for k in (0, 2, BLOCKS)],
    "u-shaped-split": [
        {"head_blocks": 0, "tail_blocks": 0}, {"head_blocks": 1, "tail_blocks": 2},
        {"head_blocks": 3, "tail_blocks": 0},
    ],
}  # fmt: skip
EVERY_CUT = [(name, cut) for name, cuts in CUTS.items() for cut in cuts]


def run_split(folder: Path, out: Path, rows: list[dict[str, Any]], *, steps: int = STEPS, **changes: Any) -> Any:
    """A split run of one client on ``rows`` in file order."""
    train = write_rows(out.parent / f"{out.name}.jsonl", rows)
    config: dict[str, Any] = {
        "model": str(folder),
        "data": {"train": str(train), "format": "text", "shuffle": False, "max_length": 64, **changes.pop("data", {})},
        "clients": 1,
        "steps": steps,
        "batch_size": SIZE,
        "framework": "sequential-sl",
        "peft": {"name": "lora", "rank": 4, "alpha": 8},
        "optimizer": {"name": "adamw", "lr": LR},
        "checkpoint_every": 1000,
        **changes,
    }
    return cutlayer.train(config, out=out)


def losses_of(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def adamw(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR)


def steps_of(batches: list[Any], *, steps: int = STEPS, accumulation: int = 1) -> list[list[Any]]:
    """Micro-batches by step; a step never reaches over the end of an epoch."""
    epoch = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    return [epoch[i % len(epoch)] for i in range(steps)]


def worst(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    assert set(ours) == set(theirs)
    assert len(ours) > 0
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = make_model(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference_of(model_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The unsplit run of a family, made once and compared with every cut."""
    made: dict[str, unsplit.Unsplit] = {}

    def make(family: str, adapter: Path) -> unsplit.Unsplit:
        if family not in made:
            folder, classifier = model_of(family), family in CLASSIFIERS
            batches = unsplit.text_batches(folder, text_rows(ROWS), size=SIZE, label=classifier)
            made[family] = unsplit.train(
                folder, steps_of(batches), adapter=adapter, make_optimizer=adamw, classifier=classifier
            )
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("partition", "cut"), EVERY_CUT, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
def test_lora_equals_unsplit(
    family: str, partition: str, cut: dict[str, int], tmp_path: Path, model_of: Any, reference_of: Any
) -> None:
    """20 AdamW steps of LoRA, right padding, every family, both partitions, three cuts each: no difference at all."""
    data = {"format": "classification"} if family in CLASSIFIERS else {}
    out = tmp_path / "out"
    run_split(model_of(family), out, text_rows(ROWS), partition={"name": partition, **cut}, data=data)
    reference = reference_of(family, out / "adapter_initial")
    assert losses_of(out) == reference.losses
    assert len(reference.losses) == STEPS
    assert worst(load_file(out / "adapter" / "adapter_model.safetensors"), reference.state) == 0.0


FULL = [f for f in FAMILIES if f in ("gpt2", "llama", "llama-tied", "opt-projected", "gemma3", "bert")]


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize(("partition", "cut"), [EVERY_CUT[1], EVERY_CUT[4]], ids=["two-part-split", "u-shaped-split"])
def test_full_fine_tuning_equals_unsplit(
    family: str, partition: str, cut: dict[str, int], tmp_path: Path, model_of: Any
) -> None:
    """Every weight trained; a tied head too in the U-shape, where both its ends are the client's."""
    classifier = family in CLASSIFIERS
    folder, out = model_of(family), tmp_path / "out"
    tied = family in ("gpt2", "llama-tied", "opt-projected", "gemma3")
    if tied and partition == "two-part-split":
        pytest.skip("the two parties hold copies of a tied matrix, which drift apart: see test_tied_two_part")
    data = {"format": "classification"} if classifier else {}
    run_split(folder, out, text_rows(ROWS), partition={"name": partition, **cut}, peft="full", data=data)
    batches = unsplit.text_batches(folder, text_rows(ROWS), size=SIZE, label=classifier)
    reference = unsplit.train(folder, steps_of(batches), adapter=None, make_optimizer=adamw, classifier=classifier)
    assert losses_of(out) == reference.losses
    saved = load_file(out / "model" / "model.safetensors")
    assert worst(saved, {name: reference.state[name] for name in saved}) == 0.0
    assert len(saved) >= len({t.data_ptr() for t in reference.state.values()}) - 1


def test_tied_two_part(tmp_path: Path, model_of: Any) -> None:
    """Two copies of one matrix: the result says so (untied), and equals unsplit training of the untied model."""
    folder, out = model_of("llama-tied"), tmp_path / "out"
    run_split(folder, out, text_rows(ROWS), partition={"name": "two-part-split", "head_blocks": 2}, peft="full")
    untied = tmp_path / "untied"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(untied)
    AutoTokenizer.from_pretrained(folder).save_pretrained(untied)
    batches = unsplit.text_batches(untied, text_rows(ROWS), size=SIZE)
    reference = unsplit.train(untied, steps_of(batches), adapter=None, make_optimizer=adamw)
    assert losses_of(out) == reference.losses
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    assert not saved.config.tie_word_embeddings
    assert worst(dict(saved.state_dict()), reference.state) == 0.0


@pytest.mark.parametrize("partition", ["two-part-split", "u-shaped-split"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_left_padding(family: str, partition: str, tmp_path: Path, model_of: Any) -> None:
    """Positions count real tokens; the reference is given the same."""
    folder, out = model_of(family), tmp_path / "out"
    run_split(
        folder, out, text_rows(ROWS), partition={"name": partition, "head_blocks": 1}, data={"padding_side": "left"}
    )
    batches = unsplit.text_batches(folder, text_rows(ROWS), size=SIZE, side="left")
    reference = unsplit.train(folder, steps_of(batches), adapter=out / "adapter_initial", make_optimizer=adamw)
    assert losses_of(out) == reference.losses
    assert worst(load_file(out / "adapter" / "adapter_model.safetensors"), reference.state) == 0.0


@pytest.mark.parametrize("partition", ["two-part-split", "u-shaped-split"])
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_gradient_accumulation(peft: str, partition: str, tmp_path: Path, model_of: Any) -> None:
    """Micro-batches of uneven label counts: the step's loss is the mean over all their label tokens, and one update."""
    folder, out = model_of("llama"), tmp_path / "out"
    rows = text_rows(11, shortest=2, longest=30)
    run_split(
        folder,
        out,
        rows,
        partition={"name": partition, "head_blocks": 1},
        gradient_accumulation=3,
        batch_size=2,
        peft=peft,
    )
    batches = unsplit.text_batches(folder, rows, size=2)
    steps = steps_of(batches, accumulation=3)
    assert len({len(step) for step in steps[:2]}) == 1
    initial = out / "adapter_initial" if peft == "lora" else None
    reference = unsplit.train(folder, steps, adapter=initial, make_optimizer=adamw)
    assert losses_of(out) == pytest.approx(reference.losses, abs=1e-6)
    name = out / "adapter" / "adapter_model.safetensors" if peft == "lora" else out / "model" / "model.safetensors"
    assert worst(load_file(name), reference.state) <= 1e-6


@pytest.mark.parametrize("partition", ["two-part-split", "u-shaped-split"])
def test_clipping(partition: str, tmp_path: Path, model_of: Any) -> None:
    """One norm over both parties' gradients; it is summed in another order than PyTorch's, hence 1e-6."""
    folder, out = model_of("gpt2"), tmp_path / "out"
    run_split(
        folder, out, text_rows(ROWS), partition={"name": partition, "head_blocks": 1}, max_grad_norm=0.05,
        optimizer={"name": "sgd", "lr": 1.0, "momentum": 0.9},
    )  # fmt: skip
    batches = unsplit.text_batches(folder, text_rows(ROWS), size=SIZE)
    reference = unsplit.train(
        folder, steps_of(batches), adapter=out / "adapter_initial", clip=0.05,
        make_optimizer=lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    )  # fmt: skip
    assert losses_of(out) == pytest.approx(reference.losses, abs=1e-6)
    assert worst(load_file(out / "adapter" / "adapter_model.safetensors"), reference.state) <= 1e-6


def _border_seeds(partition: str, head_blocks: int, tail_blocks: int) -> Any:
    """Reseed the unsplit model where the split one enters a segment."""
    hooks: list[Any] = []

    def before(model: Any, step: int, micro: int) -> None:
        for hook in hooks:
            hook.remove()
        hooks.clear()

        def seed(segment: str) -> Any:
            return lambda *_: torch.manual_seed(segment_seed(0, segment, "client-0", step, micro)) and None

        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner = core.base_model
        blocks = next(m for m in inner.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == BLOCKS)
        hooks.append(core.register_forward_pre_hook(seed("head")))
        if partition == "two-part-split":
            hooks.append(blocks[head_blocks].register_forward_pre_hook(seed("tail")))
        else:
            hooks.append(blocks[head_blocks].register_forward_pre_hook(seed("trunk")))
            if tail_blocks:
                hooks.append(blocks[BLOCKS - tail_blocks].register_forward_pre_hook(seed("tail")))

    return before


@pytest.mark.parametrize(("partition", "tail"), [("two-part-split", 0), ("u-shaped-split", 1)])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
def test_dropout(family: str, partition: str, tail: int, checkpointing: bool, tmp_path: Path, model_of: Any) -> None:
    """LoRA dropout and the model's own, seeded at the block borders; recomputation meets the same masks."""
    folder, out = model_of(family, dropout=0.2), tmp_path / "out"
    cut = {"name": partition, "head_blocks": 1, **({"tail_blocks": tail} if tail else {})}
    classifier = family in CLASSIFIERS
    run_split(
        folder, out, text_rows(ROWS), partition=cut, gradient_checkpointing=checkpointing, steps=6,
        peft={"name": "lora", "rank": 4, "dropout": 0.3}, data={"format": "classification"} if classifier else {},
    )  # fmt: skip
    batches = unsplit.text_batches(folder, text_rows(ROWS), size=SIZE, label=classifier)
    reference = unsplit.train(
        folder, steps_of(batches, steps=6), adapter=out / "adapter_initial", make_optimizer=adamw,
        classifier=classifier, before=_border_seeds(partition, 1, tail), checkpointing=checkpointing,
    )  # fmt: skip
    assert losses_of(out) == reference.losses
    assert worst(load_file(out / "adapter" / "adapter_model.safetensors"), reference.state) == 0.0


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_precisions(precision: str, attn_implementation: str, tmp_path: Path, model_of: Any) -> None:
    """A base in half precision with float32 adapters (PEFT's way); the hidden states cross in the base's precision."""
    folder, out = model_of("llama"), tmp_path / "out"
    run_split(
        folder, out, text_rows(ROWS), partition={"name": "u-shaped-split", "head_blocks": 1}, precision=precision,
        attn_implementation=attn_implementation, steps=5,
    )  # fmt: skip
    batches = unsplit.text_batches(folder, text_rows(ROWS), size=SIZE)
    reference = unsplit.train(
        folder, steps_of(batches, steps=5), adapter=out / "adapter_initial", make_optimizer=adamw,
        dtype=getattr(torch, precision), attn_implementation=attn_implementation,
    )  # fmt: skip
    assert losses_of(out) == reference.losses
    assert worst(load_file(out / "adapter" / "adapter_model.safetensors"), reference.state) == 0.0
