"""The secret of a run's clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from apart import Apart
from cutlayer.agreed import AgreedSecret, Agreement, load_secret, make_secret
from cutlayer.apart import needs_secret, served
from cutlayer.errors import KeysError, Refused
from test_joining import seat


def test_all_who_have_the_secret_have_the_same_keys(tmp_path: Path) -> None:
    make_secret(tmp_path / "ours" / "secret")
    make_secret(tmp_path / "others")
    ours, again, others = (load_secret(tmp_path / name) for name in ("ours/secret", "ours/secret", "others"))
    assert ours.key("seal", "ann", "bob") == again.key("seal", "ann", "bob")
    assert ours.check == again.check != others.check
    keys = [ours.key(*purpose) for purpose in (("seal", "ann", "bob"), ("seal", "annbob"), ("sealann", "bob"), ())]
    assert len({*keys, others.key("seal", "ann", "bob")}) == 5
    assert all(len(key) == 32 for key in keys)
    assert (tmp_path / "others").stat().st_mode & 0o777 == 0o600


def test_a_server_finds_clients_with_different_secrets() -> None:
    ours, others = AgreedSecret(b"a" * 32).check, AgreedSecret(b"b" * 32).check
    agreement = Agreement("clients seal")
    agreement.compare("ann", ours, [])
    agreement.compare("bob", ours, ["ann"])
    with pytest.raises(Refused, match="secret of 'bob' is another than that of 'ann', who is here already"):
        agreement.compare("bob", others, ["ann"])
    agreement.compare("bob", ours, ["ann", "bob"])
    for wrong in (None, 7, "", ours[1:], ours.upper().replace("0", "G") + "x"):
        with pytest.raises(Refused, match="says nothing of the clients' secret"):
            agreement.compare("ann", wrong, [])
    agreement.compare("ann", others, ["ann"])  # alone there: it has another file now
    with pytest.raises(Refused, match="another than that of 'ann'"):
        agreement.compare("bob", ours, ["ann"])
    Agreement(None).compare("ann", None, ["bob"])


def test_a_client_says_what_it_lacks_and_what_it_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    assert needs_secret(served(Apart(tmp_path / "plain").file), 4) is None
    assert "'ann'" in str(needs_secret(served(Apart(tmp_path / "ring", framework="ringsfl").file), 4))
    hashes = {"framework": {"name": "gsfl", "groups": "selection"}, "selection": "gsfl-hash-grouping"}
    assert "asks for hashes" in str(needs_secret(served(Apart(tmp_path / "hashes", **hashes).file), 4))
    secret = AgreedSecret(b"a" * 32)
    own, noted = seat(tmp_path / "unused", agreed=secret)
    assert (own.agreed, own.told().get("secret_check")) == (None, None)
    assert noted.words[0].startswith("--secret is not used")
    monkeypatch.setattr("cutlayer.seat.needs_secret", lambda *_: "somebody must")
    own, noted = seat(tmp_path / "used", agreed=secret)
    assert own.told()["secret_check"] == secret.check
    assert not noted.words
    with pytest.raises(KeysError, match=r"agreed on: somebody must.*'cutlayer secret FILE'.*--secret FILE"):
        seat(tmp_path / "lacking")


def test_keys_follow_rfc_5869() -> None:
    """The same by HMAC alone: extract with a salt of zeros, expand by one block."""
    import hashlib
    import hmac

    info = b"\x00\x00\x00\x08cutlayer\x00\x00\x00\x04seal"
    extracted = hmac.new(bytes(32), b"k" * 32, hashlib.sha256).digest()
    assert AgreedSecret(b"k" * 32).key("seal") == hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def test_a_file_that_is_no_secret_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(KeysError, match=r"is missing\. Ask the other clients"):
        load_secret(file)
    make_secret(file)
    with pytest.raises(KeysError, match="is there already"):
        make_secret(file)
    file.chmod(0o644)
    with pytest.raises(KeysError, match="open to other users"):
        load_secret(file)
    for text in ("", "abc", "g" * 64, "a" * 63, "a" * 65):
        file.write_text(text)
        file.chmod(0o600)
        with pytest.raises(KeysError, match="64 hexadecimal digits"):
            load_secret(file)
