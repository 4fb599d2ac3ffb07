"""A secret that the clients of a run have agreed on among themselves, and that the server does not know.

One of them makes it (``cutlayer secret FILE``) and gives it to the others over a way that the server has no part in. It
is not made by ``cutlayer keys``: who makes the keys is often who runs the server. From it follow what clients seal for
each other, and what they draw alike without the server's knowing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cutlayer.errors import KeysError, Refused
from cutlayer.files import write_text
from cutlayer.keys import private_file

BYTES = 32
FORM = re.compile(r"[0-9a-f]{64}")
CHECK = re.compile(r"[0-9a-f]{16}")


class AgreedSecret:
    """The secret, and the keys that follow from it.

    Args:
        secret: its 32 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == BYTES
        self._secret = secret

    def key(self, *purpose: str) -> bytes:
        """The 32 bytes that all clients have for a purpose (HKDF with SHA-256, RFC 5869)."""
        info = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in ("cutlayer", *purpose))
        return HKDF(SHA256(), BYTES, salt=None, info=info).derive(self._secret)

    @property
    def check(self) -> str:
        """What may be told of it, so that clients with different secrets are found out: 16 hex digits."""
        return self.key("check").hex()[:16]


class Agreement:
    """At a server: whether the clients of a run have one secret. It compares their checks, and learns no secret.

    Args:
        why: why the run needs one; None: it does not.
    """

    def __init__(self, why: str | None) -> None:
        self.why = why
        self._checks: dict[str, str] = {}

    def compare(self, name: str, check: object, here: Collection[str]) -> None:
        """Note what a client's hello says, if it is what those say who are ``here`` already.

        Raises:
            Refused: it says nothing, or something else.
        """
        if self.why is None:
            return
        if not isinstance(check, str) or not CHECK.fullmatch(check):
            raise Refused(
                f"The hello says nothing of the clients' secret, which this run needs: {self.why}. Both ends need the "
                "same version of cutlayer.",
                reason="secret",
            )
        for other in here:
            if other != name and self._checks.get(other, check) != check:
                raise Refused(
                    f"The secret of '{name}' is another than that of '{other}', who is here already. One of the two "
                    "files is wrong: all clients of a run need the same one. Compare them with the owner of the other "
                    "client, not with the server's.",
                    reason="secret",
                )
        self._checks[name] = check


def make_secret(file: Path) -> None:
    """Write a new secret, for its owner's eyes only.

    Raises:
        KeysError: the file is there already.
    """
    if file.exists():
        raise KeysError(f"{file} is there already, and is kept. Give another name, or move it away.")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, f"{secrets.token_hex(BYTES)}\n", mode=0o600)


def load_secret(file: str | Path) -> AgreedSecret:
    """A secret that ``make_secret`` wrote.

    Raises:
        KeysError: it is missing, open to others, or none.
    """
    text = private_file(Path(file), "Ask the other clients of the run for theirs.").decode("ascii", "replace").strip()
    if not FORM.fullmatch(text):
        raise KeysError(
            f"{file} is no secret of clients: one has {2 * BYTES} hexadecimal digits. Make one with 'cutlayer secret "
            "FILE', and give it to the other clients of the run."
        )
    return AgreedSecret(bytes.fromhex(text))


def needed(why: str | None, agreed: AgreedSecret | None, note: Callable[[str], None]) -> AgreedSecret | None:
    """The secret of a run's clients, where the run needs it (``why``, in words).

    Raises:
        KeysError: it does, and this client has none.
    """
    if why is not None and agreed is None:
        raise KeysError(
            f"This run needs a secret that its clients have agreed on: {why}. Ask the owners of the other clients "
            "for theirs; one of you makes it by 'cutlayer secret FILE', and gives it to the others, not to the "
            "server. Then join with --secret FILE."
        )
    if why is None and agreed is not None:
        note("--secret is not used: this run needs no secret of its clients")
    return agreed if why is not None else None
