"""Room at a server, by certificate: whoever opens streams without end is in nobody's way but its own."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

EACH = 32  # streams of one certificate at a time, where nobody says how many it needs
SPARE = 8  # of them for the fetching of runs and models, last words, and sessions that broke and do not know it yet


class Room:
    """How many streams there are, and how many of them have not been greeted yet.

    Args:
        each: how many one certificate may have, by its name.
        waiting: how many may wait for their greeting. Who has none there is let in also when it is full, so that all
            who fill it together still lock nobody out; there is one more at most for each certificate.
        unnamed: how many there may be of those that come without a certificate.
    """

    def __init__(self, each: Callable[[str], int], waiting: int, unnamed: Callable[[], int]) -> None:
        self.each, self.most_waiting, self.unnamed = each, waiting, unnamed
        self.open: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()

    def full(self, name: str) -> str:
        """Why there is no room for one more stream of this name, in words; empty: there is."""
        if self.open[name] >= (most := self.each(name) if name else self.unnamed()):
            return f"{most} streams are open with this certificate." if name else "The server is busy."
        if self.waiting.total() >= self.most_waiting and (self.waiting[name] or not name):
            return "The server is busy."
        return ""

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[None]:
        """One more stream, until it has ended, its last words included."""
        with _counted(self.open, name):
            yield

    @contextlib.contextmanager
    def greeting(self, name: str) -> Iterator[None]:
        """One that waits for its greeting."""
        with _counted(self.waiting, name):
            yield


@contextlib.contextmanager
def _counted(counter: Counter[str], name: str) -> Iterator[None]:
    counter[name] += 1
    try:
        yield
    finally:
        counter[name] -= 1
        if not counter[name]:  # or each name ever seen would stay
            del counter[name]
