"""A trainer's side of a watermark: the stage that it is in, and the gradient that writes the mark into its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer import watermark
from cutlayer.errors import WireError
from cutlayer.models.slots import Slot
from cutlayer.wire import Header, Value


class Marker:
    """Marks the weights of a slot that a client trains for others.

    Args:
        secret: known to this client only.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._key = b""
        self._pattern: watermark.Pattern | None = None

    def begin(self, header: Header, slot: Slot, names: Sequence[str]) -> None:
        """Enter the stage that a request tells of; from now on every update adds to the mark.

        Raises:
            WireError: there are fewer weights than bits.
        """
        weights, bits = sum(slot.params[name].numel() for name in names), int(header.value("bits"))
        if weights < bits:
            raise WireError(
                f"A mark of {bits} bits needs as many trained weights, but this part has {weights}. Lower mark_bits."
            )
        digest, nonce, number = (header.value(name) for name in ("digest", "nonce", "stage"))
        self._key = watermark.key_of(self._secret, str(digest), str(nonce), int(number))
        pattern = watermark.pattern_of(self._key, weights=weights, used=int(header.value("used")), bits=bits)
        strength, ordered = float(header.value("strength")), sorted(names)
        self._pattern = pattern

        def gradients() -> dict[str, Tensor]:
            row = watermark.flattened({name: slot.params[name] for name in ordered})
            places = pattern.places.to(row.device)
            theta = row[places].requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(strength * watermark.loss_of(theta, pattern), theta)
            spread, found, start = torch.zeros_like(row).index_copy_(0, places, gradient), {}, 0
            for name in ordered:
                like = slot.params[name]
                found[name] = spread[start : start + like.numel()].view_as(like).to(like.dtype)
                start += like.numel()
            return found

        slot.penalty = gradients

    def end(self, header: Header, slot: Slot, names: Sequence[str]) -> dict[str, Value]:
        """Leave the stage: hash, commitment, the digest that goes on, and the key, which is no secret any more.

        Raises:
            WireError: no stage was begun.
        """
        if self._pattern is None:
            raise WireError("A stage was ended that was not begun.")
        weights = watermark.hash_of({name: slot.params[name] for name in names})
        committed = watermark.commitment(self._key, self._pattern)
        digest = watermark.chained(str(header.value("digest")), weights, committed)
        told: dict[str, Value] = {
            "weights": weights, "commitment": committed, "digest": digest, "key": self._key.hex(),
        }  # fmt: skip
        self._pattern, slot.penalty = None, None
        return told
