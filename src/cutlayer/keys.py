"""Keys as ``serve`` and ``join`` load them: certificates, the tokens of clients, and who was revoked.

A folder of the server has ``ca.pem``, ``cert.pem``, ``key.pem`` and ``clients.json``: the SHA-256 of each client's
token and what was revoked. One of a client has ``ca.pem``, ``cert.pem``, ``key.pem`` and ``token``. They are made by
``issuing``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging import getLogger
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import Disconnected, KeysError

LOG = getLogger("cutlayer.keys")
CA, CERTIFICATE, KEY, TOKEN, CLIENTS = "ca.pem", "cert.pem", "key.pem", "token", "clients.json"
VERSION = 1
QUIET = 60.0  # seconds in which it is logged once that the list of clients cannot be read
OTHERS = 0o027  # rights on a secret that nobody but its owner (and who reads for the owner's group) may have
USES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}
COMMANDS = {"server": "cutlayer serve", "client": "cutlayer join"}


@dataclass(frozen=True)
class Keys:
    """A party's certificate, its key and the CA's certificate, each as PEM."""

    folder: Path
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    name: str  # the certificate's: a client's own, or ``server``
    fingerprint: str  # of the certificate
    until: datetime  # it is good


@dataclass(frozen=True)
class ClientKeys(Keys):
    """What a client shows to be let in."""

    token: str = field(repr=False)


@dataclass(frozen=True)
class ServerKeys(Keys):
    """What a server shows, and whom it lets in. The list of clients is read anew whenever its file has changed."""

    _list: _ClientList

    @property
    def problem(self) -> str:
        """Why the list of clients cannot be read, so that nobody is let in; empty where it can."""
        self._list.look()
        return self._list.problem

    def token_ok(self, client: str, token: str) -> bool:
        """Whether it is this client's token, and was not revoked; takes as long either way."""
        tokens, revoked = self._list.look()
        told = token_hash(token)
        same = hmac.compare_digest(told, tokens.get(client, token_hash("")))
        return same and client in tokens and told not in revoked

    def belong(self, peer: str, client: str, token: str) -> bool:
        """Whether the certificate's name and the token are both this client's, and the token was not revoked.

        Raises:
            Disconnected: the list of clients cannot be read at the moment; the client may come again.
        """
        if self.problem:
            raise Disconnected("The server cannot read its list of clients, and lets nobody in. Try again in a while.")
        return hmac.compare_digest(peer.encode(), client.encode()) and self.token_ok(client, token)

    def revoked(self, serial: int) -> bool:
        """Whether a certificate was revoked, by the list as it was last read.

        While the list cannot be read nobody is let in, but who is in stays: it may be half copied for a moment.
        """
        tokens, revoked = self._list.look()
        emptied = not tokens and not self._list.problem
        return emptied or serial_text(serial) in revoked

    def admit(self, certificate: bytes, token: str) -> str:
        """The name of the client that shows this certificate (PEM, as the TLS layer verified it) and token.

        Raises:
            KeysError: it is let in by neither or only one of them; the message is for the server's log.
        """
        shown = _certificate(certificate, "A client's certificate")
        name = _name(shown)
        if self.problem:
            raise KeysError(f"Client '{name}' was not let in: {self.problem}")
        if USES["client"] not in _uses(shown):
            raise KeysError(f"'{name}' was not let in: its certificate is not a client's.")
        if not _issued_by(shown, _certificate(self.ca, CA)):
            raise KeysError(f"'{name}' was not let in: its certificate is of another CA.")
        if self.revoked(shown.serial_number):
            raise KeysError(
                f"Client '{name}' was not let in: its certificate {serial_text(shown.serial_number)} was revoked."
            )
        if not self.token_ok(name, token):
            raise KeysError(f"Client '{name}' was not let in: its token is not the one that belongs to its name.")
        return name


