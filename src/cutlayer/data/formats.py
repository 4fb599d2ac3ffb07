"""Rows to token ids and labels, in the formats that users of TRL know, and packing.

====================  =====================  ===================================================================
format                columns                what becomes of a row
====================  =====================  ===================================================================
``text``              ``text``               the text's tokens and an end-of-text token
``prompt-completion`` ``prompt, completion`` the tokens of both joined, and an end-of-text token
``messages``          ``messages``           the chat template's tokens (``chat.py``)
``classification``    ``text, label``        the text's tokens with the model's own special tokens, and a class
====================  =====================  ===================================================================
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from cutlayer.config import DataConfig
from cutlayer.contracts import IGNORE, Example, Row
from cutlayer.data.borders import encode_with_borders
from cutlayer.data.chat import Chat
from cutlayer.data.classes import label_names
from cutlayer.errors import DataError

log = logging.getLogger("cutlayer")


def tokenize(
    rows: Sequence[Row],
    config: DataConfig,
    tokenizer: Any,
    *,
    task: Literal["causal", "classification"],
    where: str,
    classes: Mapping[str, int] | None = None,
) -> list[Example]:
    """One example a row, in order; none is longer than ``config.max_length``.

    Truncation keeps the left part. In the format ``text`` the end-of-text token marks where one text stops and the next
    may start, so a shortened text ends with it all the same: ``tokens[:max_length - 1] + [eos]``. After a completion or
    a chat it says that the answer is finished, which a shortened answer is not: ``(tokens + [eos])[:max_length]``.
    A tokenizer without such a token, or that ends its output with it anyway, is left alone.

    With ``completion_only``, all but the completions (the assistant's turns) have the label ``IGNORE``. The prompt and
    the completion are tokenised as one text. A token that reaches over the border between them belongs to the
    completion, whose first characters it holds; TRL counts the prompt's own tokens instead, which is the same wherever
    the prompt's tokens stay what they are. Rows in which no label is left stay in place and are counted in a warning.

    Args:
        rows: rows of ``load_rows``, with our column names.
        config: the format and its settings.
        tokenizer: a Transformers tokenizer.
        task: what the model is for; ``classification`` goes with the format of that name only.
        where: what to call the rows in messages: the file.
        classes: for classification, the number of each label (as text); by default those of ``rows``.

    Raises:
        DataError: there are no rows, format and task differ, a row has no token, no row has a label token, a class is
            unknown, or the chat template cannot be used.
    """
    if not rows:
        raise DataError(f"{where} has no rows. Put at least one example there.")
    if (config.format == "classification") != (task == "classification"):
        raise DataError(
            f"The format of {where} is '{config.format}', but the model's task is {task}. The format 'classification' "
            "goes with classification models, the others with causal ones: set data.format, or the client's own."
        )
    if config.format == "classification":
        if classes is None:
            classes = {name: number for number, name in enumerate(label_names(rows))}
        return _classified(rows, config, tokenizer, where, classes)
    labelled = _LABELLED[config.format](rows, config, tokenizer, where)
    examples = [Example(input_ids=ids, labels=labels) for ids, labels in labelled]
    _refuse_empty(examples, where)
    unlabelled = sum(example.label_tokens == 0 for example in examples)
    if unlabelled == len(examples):
        raise DataError(
            f"No row of {where} has a token that the loss counts, within data.max_length {config.max_length}. "
            "Raise max_length, check the columns, or set data.completion_only: false."
        )
    if unlabelled:
        log.warning(
            "%s: %d of %d rows have no token that the loss counts within data.max_length %d; they stay in their place.",
            where, unlabelled, len(examples), config.max_length,
        )  # fmt: skip
    return examples


def token_lengths(rows: Sequence[Row], config: DataConfig, tokenizer: Any, *, where: str) -> list[int]:
    """How many tokens each row has as an example, before anything is cut off at ``max_length``."""
    if config.format == "classification":
        return [len(ids) for ids in _encode(tokenizer, [row["text"] for row in rows])]
    whole = config.model_copy(update={"max_length": sys.maxsize, "completion_only": False})
    return [len(ids) for ids, _ in _LABELLED[config.format](rows, whole, tokenizer, where)]


Labelled = tuple[Sequence[int], Sequence[int]]  # token ids and their labels


def _texts(rows: Sequence[Row], config: DataConfig, tokenizer: Any, where: str) -> list[Labelled]:
    eos = _eos(config, tokenizer)
    done: list[Labelled] = []
    for ids in _encode(tokenizer, [row["text"] for row in rows]):
        ids = ids[: config.max_length] if eos is None else [*_without(ids, eos)[: config.max_length - 1], eos]
        done.append((ids, ids))
    return done


def _completions(rows: Sequence[Row], config: DataConfig, tokenizer: Any, where: str) -> list[Labelled]:
    eos = _eos(config, tokenizer)
    texts = [row["prompt"] + row["completion"] for row in rows]
    encoded = encode_with_borders(tokenizer, texts, [[len(row["prompt"])] for row in rows])
    done: list[Labelled] = []
    for ids, (border,) in encoded:
        ids = ids if eos is None else [*_without(ids, eos), eos]
        if eos is not None:
            border = min(
                border, len(ids) - 1
            )  # a prompt may end with such a token itself; the last one is the answer's
        labels = [*[IGNORE] * border, *ids[border:]] if config.completion_only else ids
        done.append((ids[: config.max_length], labels[: config.max_length]))
    return done


def _chats(rows: Sequence[Row], config: DataConfig, tokenizer: Any, where: str) -> list[Labelled]:
    chat = Chat(tokenizer, eos=_eos(config, tokenizer))
    done: list[Labelled] = []
    for number, row in enumerate(rows, start=1):
        try:
            ids, ours = chat.encode(row["messages"], mark=config.completion_only)
        except DataError as error:
            raise DataError(f"{where}, row {number}: {error}") from error
        labels = [token if mine else IGNORE for token, mine in zip(ids, ours, strict=True)]
        done.append((ids[: config.max_length], labels[: config.max_length]))
    return done


_LABELLED: dict[str, Callable[[Sequence[Row], DataConfig, Any, str], list[Labelled]]] = {
    "text": _texts,
    "prompt-completion": _completions,
    "messages": _chats,
}


def _classified(
    rows: Sequence[Row], config: DataConfig, tokenizer: Any, where: str, classes: Mapping[str, int]
) -> list[Example]:
    for number, row in enumerate(rows, start=1):
        if str(row["label"]) not in classes:
            listed = ", ".join(list(classes)[:20]) + (", ..." if len(classes) > 20 else "")
            raise DataError(f"{where}, row {number}: the label {row['label']!r} is not among the classes {listed}.")
    before, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:  # the tokenizer's own truncation, because special tokens may follow the text
        encoded = _encode(tokenizer, [row["text"] for row in rows], truncation=True, max_length=config.max_length)
    finally:
        tokenizer.truncation_side = before
    examples = [
        Example(input_ids=ids, label=classes[str(row["label"])]) for ids, row in zip(encoded, rows, strict=True)
    ]
    _refuse_empty(examples, where)
    return examples


def _encode(tokenizer: Any, texts: list[str], **options: Any) -> list[list[int]]:
    """Token ids with the tokenizer's own special tokens; ``verbose`` off, as rows are cut to length afterwards."""
    ids: list[list[int]] = tokenizer(texts, verbose=False, **options)["input_ids"]
    return ids


def _eos(config: DataConfig, tokenizer: Any) -> int | None:
    eos: int | None = tokenizer.eos_token_id if config.append_eos else None
    return eos


def _without(ids: list[int], eos: int) -> list[int]:
    return ids[:-1] if ids and ids[-1] == eos else ids


def _refuse_empty(examples: Sequence[Example], where: str) -> None:
    for number, example in enumerate(examples, start=1):
        if not example.input_ids:
            raise DataError(f"{where}, row {number} gives no token at all: its text is empty. Take the row out.")


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Fill rows of at most ``max_length`` tokens with whole examples, in order; the same examples give the same rows.

    ``position_ids`` restart at 0 at each example, from which Transformers builds a mask that keeps examples apart. The
    first label of each becomes ``IGNORE``: the shifted loss would predict it from the end of the example before.
    A row of one's own never counted that label either, so the number of label tokens stays the same.

    Raises:
        DataError: classification examples, which have one label a row, or an example longer than ``max_length``.
    """
    packed: list[Example] = []
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for number, example in enumerate(examples, start=1):
        if example.labels is None:
            raise DataError("Packing joins texts; classification has one label a row. Set data.packing: false.")
        size = len(example.input_ids)
        if size > max_length:
            raise DataError(f"Example {number} has {size} tokens and does not fit into rows of {max_length}.")
        if ids and len(ids) + size > max_length:
            packed.append(Example(input_ids=ids, labels=labels, position_ids=positions))
            ids, labels, positions = [], [], []
        ids.extend(example.input_ids)
        labels.extend([IGNORE, *example.labels[1:]])
        positions.extend(range(size))
    if ids:
        packed.append(Example(input_ids=ids, labels=labels, position_ids=positions))
    return packed
