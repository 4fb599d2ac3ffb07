"""The cost model: work against torch's own counter, memory against saved tensors, compositions against the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

from cutlayer.clock import Fifo, Turnstile, VirtualClock
from cutlayer.costs import (
    Stages,
    Training,
    Work,
    leg_seconds,
    memory,
    profile_from,
    queue_finish,
    queue_step,
    seconds,
    sequential_step,
    shape_of,
    two_part_stages,
)

ROWS, LENGTH, LAYERS = 2, 16, 3
TOKENS = ROWS * LENGTH
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=64, n_positions=32, eos_token_id=1),
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    ),
}
# Rotary angles are one product of (head_dim / 2) x 1 with 1 x T: head_dim FLOP a token and pass, not in the model.
TOLERANCE = {"gpt2": 1e-9, "llama": 1e-3}
ALL = range(LAYERS)


def build(name: str) -> Any:
    # Eager attention: it computes (and the counter sees) the full square; the fused CPU kernel is not counted at all.
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")


def counted(model: Any, *, input_gradient: bool) -> tuple[float, float]:
    """FLOP per token of forward and backward by torch's counter; the input's gradient is taken if asked for."""
    ids = torch.arange(TOKENS).reshape(ROWS, LENGTH)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(input_gradient)
    with FlopCounterMode(display=False) as forward:
        loss = model(inputs_embeds=embeds, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() / TOKENS, backward.get_total_flops() / TOKENS


@pytest.mark.parametrize("name", CONFIGS)
def test_work_of_a_frozen_model(name: str) -> None:
    model = build(name).requires_grad_(False)
    work = Work(shape_of(CONFIGS[name]), length=LENGTH)
    forward, backward = counted(model, input_gradient=True)
    assert work.forward(ALL, lm_head=True) == pytest.approx(forward, rel=TOLERANCE[name])
    assert work.backward(ALL, lm_head=True, input_gradient=True) == pytest.approx(backward, rel=TOLERANCE[name])
    assert work.backward(ALL, lm_head=True, input_gradient=False) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_work_of_a_fully_trained_model(name: str) -> None:
    work = Work(shape_of(CONFIGS[name]), length=LENGTH, training=Training(full=True))
    forward, backward = counted(build(name), input_gradient=True)
    assert work.forward(ALL, lm_head=True) == pytest.approx(forward, rel=TOLERANCE[name])
    assert work.backward(ALL, lm_head=True, input_gradient=False) == pytest.approx(backward, rel=TOLERANCE[name])
    assert work.backward(ALL, lm_head=True, input_gradient=False) == pytest.approx(2 * work.forward(ALL, lm_head=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "c_attn"]])
def test_work_with_lora(name: str, targets: str | list[str]) -> None:
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
    model = get_peft_model(build(name), lora)
    shape, training = shape_of(CONFIGS[name]), Training(rank=4, targets=targets)
    assert training.adapter_params(shape, ALL) == model.get_nb_trainable_parameters()[0]
    work = Work(shape, length=LENGTH, training=training)
    forward, backward = counted(model, input_gradient=True)
    assert work.forward(ALL, lm_head=True) == pytest.approx(forward, rel=TOLERANCE[name])
    assert work.backward(ALL, lm_head=True, input_gradient=True) == pytest.approx(backward, rel=TOLERANCE[name])
    # Without the input's gradient, what lies below the lowest adapter is not computed: at most that block.
    _, less = counted(model, input_gradient=False)
    bound = work.backward(ALL, lm_head=True, input_gradient=False)
    assert work.backward(range(1, LAYERS), lm_head=True, input_gradient=True) < less <= bound


def test_backward_ends_at_the_lowest_trained_block() -> None:
    work = Work(shape_of(CONFIGS["llama"]), length=LENGTH, training=Training(rank=4, blocks=range(2, 3)))
    assert work.backward(range(2), input_gradient=False) == 0
    assert work.backward(ALL, input_gradient=False) == work.backward(range(2, 3), input_gradient=True)
    only_head = Work(shape_of(CONFIGS["llama"]), length=LENGTH, training=Training(head=True))
    assert only_head.backward(ALL, lm_head=True, input_gradient=False) == only_head.forward(range(0), lm_head=True)


def test_work_is_a_sum_over_cuts() -> None:
    work = Work(shape_of(CONFIGS["gpt2"]), length=LENGTH, training=Training(rank=2))
    for cut in range(LAYERS + 1):
        assert work.forward(range(cut)) + work.forward(range(cut, LAYERS)) == pytest.approx(work.forward(ALL))


def test_an_encoders_classifier_reads_one_position() -> None:
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=64
    )
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    ids = torch.arange(TOKENS).reshape(ROWS, LENGTH)
    with FlopCounterMode(display=False) as forward:
        model(input_ids=ids)
    work = Work(shape_of(config, task="classification"), length=LENGTH)
    assert work.forward(ALL, lm_head=True) * TOKENS == pytest.approx(forward.get_total_flops())


def test_a_causal_kernel_halves_attention_only() -> None:
    shape = shape_of(CONFIGS["gpt2"])
    square = Work(shape, length=LENGTH).forward(ALL)
    half = Work(shape, length=LENGTH, causal_kernel=True).forward(ALL)
    assert square - half == LAYERS * 2 * LENGTH * 32


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(("name", "full"), [("gpt2", False), ("gpt2", True), ("llama", False), ("llama", True)])
def test_saved_activations_are_of_the_right_size(name: str, full: bool) -> None:
    """An estimate: 0.96 and 1.05 of what Llama saves; GPT-2 saves 1.7 times as much (its GELU is written out)."""
    model = build(name).train()
    training = Training(full=True) if full else Training(rank=4)
    if not full:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")
        model = get_peft_model(model, lora)
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(TOKENS).reshape(ROWS, LENGTH)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    base = model.base_model if full else model.base_model.model.base_model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = base(inputs_embeds=embeds)
    estimate = memory(
        shape_of(CONFIGS[name]), blocks=ALL, training=training, tokens=TOKENS, length=LENGTH, eager=True
    ).activations
    assert out is not None
    low, high = (0.85, 1.15) if name == "llama" else (1.4, 2.0)
    assert low < sum(saved.values()) / estimate < high


def test_memory_by_hand() -> None:
    shape = shape_of(CONFIGS["gpt2"])
    block = shape.blocks[0].params
    common: dict[str, Any] = {"tokens": TOKENS, "length": LENGTH}
    client = memory(
        shape,
        blocks=range(1),
        training=Training(rank=4, targets=["c_attn"]),
        embedding=True,
        precision="bfloat16",
        **common,
    )
    adapter = 4 * (32 + 96)
    assert client.frozen == 2 * (block + 64 * 32 + 32 * 32)
    assert client.trained == 16 * adapter  # weight 4, gradient 4, Adam 8
    assert client.activations == 2 * TOKENS * 18 * 32
    assert client.logits == 0
    whole = memory(shape, blocks=ALL, training=Training(), embedding=True, lm_head=True, **common)
    assert whole.frozen == 4 * shape.params  # the tied matrix once
    assert whole.logits == 3 * TOKENS * 64 * 4
    assert whole.total == whole.frozen + whole.per_client
    full = memory(shape, blocks=ALL, training=Training(full=True), lm_head=True, optimizer="sgd", **common)
    assert full.frozen == 0
    assert full.trained == 8 * (3 * block + shape.params_head)
    assert memory(shape, blocks=ALL, training=Training(), backward=False, **common).activations == 0
    checkpointed = memory(shape, blocks=ALL, training=Training(), checkpointing=True, **common)
    assert checkpointed.activations == 4 * TOKENS * (3 * 32 + 18 * 32)


# ---------------------------------------------------------------- time


def test_seconds_and_legs() -> None:
    profile = profile_from({"flops": 2e9, "up_mbps": 8, "down_mbps": 16, "rtt_ms": 100})
    assert profile is not None
    assert seconds(1e9, profile) == 0.5
    assert leg_seconds(1_000_000, profile.up, profile.rtt) == pytest.approx(1.05)
    assert leg_seconds(0, profile.down, profile.rtt) == pytest.approx(0.05)


def test_two_part_stages() -> None:
    shape = shape_of(CONFIGS["llama"])
    client, server = profile_from("phone+4g"), profile_from("server")
    assert client is not None
    assert server is not None
    common: dict[str, Any] = {"cut": 1, "tokens": TOKENS, "up_bytes": 4096, "client": client, "server": server}
    work = Work(shape, length=LENGTH, training=Training(rank=4))
    stages = two_part_stages(work, shape, down_bytes=4096, **common)
    assert stages.forward == pytest.approx(TOKENS * work.forward(range(1)) / 1e11)
    assert stages.up == pytest.approx(0.025 + 8 * 4096 / 10e6)
    assert stages.down == pytest.approx(0.025 + 8 * 4096 / 30e6)
    trunk = range(1, LAYERS)
    both = work.forward(trunk, lm_head=True) + work.backward(trunk, lm_head=True, input_gradient=True)
    assert stages.server == pytest.approx(TOKENS * both / 1e14)
    forward_only = two_part_stages(work, shape, down_bytes=None, **common)
    assert (forward_only.down, forward_only.backward) == (0, 0)
    assert forward_only.release == stages.release


def stages_of(*rows: tuple[float, float, float, float, float]) -> list[Stages]:
    return [Stages(*row) for row in rows]


# a, up, s, dn, z. Releases 3, 2, 9: the server ends the first at 3+4=7, the second at 7+1=8, the third at 9+2=11.
THREE = stages_of((2, 1, 4, 1, 1), (1, 1, 1, 2, 5), (8, 1, 2, 0.5, 0.5))


def test_compositions_by_hand() -> None:
    assert queue_finish(THREE) == (7, 8, 11)
    assert queue_step(THREE) == 15  # the second: 8 + 2 + 5
    assert sequential_step(THREE) == 9 + 10 + 12
    assert queue_finish([THREE[1], THREE[0], THREE[2]]) == (3, 7, 11)


def replayed(stages: Sequence[Stages], order: Sequence[int] | None) -> float:
    """The step on the virtual clock: the server serves in ``order``, or as activations arrive."""
    clock = VirtualClock()
    names = [f"client-{number}" for number in range(len(stages))]
    queue = Fifo(clock, "server") if order is None else Turnstile([names[k] for k in order], clock, "server")

    async def client(name: str, one: Stages) -> None:
        await clock.sleep(one.forward, key=name)
        await clock.sleep(one.up, key=name)
        async with queue(name):
            await clock.sleep(one.server, key="server")
        await clock.sleep(one.down, key=name)
        await clock.sleep(one.backward, key=name)

    async def main() -> float:
        await asyncio.gather(*(client(name, one) for name, one in zip(names, stages, strict=True)))
        return clock.now()

    return clock.run(main())


def test_the_clock_agrees_with_the_queue_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 20):
        stages = [Stages(*row) for row in torch.rand(count, 5, generator=draw, dtype=torch.float64).tolist()]
        order = torch.randperm(count, generator=draw).tolist()
        # Five durations a client, each rounded to a nanosecond.
        close = pytest.approx(queue_step([stages[k] for k in order]), abs=5e-9 * count)
        assert replayed(stages, order) == close
        arrivals = sorted(stages, key=lambda one: one.release)
        assert replayed(stages, None) == pytest.approx(queue_step(arrivals), abs=5e-9 * count)


def test_the_clock_agrees_with_the_sequential_formula() -> None:
    total = sum(replayed([one], None) for one in THREE)
    assert total == pytest.approx(sequential_step(THREE))
