"""Frames that clients seal for each other, so that the server that passes them on can neither read nor change them.

A sealed frame is a frame with one tensor of bytes::

    12 nonce, random | u64 number | AES-256-GCM of the frame inside, with 16 for its tag

The key is of the run, the sender and the receiver, and follows from the secret that the clients have agreed on. What
the frame is about (sender, receiver, owner of the batch, step, micro-batch, which way it goes, number) is bound to it
as associated data, so a frame that is changed, redirected or put to another use does not open. Numbers of a sender
only grow, over restarts too, and whoever opens a frame remembers the last one of each way: a frame that was opened, or
is older than one that was, is refused. Both are on the disk before anything that follows from a frame leaves.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor

from cutlayer.agreed import AgreedSecret
from cutlayer.errors import CheckpointError, OutputError, WireError
from cutlayer.files import write_text
from cutlayer.wire import SEAL_BYTES, SEALED, Header, Limits, decode, encode

NONCE, NUMBER, TAG = 12, 8, 16
END = 2**63  # of the numbers of frames, which are nanoseconds since 1970, or more
MOST = 2**31 - 1  # bytes that can be sealed in one piece
assert NONCE + NUMBER + TAG == SEAL_BYTES


@dataclass(frozen=True)
class About:
    """What a sealed frame is about: its way, and what is on it.

    Args:
        sender: the client that seals it.
        receiver: the client that opens it.
        owner: the client whose batch it is of.
        leg: ``forward``, ``backward``, or ``evaluation``.
        step: of the owner, or the number of its evaluation batch.
        micro: micro-batch of the step.
    """

    sender: str
    receiver: str
    owner: str
    leg: str
    step: int
    micro: int

    @property
    def way(self) -> str:
        """What has numbers of its own: frames of one way come one after the other."""
        return json.dumps([self.sender, self.owner, self.leg])

    def bytes(self, number: int) -> bytes:
        """The associated data."""
        texts = (self.sender, self.receiver, self.owner, self.leg)
        parts = [len(text.encode()).to_bytes(4, "big") + text.encode() for text in texts]
        return b"cutlayer sealed 1" + b"".join(parts) + b"".join(map(_whole, (self.step, self.micro, number)))

    def __str__(self) -> str:
        what = "evaluation batch" if self.leg == "evaluation" else "step"
        return f"{what} {self.step}, micro-batch {self.micro} of '{self.owner}' ({self.leg})"


class Seals:
    """One client's seals: it seals for the others, and opens what they sealed for it.

    Args:
        secret: that the clients have agreed on.
        run: what the run is; equal for all its clients, and for no other run.
        file: where the numbers are kept.

    Raises:
        CheckpointError: the file is damaged.
    """

    def __init__(self, secret: AgreedSecret, run: str, file: Path) -> None:
        self._secret, self._run, self._file = secret, run, file
        self._sent, self._seen = _read(file)
        self._ciphers: dict[tuple[str, str], AESGCM] = {}

    def seal(self, header: Header, tensors: Sequence[Tensor], about: About) -> Tensor:
        """A frame, sealed: bytes [N]. ``save`` must be called before it leaves.

        Raises:
            WireError: it is too large.
        """
        plain = encode(header, tensors).bytes()
        if len(plain) + TAG > MOST:
            raise WireError(f"A frame of {len(plain)} bytes cannot be sealed; at most {MOST - TAG}. Lower batch_size.")
        # By the clock, so that numbers grow even where the file was lost.
        self._sent = max(self._sent + 1, time.time_ns())
        nonce = os.urandom(NONCE)
        closed = self._cipher(about).encrypt(nonce, plain, about.bytes(self._sent))
        return torch.frombuffer(bytearray(nonce + _whole(self._sent) + closed), dtype=torch.uint8)

    def open(self, sealed: Tensor, about: About, limits: Limits) -> tuple[Header, list[Tensor]]:
        """The frame inside.

        Raises:
            WireError: it was changed, is about something else, was opened before, or is none.
        """
        data = sealed.numpy().tobytes() if sealed.dtype == torch.uint8 and sealed.dim() == 1 else b""
        if len(data) < SEAL_BYTES:
            raise WireError(f"What came for {about} from '{about.sender}' is no sealed frame.")
        number = int.from_bytes(data[NONCE : NONCE + NUMBER], "little")
        try:
            plain = self._cipher(about).decrypt(data[:NONCE], data[NONCE + NUMBER :], about.bytes(number))
        except InvalidTag as error:
            raise WireError(
                f"The sealed frame for {about} from '{about.sender}' does not open: on its way it was changed, or put "
                "in place of another one. Only the server passes it on. (Or the run as it was offered to "
                f"'{about.sender}' is another.)"
            ) from error
        if number <= self._seen.get(about.way, 0):
            raise WireError(
                f"The sealed frame for {about} from '{about.sender}' was passed on again, or after a later one: that "
                "must not be. Only the server passes it on."
            )
        self._seen[about.way] = number
        header, tensors = decode(plain, limits)
        wanted = (about.sender, about.receiver, about.owner, about.step, about.micro)
        if (header.sender, header.receiver, header.client, header.step, header.micro) != wanted:
            raise WireError(f"'{about.sender}' sealed a frame for {about} that says it is about something else.")
        return header, tensors

    def save(self) -> None:
        """Have the numbers on the disk when this returns.

        Raises:
            OutputError: they cannot be written; nothing may leave then.
        """
        try:
            write_text(self._file, json.dumps({"sent": self._sent, "seen": self._seen}), mode=0o600)
        except OSError as error:
            raise OutputError(
                f"The numbers of sealed frames cannot be written to {self._file}: {error.strerror}. Nothing was sent."
            ) from error

    def _cipher(self, about: About) -> AESGCM:
        pair = about.sender, about.receiver
        if pair not in self._ciphers:
            self._ciphers[pair] = AESGCM(self._secret.key("seal", self._run, *pair))
        return self._ciphers[pair]


def is_sealed(header: Header) -> bool:
    """Whether a frame holds another one that is sealed."""
    return header.names == (SEALED,)


def _whole(number: int) -> bytes:
    return number.to_bytes(NUMBER, "little")


def _read(file: Path) -> tuple[int, dict[str, int]]:
    if not file.is_file():
        return 0, {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        sent, seen = int(found["sent"]), {str(way): int(number) for way, number in found["seen"].items()}
        if not all(0 <= number < END for number in (sent, *seen.values())):
            raise ValueError("a number that no frame has")
        return sent, seen
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The numbers of sealed frames, {file}, cannot be read, so frames that come again would not be found out. "
            "Restore the file from a copy, or join with a new secret and another --out."
        ) from error
