"""A small certificate authority: makes, renews and revokes the keys of one server and its clients.

``ca/issued.json`` is what is true; the server's ``clients.json`` follows from it and is written anew each time, so a
command that was cut off is mended by the next one. A party's folder is never written over, but by ``renew``.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from cutlayer.config_types import NAME
from cutlayer.errors import KeysError, suggest
from cutlayer.files import make_folder, move, write_text
from cutlayer.keys import CA, CERTIFICATE, CLIENTS, KEY, TOKEN, USES, VERSION, fingerprint_of, serial_text, token_hash

SERVER, AUTHORITY, ISSUED = "server", "ca", "issued.json"
TAKEN = (SERVER, AUTHORITY)
PRIVATE, SHARED = 0o600, 0o644
DAYS, CA_DAYS = 365, 7300
SKEW = timedelta(hours=1)  # a certificate is good from so long before it was made: clocks differ
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOST = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.IGNORECASE
)


@dataclass
class Issued:
    """What the CA remembers of a party: its newest certificate, and whether it is still let in."""

    name: str
    serial: str
    fingerprint: str
    until: str  # an ISO date and time, UTC
    token: str = ""  # its SHA-256; a server has none
    hosts: tuple[str, ...] = ()  # of the server
    revoked: bool = False

    def state(self, now: datetime | None = None) -> str:
        """``good``, ``expired`` or ``revoked``."""
        expired = datetime.fromisoformat(self.until) < (now or datetime.now(UTC))
        return "revoked" if self.revoked else "expired" if expired else "good"


class Authority:
    """The CA of a folder, made if there is none.

    Args:
        out: its folder, with ``ca/``, ``server/`` and a folder for each client.
        make: whether to make one where there is none.
        now: the time to count from; by default the clock's.

    Raises:
        KeysError: there is none, or it is damaged.
    """

    def __init__(self, out: Path, *, make: bool = False, now: datetime | None = None) -> None:
        self.out, self.folder, self.now = out, out / AUTHORITY, now or datetime.now(UTC)
        self.parties: dict[str, Issued] = {}
        self.gone: dict[str, list[str]] = {"serials": [], "tokens": []}
        if (self.folder / ISSUED).is_file():
            self._open()
        elif self.folder.exists():
            raise KeysError(f"{self.folder} is there, but without {ISSUED}. Give another --out, or restore the folder.")
        elif make:
            self._make()
        else:
            raise KeysError(f"There is no CA in {out}. Make one: cutlayer keys --out {out} --host HOST --client NAME")

    def add(self, *, hosts: Sequence[str] = (), clients: Sequence[str] = (), days: int = DAYS) -> list[str]:
        """Make keys for the server and for clients that have none; who has keeps them.

        Returns:
            the names that got keys.

        Raises:
            KeysError: a name or host is none, a client was revoked, or the server's certificate is for other hosts.
        """
        for number, name in enumerate(clients):
            self._check_name(name, clients[:number])
        given = _hosts(hosts)
        server = self.parties.get(SERVER)
        if server is None and not given:
            raise KeysError("The server needs a name or an address that clients reach it by. Give --host.")
        if server is not None and not set(given) <= set(server.hosts):
            raise KeysError(
                f"The server's certificate is for {', '.join(server.hosts)}, not for {', '.join(given)}. For another: "
                f"cutlayer keys --out {self.out} --renew server --host ... (with all hosts)"
            )
        made = []
        if server is None:
            self._give(SERVER, days=days, hosts=given)
            made.append(SERVER)
        for name in dict.fromkeys(clients):
            if name not in self.parties:
                self._give(name, days=days)
                made.append(name)
        self._write()
        return made

    def renew(self, name: str, *, hosts: Sequence[str] = (), days: int = DAYS) -> Issued:
        """Give a party a new key, certificate and token in place of its old ones, which no longer let it in.

        Raises:
            KeysError: there is no such party.
        """
        old = self._party(name)
        given = _hosts(hosts) or old.hosts
        if name != SERVER:
            self._bury(old)
        self._give(name, days=days, hosts=given if name == SERVER else (), again=True)
        self._write()
        return self.parties[name]

    def revoke(self, name: str) -> None:
        """Let a client in no more: its certificate and its token go into the server's list.

        Raises:
            KeysError: there is no such client, or it is the server.
        """
        if name == SERVER:
            raise KeysError(
                "The server cannot be revoked: clients trust what this CA has signed. Renew it, and give the data "
                "owners its new fingerprint; or begin anew with another --out."
            )
        party = self._party(name)
        if not party.revoked:
            party.revoked = True
            self._bury(party)
        self._write()

    def _bury(self, party: Issued) -> None:
        for kind, value in (("serials", party.serial), ("tokens", party.token)):
            if value not in self.gone[kind]:
                self.gone[kind].append(value)

    def _party(self, name: str) -> Issued:
        if name not in self.parties:
            known = ", ".join(self.parties)
            raise KeysError(f"{self.out} has no keys of '{name}'.{suggest(name, self.parties)} It has: {known}.")
        return self.parties[name]

    def _check_name(self, name: str, others: Sequence[str]) -> None:
        if not NAME.fullmatch(name):
            raise KeysError(
                f"'{name}' is no name of a client. A name has letters, digits, '-', '_' and '.', begins with no '-' or "
                "'.', and has at most 64 characters."
            )
        if name.lower() in TAKEN:
            raise KeysError(f"'{name}' cannot be the name of a client: the folder {name.lower()}/ has another use.")
        known = [*self.parties, *others]
        same = next((other for other in known if other.lower() == name.lower() and other != name), None)
        if same is not None:
            raise KeysError(f"'{name}' and '{same}' differ in capitals only. Give the client another name.")
        if name in self.parties and self.parties[name].revoked:
            raise KeysError(
                f"The client '{name}' was revoked. To let it in again: cutlayer keys --out {self.out} --renew {name}"
            )

    def _give(self, name: str, *, days: int, hosts: Sequence[str] = (), again: bool = False) -> None:
        """Make a party's folder, and remember it."""
        folder = self.out / name
        if folder.exists() and not again:
            raise KeysError(f"{folder} is in the way: this CA has no record of it. Move it away, or give another name.")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(name, key.public_key(), days, hosts)
        pem, token = certificate.public_bytes(Encoding.PEM), secrets.token_urlsafe(32) if name != SERVER else ""
        party = Issued(
            name, serial_text(certificate.serial_number), fingerprint_of(pem),
            certificate.not_valid_after_utc.isoformat(), token_hash(token) if token else "", tuple(hosts),
        )  # fmt: skip
        draft = self.out / f".draft-{name}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        write_text(draft / CA, (self.folder / CA).read_text(encoding="ascii"), mode=SHARED)
        write_text(draft / CERTIFICATE, pem.decode("ascii"), mode=SHARED)
        write_text(draft / KEY, _private(key), mode=PRIVATE)
        if token:
            write_text(draft / TOKEN, f"{token}\n", mode=PRIVATE)
        before = self.parties.get(name)
        self.parties[name] = party
        if not token:
            write_text(draft / CLIENTS, self._clients(), mode=PRIVATE)
        try:
            move(draft, folder)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if before is None:
                del self.parties[name]
            raise
        self._remember()

    def _signed(
        self, name: str, public: ec.EllipticCurvePublicKey, days: int, hosts: Sequence[str]
    ) -> x509.Certificate:
        ends, last = self.now + timedelta(days=days), self._ca.not_valid_after_utc
        if ends > last:
            raise KeysError(
                f"The CA in {self.folder} ends on {last:%Y-%m-%d}, before {days} days are over. "
                "Give fewer --days, or begin anew with another --out."
            )
        role = "server" if name == SERVER else "client"
        built = (
            _begun(name, self._ca.subject, public, self.now, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([USES[role]]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(_public(self._ca)), critical=False)
        )
        if hosts:
            built = built.add_extension(x509.SubjectAlternativeName([_general(host) for host in hosts]), critical=False)
        return built.sign(self._key, SHA256())

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"cutlayer CA {secrets.token_hex(4)}")])
        ca = (
            _begun(None, subject, key.public_key(), self.now, self.now + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, SHA256())
        )
        make_folder(self.out)
        draft = self.out / f".draft-{AUTHORITY}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        write_text(draft / CA, ca.public_bytes(Encoding.PEM).decode("ascii"), mode=PRIVATE)
        write_text(draft / KEY, _private(key), mode=PRIVATE)
        write_text(draft / ISSUED, self._issued(), mode=PRIVATE)
        move(draft, self.folder)
        self._open()

    def _open(self) -> None:
        try:
            self._ca = x509.load_pem_x509_certificate((self.folder / CA).read_bytes())
            key = load_pem_private_key((self.folder / KEY).read_bytes(), password=None)
            read = json.loads((self.folder / ISSUED).read_text(encoding="utf-8"))
            parties = [Issued(**{**party, "hosts": tuple(party["hosts"])}) for party in read["parties"]]
            self.gone = {kind: [str(one) for one in read["revoked"][kind]] for kind in ("serials", "tokens")}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise KeysError(
                f"The CA in {self.folder} cannot be read: {error}. Restore the folder from a copy."
            ) from error
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key, self.parties = key, {party.name: party for party in parties}

    def _issued(self) -> str:
        listed = [asdict(party) for party in self.parties.values()]
        return json.dumps({"version": VERSION, "parties": listed, "revoked": self.gone}, indent=1)

    def _clients(self) -> str:
        tokens = {name: party.token for name, party in self.parties.items() if party.token and not party.revoked}
        return json.dumps({"version": VERSION, "tokens": tokens, "revoked": self.gone}, indent=1)

    def _remember(self) -> None:
        write_text(self.folder / ISSUED, self._issued(), mode=PRIVATE)

    def _write(self) -> None:
        """Write what is true, and what the server may know of it."""
        self._remember()
        folder = self.out / SERVER
        if folder.is_dir():
            write_text(folder / CLIENTS, self._clients(), mode=PRIVATE)


