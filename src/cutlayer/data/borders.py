"""Which tokens of a text belong to its beginning: where a completion or an assistant's turn starts and stops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any


def encode_with_borders(
    tokenizer: Any, texts: Sequence[str], cuts: Sequence[Sequence[int]], *, add_special_tokens: bool = True
) -> list[tuple[list[int], list[int]]]:
    """The token ids of each text, and for each of its cuts how many of them stand before it.

    A cut is a number of characters. A token stands before it if it ends there or earlier, so that one that reaches over
    the cut stands behind it. This comes from the tokenizer's offsets. A tokenizer written in Python has none: there the
    tokens that the text shares with its beginning alone count, which may be a few less where a token reaches over.

    Args:
        tokenizer: a Transformers tokenizer.
        texts: whole texts; each is tokenised in one go.
        cuts: for each text, numbers of characters.
        add_special_tokens: whether the tokenizer adds its own; those at the start stand before every cut.
    """
    if not texts:
        return []
    options = {"add_special_tokens": add_special_tokens, "verbose": False}
    if tokenizer.is_fast:
        encoded = tokenizer(list(texts), return_offsets_mapping=True, **options)
        # only the ends are used: some tokenizers trim blanks off the starts
        stops_of = ([stop for _, stop in offsets] for offsets in encoded["offset_mapping"])
        return [
            (ids, [next((n for n, stop in enumerate(stops) if stop > cut), len(ids)) for cut in mine])
            for ids, stops, mine in zip(encoded["input_ids"], stops_of, cuts, strict=True)
        ]
    found = []
    for text, mine in zip(texts, cuts, strict=True):
        ids = tokenizer(text, **options)["input_ids"]
        beginnings = [tokenizer(text[:cut], **options)["input_ids"] for cut in mine]
        found.append((ids, [_shared(ids, beginning) for beginning in beginnings]))
    return found


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, others, strict=False)))
