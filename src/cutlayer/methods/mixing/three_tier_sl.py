"""An aggregator stands between clients and server and passes on only the average of a group's activations.

From the catalogue's account (we know of no paper): the average of K clients, soft labels where the server has the loss,
the same output to all in the U-shape, and G/K back to each. In the U-shape a client's tail learns from its own loss,
and the aggregator sums the clients' gradients by their shares. Ours: the trunk makes one update a step for all groups,
by their sizes; groups are the clients of a round in order, and who is left over joins the last group.

The aggregator is a party of its own, ``aggregator`` on the wire (its profile: ``profiles.aggregator``). It sees all
that clients send, so the protection holds only while it does not help the server. Nor is it complete: a position at
which the others have only padding goes up as one client's own, times its share, so rows of one length are better. With
unequal weights the masses of the labels say whose they are. Clients' parts are merged at the server, as the framework
has it, and evaluation texts go up one by one: leave ``data.eval`` out where they are private.

Averages of unlike texts destroy nearly all that predicts the next token: K = 2 with unequal weights (0.8, 0.2), or
texts of one kind with the same labels, are what this is for. Held-out loss of the demo model (runs/three-tier-two-part
with equal weights, 3 rounds, one seed), from 7.03: 4.41 with K = 2 and 4.92 with K = 4, where ``minibatch-sfl``, which
averages nothing, reached 3.25. What an attacker recovers is not measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutlayer.contracts import SERVER, How, Joint, Layout, Mixing, Parcel, StepResult
from cutlayer.errors import MethodError
from cutlayer.joint import Meeting
from cutlayer.methods.mixing._averager import Averager
from cutlayer.registry import method

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.driver import Run

AGGREGATOR = "aggregator"


@method("mixing")
@dataclass(frozen=True)
class ThreeTierSL(Mixing):
    """An aggregator passes on only the average of the activations of a group of clients."""

    size: int = 2  # clients whose activations are averaged, at least
    weights: list[float] | None = None  # of a group's clients, in order; null: the same for all

    between = AGGREGATOR

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"size is {self.size}; an average is of 2 clients or more")
        if self.weights is not None and (
            len(self.weights) != self.size or not all(math.isfinite(w) and w > 0 for w in self.weights)
        ):
            raise ValueError(
                f"weights is {self.weights}; it must be {self.size} numbers above 0, one for each of a group"
            )

    def problems(self, config: RunConfig) -> Iterator[str]:
        """A client must never be alone in a step, and batches must be alike enough to be averaged."""
        framework, names = config.build("framework"), config.client_names
        count = max(1, math.ceil(framework.participation * len(names)))
        if count < self.size:
            yield f"averages {self.size} clients, but a round has {count}. Add some, or raise framework.participation."
        elif self.weights is not None and count % self.size:
            yield f"has weights for groups of {self.size}, but a round has {count} clients, which is no multiple of it."
        if config.length[0] != "rounds":
            yield f"needs clients that make the same steps; with {config.length[0]} one may be left alone. Set rounds."
        if config.gradient_accumulation > 1:
            yield "needs steps of one micro-batch, or one client may be left alone. Set gradient_accumulation: 1."
        if config.data.packing:
            yield "cannot average packed rows, whose texts begin at different places. Set data.packing: false."
        if config.build("exchange").caches:
            yield "averages what clients send, which a cache leaves out. Set exchange.cache: false."

    def check(self, layouts: Mapping[str, Layout]) -> None:
        """All must be cut at the same place."""
        first = next(iter(layouts))
        other = next((name for name in layouts if layouts[name] != layouts[first]), None)
        if other is not None:
            raise MethodError(
                f"mixing 'three-tier-sl': '{first}' and '{other}' have different cuts, so their activations cannot be "
                "averaged. Give all clients the same head_blocks and tail_blocks."
            )

    def gather(self, run: Run, clients: Sequence[str]) -> Joint:
        """The groups of these clients."""
        return Tier(run, clients, self.size, self.weights)

    def alone(self, run: Run, stop: Any) -> Any:
        """An evaluation passes through the aggregator as it is."""
        return _Relayed(run, stop)


class Tier(Joint):
    """Clients in groups with an aggregator, and one update of the trunk when all have made their step."""

    def __init__(self, run: Run, clients: Sequence[str], size: int, weights: Sequence[float] | None) -> None:
        if len(clients) < size:
            raise MethodError(
                f"mixing 'three-tier-sl' averages {size} clients, but only {len(clients)} train in round "
                f"{run.counters.rounds}. Look at selection and framework.participation."
            )
        self.run = run
        starts = range(0, len(clients) - len(clients) % size, size)
        groups = [list(clients[start : start + size]) for start in starts]
        groups[-1] += clients[len(groups) * size :]
        self.groups = {f"group {number}": _Group(run, f"group {number}", g, weights) for number, g in enumerate(groups)}
        self.of = {client: group for group in self.groups.values() for client in group.members}
        self.meeting: Meeting[StepResult, None] = Meeting(clients, run.clock, "three-tier-sl")

    def wrap(self, stop: Any, client: str) -> Any:
        """The stop behind the aggregator."""
        return _Averaged(self.of[client], stop, client)

    async def done(self, result: StepResult) -> None:
        """Wait for all groups, and the update."""
        await self.meeting.bring(result.client, result, self._update)

    async def _update(self, results: Mapping[str, StepResult]) -> Mapping[str, None]:
        sizes = {name: float(sum(c in results for c in group.members)) for name, group in self.groups.items()}
        made = {name: size for name, size in sizes.items() if size}
        self.run.update_slot(self.run.slots_of(list(results))[0], made, participants=len(results))
        return dict.fromkeys(results)

    def leave(self, client: str) -> None:
        """Nobody waits for it."""
        self.of[client].leave(client)
        self.meeting.leave(client)


class _Group:
    """The clients of one average, and where they wait for each other."""

    def __init__(self, run: Run, name: str, members: Sequence[str], weights: Sequence[float] | None) -> None:
        self.run, self.name, self.members = run, name, list(members)
        given = weights if weights is not None else [1.0] * len(members)
        shares = {client: weight / sum(given) for client, weight in zip(members, given, strict=True)}
        left, causal = run.config.data.padding_side == "left", run.parts.base.anatomy.causal
        self.averager = Averager(shares, left=left, causal=causal)
        self.there: Meeting[tuple[Parcel, How, Any], Parcel] = Meeting(members, run.clock, f"{name} of the aggregator")
        self.back: Meeting[tuple[Parcel, How, Any], Parcel] = Meeting(members, run.clock, f"{name} of the aggregator")

    def leave(self, client: str) -> None:
        self.there.leave(client)
        self.back.leave(client)

    async def forward(self, brought: Mapping[str, tuple[Parcel, How, Any]]) -> Mapping[str, Parcel]:
        """U-shape: the average up, and its output to all."""
        _, how, stop = next(iter(brought.values()))
        out = await self._down(await stop.forward(await self._up(brought), how))
        hidden = out.tensors["hidden"]
        return {
            name: self._to(name, one[0], out, self.averager.pieces[name].own(hidden)) for name, one in brought.items()
        }

    async def tail_step(self, brought: Mapping[str, tuple[Parcel, How, Any]]) -> Mapping[str, Parcel]:
        """Two-part: the average up, and each client's share of its gradient."""
        _, how, stop = next(iter(brought.values()))
        return self._dealt(brought, await self._down(await stop.tail_step(await self._up(brought), how)))

    async def backward(self, brought: Mapping[str, tuple[Parcel, How, Any]]) -> Mapping[str, Parcel]:
        """U-shape: the sum of the clients' gradients up, and each client's share of what comes back."""
        parcel, how, stop = next(iter(brought.values()))
        summed = self.averager.gradients({name: one[0].tensors["hidden"] for name, one in brought.items()})
        about = parcel.header.but(sender=AGGREGATOR, receiver=SERVER, client=self.name, values={"last": True})
        up = await self.run.carrier.carry(Parcel(about, [summed]))
        return self._dealt(brought, await self._down(await stop.backward(up, how)))

    async def _up(self, brought: Mapping[str, tuple[Parcel, How, Any]]) -> Parcel:
        if len(brought) < 2:
            raise MethodError(
                f"Client '{next(iter(brought))}' is left alone in {self.name} of the aggregator, so nothing goes up."
            )
        headers = [parcel.header for parcel, _, _ in brought.values()]
        tensors = self.averager.activations({name: parcel.tensors for name, (parcel, _, _) in brought.items()})
        values: dict[str, bool | int | float | str] = {"last": True}
        values |= {"needs_gradient": any(header.value("needs_gradient") for header in headers)}
        if "labels" in tensors:
            counts = {key: sum(int(h.value(key)) for h in headers) for key in ("label_tokens", "tokens")}
            values |= {"weight": 1.0, **counts}
        about = headers[0].but(
            sender=AGGREGATOR, receiver=SERVER, client=self.name, values=values, names=tuple(tensors)
        )  # fmt: skip
        return await self.run.carrier.carry(Parcel(about, list(tensors.values())))

    async def _down(self, parcel: Parcel) -> Parcel:
        """What the server gives, at the aggregator; of the rows' losses, which are the server's, only the sum."""
        tensors = {name: tensor for name, tensor in parcel.tensors.items() if name != "row_losses"}
        header = parcel.header.but(
            receiver=AGGREGATOR, names=tuple(tensors), kind=parcel.header.kind if tensors else "no-gradient"
        )  # fmt: skip
        return await self.run.carrier.carry(Parcel(header, list(tensors.values())))

    def _dealt(self, brought: Mapping[str, tuple[Parcel, How, Any]], out: Parcel) -> Mapping[str, Parcel]:
        gradient = out.tensors.get("hidden")
        return {
            name: self._to(name, one[0], out, None if gradient is None else self.averager.dealt(gradient, name))
            for name, one in brought.items()
        }

    @staticmethod
    def _to(client: str, asked: Parcel, out: Parcel, tensor: Any) -> Parcel:
        """A parcel from the aggregator to a client, of the client's own step."""
        about = asked.header
        header = out.header.but(
            sender=AGGREGATOR, receiver=client, client=client, step=about.step, micro=about.micro, turn=about.turn
        )  # fmt: skip
        return Parcel(header, [] if tensor is None else [tensor])


