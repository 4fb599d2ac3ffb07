"""A turn at the server: clients in a given order (or as they come), one at a time."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from cutlayer.clock import Queue, Turnstile
from cutlayer.contracts import How, Parcel


class Turn:
    """A stop that its client enters when its turn has come, and gives up after its last backward.

    Wraps a trunk (entered at ``forward``) or the server's tail (entered at ``tail_step``). With ``hold`` the turn ends
    only at ``leave``: where the update is a verb of its own that follows the backward.
    """

    def __init__(self, stop: Any, turnstile: Turnstile | Queue, client: str, *, hold: bool) -> None:
        self.stop, self.turnstile, self.client, self.hold = stop, turnstile, client, hold
        self._inside: AbstractAsyncContextManager[None] | None = None

    async def _enter(self) -> None:
        if self._inside is None:
            inside = self.turnstile(self.client)
            await inside.__aenter__()
            self._inside = inside

    async def leave(self, client: str) -> None:
        """Give up the turn."""
        if self._inside is not None:
            inside, self._inside = self._inside, None
            await inside.__aexit__(None, None, None)

    async def forward(self, parcel: Parcel, how: How) -> Parcel:
        """Wait for the turn, then the trunk's forward."""
        await self._enter()
        out: Parcel = await self.stop.forward(parcel, how)
        return out

    async def backward(self, parcel: Parcel, how: How) -> Parcel:
        """The trunk's backward; the last one ends the turn."""
        last = bool(parcel.header.value("last"))
        out: Parcel = await self.stop.backward(parcel, how)
        if last and not self.hold:
            await self.leave(self.client)
        return out

    async def tail_step(self, parcel: Parcel, how: How) -> Parcel:
        """Wait for the turn, then the tail's step; the last one ends the turn."""
        await self._enter()
        last = bool(parcel.header.value("last"))
        out: Parcel = await self.stop.tail_step(parcel, how)
        if last and not self.hold:
            await self.leave(self.client)
        return out
