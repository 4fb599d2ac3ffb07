"""A round of Flower's, and which runs it can carry."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord

from cutlayer.allotment import Allotter
from cutlayer.assembly import routes_of
from cutlayer.build import layouts_of
from cutlayer.config import RunConfig
from cutlayer.contracts import SERVER, SHARED, Framework
from cutlayer.errors import ConfigError
from cutlayer.flower.records import OURS, counts_of, parts_of

if TYPE_CHECKING:
    from cutlayer.federation import Federation

POLL = 1.0  # seconds between looks for replies


def check(config: RunConfig, blocks: int) -> None:
    """Refuse runs whose step 11 is more than one merge of equal parts, which is what a strategy of Flower's does.

    Raises:
        ConfigError: with all that does not fit.
    """
    wrong, layouts = [], layouts_of(config, blocks)
    framework: Framework = config.build("framework")
    stops = {(stop.party, stop.slot) for route in routes_of(config, layouts).values() for stop in route}
    if framework.travels or framework.asynchronous or framework.personal or stops != {(SERVER, SHARED)}:
        wrong.append(
            f"framework '{config.framework.name}': Flower merges the clients' parts once a round and no trunks. Take "
            "sfl-v2, or another with one trunk for all whose clients' parts are merged."
        )
    if config.length[0] != "rounds":
        wrong.append(f"{config.length[0]} is given, but Flower counts rounds. Set rounds.")
    if config.selection.name != "all" or framework.participation != 1.0:
        wrong.append("Flower's strategy draws the clients of a round. Take selection: all and participation: 1.0.")
    if config.aggregator.name != "fedavg":
        wrong.append(f"aggregator is '{config.aggregator.name}', but Flower's strategy merges. Leave it out.")
    if len(set(layouts.values())) > 1:
        wrong.append("the clients have different cuts, but Flower's strategies merge equal parts. Give all the same.")
    if config.mixing is not None or config.early_stop is not None or config.profile is not None:
        wrong.append("mixing, early_stop and profile are not there with Flower. Leave them out.")
    if config.planner is not None or isinstance(config.build("peft"), Allotter):
        wrong.append("planners that move cuts, and ranks by importance, are not there with Flower. Leave them out.")
    if wrong:
        raise ConfigError(wrong, "the run")


class Rounds:
    """Flower's grid, which tells our side of each round that its messages are sent for."""

    def __init__(self, grid: Any, trunk: Federation, address: str) -> None:
        self._grid, self._trunk, self._address = grid, trunk, address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Any:
        """Send the messages of a round; meanwhile its steps are made over our stream."""
        listed = list(messages)
        if not listed:
            return self._grid.send_and_receive(listed, timeout=timeout)
        training = str(listed[0].metadata.message_type).startswith("train")
        number, done = self._trunk.open(len(listed), training=training)
        for message in listed:
            message.content[OURS] = ConfigRecord({"address": self._address, "round": number})
        replies = self._replies(listed, timeout)
        self._trunk.over()
        done.result()
        return replies

    def _replies(self, messages: Sequence[Any], timeout: float | None) -> list[Any]:
        """All replies; of a node that has failed our side hears at once, and does not wait for it."""
        open_, found = set(self._grid.push_messages(messages)), list[Any]()
        until = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            came = list(self._grid.pull_messages(open_))
            found += [message for message in came if self._fits(message)]
            open_ -= {message.metadata.reply_to_message_id for message in came}
            for message in came:
                if message.has_error():
                    self._trunk.lacks_one()
            if not open_ or time.monotonic() > until:
                return found
            time.sleep(POLL)

    def _fits(self, message: Any) -> bool:
        """Whether the strategy may have this reply; one node's numbers that are none would spoil the merge for all."""
        if message.has_error():
            return True
        why = next(filter(None, map(self._trunk.unfit, parts_of(message.content))), None)
        if why is None and not all(0 <= count < math.inf for count in counts_of(message.content)):
            why = "its 'num-examples' is no count"
        if why is not None:
            self._trunk.progress.note(f"what node {message.metadata.src_node_id} gave is not merged: {why}")
        return why is None
