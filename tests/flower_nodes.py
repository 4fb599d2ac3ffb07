"""A Flower federation in one process: a grid that hands each message to a node's ClientApp, in threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity


class Nodes:
    """As much of Flower's grid as strategies use.

    Args:
        app: the ClientApp of all nodes.
        configs: by the node's number, its config.
    """

    def __init__(self, app: Any, configs: Mapping[int, dict[str, str]]) -> None:
        self.app, self.configs = app, configs
        self.errors: list[str] = []
        self._pool, self._numbers = ThreadPoolExecutor(), itertools.count()
        self._replies: dict[str, Future[Any]] = {}
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as where a real app runs

    def get_node_ids(self) -> list[int]:
        """All nodes."""
        return list(self.configs)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        """Send; each node begins at once."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{next(self._numbers)}"
            ids.append(message.metadata.message_id)
            self._replies[ids[-1]] = self._pool.submit(self._handled, message)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Any]:
        """The replies that there are."""
        done = [number for number in ids if self._replies[number].done()]
        return [self._replies.pop(number).result() for number in done]

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        """Of no messages, none; the rest is done by the other two."""
        assert not list(messages)
        return []

    def _handled(self, message: Any) -> Any:
        node = message.metadata.dst_node_id
        context = Context(1, node, dict(self.configs[node]), RecordDict(), {})
        try:
            return self.app(message, context)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            return Message(Error(code=0, reason=str(error)), reply_to=message)
