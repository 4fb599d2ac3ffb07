"""What of a run asks for what: a server may ask a client only for what the run that it offered has a use for.

``ASKED_BY`` says by verb what of a run asks for it; a verb that is not there belongs to every run. A framework says by
``asks``, ``personal``, ``line`` and ``optimizer_travels`` what it asks of clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cutlayer.allotment import Allotter
from cutlayer.arrangement import Arranger
from cutlayer.asking import named
from cutlayer.config import RunConfig
from cutlayer.contracts import Layout, Peft
from cutlayer.errors import PolicyRefused
from cutlayer.wire import Header


@dataclass(frozen=True)
class Entitled:
    """What a run, as it was offered, has a use for at one client.

    Args:
        cuts: the client's head blocks and tail blocks (-1: the server has the tail); None: a planner says them.
        moves: a planner moves its cut between rounds.
        allots: its ranks are given out by importance.
        ranks: its ranks follow the cut, or are given out.
        directions: in which an exchange has it look around in place of backpropagation; 0: none.
        exchanges: its part goes to the server and back, to be merged or handed on.
        hands_on: its part is handed on among clients, with its number of updates.
        resets: who gets a part begins with a new optimizer.
        moments: the optimizer's state goes along with a part.
        trunk_moments: what becomes of the optimizer's state of merged trunks: ``keep``, ``average``, ``reset``.
        arranges: a selection asks for sketches, and says who trains with whom.
        clips: gradients are clipped by a norm that the server computes.
        caches: the server remembers what samples were shown as.
        counts_steps: the label tokens of a step are told before its end.
        hosts: it runs blocks for other clients, or may come to.
        asks: other verbs that the framework asks for.
    """

    cuts: tuple[int, int] | None
    moves: bool
    allots: bool
    ranks: bool
    directions: int
    exchanges: bool
    hands_on: bool
    resets: bool
    moments: bool
    trunk_moments: str
    arranges: bool
    clips: bool
    caches: bool
    counts_steps: bool
    hosts: bool
    asks: frozenset[str]

    def check(self, header: Header) -> None:
        """Whether the run asks for such a request.

        Raises:
            PolicyRefused: by the rule ``verbs``, or of what it tells by ``told``: it does not.
        """
        asked, what = ASKED_BY.get(header.verb, (lambda run: True, ""))
        if not asked(self):
            raise PolicyRefused("verbs", f"{named(header)} is nothing that this run asks for: it has no {what}.")
        for needed, given, said in self._uses(header):
            if needed and not given:
                raise PolicyRefused("told", f"{named(header)} {said}, which nothing in this run asks for.")

    def _uses(self, header: Header) -> Iterator[tuple[bool, bool, str]]:
        """What a request tells: whether that is something that must be asked for, whether it is, and in words."""
        verb, told, names = header.verb, header.values, header.names
        head, tail = self.cuts if self.cuts is not None else (told.get("head_blocks"), told.get("tail_blocks"))
        if verb in ("set_up", "move"):
            blocks = told.get("head_blocks", head)
            yield True, blocks == head, f"gives {blocks} head blocks"
            yield verb == "move" and bool(names), self.ranks, "gives ranks"
        if verb == "set_up":
            blocks = told.get("tail_blocks", tail)
            yield True, blocks == tail, f"gives {blocks} tail blocks"
            yield bool(told.get("cache")), self.caches, "asks for the numbers of samples"
            yield bool(told.get("tell_step_tokens")), self.counts_steps, "asks for the label tokens of steps"
        elif verb == "head_forward":
            yield bool(told.get("graph")), not self.directions, "asks for a step with backpropagation"
        elif verb == "probe":
            count = told.get("directions")
            yield True, count == self.directions, f"asks for {count} directions"
        elif verb == "get_state":
            part = told.get("part")
            yield bool(told.get("optimizer")), self.moments, "asks for the optimizer's state"
            yield part != "own", self.hosts, f"asks for the part '{part}'"
        elif verb == "set_state":
            moments = any(name.startswith("optimizer/") for name in names)
            yield moments, self.moments or self.moves, "brings an optimizer's state"
            yield bool(told.get("reset")), self.resets, "has the optimizer begin anew"
            yield told.get("version", -1) != -1, self.hands_on, "tells a number of updates"
        elif verb == "host_get":
            yield bool(told.get("optimizer")), self.trunk_moments == "average", "asks for the optimizer's state"
        elif verb == "host_put":
            moments = any(name.startswith("optimizer/") for name in names)
            yield moments, self.trunk_moments == "average", "brings an optimizer's state"
            yield bool(told.get("reset")), self.trunk_moments == "reset", "has the optimizer begin anew"


Use = Callable[[Entitled], bool]

# By verb: what of a run asks for it, and what a run lacks that does not.
ASKED_BY: Mapping[str, tuple[Use, str]] = {
    "sketch": (lambda run: run.arranges, "selection that asks for sketches"),
    "retime": (lambda run: run.arranges, "selection that arranges who trains with whom"),
    "histogram": (lambda run: "histogram" in run.asks, "framework that asks for histograms"),
    "features": (lambda run: "features" in run.asks, "framework that asks for features"),
    "head_backward": (lambda run: not run.directions, "backpropagation"),
    "probe": (lambda run: run.directions > 0, "exchange that looks around"),
    "probed": (lambda run: run.directions > 0, "exchange that looks around"),
    "grad_norm": (lambda run: run.clips, "max_grad_norm"),
    "update": (
        lambda run: run.clips or "update" in run.asks,
        "max_grad_norm, and no framework that updates the clients' parts by themselves",
    ),
    "host_norm": (lambda run: run.hosts and run.clips, "max_grad_norm with a client for whom this one trains blocks"),
    "move": (lambda run: run.moves or run.allots, "planner that moves cuts, and no peft that gives out ranks"),
    "importance": (lambda run: run.allots, "peft that gives out ranks"),
    "begin_stage": (lambda run: "begin_stage" in run.asks, "framework that marks stages"),
    "end_stage": (lambda run: "end_stage" in run.asks, "framework that marks stages"),
    "get_state": (lambda run: run.exchanges, "merge of the clients' parts, and hands none on"),
    "set_state": (lambda run: run.exchanges, "merge of the clients' parts, and hands none on"),
    **dict.fromkeys(
        ("host_forward", "host_backward", "host_tail_step", "host_get", "host_put", "host_update"),
        (lambda run: run.hosts, "client for whom this one runs blocks"),
    ),
}  # fmt: skip


NOTHING = Entitled(
    cuts=None, moves=False, allots=False, ranks=False, directions=0, exchanges=False, hands_on=False, resets=False,
    moments=False, trunk_moments="keep", arranges=False, clips=False, caches=False, counts_steps=False, hosts=False,
    asks=frozenset(),
)  # fmt: skip
"""Of no run: only words leave."""


def entitled(config: RunConfig, layout: Layout, *, hosts: bool) -> Entitled:
    """What a run has a use for at a client.

    Args:
        config: the run, as it was offered.
        layout: the client's, before a planner says more.
        hosts: whether it runs blocks for other clients, or may come to.
    """
    framework, exchange, peft = config.build("framework"), config.build("exchange"), config.build("peft")
    planner, mixing, clients = config.build("planner"), config.build("mixing"), config.client_names
    hands_on = framework.travels or any(len(framework.line(client, clients)) > 1 for client in clients)
    allots = isinstance(peft, Allotter)
    return Entitled(
        cuts=None if planner is not None else (len(layout.head), len(layout.tail) if layout.tail_at_client else -1),
        moves=planner is not None and planner.every > 0,
        allots=allots,
        ranks=allots or type(peft).rank_at is not Peft.rank_at,
        directions=exchange.probes,
        exchanges=hands_on or (config.build("aggregator").exchanges and not framework.personal),
        hands_on=hands_on,
        resets=framework.travels,
        moments=framework.optimizer_travels,
        trunk_moments=framework.moments,
        arranges=isinstance(config.build("selection"), Arranger),
        clips=config.max_grad_norm is not None,
        caches=exchange.caches,
        counts_steps=framework.needs_step_tokens or (mixing is not None and mixing.needs_step_tokens),
        hosts=hosts,
        asks=frozenset(framework.asks),
    )