@dataclass(frozen=True)
class _Averaged:
    """The server's stop as a client of a group meets it."""

    group: _Group
    stop: Any
    client: str

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        parcel.open()  # here, so that its bytes and seconds are booked on this client's step
        return await self.group.there.bring(self.client, (parcel, how, self.stop), self.group.forward)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        parcel.open()
        return await self.group.there.bring(self.client, (parcel, how, self.stop), self.group.tail_step)

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        return await self.group.back.bring(self.client, (parcel, how, self.stop), self.group.backward)

    async def leave(self, client: str) -> None:
        await self.stop.leave(client)


@dataclass(frozen=True)
class _Relayed:
    """The server's stop behind an aggregator that changes nothing (evaluation)."""

    run: Run
    stop: Any

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        out = await self.stop.forward(await self._at(parcel, AGGREGATOR, SERVER), how)
        return await self._at(out, SERVER, AGGREGATOR, then=parcel.header.client)

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        out: Parcel = await self.stop.tail_step(await self._at(parcel, AGGREGATOR, SERVER), how)
        return out

    async def leave(self, client: str) -> None:
        await self.stop.leave(client)

    async def _at(self, parcel: Parcel, sender: str, receiver: str, then: str = "") -> Parcel:
        header, tensors = parcel.open()
        found = await self.run.carrier.carry(Parcel(header.but(sender=sender, receiver=receiver), tensors))
        header, tensors = found.open()
        return Parcel(header.but(sender=AGGREGATOR, receiver=then) if then else header, tensors)
