"""Certificates for the tests: a small CA and what it signs."""

from __future__ import annotations

import datetime as dt
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.links.net.tls import Credentials

NOW = dt.datetime.now(dt.UTC)


class Authority:
    """A CA."""

    def __init__(self, name: str = "ca") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._made(name, name, self.key, 30, x509.BasicConstraints(ca=True, path_length=0))
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self, name: str, host: str | None = None, *, days: int = 5, trusts: Authority | None = None
    ) -> Credentials:
        """A client's credentials, or with ``host`` a server's; ``days`` below 0: expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if host else ExtendedKeyUsageOID.CLIENT_AUTH
        more: list[x509.ExtensionType] = [x509.ExtendedKeyUsage([usage])]
        if host:
            number = host.replace(".", "").isdigit()
            at = x509.IPAddress(ipaddress.ip_address(host)) if number else x509.DNSName(host)
            more.append(x509.SubjectAlternativeName([at]))
        made = self._made(name, "", key, days, x509.BasicConstraints(ca=False, path_length=None), *more)
        return Credentials(
            (trusts or self).pem,
            made.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def _made(
        self, name: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: int, *more: x509.ExtensionType
    ) -> x509.Certificate:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(issuer) if issuer else self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - dt.timedelta(days=20))
            .not_valid_after(NOW + dt.timedelta(days=days))
        )
        for extension in more:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self.key, hashes.SHA256())


def certificate_of(credentials: Credentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(credentials.certificate)


CA = Authority()
SERVER, CLIENT = CA.issue("server", "127.0.0.1"), CA.issue("clinic")
