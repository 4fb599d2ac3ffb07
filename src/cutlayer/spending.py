"""What the defenses of a client that joins have spent: written to ``privacy.json`` in its folder, and told in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.defense import spent_in_words
from cutlayer.errors import OutputError
from cutlayer.files import write_text
from cutlayer.parties.defending import Defending
from cutlayer.parties.releases import UNCOUNTED, Releases

RELEASED, SPENT = "released.jsonl", "privacy.json"


class Spending:
    """The claims of a client's defenses, over all that ever left from its folder.

    Args:
        folder: the client's.
        about: what says which record has which number, and of what data and model.
        left: whether batches left from this folder before.
    """

    def __init__(self, folder: Path, about: Mapping[str, str], *, left: bool) -> None:
        self.folder, self._left = folder, left
        self._about = {"data_and_model": hashlib.blake2b(json.dumps(dict(about)).encode(), digest_size=8).hexdigest()}
        self._defending: Defending | None = None
        self._releases: Releases | None = None

    def follow(self, defending: Defending | None) -> None:
        """These defenses act from now on; None: there are none.

        Raises:
            CheckpointError: what is written down of what left cannot be read.
        """
        path = self.folder / RELEASED
        new, self._defending, self._releases = not path.exists(), defending, None
        if defending is not None or not new:
            self._releases = Releases(path, self._about, self.write)
        if defending is not None:
            defending.releases = self._releases

    def begin(self) -> None:
        """Messages may leave from now on.

        Raises:
            OutputError: it cannot be written down.
        """
        if self._releases is None:
            return
        if self._defending is None or (self._left and not self._releases.path.exists()):
            self._releases.under(UNCOUNTED)
        self.write()

    def told(self) -> list[dict[str, Any]]:
        """What each defense has spent."""
        if self._releases is None:
            return []
        sends, mixed = self._releases.sends(), self._releases.mixed()
        if self._defending is not None:
            return self._defending.told(sends, mixed)
        mechanism = "this run has none, and earlier ones from this folder had some"
        return [{"defense": "none", "mechanism": mechanism, "kind": "empirical", "epsilon": None, "why": mixed}]

    def write(self) -> None:
        """Write what was spent.

        Raises:
            OutputError: it cannot be written.
        """
        if self._releases is None:
            return
        path = self.folder / SPENT
        try:
            write_text(path, json.dumps(self.told(), indent=1))
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}.") from error

    def words(self) -> list[str]:
        """What was spent, a sentence for each defense."""
        return [spent_in_words(told) for told in self.told()]
