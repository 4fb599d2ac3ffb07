"""The secret of a run's clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlayer.agreed import AgreedSecret, load_secret, make_secret
from cutlayer.errors import KeysError


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
