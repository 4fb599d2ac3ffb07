"""A client gets its part of the model from the server, and keeps it beside its output.

The listing is judged before a byte is written, every entry by its checksum before anything is loaded. What is under
way lies in a folder of its own, which is moved to its place when all of it is there; a transfer that broke, or whose
process was killed, goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

from cutlayer.apart import parts_of
from cutlayer.config import RunConfig
from cutlayer.errors import Disconnected, OutputError, Refused
from cutlayer.files import move
from cutlayer.handing import hello
from cutlayer.links.net.answering import Again
from cutlayer.links.net.handing import listing_of, pieces
from cutlayer.links.net.session import Session
from cutlayer.models.families import number_of_blocks
from cutlayer.models.loading import load_config, own_tensors
from cutlayer.models.pieces import PIECE, WEIGHTS, Item, Listing, foreign, hashed
from cutlayer.report.progress import Reporter

LOG = getLogger("cutlayer.net")
T = TypeVar("T")
SERVED = "served"  # as --model
BASE = "base"  # where the part is, in the client's folder
LISTING = "listing.json"
Open = Callable[[Mapping[str, Any]], Awaitable[Session]]


def is_served(model: str | None, config: RunConfig, *, own: bool) -> bool:
    """Whether a client is to get the model from the server.

    Args:
        model: what the client's owner said, if anything.
        config: the run as the server offers it.
        own: the server's model is a folder of its own, and no name that others know.
    """
    return model == SERVED or (model is None and own and not Path(config.model).is_dir())


@dataclass
class _Entry:
    """An entry of the listing on its way to the disk: its file, where in it it begins, and how much is there."""

    number: int
    item: Item
    path: Path
    place: int
    have: int = 0  # bytes
    fresh: bool = True  # all of it came from the server since this process began
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def missing(self) -> int:
        """Bytes that have not come."""
        return self.item.size - self.have

    def look(self) -> None:
        """Take account of what an earlier process has written."""
        there = self.path.stat().st_size if self.path.exists() else 0
        self.have = min(max(there - self.place, 0), self.item.size)
        self.fresh = not self.have
        if self.have:
            self.digest = hashed(self.path, self.place, self.have)
        if not self.missing and self.digest.hexdigest() != self.item.checksum:
            self.restart()

    def restart(self) -> None:
        """Begin again."""
        self.have, self.fresh, self.digest = 0, True, hashlib.sha256()

    def take(self, data: memoryview) -> None:
        """Write the next bytes.

        Raises:
            Refused: all of it is there, and it is not what the listing said.
        """
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(self.place + self.have)
            file.write(data)
        self.digest.update(data)
        self.have += len(data)
        if not self.missing and self.digest.hexdigest() != self.item.checksum:
            if self.fresh:
                raise Refused(
                    f"'{self.item.name}' of the server's model came with another checksum than the server had said. "
                    "Nothing of it was used. Ask the operator whether the model's files changed while it runs."
                )
            self.restart()  # what lay on the disk was damaged


class Fetch:
    """One client's way to its part of the model.

    ``received`` counts bytes of frames.

    Args:
        connect: opens a session with a hello.
        client: the client's name.
        again: when to try again after a connection was lost.
        progress: is told what happens.
    """

    def __init__(self, connect: Open, client: str, *, again: Again | None, progress: Reporter) -> None:
        self.connect, self.client, self.again, self.progress = connect, client, again or Again(), progress
        self.received = 0
        self._instance = secrets.token_hex(8)

    async def listing(self) -> Listing:
        """What the server hands.

        Raises:
            CutlayerError: it hands nothing, or nothing that could be taken.
        """

        async def ask(session: Session) -> Listing:
            return Listing.from_json(bytes(await listing_of(session, self.client)))

        return await self._over_sessions(ask, "It knows what would be handed of the model.")

    async def into(self, out: Path, listing: Listing, config: RunConfig) -> Path:
        """The folder with the part, below ``out``: fetched, or there already; every checksum is checked.

        Args:
            out: the client's folder, which no other process may use meanwhile.
            listing: what the server hands.
            config: the run, by which the part must be the client's own.

        Raises:
            OutputError: the disk is full, or the folder holds a part of another model.
            CutlayerError: what came is not what was listed, or is not what a client takes.
        """
        final, draft = out / BASE, out / f".{BASE}.draft"
        try:
            if final.is_dir():
                await asyncio.to_thread(_check, final, listing)
                return final
            if not _is_of(draft, listing):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                (draft / LISTING).write_bytes(listing.to_json())
            files, tensors = await asyncio.to_thread(_entries, draft, listing)
            missing = sum(entry.missing for entry in files + tensors)
            if missing > (free := shutil.disk_usage(out).free):
                raise OutputError(
                    f"The model needs {missing:,} bytes more on the disk of {out}, which has {free:,}. Make room."
                )
            self.progress.note(f"fetching this client's part of the model from the server: {missing / 1e6:.1f} MB")
            await self._bring(files)
            await asyncio.to_thread(_judge, draft, listing, config, self.client)
            await self._bring(tensors)
            await asyncio.to_thread(move, draft, final)
        except OSError as error:
            raise OutputError(
                f"The model cannot be written to {out}: {error.strerror or error}. What came is kept: with that "
                "mended, the same command goes on."
            ) from error
        self.progress.note(f"the part is in {final}; {self.received / 1e6:.1f} MB came, beside the run's own traffic")
        return final

    async def _bring(self, entries: list[_Entry]) -> None:
        """Fetch what entries lack."""
        by_number = {entry.number: entry for entry in entries}

        async def fetch(session: Session) -> None:
            while any(entry.missing for entry in entries):
                async for number, data in pieces(session, self.client, _wanted(entries)):
                    by_number[number].take(data)

        what = "tensors" if any(entry.item.dtype for entry in entries) else "files"
        said = f"It has the {what} of its part of the model."
        await self._over_sessions(fetch, said, lambda: sum(entry.have for entry in entries))

    async def _over_sessions(
        self, work: Callable[[Session], Awaitable[T]], said: str, done: Callable[[], int] = lambda: 0
    ) -> T:
        """Do it over as many sessions as it takes; ``said`` at its end, and ``done`` tells how much is."""
        tries, since = 0, time.monotonic()
        while True:
            before = done()
            try:
                session = await self.connect(hello(self.client, self._instance))
                words = "It could not use what came, or was stopped."
                try:
                    found = await work(session)
                    words = said
                    return found
                finally:
                    self.received += session.received
                    await session.close(words)
            except Disconnected as error:
                if done() != before:
                    tries, since = 0, time.monotonic()
                elif time.monotonic() - since > self.again.give_up:
                    raise
                seconds = self.again.pause(tries)
                tries += 1
                LOG.warning("%s Trying again in %.1f seconds.", error, seconds)
                await asyncio.sleep(seconds)


def _entries(draft: Path, listing: Listing) -> tuple[list[_Entry], list[_Entry]]:
    """Files, and tensors in the order in which they lie in their file, with what is there of each."""
    head, places = listing.safetensors()
    weights = draft / WEIGHTS
    if not weights.exists() or weights.stat().st_size < len(head):
        weights.write_bytes(head)
    numbered = {item: number for number, item in enumerate(listing.items)}
    files = [_Entry(numbered[item], item, draft / item.name, 0) for item in listing.files]
    tensors = [_Entry(numbered[item], item, weights, place) for item, place in places.items()]
    for entry in files + tensors:
        entry.path.touch()
        entry.look()
    return files, tensors


def _wanted(entries: list[_Entry]) -> Iterator[tuple[int, int, int]]:
    """The pieces that are missing, as of now."""
    for number, start, size in [(entry.number, entry.have, entry.item.size) for entry in entries]:
        for place in range(start, size, PIECE):
            yield number, place, min(PIECE, size - place)


def _judge(draft: Path, listing: Listing, config: RunConfig, client: str) -> None:
    """Refuse files that lead elsewhere, and tensors that are not the client's own.

    Raises:
        Refused: there are such.
        ModelError: the model cannot be cut so.
    """
    for item in listing.files:
        if not item.name.endswith(".json"):
            continue
        try:
            key = foreign((draft / item.name).read_bytes())
        except ValueError as error:
            raise Refused(f"'{item.name}' of the server's model is no sound JSON: {error}.") from error
        if key is not None:
            raise Refused(
                f"'{item.name}' of the server's model has '{key}', by which other files or code would be loaded. A "
                "model with it can only be used from your own disk: name it by --model."
            )
    part = parts_of(config, number_of_blocks(load_config(draft)))[client]
    is_own, most = own_tensors(draft, part)
    other = next((item.name for item in listing.tensors if not is_own(item.name)), None)
    if other is not None:
        raise Refused(f"The server hands '{other}', which is not of this client's part. Nothing of it was fetched.")
    numbers = sum(math.prod(item.shape) for item in listing.tensors)
    if numbers > most:
        raise Refused(f"The server hands {numbers:,} numbers; this client's part has {most:,} at most.")


def _is_of(folder: Path, listing: Listing) -> bool:
    file = folder / LISTING
    return file.is_file() and file.read_bytes() == listing.to_json()


def _check(final: Path, listing: Listing) -> None:
    """Prove that a part that was fetched before is whole, and what the server has now.

    Raises:
        OutputError: it is not.
    """
    if not _is_of(final, listing):
        raise OutputError(
            f"{final} holds a part of another model than the one that the server hands now. If the server's model was "
            "changed on purpose, join with another --out, or delete that folder and what was trained with it."
        )
    _, places = listing.safetensors()
    spots = [(item, final / item.name, 0) for item in listing.files]
    spots += [(item, final / WEIGHTS, place) for item, place in places.items()]
    for item, path, place in spots:
        if hashed(path, place, item.size).hexdigest() != item.checksum:
            raise OutputError(f"{path} is damaged ('{item.name}'). Delete {final}; it is then fetched again.")
