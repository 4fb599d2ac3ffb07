"""What a served run counts of its clients' connections, added up over all server processes that it took.

It stands in the server's folder, written every few seconds and when a server ends: one that is killed forgets the last
of them. The time in which no server ran is nobody's absence.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path

from cutlayer.errors import NetworkError
from cutlayer.files import write_text
from cutlayer.links.net.remote import Remote

LOG = getLogger("cutlayer.net")
FILE = "network.json"
EVERY = 5.0  # seconds between two looks whether something is to be written
KEYS = ("sessions", "retries", "dropped", "seconds_away", "model_bytes")


class Tally:
    """By client: sessions, requests sent again, replies dropped, seconds away, and bytes of the model handed.

    Args:
        out: the server's folder.
        remotes: the clients.
        handed: bytes of the model that this process has handed, by client.

    Raises:
        NetworkError: what an earlier process wrote cannot be read.
    """

    def __init__(self, out: Path, remotes: Mapping[str, Remote], handed: Mapping[str, int]) -> None:
        self.file, self.remotes, self.handed = out / FILE, remotes, handed
        self._before = _read(self.file)
        self._written: dict[str, dict[str, float]] = {}

    def all(self, name: str) -> dict[str, float]:
        """The sums of one client."""
        remote, before = self.remotes[name], self._before.get(name, {})
        here = (remote.sessions, remote.retries, remote.dropped, remote.seconds_away, self.handed.get(name, 0))
        return {key: before.get(key, 0) + value for key, value in zip(KEYS, here, strict=True)}

    def told(self, name: str) -> dict[str, float]:
        """The same as ``summary.json`` has it: ``reconnects`` are the sessions after the first."""
        found = self.all(name)
        sessions, away = found.pop("sessions"), found.pop("seconds_away")
        return {"reconnects": max(sessions - 1, 0), **found, "seconds_away": round(away, 3)}

    def write(self) -> None:
        """Write down what there is, if it has changed; a disk that is full for a while ends no run."""
        found = {name: self.all(name) for name in self.remotes}
        if found == self._written:
            return
        try:
            write_text(self.file, json.dumps(found, indent=1))
            self._written = found
        except OSError as error:
            LOG.warning("The counts of connections were not written: %s", error)

    async def keep(self) -> None:
        """Write it down now and then, for as long as the run is served."""
        while True:
            await asyncio.sleep(EVERY)
            self.write()


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): {key: one[key] + 0 for key in KEYS} for name, one in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NetworkError(f"{file} cannot be read ({error}). Delete it: counts of connections begin anew.") from error
