"""The ClientApp: for each message of a round a client opens our stream, answers the round's steps, and gives its part.

Flower makes a process for each message, so what a client keeps between rounds (its optimizer, its counts) is in its
folder. What it gives to Flower passes its owner's guard, and is in its log, like every frame.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor

from cutlayer.contracts import SERVER
from cutlayer.errors import ConfigError, NetworkError, PolicyRefused
from cutlayer.flower.records import OURS, arrays_of, reply_of
from cutlayer.frames import limits_of
from cutlayer.keys import client_keys
from cutlayer.links.net.answering import Again, answer
from cutlayer.links.net.connecting import hello_of
from cutlayer.links.net.handing import LIMITS
from cutlayer.links.net.session import Session
from cutlayer.models.loading import load_config
from cutlayer.offered import fetched, opener, own_name
from cutlayer.outputs import alone
from cutlayer.policy import Policy, load_policy
from cutlayer.report.progress import Reporter, reporter
from cutlayer.seat import Seat
from cutlayer.wire import Header

PLACES = ("name", "data", "eval", "out", "keys", "policy", "model", "device")  # what a node's config may say


def client_app(**places: str) -> ClientApp:
    """The ClientApp of a node.

    Where its data are and what its owner allows is in the node's config (``flower-supernode --node-config``), or here:
    ``data`` (its text) and ``out`` (its folder) must be given, and ``keys`` or, without TLS on one machine, ``name``;
    ``eval``, ``policy``, ``model`` and ``device`` are as of ``cutlayer join``.
    """
    app = ClientApp()

    def handle(message: Any, context: Any) -> Any:
        found = {key: str(context.node_config[key]) for key in PLACES if key in context.node_config}
        return Message(_handled(message, {**places, **found}), reply_to=message)

    app.train()(handle)
    app.evaluate()(handle)
    return app


def _handled(message: Any, places: Mapping[str, str]) -> Any:
    if missing := [key for key in ("data", "out") if key not in places]:
        raise ConfigError([f"the node's config has no '{key}'." for key in missing], "the node's config")
    if OURS not in message.content.config_records:
        raise NetworkError("The message comes from no ServerApp of cutlayer: it does not say where the trunk is.")
    told = message.content.config_records[OURS]
    key, arrays = arrays_of(message.content)
    training = str(message.metadata.message_type).startswith("train")
    out = Path(places["out"])
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        state, metrics = asyncio.run(
            _round(str(told["address"]), int(told["round"]), arrays, places, out, reporter(False), training=training)
        )
    return reply_of(key, state if training else None, metrics)


async def _round(
    address: str, number: int, arrays: Mapping[str, Tensor], places: Mapping[str, str], out: Path, progress: Reporter,
    *, training: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """One round: what is this client's, and what it measured."""
    keys = client_keys(places["keys"]) if "keys" in places else None
    name = own_name(keys, places.get("name"))
    policy = load_policy(places["policy"]) if "policy" in places else Policy()
    if training and not policy.may_leave.head_adapter:
        raise PolicyRefused("may_leave.head_adapter", "Flower's strategy gets this client's part of the model.")
    offered = await fetched(
        opener(address, keys, policy, LIMITS), address, name, policy, progress=progress, model=places.get("model"),
        device=places.get("device", "auto"),
    )  # fmt: skip
    config = await offered.with_model(out)
    open_session = opener(address, keys, policy, limits_of(config, load_config(config.model)))
    seat = _RoundSeat(
        config, name, places["data"], places.get("eval"), out, policy, progress, base_name=offered.config.model
    )
    seat.arrays = arrays
    hello = {**offered.hello, **seat.told(), "round": number}

    async def open_again(extras: Mapping[str, Any]) -> Session:
        told = {**hello, **extras}
        return await open_session(told, lambda: seat.guard.greets(told, len(hello_of(told))))

    words = await answer(open_again, seat.handle, again=Again(give_up=600.0), resent=seat.resent)
    try:
        found = {key: float(value) for key, value in json.loads(words).items()}
    except (ValueError, AttributeError) as error:
        raise NetworkError(f"The server ended the round before it was done: {words or 'it did not say why'}") from error
    return seat.given() if training else {}, {**found, "num-examples": float(found["num-examples"])}


class _RoundSeat(Seat):
    """A client's place in one round: it begins with what Flower merged."""

    arrays: Mapping[str, Tensor] = {}

    def _begin(self, header: Header) -> None:
        """Be as after its last round, with the merged part."""
        super()._begin(header)
        request = Header("aggregate", "state", "set_state", SERVER, self.name, self.name)
        request = request.but(values={"version": -1, "reset": False}, names=tuple(self.arrays))
        self._answer(self.party, request, list(self.arrays.values()))

    def given(self) -> dict[str, Tensor]:
        """Its part of the model, for Flower's strategy."""
        request = Header("aggregate", "control", "get_state", SERVER, self.name, self.name)
        request = request.but(values={"optimizer": False, "part": "own"})
        header, tensors = self._answer(self.party, request, [])
        return dict(zip(header.names, tensors, strict=True))
