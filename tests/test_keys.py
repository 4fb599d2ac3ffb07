"""Keys: what each folder holds, who verifies whom, what is refused and in which words."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from cutlayer.cli.main import app
from cutlayer.errors import Disconnected, KeysError
from cutlayer.issuing import Authority, authority
from cutlayer.keys import client_keys, fingerprint_of, server_keys, token_hash


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with a CA, a server on the loopback and two clients."""
    Authority(tmp_path / "keys", make=True).add(hosts=["localhost"], clients=["ann", "bob"])
    return tmp_path / "keys"


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes())


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        app(["keys", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return int(end.value.code or 0), said.out, " ".join(said.err.split())


# ---------------------------------------------------------------- what is made


def test_each_folder_has_what_its_party_needs_and_no_more(made: Path) -> None:
    found = {folder.name: {path.name for path in folder.iterdir()} for folder in made.iterdir() if folder.is_dir()}
    assert found == {
        "ca": {"ca.pem", "key.pem", "issued.json"},
        "server": {"ca.pem", "cert.pem", "key.pem", "clients.json"},
        "ann": {"ca.pem", "cert.pem", "key.pem", "token"},
        "bob": {"ca.pem", "cert.pem", "key.pem", "token"},
    }
    assert not list(made.rglob("*draft*"))
    for path in made.rglob("*"):
        mode = path.stat().st_mode & 0o777
        if path.is_dir():
            assert mode == 0o700
        elif path.name in ("key.pem", "token", "clients.json", "issued.json") or path.parent.name == "ca":
            assert mode == 0o600, path
    tokens = [(made / name / "token").read_text().strip() for name in ("ann", "bob")]
    kept = (made / "server/clients.json").read_text() + (made / "ca/issued.json").read_text()
    assert all(token not in kept and token_hash(token) in kept and len(token) >= 43 for token in tokens)
    assert len({(made / name / "key.pem").read_text() for name in ("ca", "server", "ann", "bob")}) == 4


def test_secrets_are_private_whatever_the_mask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Authority(tmp_path / "keys", make=True).add(hosts=["localhost"], clients=["ann"])
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "keys").rglob("*") if p.name in ("key.pem", "token")}
    assert modes == {"key.pem": 0o600, "token": 0o600}