@contextmanager
def authority(out: Path, *, make: bool = False) -> Iterator[Authority]:
    """The CA of a folder, for one command at a time."""
    if make:
        make_folder(out)
    elif not out.is_dir():
        raise KeysError(
            f"There is no folder {out}. Make keys first: cutlayer keys --out {out} --host HOST --client NAME"
        )
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise KeysError(f"Another cutlayer keys is at work in {out}. Wait until it is done.") from error
        yield Authority(out, make=make)


def _hosts(given: Sequence[str]) -> tuple[str, ...]:
    """Names and addresses as certificates have them; with one of the loopback, all of it."""
    found: list[str] = []
    for host in given:
        try:
            found.append(str(ipaddress.ip_address(host.strip("[]"))))
            continue
        except ValueError:
            pass  # it is a name
        if not HOST.fullmatch(host) or host.replace(".", "").isdigit():
            raise KeysError(
                f"--host '{host}' is neither a host's name nor an IP address. Give it without a port, such as "
                "train.example.org or 192.0.2.7; one that is not ASCII in its xn-- form."
            )
        found.append(host.lower())
    if any(_is_loopback(host) for host in found):
        found += LOOPBACK
    return tuple(dict.fromkeys(found))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _begun(
    name: str | None, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    subject = issuer if name is None else x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _public(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def _private(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode("ascii")
