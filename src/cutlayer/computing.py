"""The one thread that computes for all runs of a server.

Its event loop takes the runs' verbs in turn, each from its beginning to its end. So two runs never draw from PyTorch's
generator, or use a GPU, at the same time, and each run has the numbers that it would have alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from cutlayer.links.net.remote import on_loop

T = TypeVar("T")


class Computing:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="cutlayer-compute", daemon=True)
        self._thread.start()

    async def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``, which runs in the thread."""
        return await on_loop(self.loop, work)

    def close(self) -> None:
        """End the thread, once nothing runs in it any more."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
