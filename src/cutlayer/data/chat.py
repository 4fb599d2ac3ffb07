"""Conversations through a tokenizer's chat template, and which of their tokens the assistant said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.data.borders import encode_with_borders
from cutlayer.errors import DataError

MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as Transformers looks for it


class Chat:
    """A tokenizer's chat template, ready to encode conversations.

    Args:
        tokenizer: a Transformers tokenizer with a chat template.
        eos: the token to append where the template's own text does not end with it (blanks aside), or None.

    Raises:
        DataError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, *, eos: int | None) -> None:
        self.tokenizer = tokenizer
        self.eos = eos
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "The tokenizer has no chat template, which data.format 'messages' needs. Use an instruction-tuned "
                "model, set the tokenizer's chat_template, or turn the data into prompt-completion."
            ) from error
        # a tokenizer written in Python cannot say which tokens lie between the marks
        self.marked = MARKER.search(template) is not None and tokenizer.is_fast

    def encode(self, messages: Sequence[Mapping[str, str]], *, mark: bool) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation, and for each whether the loss counts it.

        With ``mark`` these are the assistant's tokens: what the template puts between ``{% generation %}`` marks or,
        where it has none, what a turn adds to the conversation before it with its generation prompt. A token that
        reaches into the turn from before it counts, one that reaches out of it does not. The appended end-of-text token
        counts if the assistant spoke last. Without ``mark`` all tokens count.

        Raises:
            DataError: the template refuses the messages, or has no marks and does not render turn after turn.
        """
        text = self._render(messages)
        if not mark:
            ids = self._tokens(text)
            ours = [True] * len(ids)
        elif self.marked:
            ids, ours = self._by_marks(messages)
        else:
            ids, ours = self._by_prefixes(messages, text)
        if self.eos is not None and not text.rstrip().endswith(self.tokenizer.eos_token):
            ids = [*ids, self.eos]
            ours = [*ours, not mark or messages[-1]["role"] == "assistant"]
        return ids, ours

    def _by_marks(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return encoded["input_ids"], [bool(one) for one in encoded["assistant_masks"]]

    def _by_prefixes(self, messages: Sequence[Mapping[str, str]], text: str) -> tuple[list[int], list[bool]]:
        cuts = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise DataError(
                    "the conversation starts with the assistant, whose turn cannot be told from the template's own "
                    "text. Start with another role, mark the turns in the template with {% generation %}, or set "
                    "data.completion_only: false."
                )
            before = self._render(messages[:number], generation_prompt=True)
            through = self._render(messages[: number + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    f"the chat template writes message {number + 1} or those before it differently once others "
                    "follow, so the assistant's tokens cannot be found. Mark them in the template with "
                    "{% generation %} ... {% endgeneration %}, or set data.completion_only: false."
                )
            cuts += [len(before), len(through)]
        [(ids, borders)] = encode_with_borders(self.tokenizer, [text], [cuts], add_special_tokens=False)
        ours = [False] * len(ids)
        for start, end in zip(borders[::2], borders[1::2], strict=True):
            ours[start:end] = [True] * (end - start)
        return ids, ours

    def _tokens(self, text: str) -> list[int]:
        # the template has written the special tokens already
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template is a program of its author's and may fail in any way
            raise DataError(
                f"the chat template does not take these messages: {error}. Check their roles and their order."
            ) from error
        return text
