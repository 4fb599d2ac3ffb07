"""The trunk of a group at the client that trains it, in a process of its own: a slot beside the client's own part."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cutlayer.asking import WEIGHT
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, Layout
from cutlayer.errors import PolicyRefused, WireError
from cutlayer.leading import Lead
from cutlayer.models.arena import Arena
from cutlayer.models.segment import Base
from cutlayer.models.slots import Slot, new_params, parameter_of
from cutlayer.plans import at_ranks, slot_ranks
from cutlayer.schedule import learning_rate, make_optimizer
from cutlayer.wire import Header, Value

Answer = tuple[Header, list[Tensor]]


@dataclass(frozen=True)
class KeptTrunk:
    """Such a trunk as a checkpoint has it: which one it is, its updates, its parameters and its optimizer's state."""

    slot: str
    born: int
    version: int
    state: Mapping[str, Tensor]

    def noted(self) -> dict[str, Any]:
        """What of it is no tensor."""
        return {"slot": self.slot, "born": self.born, "version": self.version}


class TrunkSlot:
    """A trunk that a client trains for its group, and the verbs that are about it.

    Args:
        config: the run.
        name: the client's.
        lead: what the server said of it.
        base: has the blocks.
        names: what it trains.
        users: the layouts of those who pass it.
        kept: what the client's checkpoint has; it is taken where it is of this trunk.
    """

    def __init__(
        self, config: RunConfig, name: str, lead: Lead, base: Base, names: Collection[str], users: Sequence[Layout],
        kept: KeptTrunk | None,
    ) -> None:  # fmt: skip
        self.config, self.name, self.born, self._device = config, name, lead.born, base.device
        ordered, arena = [n for n in base.initial if n in names], Arena()
        ranks = slot_ranks(config.build("peft"), base, ordered, users)
        start = {**base.initial, **at_ranks(base, ranks)} if ranks else base.initial
        params = new_params(start, ordered, arena)
        self.slot = Slot(lead.slot, params, make_optimizer(config), learning_rate(config, lead.total), arena)
        self.slot.version = lead.version
        if kept is not None and (kept.slot, kept.born) == (lead.slot, lead.born):
            self.slot.put(kept.state, version=kept.version, resize=True)

    def is_of(self, lead: Lead) -> bool:
        """Whether this is the trunk that the server speaks of."""
        return (self.slot.name, self.born) == (lead.slot, lead.born)

    def last_for(self, updates: int) -> None:
        """So many updates it has in the run."""
        self.slot.retime(learning_rate(self.config, updates))

    def kept(self) -> KeptTrunk:
        """As a checkpoint needs it."""
        return KeptTrunk(self.slot.name, self.born, self.slot.version, self.slot.get(optimizer=True))

    def answer(self, header: Header, tensors: Sequence[Tensor]) -> Answer:
        """Do what a request asks for.

        Raises:
            PolicyRefused: it brings what is not the trunk's.
            WireError: it came out of order.
        """
        given = dict(zip(header.names, tensors, strict=True))
        values, found = getattr(self, f"_{header.verb}")(header, given)
        step_name = "aggregate" if header.verb in ("host_get", "host_put") else "trunk_backward"
        kind = "state" if header.verb == "host_get" else "ack"
        told = Header(
            step_name, kind, "", self.name, SERVER, self.name, header.slot, header.step, header.micro, header.turn,
            values, tuple(found),
        )  # fmt: skip
        return told, list(found.values())

    def _host_get(self, header: Header, given: Mapping[str, Tensor]) -> tuple[dict[str, Value], dict[str, Tensor]]:
        return {"version": self.slot.version}, self.slot.get(optimizer=bool(header.value("optimizer")))

    def _host_put(self, header: Header, given: Mapping[str, Tensor]) -> tuple[dict[str, Value], dict[str, Tensor]]:
        if not self.slot.idle:
            raise WireError(f"'{self.name}' was given tensors of '{header.slot}' while gradients wait for its update.")
        held = self.slot.get()
        for name, tensor in given.items():
            own = held.get(parameter_of(name))
            fits = own is not None and (
                tensor.numel() <= own.numel() if name != parameter_of(name) else tensor.shape == own.shape
            )
            if not fits or not tensor.is_floating_point():
                raise PolicyRefused("owned", f"'host_put' brings '{name}', which is not as '{header.slot}' has it.")
        if header.value("reset"):
            self.slot.reset_optimizer()
        self.slot.put({name: tensor.to(self._device) for name, tensor in given.items()})
        return {}, {}

    def _host_update(self, header: Header, given: Mapping[str, Tensor]) -> tuple[dict[str, Value], dict[str, Tensor]]:
        version = self.slot.update(
            scale=float(header.value("scale")), weights=self._weights(header), rate=float(header.value("rate")),
            by_tensor=bool(header.value("by_tensor")),
        )  # fmt: skip
        return {"version": version}, {}

    def _host_norm(self, header: Header, given: Mapping[str, Tensor]) -> tuple[dict[str, Value], dict[str, Tensor]]:
        squared = self.slot.squared_norm(self._weights(header), by_tensor=bool(header.value("by_tensor")))
        return {"squared_norm": squared}, {}

    def _weights(self, header: Header) -> dict[str, float] | None:
        """What each client's gradients weigh; None: all alike, as they are."""
        told = {n.removeprefix(WEIGHT): float(v) for n, v in header.values.items() if n.startswith(WEIGHT)}
        if told and (missing := self.slot.waiting - told.keys()):
            raise WireError(f"'{header.verb}' says nothing of '{min(missing)}', whose gradients wait.")
        return told or None
