"""What a planner is told, and the parts of the cost model that it asks for (catalogue: ``cost_model``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cutlayer.costs import (
    Memory,
    ModelShape,
    Profile,
    Stages,
    Training,
    Work,
    leg_seconds,
    memory,
    queue_step,
    seconds,
)  # fmt: skip
from cutlayer.values import Layout

__all__ = ["Costs", "Situation", "Stages", "at_cut", "queue_step"]

HEADER_BYTES = 256  # about what a frame has beside its tensors; small beside them


@dataclass(frozen=True)
class Situation:
    """How things are when a planner is asked.

    ``examples`` are those that each client trains on; ``profiles`` is empty where the run has none. ``accuracy`` is
    each client's own on its validation shard (of label tokens), and ``measured`` the mean virtual seconds that a step
    since the last plan kept the client and its links busy; both are empty at the start.
    """

    num_blocks: int
    layouts: Mapping[str, Layout]
    examples: Mapping[str, float]
    profiles: Mapping[str, Profile]
    costs: Costs
    accuracy: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)

    def cut(self, client: str) -> int:
        """The head blocks that a client has now."""
        return len(self.layouts[client].head)

    def most(self, client: str) -> int:
        """The head blocks that leave the server one block."""
        return self.layouts[client].middle.stop - 1

    def stages(self, client: str, cut: int) -> Stages:
        """What a step of a client takes at another cut; only where there are profiles."""
        return self.costs.stages(at_cut(self.layouts[client], cut), client)

    def memory(self, client: str, cut: int) -> int:
        """The bytes that a client holds at another cut (``costs.memory``, section 9)."""
        return self.costs.memory(at_cut(self.layouts[client], cut), client)

    def server_memory(self, cuts: Mapping[str, int]) -> int:
        """The bytes that a server holds that serves all clients at once: one base, and each one's own."""
        return self.costs.server_memory({client: at_cut(self.layouts[client], cut) for client, cut in cuts.items()})


@dataclass(frozen=True)
class Costs:
    """The cost model of one run: ``rows`` of a micro-batch, of ``lengths`` tokens by client, ``micro`` of them a step.

    ``server`` is its profile; ``number`` the bytes of one number on the wire.
    """

    shape: ModelShape
    training: Training
    rows: int
    micro: int
    lengths: Mapping[str, int]
    profiles: Mapping[str, Profile]
    server: Profile | None
    number: int
    holds: Callable[..., Memory] = memory

    def stages(self, layout: Layout, client: str) -> Stages:
        """The stages of one optimizer step (section 5).

        In the U-shape ``down`` has all its legs but the first, ``backward`` the tail's work too, so that the sum of the
        stages is the step of a client that waits for nobody.
        """
        length, mine, server = self.lengths[client], self.profiles[client], self.server
        assert server is not None
        work, tokens = Work(self.shape, length=length, training=self.training), self.rows * length
        returns = self.training.full or any(map(self.training.trains, layout.head))
        head, middle, tail = layout.head, layout.middle, layout.tail
        leg = tokens * self.shape.hidden * self.number + HEADER_BYTES
        up = leg_seconds(leg + (0 if layout.tail_at_client else 4 * tokens), mine.up, mine.rtt)
        gradient = leg_seconds(leg, mine.down, mine.rtt) if returns else mine.rtt / 2
        top = not layout.tail_at_client
        at_server = work.forward(middle, lm_head=top)
        at_server += work.backward(middle, lm_head=top, input_gradient=returns)
        back = work.backward(head, input_gradient=False) if returns else 0.0
        legs = gradient
        if layout.tail_at_client:
            back += work.forward(tail, lm_head=True) + work.backward(tail, lm_head=True, input_gradient=True)
            legs += leg_seconds(leg, mine.down, mine.rtt) + leg_seconds(leg, mine.up, mine.rtt)
        one = Stages(
            forward=seconds(tokens * work.forward(head), mine), up=up, server=seconds(tokens * at_server, server),
            down=legs, backward=seconds(tokens * back, mine),
        )  # fmt: skip
        return Stages(**{name: value * self.micro for name, value in vars(one).items()})

    def memory(self, layout: Layout, client: str) -> int:
        """The bytes of a client's head, and of its tail in the U-shape."""
        length = self.lengths[client]
        tokens = self.rows * length
        total = self.holds(
            self.shape, blocks=layout.head, training=self.training, tokens=tokens, length=length, embedding=True
        ).total
        if layout.tail_at_client:
            total += self.holds(
                self.shape, blocks=layout.tail, training=self.training, tokens=tokens, length=length, lm_head=True
            ).total
        return total

    def server_memory(self, layouts: Mapping[str, Layout]) -> int:
        """The bytes of the server: the frozen blocks that any client needs once, and what each client adds."""
        held, frozen = 0, 0
        for client, layout in layouts.items():
            length = self.lengths[client]
            one = self.holds(
                self.shape, blocks=layout.middle, training=self.training, tokens=self.rows * length, length=length,
                lm_head=not layout.tail_at_client,
            )  # fmt: skip
            held, frozen = held + one.per_client, max(frozen, one.frozen)  # the middles end at the same block
        return frozen + held


def at_cut(layout: Layout, cut: int) -> Layout:
    """The layout with ``cut`` blocks in its head; the tail stays."""
    if layout.tail_at_client:
        return replace(layout, head=range(cut), trunk=range(cut, layout.trunk.stop))
    return replace(layout, head=range(cut), trunk=range(cut, cut), tail=range(cut, layout.tail.stop))
