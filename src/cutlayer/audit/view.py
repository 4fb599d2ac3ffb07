"""A View: exactly what the adversary of a threat model has, and nothing else.

It is filled from frames and from what is public; no object of a client is ever handed to it, and the truth is with the
scorer. What the threat does not claim to read or to know is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cutlayer.audit.classes import mixed
from cutlayer.audit.messages import Exchange, Key, exchanges
from cutlayer.audit.public import PublicModel, reinitialised
from cutlayer.contracts import Layout
from cutlayer.errors import MethodError
from cutlayer.seeds import derive
from cutlayer.threat import Threat
from cutlayer.wire import Header

T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """What an adversary has.

    Args:
        threat: what it claims to read and to know.
        exchanges: the training micro-batches that it read, in the order of the wire.
        layout: which blocks the clients hold; a server knows what it was asked to train.
        seed: of its own draws.
    """

    threat: Threat
    exchanges: Sequence[Exchange]
    layout: Layout
    seed: int = 0
    _public: PublicModel | None = None
    _auxiliary: Sequence[Tensor] | None = None
    _classes: Mapping[int, float] | None = None
    _labelled: Mapping[Key, Tensor] | None = None

    @property
    def public(self) -> PublicModel:
        """The public base model.

        Raises:
            MethodError: the threat does not claim to know it.
        """
        return _named(self._public, "the base model's weights")

    @property
    def auxiliary(self) -> Sequence[Tensor]:
        """The adversary's own texts, as token ids [T] each.

        Raises:
            MethodError: the threat does not claim to have any.
        """
        return _named(self._auxiliary, "text of the attacker's own")

    @property
    def classes(self) -> Mapping[int, float]:
        """The labels that there are, with the share of each; the most frequent first.

        Raises:
            MethodError: the threat does not claim to know them.
        """
        return _named(self._classes, "the classes")

    @property
    def labelled(self) -> Mapping[Key, Tensor]:
        """The labels [B,1] that it was told, ``MISSING`` where it was not.

        Raises:
            MethodError: the threat does not claim to have any.
        """
        return _named(self._labelled, "labelled samples")

    @property
    def cut(self) -> int:
        """How many blocks a client's head has."""
        return len(self.layout.head)

    @property
    def tail_start(self) -> int:
        """The first block above the trunk."""
        return self.layout.middle.stop

    def generator(self, *purpose: object) -> torch.Generator:
        """Draws of the adversary's own."""
        return torch.Generator().manual_seed(derive("attack", self.seed, *purpose))

    def shuffled(self) -> View:
        """The control in which the order of positions is lost; of samples with one label each, which is whose."""
        if self.threat.classes is not None:
            return replace(self, exchanges=mixed(self.exchanges, self.generator("shuffled")))
        moved = [one.shuffled(self.generator("shuffled", *one.key)) for one in self.exchanges]
        return replace(self, exchanges=moved)

    def with_other_weights(self) -> View:
        """The control in which the attacker has the architecture, and weights of another start."""
        assert self._public is not None
        return replace(self, _public=reinitialised(self._public, self.seed))


def view_of(
    threat: Threat,
    frames: Iterable[tuple[Any, Header, list[Tensor]]],
    *,
    layout: Layout,
    public: PublicModel,
    auxiliary: Sequence[Tensor] | None,
    rows: int | None = None,
    seed: int = 0,
) -> View:
    """The view of an adversary with this threat.

    Args:
        threat: its threat model.
        frames: the wire, as ``wire.read_frames`` gives it.
        layout: which blocks the clients hold.
        public: the base model; in the view only if the threat knows the weights.
        auxiliary: text for the attacker; in the view only if the threat names it.
        rows: stop reading after so many rows [B] of batches; None: never.
        seed: of its own draws.
    """
    read, count = [], 0
    for one in exchanges(frames, reads=threat.reads):
        read.append(one)
        count += next(len(t) for found in one.tensors.values() for t in found.values())
        if rows is not None and count >= rows:
            break
    return View(
        threat, read, layout, seed,
        public if "weights" in threat.knows else None,
        auxiliary if "auxiliary" in threat.knows else None,
    )  # fmt: skip


def _named(thing: T | None, what: str) -> T:
    if thing is None:
        raise MethodError(f"An attack asked for {what}, which its threat does not name.")
    return thing
