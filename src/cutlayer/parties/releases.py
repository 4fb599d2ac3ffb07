"""How often each record of a client has left, kept where its process may be killed.

A message that is made again with the same bits tells nothing new, and counts once. What is written is numbers and
digests, never content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from cutlayer.defense import Leg, Sends
from cutlayer.errors import CheckpointError, OutputError
from cutlayer.noise import bytes_of

Key = tuple[str, bool, int]  # the leg, whether in training, and which record (of evaluation data: which batch)


class Releases:
    """The different messages that each record was in, written down before they leave.

    Args:
        path: a JSON line for each message.

    Raises:
        CheckpointError: what is there cannot be read, so it cannot be known what left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: defaultdict[Key, set[str]] = defaultdict(set)
        if not path.exists():
            return
        try:
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # half a line is of a message that never left
            if whole != text:
                os.truncate(path, len(whole.encode()))
            for line in whole.splitlines():
                leg, training, records, digest = json.loads(line)
                self._note(leg, bool(training), [int(record) for record in records], str(digest))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path}, which says what left, cannot be read, so what the defenses have spent is not known. Restore "
                "the file from a copy, or begin in another folder."
            ) from error

    def add(self, leg: Leg, training: bool, records: Sequence[int], shown: Tensor) -> None:
        """A message is about to leave.

        Raises:
            OutputError: it cannot be written down; it must not leave then.
        """
        digest = hashlib.blake2b(bytes_of(shown), digest_size=8).hexdigest()
        if not self._note(leg, training, records, digest):
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([leg, training, list(records), digest]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path}, which says what left, cannot be written: {error.strerror}. Nothing was sent."
            ) from error

    def sends(self) -> Sends:
        """How often a record left at most."""
        most = {kind: [0] for kind in (True, False)}
        for (_, training, _), digests in self._seen.items():
            most[training].append(len(digests))
        return Sends(max(most[True]), max(most[False]))

    def _note(self, leg: str, training: bool, records: Sequence[int], digest: str) -> bool:
        """Whether it is new."""
        new = False
        for record in records:
            seen = self._seen[leg, training, record]
            new |= digest not in seen
            seen.add(digest)
        return new
