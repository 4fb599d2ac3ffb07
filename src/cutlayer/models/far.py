"""A slot whose blocks are run in other processes: the gradients and the updates are there, and a copy is here.

The copy is as new as somebody needs it. What was changed here (a checkpoint, a merge) goes there before the next thing
is worked on there; what was changed there comes here when it is looked at. Parameters and the optimizer's moments go
each by themselves, as most merges leave the moments where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum, auto
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from cutlayer.models.arena import Arena
from cutlayer.models.slots import Key, MakeOptimizer, Slot


class Far(Protocol):
    """The processes with a slot, each with some of its blocks."""

    def put(self, state: Mapping[str, Tensor], *, reset: bool) -> None:
        """Send parameters and moments to those who have them, and wait for nobody; ``reset`` forgets moments first."""
        ...

    def get(self, *, moments: bool) -> dict[str, Tensor]:
        """The parameters, or the optimizer's moments, as they are when all that was asked before is done."""
        ...

    def update(self, factor: float, **how: Any) -> None:
        """An optimizer step, as ``Slot.update`` makes it, at ``factor`` times the base rate; waits for nobody."""
        ...

    def norms(self, weights: Mapping[str, float] | None, *, by_tensor: bool) -> list[list[tuple[Key | None, float]]]:
        """``Slot.norms`` of each process, in the order of the blocks."""
        ...


class _Newer(Enum):
    """Where the newer of two copies is."""

    HERE = auto()
    NOWHERE = auto()
    THERE = auto()


class FarSlot(Slot):
    """A ``Slot`` whose work is done by ``far``; as long as there is none, an ordinary one."""

    far: Far | None = None

    def __init__(
        self, name: str, params: Mapping[str, Parameter], make_optimizer: MakeOptimizer,
        rate: Callable[[int], float] = lambda _: 1.0, arena: Arena | None = None,
    ) -> None:  # fmt: skip
        self._parameters = self._moments = _Newer.HERE
        super().__init__(name, params, make_optimizer, rate, arena)

    @property
    def params(self) -> dict[str, Parameter]:
        """The parameters as they are now, there."""
        self._fetch()
        return self._here

    @params.setter
    def params(self, params: dict[str, Parameter]) -> None:
        self._here = params

    @property
    def factor(self) -> float:
        """The learning rate of the next update, as a multiple of the base rate."""
        return self._rate(self.version)

    def send(self) -> None:
        """Send what is newer here, before anything is worked on there."""
        assert self.far is not None
        chosen = {}
        for name, tensor in Slot.get(self, optimizer=True).items():
            newer = self._moments if name.startswith("optimizer/") else self._parameters
            if newer is _Newer.HERE:
                chosen[name] = tensor
        reset = self._moments is _Newer.HERE
        if chosen or reset:
            self.far.put(chosen, reset=reset)
        self._parameters, self._moments = (
            _Newer.NOWHERE if newer is _Newer.HERE else newer for newer in (self._parameters, self._moments)
        )

    def updated(self, *, counts: bool = True) -> int:
        """Note that an update was asked for there; ``counts``: it is one of those that schedules count."""
        self._parameters = self._moments = _Newer.THERE
        self.version += counts
        return self.version

    def _fetch(self, *, moments: bool = False) -> None:
        """Bring what is newer there; with ``moments`` the optimizer's state, else the parameters."""
        if (self._moments if moments else self._parameters) is not _Newer.THERE:
            return
        assert self.far is not None
        found = self.far.get(moments=moments)
        if moments:
            self._moments = _Newer.NOWHERE
            super().reset_optimizer()
        else:
            self._parameters = _Newer.NOWHERE
        super().put(found)

    def get(self, *, optimizer: bool = False) -> dict[str, Tensor]:
        """As of a slot that is here."""
        self._fetch()
        if optimizer:
            self._fetch(moments=True)
        return super().get(optimizer=optimizer)

    def put(self, state: Mapping[str, Tensor], *, version: int | None = None, resize: bool = False) -> None:
        """As of a slot that is here."""
        moments = any(name.startswith("optimizer/") for name in state)
        if any(not name.startswith("optimizer/") for name in state):
            self._fetch()
            self._parameters = _Newer.HERE
        if moments:
            self._fetch(moments=True)
            self._moments = _Newer.HERE
        super().put(state, version=version, resize=resize)

    def reshape(self, state: Mapping[str, Tensor]) -> None:
        """As of a slot that is here."""
        if state:
            self._fetch()
            self._parameters = _Newer.HERE
            super().reshape(state)

    def forget(self, names: Iterable[str]) -> None:
        """As of a slot that is here."""
        self._fetch(moments=True)
        self._moments = _Newer.HERE
        super().forget(names)

    def reset_optimizer(self) -> None:
        """As of a slot that is here."""
        self._moments = _Newer.HERE
        super().reset_optimizer()

    def squared_norm(self, weights: Mapping[str, float] | None = None, *, by_tensor: bool = False) -> float:
        """As of a slot that is here, to the last bit: the sum is made in the same order."""
        if self.far is None:
            return super().squared_norm(weights, by_tensor=by_tensor)
        found = [
            (key, place, norm)
            for place, norms in enumerate(self.far.norms(weights, by_tensor=by_tensor))
            for key, norm in norms
        ]
        assert all(key is not None for key, _, _ in found), "a penalty is of clients only"
        return float(sum(norm * norm for _, _, norm in sorted(found, key=lambda one: one[:2])))

    def update(
        self, *, scale: float = 1.0, weights: Mapping[str, float] | None = None, rate: float = 1.0,
        by_tensor: bool = False,
    ) -> int:  # fmt: skip
        """As of a slot that is here; nobody waits for it."""
        if self.far is None:
            return super().update(scale=scale, weights=weights, rate=rate, by_tensor=by_tensor)
        self.send()
        self.far.update(self.factor, scale=scale, weights=weights, rate=rate, by_tensor=by_tensor)
        return self.updated()
