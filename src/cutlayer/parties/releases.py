"""How often each record of a client has left, kept where its process may be killed.

A message that is made again with the same bits tells nothing new, and counts once. Beside the messages are the settings
under which they left: where there was more than one, they do not add up to anything that can be claimed. What is
written is settings, numbers and digests, never content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from cutlayer.defense import Leg, Sends
from cutlayer.errors import CheckpointError, OutputError
from cutlayer.noise import bytes_of

Key = tuple[str, bool, int]  # the leg, whether in training, and which record (of evaluation data: which batch)
Settings = Mapping[str, Any]  # as JSON has it: the defenses with their options, and what their claims rest on
LONG = 160  # characters of a setting that are shown
UNCOUNTED: Settings = {"defenses": None}  # of messages that passed no defense, or were not written down here


class Releases:
    """The different messages that each record was in, written down before they leave.

    Args:
        path: a JSON line for each message, and one, ``{"under": ...}``, for each settings that any left under.
        about: what else the settings have: what says which record has which number, of which data.
        grown: is called where there is more to be told than before, after it was written down.

    Raises:
        CheckpointError: what is there cannot be read, so it cannot be known what left.
    """

    def __init__(
        self, path: Path, about: Settings | None = None, grown: Callable[[], None] = lambda: None
    ) -> None:  # fmt: skip
        self.path, self._about, self._grown = path, dict(about or {}), grown
        self._seen: defaultdict[Key, set[str]] = defaultdict(set)
        self._under: list[dict[str, Any]] = []
        self._most = {True: 0, False: 0}  # how often a record left at most, in training and for evaluation
        self._told: tuple[Sends, int] | None = None  # of what ``grown`` was last called
        if not path.exists():
            return
        try:
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # half a line is of a message that never left
            if whole != text:
                os.truncate(path, len(whole.encode()))
            for line in whole.splitlines():
                read = json.loads(line)
                if isinstance(read, dict):
                    self._under.append(dict(read["under"]))
                    continue
                leg, training, records, digest = read
                if not self._under:
                    self._under.append(dict(UNCOUNTED))
                self._note([(leg, bool(training), int(record)) for record in records], str(digest))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}, which says what left, cannot be read, so what the defenses have spent is not known. Restore "
                "the file from a copy, or begin in another folder."
            ) from error

    def add(self, leg: Leg, training: bool, records: Sequence[int], shown: Tensor, under: Settings) -> None:
        """A message is about to leave, under these settings.

        Raises:
            OutputError: it cannot be written down; it must not leave then.
        """
        self.under({**under, **self._about})
        digest = hashlib.blake2b(bytes_of(shown), digest_size=8).hexdigest()
        keys: list[Key] = [(leg, training, record) for record in records]
        if any(digest not in self._seen[key] for key in keys):
            self._write([leg, training, list(records), digest])
            self._note(keys, digest)
        self._tell()

    def under(self, settings: Settings) -> None:
        """A message is about to leave under these settings, whatever it is.

        Raises:
            OutputError: it cannot be written down; the message must not leave then.
        """
        plain = json.loads(json.dumps(settings))
        if plain not in self._under:
            self._write({"under": plain})
            self._under.append(plain)

    def sends(self) -> Sends:
        """How often a record left at most."""
        return Sends(self._most[True], self._most[False])

    def mixed(self) -> str:
        """In which settings messages differ, in words; empty: all left under the same."""
        if len(self._under) < 2 and UNCOUNTED not in self._under:
            return ""
        return "messages left from this folder under more than one setting: " + "; ".join(self._differences())

    def _differences(self) -> Iterator[str]:
        counted = [one for one in self._under if one != UNCOUNTED]
        if len(counted) < len(self._under):
            yield "some without a defense, or not counted here"
        for name in dict.fromkeys(name for one in counted for name in one):
            values = list(dict.fromkeys(_shown(one.get(name)) for one in counted))
            if len(values) > 1:
                yield f"{name} {' and '.join(values)}"

    def _tell(self) -> None:
        now = (self.sends(), len(self._under))
        if now != self._told:
            self._grown()
            self._told = now  # only now: where it could not be written it is tried again with the next message

    def _note(self, keys: Sequence[Key], digest: str) -> None:
        for key in keys:
            seen = self._seen[key]
            seen.add(digest)
            self._most[key[1]] = max(self._most[key[1]], len(seen))

    def _write(self, line: Any) -> None:
        """Add a line, whole or not at all."""
        before = None
        try:
            with self.path.open("ab") as file:
                before = file.tell()
                file.write((json.dumps(line) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if before is not None:
                with suppress(OSError):  # a disk that takes nothing; half a line is cut off when it is read
                    os.truncate(self.path, before)
            raise OutputError(
                f"{self.path}, which says what left, cannot be written: {error.strerror}. Nothing was sent."
            ) from error


def _shown(value: Any) -> str:
    """A setting, shortly."""
    said = json.dumps(value)
    return said if len(said) <= LONG else f"{said[: LONG - 3]}..."
