"""Seeds derived from names, so that no random stream depends on the order of events.

Every verb of a party seeds from (run seed, segment, client, step, micro-batch); dropout is then the same whatever ran
before, and replay, recompute and resume need no stored generator state. Privacy noise never comes from here: the run's
seed is known to the server.
"""

from __future__ import annotations

import hashlib


def derive(*parts: object) -> int:
    """A 63-bit seed that is a stable function of ``parts`` (their text), on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def segment_seed(seed: int, segment: str, client: str, step: int, micro: int) -> int:
    """The seed set at the entry of a segment (``head``, ``trunk`` or ``tail``) in training.

    An unsplit reference with dropout calls ``torch.manual_seed`` with these at the same block borders.
    """
    return derive(seed, segment, client, step, micro)