def test_certificates_say_who_and_what_for(made: Path) -> None:
    server, client = certificate(made / "server"), certificate(made / "ann")
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    for one, use, name in (
        (server, ExtendedKeyUsageOID.SERVER_AUTH, "server"),
        (client, ExtendedKeyUsageOID.CLIENT_AUTH, "ann"),
    ):
        assert list(one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [use]
        assert one.subject.rfc4514_string() == f"CN={name}"
        assert not one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert timedelta(364) < one.not_valid_after_utc - datetime.now(UTC) <= timedelta(365)
        assert one.not_valid_before_utc < datetime.now(UTC)
    assert server.serial_number != client.serial_number


def test_loopback_is_named_only_when_asked_for(tmp_path: Path) -> None:
    Authority(tmp_path, make=True).add(hosts=["Train.Example.org", "192.0.2.7", "2001:DB8::1"], clients=["ann"])
    names = certificate(tmp_path / "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["train.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "2001:db8::1"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not there")
def test_openssl_verifies_them(made: Path) -> None:
    def verified(folder: str, purpose: str) -> bool:
        words = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", made / "ca/ca.pem"]
        return subprocess.run([*words, made / folder / "cert.pem"], capture_output=True).returncode == 0

    assert verified("server", "sslserver")
    assert verified("ann", "sslclient")
    assert not verified("ann", "sslserver")
    assert not verified("server", "sslclient")
    words = ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", made / "server/cert.pem"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said.strip().partition("=")[2] == server_keys(made / "server").fingerprint


def handshake(made: Path, client: Path | None, host: str = "localhost") -> str:
    """The client's name as the server sees it after a mutual TLS handshake in memory; raises ``ssl.SSLError``."""
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(made / "server/cert.pem", made / "server/key.pem")
    accepting.load_verify_locations(made / "server/ca.pem")
    accepting.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.load_verify_locations(made / "ann/ca.pem")
    if client is not None:
        calling.load_cert_chain(client / "cert.pem", client / "key.pem")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        accepting.wrap_bio(up, down, server_side=True),
        calling.wrap_bio(down, up, server_side=False, server_hostname=host),
    ]
    for _ in range(6):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = ends[0].getpeercert(binary_form=True)
    assert shown
    pem = x509.load_der_x509_certificate(shown).public_bytes(Encoding.PEM)
    return server_keys(made / "server").admit(pem, client_keys(client or made).token)


def test_the_tls_library_takes_them_and_no_others(made: Path, tmp_path: Path) -> None:
    assert handshake(made, made / "ann") == "ann"
    Authority(tmp_path / "foreign", make=True).add(hosts=["localhost"], clients=["ann"])
    for client, host in ((tmp_path / "foreign/ann", "localhost"), (None, "localhost"), (made / "ann", "example.org")):
        with pytest.raises(ssl.SSLError):
            handshake(made, client, host)
    with pytest.raises(ssl.SSLError):
        handshake(made, made / "server")  # a server's certificate does not make a client


# ---------------------------------------------------------------- again: add, revoke, renew


def test_a_second_call_adds_and_keeps(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*.pem")}
    assert Authority(made).add(hosts=["127.0.0.1"], clients=["ann", "cid"]) == ["cid"]
    assert {path: path.read_bytes() for path in before} == before
    keys = server_keys(made / "server")
    assert all(keys.token_ok(name, client_keys(made / name).token) for name in ("ann", "bob", "cid"))


def test_other_hosts_need_a_renewal(made: Path) -> None:
    with pytest.raises(KeysError, match=r"is for localhost, 127.0.0.1, ::1, not for example.org.*--renew server"):
        Authority(made).add(hosts=["example.org"])
    old = server_keys(made / "server").fingerprint
    Authority(made).renew("server", hosts=["example.org"])
    keys = server_keys(made / "server")
    assert keys.fingerprint != old
    assert keys.token_ok("ann", client_keys(made / "ann").token)
    Authority(made).renew("server")
    names = certificate(made / "server").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["example.org"]


def test_a_running_server_sees_a_revocation(made: Path) -> None:
    keys, ann = server_keys(made / "server"), client_keys(made / "ann")
    serial = certificate(made / "ann").serial_number
    assert keys.admit(ann.certificate, ann.token) == "ann"
    assert not keys.revoked(serial)
    Authority(made).revoke("ann")
    assert keys.revoked(serial)
    assert not keys.token_ok("ann", ann.token)
    with pytest.raises(KeysError, match="revoked"):
        keys.admit(ann.certificate, ann.token)
    bob = client_keys(made / "bob")
    assert keys.admit(bob.certificate, bob.token) == "bob"
    Authority(made).revoke("ann")  # twice is once
    assert json.loads((made / "server/clients.json").read_text())["revoked"]["serials"] == [f"{serial:x}"]
    with pytest.raises(KeysError, match=r"was revoked. To let it in again: .* --renew ann"):
        Authority(made).add(clients=["ann"])


@pytest.mark.parametrize("revoked", [False, True])
def test_renewed_keys_are_good_and_the_old_ones_void(made: Path, revoked: bool) -> None:
    keys, old = server_keys(made / "server"), client_keys(made / "ann")
    if revoked:
        Authority(made).revoke("ann")
    Authority(made).renew("ann", days=7)
    new = client_keys(made / "ann")
    assert keys.admit(new.certificate, new.token) == "ann"
    assert new.until - datetime.now(UTC) < timedelta(days=7, seconds=1)
    for pem, token, said in (
        (old.certificate, old.token, "was revoked"),
        (old.certificate, new.token, "was revoked"),
        (new.certificate, old.token, "not the one that belongs"),
    ):
        with pytest.raises(KeysError, match=said):
            keys.admit(pem, token)


def test_only_both_together_let_in(made: Path, tmp_path: Path) -> None:
    keys, ann, bob = server_keys(made / "server"), client_keys(made / "ann"), client_keys(made / "bob")
    Authority(tmp_path / "foreign", make=True).add(hosts=["localhost"], clients=["ann", "eve"])
    foreign = client_keys(tmp_path / "foreign/ann")
    for pem, token, said in (
        (ann.certificate, bob.token, "token is not the one"),
        (ann.certificate, "", "token is not the one"),
        (ann.certificate, "é", "token is not the one"),
        (foreign.certificate, ann.token, "of another CA"),
        (keys.certificate, ann.token, "not a client's"),
        (b"nonsense", ann.token, "no certificate in PEM form"),
    ):
        with pytest.raises(KeysError, match=said):
            keys.admit(pem, token)
    assert not keys.token_ok("eve", "")


@pytest.mark.parametrize("damage", ["", "{}", '{"version": 1, "tokens": {}}', "[" * 100_000, None])
def test_nobody_is_let_in_while_the_list_cannot_be_read(made: Path, damage: str | None) -> None:
    keys, ann = server_keys(made / "server"), client_keys(made / "ann")
    path, serial = made / "server/clients.json", certificate(made / "ann").serial_number
    path.write_text(damage) if damage is not None else path.unlink()
    assert "clients.json" in keys.problem
    assert not keys.revoked(serial)  # its session goes on
    assert not keys.token_ok("ann", ann.token)
    with pytest.raises(Disconnected, match="Try again in a while"):
        keys.belong("ann", "ann", ann.token)
    with pytest.raises(KeysError, match=r"not let in: .*clients.json"):
        keys.admit(ann.certificate, ann.token)
    with pytest.raises(KeysError, match=r"clients.json"):
        server_keys(made / "server")
    Authority(made).add()  # mends it
    assert keys.admit(ann.certificate, ann.token) == "ann"


def test_who_was_revoked_stays_so_while_the_list_cannot_be_read(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, serial = server_keys(made / "server"), certificate(made / "ann").serial_number
    Authority(made).revoke("ann")
    assert keys.revoked(serial)
    path = made / "server/clients.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    for _ in range(3):
        assert keys.revoked(serial)
        assert not keys.revoked(certificate(made / "bob").serial_number)
    assert caplog.text.count("those who are in stay") == 1
    path.write_text(whole.replace(next(iter(json.loads(whole)["tokens"])), "eve"))
    assert not keys.problem
    path.write_text(json.dumps(json.loads(whole) | {"tokens": {}}))  # read, and nobody is on it
    assert keys.revoked(certificate(made / "bob").serial_number)


def test_a_folder_that_the_ca_does_not_know_is_in_the_way(made: Path) -> None:
    (made / "cid").mkdir()
    (made / "cid/key.pem").write_text("precious")
    with pytest.raises(KeysError, match="cid is in the way"):
        Authority(made).add(clients=["cid"])
    assert (made / "cid/key.pem").read_text() == "precious"


def test_one_command_at_a_time(made: Path) -> None:
    with authority(made), pytest.raises(KeysError, match="Another cutlayer keys is at work"), authority(made):
        pass


# ---------------------------------------------------------------- what loading refuses


def wrong_pair(made: Path) -> None:
    shutil.copy(made / "bob/key.pem", made / "ann/key.pem")


def foreign_ca(made: Path) -> None:
    Authority(made / "other", make=True)
    shutil.copy(made / "other/ca/ca.pem", made / "ann/ca.pem")


REFUSED = {
    "another's key": (wrong_pair, "key.pem does not belong to .*cert.pem"),
    "another CA": (foreign_ca, "cert.pem is not signed by .*ca.pem"),
    "key open to all": (lambda made: (made / "ann/key.pem").chmod(0o644), r"rights 644.*chmod 600 .*ann/key.pem"),
    "token open to all": (lambda made: (made / "ann/token").chmod(0o604), r"rights 604.*chmod 600 .*ann/token"),
    "no key": (lambda made: (made / "ann/key.pem").unlink(), "key.pem is missing"),
    "no token": (lambda made: (made / "ann/token").unlink(), "token is missing"),
    "no certificate": (lambda made: (made / "ann/cert.pem").unlink(), "cert.pem is missing"),
    "no CA": (lambda made: (made / "ann/ca.pem").unlink(), "ca.pem is missing"),
    "an empty token": (lambda made: (made / "ann/token").write_text("\n"), "token is empty"),
    "a broken key": (lambda made: (made / "ann/key.pem").write_text("x"), "key.pem is no private key"),
    "a broken certificate": (lambda made: (made / "ann/cert.pem").write_text("x"), "cert.pem is no certificate"),
    "expired": (
        lambda made: Authority(made, now=datetime.now(UTC) - timedelta(days=9)).renew("ann", days=8),
        r"cert.pem has expired .*--renew ann",
    ),
    "from tomorrow on": (
        lambda made: Authority(made, now=datetime.now(UTC) + timedelta(days=1)).renew("ann"),
        r"cert.pem is good from .*Check this machine's clock",
    ),
    "no folder": (lambda made: shutil.rmtree(made / "ann"), "There is no folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_not_right_is_refused_in_words(case: str, made: Path) -> None:
    assert client_keys(made / "ann").name == "ann"
    spoil, said = REFUSED[case]
    spoil(made)
    with pytest.raises(KeysError, match=said):
        client_keys(made / "ann")


def test_a_folder_for_the_other_role_is_refused(made: Path) -> None:
    with pytest.raises(KeysError, match="holds the keys of a client; cutlayer serve needs the folder server/"):
        server_keys(made / "ann")
    with pytest.raises(KeysError, match="holds the keys of a server; cutlayer join needs the folder with"):
        client_keys(made / "server")


def test_secrets_are_not_shown(made: Path) -> None:
    keys = client_keys(made / "ann")
    assert keys.token not in repr(keys)
    assert "PRIVATE" not in repr(keys)
    assert fingerprint_of(keys.certificate) == keys.fingerprint


# ---------------------------------------------------------------- the command


def test_the_command_makes_lists_revokes_and_renews(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "keys"
    code, said, _ = run(capsys, "--out", out, "--host", "localhost", "--client", "ann", "bob", "--client", "cid")
    assert code == 0
    keys = server_keys(out / "server")
    assert f"The server's fingerprint: {keys.fingerprint}\n" in said
    assert [client_keys(out / name).name for name in ("ann", "bob", "cid")] == ["ann", "bob", "cid"]
    code, said, _ = run(capsys, "--out", out, "--client", "ann", "--client", "dan")
    assert code == 0
    assert f"{out}/ann (was there, and is kept)\n" in said
    assert f"{out}/dan\n" in said
    token = client_keys(out / "ann").token
    assert run(capsys, "--out", out, "--revoke", "ann", "--revoke", "bob")[0] == 0
    assert not keys.token_ok("ann", token)
    code, said, _ = run(capsys, "--out", out, "--renew", "bob", "--days", "30")
    assert code == 0
    assert keys.token_ok("bob", client_keys(out / "bob").token)
    code, said, _ = run(capsys, "--out", out, "--list")
    rows = {line.split()[1]: line for line in said.splitlines() if line.startswith("│")}
    assert set(rows) == {"server", "ann", "bob", "cid", "dan"}
    assert "revoked" in rows["ann"]
    assert "revoked" not in rows["bob"]
    assert keys.fingerprint in rows["server"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--client", "ann"], "The server needs a name or an address"),
        (["--host", "localhost:8000", "--client", "ann"], "neither a host's name nor an IP address"),
        (["--host", "*.example.org", "--client", "ann"], "neither a host's name nor an IP address"),
        (["--host", "1.2.3", "--client", "ann"], "neither a host's name nor an IP address"),
        (["--host", "localhost", "--client", "../ann"], "is no name of a client"),
        (["--host", "localhost", "--client", "Server"], "cannot be the name of a client"),
        (["--host", "localhost", "--client", "ca"], "cannot be the name of a client"),
        (["--host", "localhost", "--client", "ann", "Ann"], "differ in capitals only"),
        (["--revoke", "ann"], "There is no"),
        (["--list"], "There is no"),
        ([], "Give one of --client"),
        (["ann"], "Clients to add come after --client"),
        (["--list", "--client", "ann"], "Give one of --client"),
    ],
)
def test_mistakes_are_said_in_words(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "--out", tmp_path / "keys", *arguments)
    assert code == 2
    assert said in err
    assert not list(tmp_path.rglob("key.pem"))[1:]  # of the CA at most


def test_revoking_what_is_not_there(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no keys of 'anne'. Did you mean 'ann'?" in run(capsys, "--out", made, "--revoke", "anne")[2]
    assert "cannot be revoked" in run(capsys, "--out", made, "--revoke", "server")[2]
