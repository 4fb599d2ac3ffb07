"""A client in one round of a run whose rounds and step 11 are another system's (Flower's).

That system makes a process for each message, so what a client keeps between rounds (its optimizer, its counts) is in
its folder. What it gives to that system passes its owner's guard, and is in its log, like every frame; so are the words
of its errors, which that system sends on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer.contracts import SERVER
from cutlayer.entitled import NOTHING
from cutlayer.errors import ConfigError, CutlayerError, NetworkError, PolicyRefused
from cutlayer.frames import limits_of
from cutlayer.guard import Guard, Held
from cutlayer.keys import client_keys
from cutlayer.links.net.answering import Again, answer
from cutlayer.links.net.connecting import hello_of
from cutlayer.links.net.handing import LIMITS
from cutlayer.links.net.session import Session
from cutlayer.models.loading import load_config
from cutlayer.offered import fetched, opener, own_name
from cutlayer.outputs import alone
from cutlayer.policy import Policy, load_policy
from cutlayer.released import Counts, Log
from cutlayer.report.progress import Reporter
from cutlayer.seat import Seat
from cutlayer.wire import Header

LOG = getLogger("cutlayer.net")


class Told(CutlayerError):
    """An error in the words that may leave this machine."""


@contextmanager
def in_kind() -> Iterator[None]:
    """Let an error out by its kind alone, where no policy has allowed more; the log here has its words.

    Raises:
        Told: in place of any other.
    """
    try:
        yield
    except Told:
        raise
    except Exception as error:
        _note(error)
        raise Told(f"{type(error).__name__} (its words stay with the client)") from error


def take_part(
    address: str, number: int, arrays: Mapping[str, Tensor], places: Mapping[str, str], progress: Reporter, *,
    training: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:  # fmt: skip
    """One round: what is this client's (nothing, where it only evaluates), and what was measured of it.

    Args:
        address: ``HOST:PORT`` of the trunk.
        number: of the round.
        arrays: what was merged, which it begins with.
        places: ``data`` and ``out``, ``keys`` or ``name``; ``eval``, ``policy``, ``model``, ``device``.
        progress: is told what happens.
        training: else it evaluates.

    Raises:
        Told: it cannot; what it says may be sent on.
    """
    with in_kind():
        if missing := [key for key in ("data", "out") if key not in places]:
            raise ConfigError([f"the node's config has no '{key}'." for key in missing], "the node's config")
        keys = client_keys(places["keys"]) if "keys" in places else None
        name = own_name(keys, places.get("name"))
        policy = load_policy(places["policy"]) if "policy" in places else Policy()
        out = Path(places["out"])
        out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            try:
                if training and not policy.may_leave.head_adapter:
                    raise PolicyRefused(
                        "may_leave.head_adapter", "what merges the parts would get this client's part of the model."
                    )
                visit = _Visit(address, name, policy, places, out, progress)
                return asyncio.run(visit.round(number, arrays, training=training))
            except Exception as error:
                _note(error)
                raise Told(_words(error, policy, name, out)) from error


def _note(error: BaseException) -> None:
    """Write an error's words to this machine's log."""
    ours = isinstance(error, CutlayerError)
    LOG.error("No part in this round: %s: %s", type(error).__name__, error, exc_info=None if ours else error)


def _words(error: BaseException, policy: Policy, name: str, out: Path) -> str:
    """What may be said of an error, counted and written down as it leaves."""

    def held() -> Held:
        raise AssertionError("an error shows nothing that is held")

    counts = Counts.load(out / "sent.json")
    guard = Guard(policy, Log(out / "sent.jsonl"), counts, client=name, entitled=NOTHING, held=held, planned=0)
    return guard.words(error, Header("partition", verb="error"))


class _Visit:
    """A client that comes for one round."""

    def __init__(
        self, address: str, name: str, policy: Policy, places: Mapping[str, str], out: Path, progress: Reporter
    ) -> None:
        self.address, self.name, self.policy, self.places = address, name, policy, places
        self.out, self.progress = out, progress
        self.keys = client_keys(places["keys"]) if "keys" in places else None

    async def round(
        self, number: int, arrays: Mapping[str, Tensor], *, training: bool
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The round."""
        places = self.places
        offered = await fetched(
            opener(self.address, self.keys, self.policy, LIMITS), self.address, self.name, self.policy,
            progress=self.progress, model=places.get("model"), device=places.get("device", "auto"),
        )  # fmt: skip
        config = await offered.with_model(self.out)
        open_session = opener(self.address, self.keys, self.policy, limits_of(config, load_config(config.model)))
        seat = _RoundSeat(
            config, self.name, places["data"], places.get("eval"), self.out, self.policy, self.progress,
            base_name=offered.config.model,
        )  # fmt: skip
        seat.arrays = arrays
        hello = {**offered.hello, **seat.told(), "round": number}

        async def open_again(extras: Mapping[str, Any]) -> Session:
            told = {**hello, **extras}
            return await open_session(told, lambda: seat.guard.greets(told, len(hello_of(told))))

        words = await answer(open_again, seat.handle, again=Again(give_up=600.0), resent=seat.resent)
        try:
            found = {key: float(value) for key, value in json.loads(words).items()}
        except (ValueError, AttributeError) as error:
            said = words or "it did not say why"
            raise NetworkError(f"The server ended the round before it was done: {said}") from error
        return seat.given() if training else {}, {**found, "num-examples": float(found["num-examples"])}


class _RoundSeat(Seat):
    """A client's place in one round: it begins with what was merged."""

    arrays: Mapping[str, Tensor] = {}

    def _begin(self, header: Header) -> None:
        """Be as after its last round, with the merged part."""
        super()._begin(header)
        request = Header("aggregate", "state", "set_state", SERVER, self.name, self.name)
        request = request.but(values={"version": -1, "reset": False}, names=tuple(self.arrays))
        self._answer(self.party, request, list(self.arrays.values()))

    def given(self) -> dict[str, Tensor]:
        """Its part of the model, for what merges it."""
        request = Header("aggregate", "control", "get_state", SERVER, self.name, self.name)
        request = request.but(values={"optimizer": False, "part": "own"})
        header, tensors = self._answer(self.party, request, [])
        return dict(zip(header.names, tensors, strict=True))
