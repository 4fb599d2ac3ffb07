"""What a server tells a client of its place among the others, where a selection says who runs blocks for whom."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cutlayer.errors import WireError
from cutlayer.wire import Header, Value

FOR = "for/"  # before the name of a client whose blocks are to be run


@dataclass(frozen=True)
class Lead:
    """A client's place among the others, from now on.

    ``to``: who runs the blocks between its head and its tail. ``owners``: the clients whose blocks it runs itself.
    ``slot``: the name of the trunk that it trains for them beside its own part; empty: it trains it in that part.
    ``born``: the round since which this trunk is there; another one of the same name is another trunk. ``version``:
    the updates that it begins with, where it is new to the client. ``total``: its updates in the whole run.
    """

    to: str
    owners: tuple[str, ...] = ()
    slot: str = ""
    born: int = 0
    version: int = 0
    total: int = 0

    def values(self) -> dict[str, Value]:
        """As a request tells it."""
        told: dict[str, Value] = {"to": self.to, **{f"{FOR}{owner}": True for owner in self.owners}}
        if self.slot:
            told |= {"slot": self.slot, "born": self.born, "version": self.version, "total": self.total}
        return told

    @staticmethod
    def read(header: Header, clients: Collection[str]) -> Lead:
        """What a request tells, if it can be.

        Raises:
            WireError: it cannot.
        """
        values = dict(header.values)
        to = values.pop("to", "")
        owners = [name for name in values if name.startswith(FOR)]
        if any(values.pop(name) is not True for name in owners):
            raise WireError("'lead' names a client, and does not say that its blocks are to be run.")
        names = tuple(name.removeprefix(FOR) for name in owners)
        if strange := [name for name in (to, *names) if name not in clients]:
            raise WireError(f"'lead' names '{strange[0]}', which is no client of this run.")
        slot = values.pop("slot", "")
        if "slot" not in header.values and not values:
            return Lead(str(to), names)
        if type(slot) is not str or not slot or not names or values.keys() != {"born", "version", "total"}:
            raise WireError("'lead' does not say which trunk is to be trained for whom, and that alone.")
        return Lead(str(to), names, slot, **{name: int(value) for name, value in values.items()})
