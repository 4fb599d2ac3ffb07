"""Tiny tokenizers whose ids one can write down by hand."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "c", "d", "e", "user", "assistant", ":", ";", "system"]


def word_tokenizer(*, bos=False, ends_itself=False, eos=True):
    """One word, one id: a is 4, b 5, c 6, d 7, e 8, user 9, assistant 10, ":" 11, ";" 12; <eos> is 1, <bos> 2."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = f"{'<bos> ' if bos else ''}$A{' <eos>' if ends_itself else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    named = {"eos_token": "<eos>"} if eos else {"additional_special_tokens": ["<eos>"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", **named
    )


def byte_tokenizer():
    """Byte-level BPE in which " yes" is one token, but " " and "yes" apart are not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("Ġ", "yes")]
    vocab = {piece: i for i, piece in enumerate([*alphabet, "ye", "yes", "Ġyes", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def words():
    return word_tokenizer()


@pytest.fixture
def words_with():
    return word_tokenizer


@pytest.fixture
def bytewise():
    return byte_tokenizer()
