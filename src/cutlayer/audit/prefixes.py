"""Running a causal model one token at a time for many texts, with several candidates for the next token of each.

With the model's own cache of keys and values where that gives what the uncached model gives, else by running each text
again. Shapes: N texts, K candidates, H hidden size (V for logits).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cutlayer.audit.public import PublicModel

MOST_AT_ONCE = 1024  # texts times candidates that run as one batch
CHECKED = 5  # tokens on which the cache is compared with no cache
CLOSE = 1e-4


class Prefixes:
    """Texts that grow together.

    Args:
        public: the base model.
        blocks: how many blocks the head has that runs; None: the whole model, which gives logits.
        texts: how many.
    """

    def __init__(self, public: PublicModel, blocks: int | None, texts: int) -> None:
        self.public, self.blocks = public, blocks
        self.device = public.base.device
        self._tokens = torch.empty(texts, 0, dtype=torch.int64)
        self._cache: Any = DynamicCache(config=public.base.model.config) if self._cacheable() else None

    @property
    def length(self) -> int:
        """How many tokens each text has."""
        return self._tokens.shape[1]

    def try_(self, candidates: Tensor) -> Tensor:
        """What comes out [N,K,H] at the next position, for candidates [N,K] there."""
        count = candidates.shape[1]
        size = max(1, MOST_AT_ONCE // len(candidates))
        parts = [self._tried(candidates[:, first : first + size]) for first in range(0, count, size)]
        return torch.cat(parts, 1)

    def _tried(self, candidates: Tensor) -> Tensor:
        texts, count = candidates.shape
        flat = candidates.reshape(-1, 1)
        if self._cache is None:
            whole = torch.cat([self._tokens.repeat_interleave(count, 0), flat], 1)
            return self._run(whole, None).view(texts, count, -1)
        cache = copy.deepcopy(self._cache)
        if self.length:
            cache.batch_repeat_interleave(count)
        return self._run(flat, cache).view(texts, count, -1)

    def append(self, tokens: Tensor) -> Tensor:
        """Let each text go on with its token of ``tokens`` [N]; gives what comes out there [N,H]."""
        if self._cache is None:
            found = self._run(torch.cat([self._tokens, tokens[:, None]], 1), None)
        else:
            found = self._run(tokens[:, None], self._cache)
        self._tokens = torch.cat([self._tokens, tokens[:, None]], 1)
        return found

    def keep(self, texts: Tensor) -> None:
        """Go on with these of the texts only: indices [M]."""
        if len(texts) == len(self._tokens):
            return
        self._tokens = self._tokens[texts]
        if self._cache is not None and self.length:
            self._cache.batch_select_indices(texts.to(self.device))

    def only(self, text: int) -> Prefixes:
        """One of the texts, as it is now, apart from the others."""
        found = copy.copy(self)
        found._tokens, found._cache = self._tokens[text : text + 1], copy.deepcopy(self._cache)
        if found._cache is not None and self.length:
            found._cache.batch_select_indices(torch.tensor([text], device=self.device))
        return found

    def _run(self, tokens: Tensor, cache: Any) -> Tensor:
        """What comes out at the last of ``tokens`` [N,T], which follow what is in the cache: [N,H]."""
        return run_last(self.public, self.blocks, tokens, cache, self.length if cache is not None else 0)

    def _cacheable(self) -> bool:
        """Whether the model gives the same with a cache; some families have none, or one of their own."""
        tokens = torch.arange(CHECKED)[None] % self.public.vocabulary
        try:
            cache: Any = DynamicCache(config=self.public.base.model.config)
            for place in range(CHECKED):
                found = run_last(self.public, self.blocks, tokens[:, place : place + 1], cache, place)
            copy.deepcopy(cache).batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0], device=self.device))
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False  # whatever such a model says to a cache, it can do without
        return torch.allclose(found, run_last(self.public, self.blocks, tokens, None, 0), rtol=CLOSE, atol=CLOSE)


def run_last(public: PublicModel, blocks: int | None, tokens: Tensor, cache: Any, before: int) -> Tensor:
    """What comes out at the last of ``tokens`` [N,T]: hidden states [N,H] of a head, else log-probabilities [N,V].

    ``before`` tokens are in the ``cache``.
    """
    base = public.base
    base.train(False)
    positions = torch.arange(before, before + tokens.shape[1], device=base.device).expand(len(tokens), -1)
    inputs = {
        "input_ids": tokens.to(base.device), "position_ids": positions, "past_key_values": cache,
        "use_cache": cache is not None,
    }  # fmt: skip
    with torch.no_grad():
        if blocks is None:
            base.install(None)
            return torch.log_softmax(base.model(**inputs).logits[:, -1].float(), -1).cpu()
        base.install(public.head(blocks))
        hidden: Tensor = base.model.base_model(**inputs)[0]
    return hidden[:, -1].float().cpu()
