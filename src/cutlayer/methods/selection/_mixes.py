"""How far the mix of some clients' data is from the mix of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TINY = 1e-12  # so that the divergence of mixes without some class stays finite


def divergence(mix: np.ndarray, whole: np.ndarray) -> float:
    """KL(mix || whole) in nats, of proportions [D], each smoothed by 1e-12."""
    p, q = (mix + TINY) / (mix + TINY).sum(), (whole + TINY) / (whole + TINY).sum()
    return float((p * np.log(p / q)).sum())


def mean_mix(sketches: Mapping[str, np.ndarray], clients: Sequence[str]) -> np.ndarray:
    """The mean sketch of some clients."""
    return np.asarray(np.mean([sketches[client] for client in clients], axis=0))
