"""Zeroth-order estimates: the gradient of a function of parameters from its values at two points.

d = (f(theta + mu*u) - f(theta - mu*u)) / (2*mu) is the slope along u ~ N(0, I), and d*u an estimate of the gradient
(Spall's SPSA; Malladi et al., arXiv:2305.17333). u follows from a seed and is made anew whenever it is needed, so that
(seed, d) is all that has to be remembered or sent. No graph is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

Value = TypeVar("Value")


@dataclass(frozen=True)
class Probe:
    """How to look around: how many directions, how far in each, and whether a copy of the parameters is put back.

    Without a copy what was added is taken off again, which leaves a rounding error.
    """

    directions: int
    mu: float
    copy: bool


def directions(params: Mapping[str, Parameter], seed: int) -> Iterator[tuple[str, Parameter, Tensor]]:
    """Each parameter once, with normal numbers of its shape that follow from ``seed`` and the order of the names."""
    generators: dict[torch.device, torch.Generator] = {}
    done: set[int] = set()
    for name, parameter in params.items():
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        device = parameter.device
        if device not in generators:
            generators[device] = torch.Generator(device=device).manual_seed(seed)
        u = torch.randn(parameter.shape, generator=generators[device], device=device, dtype=torch.float32)
        yield name, parameter, u.to(parameter.dtype)


def two_points(
    params: Mapping[str, Parameter], seed: int, probe: Probe, value: Callable[[], Value]
) -> tuple[Value, Value]:
    """``value()`` at theta + mu*u and at theta - mu*u; the parameters are then as they were, also after an error."""
    away = 0
    with torch.no_grad():
        kept = [(parameter, parameter.clone()) for parameter in params.values()] if probe.copy else []

        def to(place: int) -> None:
            nonlocal away
            for _, parameter, u in directions(params, seed):
                parameter.add_(u, alpha=(place - away) * probe.mu)
            away = place

        try:
            to(1)
            above = value()
            to(-1)
            return above, value()
        finally:
            if probe.copy:
                for parameter, copy in kept:
                    parameter.copy_(copy)
            else:
                to(0)


def slope(points: tuple[float, float], probe: Probe) -> float:
    """d of the values at two points."""
    above, below = points
    return (above - below) / (2 * probe.mu)


def estimate(params: Mapping[str, Parameter], seeds: Sequence[int], slopes: Sequence[float]) -> dict[str, Tensor]:
    """The mean of d*u over directions, by name: what stands for the gradient."""
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for seed, d in zip(seeds, slopes, strict=True):
            for name, _, u in directions(params, seed):
                part = u.mul_(d / len(seeds))
                found[name] = found[name].add_(part) if name in found else part
    return found
