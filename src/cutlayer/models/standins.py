"""Parameter-free modules that take the place of what a segment does not own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """A block that hands its hidden states on; ``as_tuple`` where the model takes the first of a block's results."""

    def __init__(self, block: nn.Module | None = None, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        # Some models read a plain attribute of the block before calling it (the layer's attention type).
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):
            value = getattr(block, name, None)
            if isinstance(value, str | int | bool):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states [B,T,H], unchanged."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, None) if self.as_tuple else hidden


class Zero(nn.Module):
    """A learned position embedding that was already added below the cut."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """A scalar zero: adding it changes no number and no dtype."""
        found = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        return torch.zeros((), device=found[0].device if found else None)


class Embeds(nn.Module):
    """An embedding module that is called with the hidden states of the part below as ``inputs_embeds``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states [B,T,H], unchanged."""
        given = kwargs.get("inputs_embeds")
        if given is None:
            given = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        assert isinstance(given, Tensor)
        return given


class Identity(nn.Module):
    """What passes its first argument on, however it is called."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, unchanged."""
        return args[0] if args else next(iter(kwargs.values()))


def stand_in(kind: str) -> nn.Module | None:
    """The module (or None, where the model tests for None) for a kind named in ``families``."""
    kinds: dict[str, type[nn.Module]] = {"zero": Zero, "embeds": Embeds, "identity": Identity}
    return None if kind == "none" else kinds[kind]()
