"""Running a causal model one token at a time for many texts, with several candidates for the next token of each.

With the model's cache of keys and values, candidates stand side by side behind a text, each of which sees the text and
itself; so a candidate costs one token. Where a model does not take that (it is tried first), each text is run again
with each candidate. Shapes: N texts, K candidates, H hidden size (V for logits).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cutlayer.audit.public import PublicModel

MOST_AT_ONCE = 2048  # texts times candidates that run as one batch
CHECKED = 5  # tokens on which the cache is compared with no cache
CLOSE = 1e-4


class Prefixes:
    """Texts that grow together.

    Args:
        public: the base model.
        blocks: how many blocks the head has that runs; None: the whole model, which gives log-probabilities.
        texts: how many.
    """

    def __init__(self, public: PublicModel, blocks: int | None, texts: int) -> None:
        self.public, self.blocks = public, blocks
        self._tokens = torch.empty(texts, 0, dtype=torch.int64)
        self._cache: Any = DynamicCache(config=public.base.model.config) if cacheable(public, blocks) else None

    @property
    def length(self) -> int:
        """How many tokens each text has."""
        return self._tokens.shape[1]

    def try_(self, candidates: Tensor) -> Tensor:
        """What comes out [N,K,H] at the next position, for candidates [N,K] there."""
        size = max(1, MOST_AT_ONCE // len(candidates))
        return torch.cat([self._tried(part) for part in torch.split(candidates, size, 1)], 1)

    def _tried(self, candidates: Tensor) -> Tensor:
        texts, count = candidates.shape
        if self._cache is None:
            whole = torch.cat([self._tokens.repeat_interleave(count, 0), candidates.reshape(-1, 1)], 1)
            return run(self.public, self.blocks, whole)[:, -1].view(texts, count, -1)
        found = run(self.public, self.blocks, candidates, self._cache, self.length, apart=True)
        self._cache.crop(-count)
        return found

    def append(self, tokens: Tensor) -> Tensor:
        """Let each text go on with its token of ``tokens`` [N]; gives what comes out there [N,H]."""
        longer = torch.cat([self._tokens, tokens[:, None]], 1)
        if self._cache is None:
            found = run(self.public, self.blocks, longer)
        else:
            found = run(self.public, self.blocks, tokens[:, None], self._cache, self.length)
        self._tokens = longer
        return found[:, -1]

    def keep(self, count: int) -> None:
        """Go on with the first so many of the texts."""
        if count < len(self._tokens):
            self._select(torch.arange(count))

    def only(self, text: int) -> Prefixes:
        """One of the texts, as it is now, apart from the others."""
        found = copy.copy(self)
        found._cache = copy.deepcopy(self._cache)
        found._select(torch.tensor([text]))
        return found

    def _select(self, texts: Tensor) -> None:
        self._tokens = self._tokens[texts]
        if self._cache is None:
            return
        if self.length:
            self._cache.batch_select_indices(texts.to(self.public.base.device))
        else:  # what was tried and taken back has left the number of texts in it
            self._cache = DynamicCache(config=self.public.base.model.config)


def run(
    public: PublicModel, blocks: int | None, tokens: Tensor, cache: Any = None, before: int = 0, *, apart: bool = False
) -> Tensor:
    """What comes out at ``tokens`` [N,T]: hidden states [N,T,H] of a head, else log-probabilities [N,T,V].

    ``before`` tokens are in the ``cache``. ``apart``: the tokens all stand at the next position, and see that text and
    themselves, but not each other.
    """
    base = public.base
    base.train(False)
    count = tokens.shape[1]
    positions = torch.full((count,), before) if apart else torch.arange(before, before + count)
    inputs: dict[str, Any] = {
        "input_ids": tokens.to(base.device), "position_ids": positions.to(base.device).expand(len(tokens), -1),
        "past_key_values": cache, "use_cache": cache is not None,
    }  # fmt: skip
    if apart:
        dtype = base.model.get_input_embeddings().weight.dtype
        hidden = torch.full((count, count), torch.finfo(dtype).min, dtype=dtype).fill_diagonal_(0)
        mask = torch.cat([torch.zeros(count, before, dtype=dtype), hidden], 1)
        inputs["attention_mask"] = mask.to(base.device).expand(len(tokens), 1, -1, -1)
    with torch.no_grad():
        if blocks is None:
            base.install(None)
            logits: Tensor = base.model(**inputs).logits
            return torch.log_softmax(logits.float(), -1).cpu()
        base.install(public.head(blocks))
        found: Tensor = base.model.base_model(**inputs)[0]
        return found.float().cpu()


def cacheable(public: PublicModel, blocks: int | None) -> bool:
    """Whether the model gives the same with a cache and candidates side by side; some families have other caches."""
    tokens = torch.arange(CHECKED)[None] % public.vocabulary
    others = torch.cat([tokens[:, :-1], tokens[:, :1]], 1)
    wanted = torch.cat([run(public, blocks, tokens)[:, -1:], run(public, blocks, others)[:, -1:]], 1)
    try:
        cache: Any = DynamicCache(config=public.base.model.config)
        if any(cache.is_sliding):  # a layer that forgets sees another mask, once a text is longer than its window
            return False
        for place in range(CHECKED - 1):
            run(public, blocks, tokens[:, place : place + 1], cache, place)
        two = torch.cat([tokens[:, -1:], tokens[:, :1]], 1)
        for _ in range(2):  # the second time shows whether the first left nothing behind
            found = run(public, blocks, two, cache, CHECKED - 1, apart=True)
            cache.crop(-2)
        cache.batch_select_indices(torch.tensor([0], device=public.base.device))
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # whatever such a model says to a cache, it can do without
    return torch.allclose(found, wanted, rtol=CLOSE, atol=CLOSE)