class _ClientList:
    """The hashes of tokens by client, and all that is revoked, from a file that may change while the server runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        self._seen: tuple[int, int, int] | None = None
        self._logged = -QUIET  # when
        self._tokens: Mapping[str, str] = {}
        self._revoked: frozenset[str] = frozenset()

    def look(self) -> tuple[Mapping[str, str], frozenset[str]]:
        """What the file says now. Where it cannot be read: no tokens, what was revoked before, and ``problem``."""
        try:
            about = self.path.stat()
            seen = (about.st_mtime_ns, about.st_size, about.st_ino)
            if seen != self._seen:
                self._tokens, self._revoked = _read_clients(self.path)
                self._seen, self.problem = seen, ""
        except (OSError, KeysError) as error:
            said = f"{self.path} cannot be read: {error.strerror}." if isinstance(error, OSError) else str(error)
            self._seen, self.problem, self._tokens = None, said, {}
            if time.monotonic() - self._logged >= QUIET:
                self._logged = time.monotonic()
                LOG.warning("Nobody is let in, and those who are in stay: %s", said)
        return self._tokens, self._revoked


def _read_clients(path: Path) -> tuple[dict[str, str], frozenset[str]]:
    try:
        read: Any = json.loads(path.read_text(encoding="utf-8"))
        version, tokens = read["version"], {str(name): str(told) for name, told in read["tokens"].items()}
        revoked = frozenset(str(one) for key in ("serials", "tokens") for one in read["revoked"][key])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise KeysError(
            f"{path} is damaged. Run cutlayer keys --out with its parent folder: it is written anew."
        ) from error
    if version != VERSION:
        raise KeysError(f"{path} is of version {version}; this cutlayer reads version {VERSION}.")
    return tokens, revoked


def server_keys(folder: str | Path) -> ServerKeys:
    """What ``cutlayer serve`` needs of its folder.

    Raises:
        KeysError: a file is missing, damaged or open to others; the parts do not belong together; the certificate is
            not a server's, or not good today.
    """
    found = _load(Path(folder), "server")
    listed = _ClientList(found.folder / CLIENTS)
    listed.look()
    if listed.problem:
        raise KeysError(listed.problem)
    return ServerKeys(**vars(found), _list=listed)


def client_keys(folder: str | Path) -> ClientKeys:
    """What ``cutlayer join`` needs of its folder.

    Raises:
        KeysError: as ``server_keys``.
    """
    found = _load(Path(folder), "client")
    token = private_file(found.folder / TOKEN).decode("ascii", "replace").strip()
    if not token:
        raise KeysError(f"{found.folder / TOKEN} is empty. Ask the server's owner for the folder again.")
    return ClientKeys(**vars(found), token=token)


def fingerprint_of(certificate: bytes | x509.Certificate) -> str:
    """The SHA-256 of a certificate (bytes: PEM or DER), as ``openssl x509 -fingerprint -sha256`` writes it."""
    if isinstance(certificate, bytes):
        pem = certificate.lstrip().startswith(b"-----")
        certificate = (
            _certificate(certificate, "The certificate") if pem else x509.load_der_x509_certificate(certificate)
        )
    return certificate.fingerprint(SHA256()).hex(":").upper()


def token_hash(token: str) -> str:
    """The SHA-256 of a token, which is all that a server keeps of it."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def serial_text(serial: int) -> str:
    """A certificate's serial number as the lists have it."""
    return f"{serial:x}"


def _load(folder: Path, role: str) -> Keys:
    if not folder.is_dir():
        raise KeysError(
            f"There is no folder {folder}. Make it with cutlayer keys, or ask the server's owner for yours."
        )
    pem = _read(folder / CERTIFICATE)
    certificate = _certificate(pem, str(folder / CERTIFICATE))
    _check_role(folder, certificate, role)
    ca = _read(folder / CA)
    if not _issued_by(certificate, _certificate(ca, str(folder / CA))):
        raise KeysError(
            f"{folder / CERTIFICATE} is not signed by {folder / CA}. Take both from one run of cutlayer keys."
        )
    key = private_file(folder / KEY)
    _check_pair(folder, certificate, key)
    name, now = _name(certificate), datetime.now(UTC)
    until = certificate.not_valid_after_utc
    if until < now:
        raise KeysError(
            f"{folder / CERTIFICATE} has expired ({until:%Y-%m-%d}). Make another where the CA is: cutlayer keys --out "
            f"DIR --renew {name}"
        )
    if certificate.not_valid_before_utc > now:
        begins = certificate.not_valid_before_utc
        raise KeysError(
            f"{folder / CERTIFICATE} is good from {begins:%Y-%m-%d %H:%M} UTC only. Check this machine's clock."
        )
    return Keys(folder, ca, pem, key, name, fingerprint_of(certificate), until)


def _check_role(folder: Path, certificate: x509.Certificate, role: str) -> None:
    uses = _uses(certificate)
    if USES[role] in uses:
        return
    other = next((name for name, use in USES.items() if use in uses), None)
    what = f"the keys of a {other}" if other else "a certificate that cutlayer keys did not make"
    where = "the folder server/" if role == "server" else "the folder with the client's name"
    raise KeysError(f"{folder} holds {what}; {COMMANDS[role]} needs {where} that cutlayer keys made.")


def _check_pair(folder: Path, certificate: x509.Certificate, pem: bytes) -> None:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise KeysError(
            f"{folder / KEY} is no private key in PEM form. Take it from the folder as it was made."
        ) from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise KeysError(
            f"{folder / KEY} does not belong to {folder / CERTIFICATE}. Take both from the folder as it was made."
        )


def _read(path: Path, advice: str = "A folder of keys is handed on whole, as cutlayer keys made it.") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        said = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise KeysError(f"{path} {said}. {advice}") from error


def private_file(path: Path, *advice: str) -> bytes:
    """A file that only its owner may read; ``advice`` on what to do where it is missing.

    Raises:
        KeysError: it cannot be read, or others may read it.
    """
    data = _read(path, *advice)
    mode = path.stat().st_mode & 0o777
    if mode & OTHERS:
        raise KeysError(f"{path} is open to other users of this machine (rights {mode:03o}). Run: chmod 600 {path}")
    return data


def _certificate(pem: bytes, what: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise KeysError(f"{what} is no certificate in PEM form. Take it from the folder as it was made.") from error


def _uses(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []


def _issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""
