"""Profiles and shapes: what a run file may say, and parameter counts of real (tiny) models."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    RobertaConfig,
    T5Config,
)

from cutlayer.config import load_config
from cutlayer.costs import Profile, profile_from, shape_of
from cutlayer.errors import ConfigError, ModelError
from cutlayer.profiles import DEVICES, LINKS

# ---------------------------------------------------------------- profiles


def test_every_preset_and_every_pair() -> None:
    for device in DEVICES:
        for link in LINKS:
            profile = profile_from(f"{device}+{link}")
            assert profile is not None
            assert profile.name == f"{device}+{link}"
            assert min(profile.flops, profile.up, profile.down, profile.rtt, profile.memory or 0) > 0


def test_a_device_alone_is_on_the_lan() -> None:
    assert profile_from(None) is None
    assert profile_from("laptop") == Profile(5e11, 1e9, 1e9, 0.0005, 16 * 10**9, "laptop")


def test_numbers_and_presets_mix() -> None:
    assert profile_from({"flops": "1e12"}) == Profile(1e12, 1e9, 1e9, 0.0005, None, "given+lan")
    given = {"device": "phone", "link": "4g", "flops": 3e9, "rtt_ms": 0, "up_mbps": 1.5, "memory_gb": 2, "name": "old"}
    assert profile_from(given) == Profile(3e9, 1.5e6, 30e6, 0.0, 2 * 10**9, "old")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("labtop", "Did you mean 'laptop'"),
        ("laptop+6g", "link '6g' is not known"),
        ("laptop+", "link '' is not known"),
        ({"device": "laptop", "flop": 1}, "'flop' is not known. Did you mean 'flops'"),
        ({"device": "laptop", "up_mbps": -1}, "'up_mbps' must be more than 0, not -1"),
        ({"device": "laptop", "rtt_ms": -1}, "'rtt_ms' must be 0 or more"),
        ({"device": "laptop", "flops": True}, "'flops' is a finite number, not True"),
        ({"device": "laptop", "flops": float("inf")}, "'flops' is a finite number"),
        ({"device": "laptop", "memory_gb": "much"}, "'memory_gb' is a finite number, not 'much'"),
        ({"link": "4g"}, "'flops' is missing"),
        ({"device": ["laptop"]}, "device '.*' is not known"),
        (3, "a preset's name or numbers"),
    ],
)
def test_mistakes_are_named(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        profile_from(value)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        profile_from({"device": "labtop", "link": "6g", "flop": 1, "up_mbps": -1})
    assert len(caught.value.problems) == 4


# ---------------------------------------------------------------- shapes

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
CAUSAL = {
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2),
    "llama-tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=32, eos_token_id=1),
    "opt": OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64, word_embed_proj_dim=16
    ),
    "gpt-neox": GPTNeoXConfig(**SIZE),
    "gemma3": Gemma3TextConfig(**SIZE, num_key_value_heads=2, head_dim=16),
    "phi": PhiConfig(**SIZE),
    "mixtral": MixtralConfig(**SIZE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
}
CLASSIFIERS = {
    "bert": BertConfig(**SIZE),
    "distilbert": DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, vocab_size=64),
    "roberta": RobertaConfig(**SIZE),
    "llama": LlamaConfig(**SIZE),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_parameters_of_language_models(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CAUSAL[name])
    shape = shape_of(CAUSAL[name])
    assert shape.params == model.num_parameters()
    assert shape.num_blocks == 3
    assert (shape.hidden, shape.vocab, shape.outputs, shape.heads) == (32, 64, 64, 4)
    assert shape.head_dim == (16 if name == "gemma3" else 8)
    head = model.get_output_embeddings().weight
    assert shape.tied == (head is model.get_input_embeddings().weight)
    assert shape.tied == (name in ("llama-tied", "gpt2", "opt", "gemma3"))
    assert shape.active_head == head.numel() + (32 * 16 if name == "opt" else 0)  # OPT projects before its LM head
    assert not shape.head_per_row


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_parameters_of_classifiers(name: str) -> None:
    config = CLASSIFIERS[name]
    config.num_labels, config.pad_token_id = 5, 0
    shape = shape_of(config, task="classification")
    assert shape.params == AutoModelForSequenceClassification.from_config(config).num_parameters()
    assert shape.outputs == 5
    assert not shape.tied
    assert shape.head_per_row == (name != "llama")


def test_parts_by_hand() -> None:
    shape = shape_of(CAUSAL["gpt2"])
    assert shape.params_embedding == 64 * 32 + 32 * 32  # words and positions
    assert shape.params_head == 2 * 32 + 64 * 32  # the norm, and the matrix that is read
    assert shape.blocks[0].active == 12 * 32 * 32  # the catalogue's P_blk of a GPT-2 block
    assert shape.blocks[0].maps == (
        ("attn.c_attn", 32, 96),
        ("attn.c_proj", 32, 32),
        ("mlp.c_fc", 32, 128),
        ("mlp.c_proj", 128, 32),
    )


def test_only_the_chosen_experts_are_active() -> None:
    block = shape_of(CAUSAL["mixtral"]).blocks[0]
    attention, router, expert = 2 * 32 * 32 + 2 * 32 * 16, 4 * 32, 3 * 32 * 48
    assert block.params == attention + router + 4 * expert + 2 * 32
    assert block.active == attention + router + 2 * expert


def test_what_cannot_be_cut_or_built_is_refused() -> None:
    with pytest.raises(ModelError, match="for the task 'causal'"):
        shape_of(T5Config())
    with pytest.raises(ModelError, match="encoder-decoder"):
        shape_of(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2), task="classification")


def test_each_client_draws_one_of_a_list() -> None:
    """From the seed and its name, so that a study of a hundred is the same each time; its own comes first."""
    run = {"model": "m", "data": {"train": "x"}, "clients": 24, "profile": ["phone+4g", "laptop+dsl", {"flops": 3e9}]}
    config = load_config(run)
    found = [config.profile_of(name) for name in config.client_names]
    assert found == [load_config(run).profile_of(name) for name in config.client_names]
    counts = [found.count(one) for one in run["profile"]]
    assert sum(counts) == 24
    assert min(counts) >= 3
    assert found != [load_config(run, ["seed=1"]).profile_of(name) for name in config.client_names]
    own = load_config({**run, "clients": [{"name": "a", "profile": "edge-box"}, {"name": "b"}]})
    assert own.profile_of("a") == "edge-box"
    with pytest.raises(ConfigError, match=r"profile.1: .*'moon' is not known"):
        load_config({**run, "profile": ["laptop", "moon"]})
    with pytest.raises(ConfigError, match="must not be an empty list"):
        load_config({**run, "profile": []})
