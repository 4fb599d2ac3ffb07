"""Certificates: what a party holds, what it reads from the other's, and why a handshake failed, in words.

gRPC checks both chains and the server's name. What it does not do is done here: the fingerprint that a client's policy
may pin, and a reason that a user can act on (to gRPC most refusals are "Socket closed").
"""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cutlayer.errors import Disconnected, NetworkError, Refused
from cutlayer.keys import fingerprint_of

EXPIRED, NOT_YET, WRONG_NAMES, UNKNOWN = 10, 9, (62, 64), (2, 18, 19, 20, 21)  # OpenSSL's numbers of X.509 errors


@dataclass(frozen=True)
class Credentials:
    """What a party proves itself with, each as PEM: the CA both trust, its certificate, and its private key."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Peer:
    """Who the other end is, by its certificate: the common name and the serial number."""

    name: str = ""
    serial: int | None = None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` (``[HOST]:PORT`` for IPv6).

    Raises:
        NetworkError: it is no such thing.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535 or "/" in host:
        raise NetworkError(f"'{address}' is no address. Write HOST:PORT, for example server.example.org:8443.")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host:
        raise NetworkError(f"'{address}' is no address. Write an IPv6 address in brackets: [::1]:8443.")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, whatever a name server says."""
    return host in ("localhost", "::1") or (host.startswith("127.") and host.count(".") == 3)


def has_address(host: str) -> bool:
    """Whether the machine knows an address of a host; asks name servers, so it may take seconds."""
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):  # the second: no name can be so
        return False


def peer_of(pem: bytes) -> Peer:
    """Who a certificate says it is.

    Raises:
        Refused: it has no common name, or several.
    """
    found = x509.load_pem_x509_certificate(pem)
    names = found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not str(names[0].value):
        raise Refused("Your certificate names nobody, or several. Ask the operator for one made by 'cutlayer keys'.")
    return Peer(str(names[0].value), found.serial_number)


def _digits(fingerprint: str) -> str:
    return fingerprint.lower().removeprefix("sha256:").replace(":", "")


async def pinned(address: str, credentials: Credentials, fingerprint: str, seconds: float) -> bytes:
    """The server's certificate as PEM, which is then the only one that gRPC is to trust.

    The certificate is fetched by a handshake of its own, under the usual checks (chain up to the CA, name, dates), and
    compared with the fingerprint. gRPC gets exactly these bytes as its root, so the connection that carries the
    tensors is open only to who holds the private key of the pinned certificate: another certificate of the same CA
    does not verify against it, and this one is refused here if it may issue others. Nothing is believed that the
    server says, and it does not matter if the first handshake went to another machine than the second.

    Raises:
        Refused: another certificate, or one that does not verify.
        Disconnected: no connection, or no answer.
    """
    found = x509.load_der_x509_certificate(await _fetch(address, credentials, seconds))
    own = fingerprint_of(found)
    if _digits(own) != _digits(fingerprint):
        raise Refused(
            f"The server at {address} has the fingerprint {own}, but {fingerprint} is expected. "
            "Ask the operator whether the certificate was renewed; if not, this is not your server."
        )
    try:
        may_issue = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        may_issue = True  # nothing says that it may not
    if may_issue:
        raise Refused(f"The certificate of the server at {address} may issue others, so it cannot be pinned.")
    return found.public_bytes(Encoding.PEM)


async def why(address: str, credentials: Credentials | None, told: str, seconds: float) -> NetworkError:
    """Why a connection could not be opened: asks again, step by step; ``told`` is what gRPC said."""
    if credentials is None:
        return Disconnected(f"No cutlayer server answers at {address} without TLS ({told}).")
    try:
        await _fetch(address, credentials, seconds)
    except NetworkError as error:
        return error
    return _own_fault(address, credentials) or Disconnected(f"The connection to {address} failed ({told}).")


def _own_fault(address: str, credentials: Credentials) -> Refused | None:
    """What a server minds about this party's own certificate."""
    try:
        own, ca = (x509.load_pem_x509_certificate(pem) for pem in (credentials.certificate, credentials.ca))
    except ValueError:
        return Refused("Your certificate or the CA's is damaged. Ask the operator for new keys.")
    now = datetime.datetime.now(datetime.UTC)
    if now > own.not_valid_after_utc:
        return Refused(
            f"Your certificate expired on {own.not_valid_after_utc:%Y-%m-%d}. Ask the operator for a new one."
        )
    if now < own.not_valid_before_utc:
        return Refused(f"Your certificate is valid from {own.not_valid_before_utc:%Y-%m-%d} only. Check your clock.")
    try:
        own.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return Refused(f"Your certificate is not of the CA that you trust for {address}. Use the keys you got for it.")
    return None


async def _fetch(address: str, credentials: Credentials, seconds: float) -> bytes:
    """The server's certificate (DER) after a handshake with all checks; the server's check of ours comes later."""
    host, port = split_address(address)
    try:
        return await asyncio.to_thread(_handshake, host, port, credentials.ca, seconds)
    except ssl.SSLCertVerificationError as error:
        raise Refused(_words(error, address)) from error
    except ssl.SSLEOFError as error:
        raise Disconnected(
            f"{address} closed the connection before it was secure. Its server has no room for more connections now, "
            "or what listens there does not speak TLS."
        ) from error
    except ssl.SSLError as error:
        raise Refused(
            f"What listens at {address} does not speak TLS as a cutlayer server does ({error.reason}). "
            "Is it the right port, and was the server started with keys?"
        ) from error
    except TimeoutError as error:
        raise Disconnected(f"{address} does not answer. Is the address right, and no firewall between?") from error
    except ConnectionRefusedError as error:
        raise Disconnected(f"Nobody listens at {address}. Does the server run, and is the port right?") from error
    except socket.gaierror as error:
        raise Disconnected(f"No machine has the name '{host}'. Check the address and your connection.") from error
    except OSError as error:
        raise Disconnected(f"The connection to {address} failed: {error.strerror or error}.") from error


def _handshake(host: str, port: int, ca: bytes, seconds: float) -> bytes:
    context = ssl.create_default_context(cadata=ca.decode("ascii", "replace"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # in which a server asks for our certificate after this is over
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=seconds) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def _words(error: ssl.SSLCertVerificationError, address: str) -> str:
    host, _ = split_address(address)
    if error.verify_code == EXPIRED:
        return (
            f"The certificate of the server at {address} has expired. Ask its operator for a renewal; check your clock."
        )
    if error.verify_code == NOT_YET:
        return f"The certificate of the server at {address} is not valid yet. Check your clock."
    if error.verify_code in WRONG_NAMES:
        return (
            f"The server at {address} has a certificate for another name than '{host}'. Use the name it was made for, "
            "or ask the operator for one with this name ('cutlayer keys --host')."
        )
    if error.verify_code in UNKNOWN:
        return (
            f"The server at {address} has a certificate of another CA than the one you trust. Are your keys those for "
            "this server, and is it yours?"
        )
    return f"The certificate of the server at {address} is not accepted: {error.verify_message}."
