"""The server hands clients the parts of the model that are theirs, and knows whether a client has the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

from cutlayer.apart import parts_of
from cutlayer.config import RunConfig
from cutlayer.errors import Disconnected, ModelError, Refused
from cutlayer.links.net.handing import hand
from cutlayer.links.net.session import Session
from cutlayer.models.families import number_of_blocks
from cutlayer.models.loading import Part, load_config
from cutlayer.models.pieces import Source, source_of

WANTS = "model"  # in a hello's ``wants``
PATIENCE = 10.0  # seconds that a hello waits for checksums; whoever comes again finds them made


class Handing:
    """What a server hands of a run's model, read once for each kind of part.

    ``bytes`` counts, by client, the bytes of frames by which this process handed it.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.bytes: Counter[str] = Counter()
        self._sources: dict[Part, asyncio.Task[Source]] = {}
        self._parts: dict[str, Part] = {}

    async def serve(self, session: Session) -> None:
        """Hand a client its part over a session that was admitted for it.

        Raises:
            Refused: the model cannot be handed.
            NetworkError, WireError: the session is over.
        """
        client = session.hello["client"]
        try:
            source = await self._source(client)
        except ModelError as error:
            raise Refused(f"The server cannot hand its model: {error}") from error
        try:
            await hand(session, source.read, source.listing.to_json())
        finally:
            self.bytes[client] += session.sent

    async def is_same(self, client: str, model: object) -> bool:
        """Whether a hello's ``model`` says that the client has what this server hands it.

        Raises:
            Disconnected: that is not known yet.
        """
        if not isinstance(model, Mapping) or set(model) != {"handed"}:
            return False
        try:
            async with asyncio.timeout(PATIENCE):
                return bool(model["handed"] == (await self._source(client)).listing.checksum)
        except TimeoutError as error:
            raise Disconnected("The server is still reading its model. Try again in a while.") from error

    async def _source(self, client: str) -> Source:
        part = await asyncio.to_thread(self._part, client)
        if part not in self._sources:
            self._sources[part] = asyncio.ensure_future(asyncio.to_thread(source_of, self.config.model, part))
        return await asyncio.shield(self._sources[part])

    def _part(self, client: str) -> Part:
        if not self._parts:
            self._parts = parts_of(self.config, number_of_blocks(load_config(self.config.model)))
        return self._parts[client]


def hello(client: str, instance: str) -> dict[str, Any]:
    """What a client says that wants its part handed."""
    return {"client": client, "wants": WANTS, "instance": instance}
