"""Tiny random models of every family, with a tokenizer and data, made in a temporary folder; nothing is downloaded."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

VOCAB = 97
BLOCKS = 3
CLASSIFIERS = ("bert", "roberta", "distilbert")
_SAME = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
_PLAIN = {**_SAME, "max_position_embeddings": 64}
_GATED = {**_PLAIN, "intermediate_size": 48, "num_key_value_heads": 2}
_BOTH_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]  # each has rotary angles of its own
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: Mapping[str, Any] = {
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "opt-projected": lambda: OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neox": lambda: GPTNeoXConfig(**_PLAIN, intermediate_size=48),
    "llama": lambda: LlamaConfig(**_GATED),
    "llama-tied": lambda: LlamaConfig(**_GATED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_GATED, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**_GATED, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen3": lambda: Qwen3Config(**_GATED, head_dim=8),
    "gemma": lambda: GemmaConfig(**_GATED, head_dim=8),
    "gemma2": lambda: Gemma2Config(**_GATED, head_dim=8, sliding_window=5),
    "gemma3": lambda: Gemma3TextConfig(**_GATED, head_dim=8, sliding_window=5, layer_types=_BOTH_KINDS),
    "phi": lambda: PhiConfig(**_GATED),
    "phi3": lambda: Phi3Config(**_GATED),
    "bert": lambda: BertConfig(**_PLAIN, intermediate_size=48),
    "roberta": lambda: RobertaConfig(**_PLAIN, intermediate_size=48),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=BLOCKS, n_heads=4, hidden_dim=48, max_position_embeddings=64
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=BLOCKS, n_head=4),
}
FAMILIES = [name for name in CONFIGS if name != "bloom"]  # bloom stands for the families that are checked at the start
DROPOUTS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout", "seq_classif_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob",
)  # fmt: skip


def make_model(folder: Path, family: str, *, dropout: float = 0.0, seed: int = 0, **changes: Any) -> Path:
    """A random model of ``family`` with its tokenizer, saved in ``folder``."""
    config = CONFIGS[family]()
    for name, value in {**_SPECIAL, **changes}.items():
        setattr(config, name, value)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a mistake in them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a word: ``w3`` to ``w96``, and four special ones."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3", **options
    )


def texts(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 14) -> list[str]:
    """Random sentences of unequal lengths."""
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(3, VOCAB)}" for _ in range(draw.randint(shortest, longest))) for _ in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(count: int, **options: Any) -> list[dict[str, Any]]:
    """Rows of the format ``text``, with a label beside for classification."""
    return [{"text": text, "label": i % 2} for i, text in enumerate(texts(count, **options))]
