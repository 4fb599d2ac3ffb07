"""The ClientApp: for each message of a round a client opens our stream, answers its steps, and gives its part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from cutlayer.errors import NetworkError
from cutlayer.flower.records import OURS, arrays_of, reply_of
from cutlayer.one_round import in_kind, take_part
from cutlayer.report.progress import reporter

PLACES = ("name", "data", "eval", "out", "keys", "policy", "model", "device")  # what a node's config may say


def client_app(**places: str) -> ClientApp:
    """The ClientApp of a node.

    Where its data are and what its owner allows is in the node's config (``flower-supernode --node-config``), or here:
    ``data`` (its text) and ``out`` (its folder) must be given, and ``keys`` or, without TLS on one machine, ``name``;
    ``eval``, ``policy``, ``model`` and ``device`` are as of ``cutlayer join``. Flower sends the words of an error on:
    it gets the kind alone, unless the policy has ``may_leave.error_texts``; the words are in the node's log.
    """
    app = ClientApp()

    def handle(message: Any, context: Any) -> Any:
        with in_kind():
            found = {key: str(context.node_config[key]) for key in PLACES if key in context.node_config}
            return Message(_handled(message, {**places, **found}), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    return app


def _handled(message: Any, places: Mapping[str, str]) -> Any:
    if OURS not in message.content.config_records:
        raise NetworkError("The message comes from no ServerApp of cutlayer: it does not say where the trunk is.")
    told = message.content.config_records[OURS]
    key, arrays = arrays_of(message.content)
    training = str(message.metadata.message_type).startswith("train")
    state, metrics = take_part(
        str(told["address"]), int(told["round"]), arrays, places, reporter(False), training=training
    )
    return reply_of(key, state if training else None, metrics)
