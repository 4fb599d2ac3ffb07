"""Every error that a user can meet, drawn as one tree.

    CutlayerError            a user's (or the outside world's) mistake: shown as one paragraph, exit code 2
    ├── ConfigError          the run file or an option; carries ALL mistakes found
    ├── MethodError          a method that does not exist, or cannot work in this run
    ├── DataError            files, columns, formats, empty clients
    ├── ModelError           a model that cannot be loaded or cut
    │   └── NotExact         a cut model that does not equal the uncut one
    ├── WireError            a frame that is malformed, too large, or of another version
    ├── NonFinite            a loss or tensor that is NaN or infinite
    ├── KeysError            certificates, keys and tokens: missing, expired, revoked, in the wrong hands
    ├── PolicyRefused        what the data owner's policy does not let a client do
    ├── CheckpointError      a checkpoint that is missing, corrupt, or of another run
    ├── OutputError          the output folder cannot be written (full disk, rights, already in use)
    ├── NetworkError         an address, a certificate or a session between two parties
    │   ├── Disconnected     a session broke or could not be opened; trying again may help
    │   ├── Refused          the other end turned us away; trying again does not help
    │   ├── Dismissed        the other end has nothing more for us: the run is done
    │   ├── RequestFailed    one request was refused by the party that was asked
    │   ├── Gone             a client stayed away for longer than it is waited for
    │   ├── LeftRun          this client refused what it was asked for, and the run went on without it
    │   └── AllLeft          no client of a run is left that could go on
    └── Deadlock             the virtual clock has nothing left to do while somebody waits

A message says what happened, where, and what to do. Our own invariants use ``assert``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Literal


class CutlayerError(Exception):
    """Base of all errors that are shown to a user without a traceback."""


class ConfigError(CutlayerError):
    """One or more mistakes in a run file; ``problems`` lists them all."""

    def __init__(self, problems: Sequence[str], where: str = "the run file") -> None:
        self.problems = list(problems)
        head = f"{len(self.problems)} mistake{'s' if len(self.problems) > 1 else ''} in {where}:"
        super().__init__("\n".join([head, *(f"  - {p}" for p in self.problems)]))


class MethodError(CutlayerError):
    """A method is unknown, misused, or cannot work together with the rest of the run."""


class DataError(CutlayerError):
    """The data cannot be read or used."""


class ModelError(CutlayerError):
    """The model cannot be loaded or cut."""


class NotExact(ModelError):
    """The cut model does not compute what the uncut one computes; ``difference`` is the largest one seen."""

    def __init__(self, message: str, difference: float) -> None:
        super().__init__(message)
        self.difference = difference


class WireError(CutlayerError):
    """A frame is malformed, larger than allowed, or of another version."""


class NonFinite(CutlayerError):
    """A loss or a tensor is NaN or infinite."""


class KeysError(CutlayerError):
    """A certificate, key or token is missing, does not fit, has expired or was revoked."""


class PolicyRefused(CutlayerError):
    """The data owner's policy does not allow it; ``rule`` is the policy's key (or keys) that says so."""

    def __init__(self, rule: str, message: str) -> None:
        rules = f"rules {rule} refuse" if "," in rule else f"rule {rule} refuses"
        super().__init__(f"The policy's {rules}: {message}")
        self.rule = rule


class CheckpointError(CutlayerError):
    """A checkpoint is missing, corrupt, or belongs to another run."""


class OutputError(CutlayerError):
    """The output folder cannot be written."""


class NetworkError(CutlayerError):
    """Something between two parties: an address, a certificate, a session."""


class Disconnected(NetworkError):
    """A session broke or could not be opened; trying again may help."""


class Refused(NetworkError):
    """The other end turned us away, or we it; trying again does not help. ``reason`` is a word to count it under."""

    def __init__(self, message: str, *, reason: str = "other") -> None:
        super().__init__(message)
        self.reason = reason


class Dismissed(NetworkError):
    """The other end says that there is nothing more to do."""


class RequestFailed(NetworkError):
    """The party that was asked refused the request of number ``turn``, and said why (``text``)."""

    def __init__(self, turn: int, text: str, who: str = "The other end") -> None:
        super().__init__(f"{who} refused request {turn}: {text}")
        self.turn, self.text = turn, text


class Gone(NetworkError):
    """A client is lost to what was going on.

    ``kind``: it stayed ``away`` too long, came back as another process, without what it held (``anew``), ``left`` for
    good, or it is ``over`` for all.
    """

    def __init__(self, client: str, why: str, kind: Literal["away", "anew", "left", "over"] = "away") -> None:
        super().__init__(f"Client '{client}' is gone: {why}")
        self.client, self.why, self.kind = client, why, kind


class TrunkGone(Gone):
    """A process that ran blocks of the trunk is lost; ``blocks`` says which."""

    def __init__(self, blocks: str, why: str) -> None:
        super().__init__("", why)
        self.args = (f"The actor with {blocks} of the trunk is gone: {why}",)


class AllLeft(NetworkError):
    """No client of a run is left that could go on: each refused what it was asked, or answered what cannot be."""


class LeftRun(NetworkError):
    """This client refused what it was asked for, so the run went on without it."""


class Deadlock(CutlayerError):
    """Nothing is left to happen on the virtual clock, yet somebody waits."""


def suggest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest of ``known``, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
