"""Who is let in to a server, and whom a client trusts."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from certificates import CA, CLIENT, SERVER, Authority, certificate_of
from cutlayer.errors import Disconnected, NetworkError, PolicyRefused, Refused
from cutlayer.keys import fingerprint_of
from cutlayer.links.net.connecting import connect, versions
from cutlayer.links.net.messages import (
    GREETING,
    Type,
    pack,
    pack_greeting,
)
from cutlayer.links.net.tls import Credentials, split_address
from network import Raw, run, serving, small


def refusal(served: Any, own: Credentials | None, error: type[NetworkError] = Refused, **more: Any) -> Any:
    async def attempt() -> str:
        with pytest.raises(error) as caught:
            await served.join(own=own, **more)
        return str(caught.value)

    return attempt()


def test_certificates_that_are_not_let_in() -> None:
    foreign = Authority("foreign")
    revoked = CA.issue("left-us")
    serial = certificate_of(revoked).serial_number
    expired, elsewhere = CA.issue("late", days=-1), foreign.issue("stranger", trusts=CA)
    tokenless: list[str] = []

    async def admit(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        tokenless.append(peer)
        if token != "right":
            raise Refused(f"The token of '{peer}' is wrong.")
        return {}

    async def knock() -> None:
        async with serving(SERVER, admit=admit, revoked=lambda s: s == serial) as served:
            good = await served.join(own=CLIENT, token="right")
            assert "has been revoked" in await refusal(served, revoked, token="right")
            assert "expired on" in await refusal(served, expired, token="right")
            assert "not of the CA" in await refusal(served, elsewhere, token="right")
            assert "another CA than the one you trust" in await refusal(
                served, foreign.issue("stranger"), token="right"
            )
            assert tokenless == ["clinic"]
            assert "token of 'clinic' is wrong" in await refusal(served, CLIENT, token="wrong")
            assert "token of 'clinic' is wrong" in await refusal(served, CLIENT, token="")
            assert tokenless == ["clinic"] * 3
            assert "answers" in await refusal(served, None, Disconnected, token="right")
            assert served.listener.refusals == {"left-us": 1, "clinic": 2}
            await good.send(small(9))
            assert (await good.receive())[0].turn == 9

    run(knock())


def test_a_client_checks_whom_it_talks_to() -> None:
    other = CA.issue("server", "127.0.0.1")

    async def check() -> None:
        for own, words in (
            (CA.issue("server", "127.0.0.1", days=-1), "has expired"),
            (CA.issue("server", "elsewhere.example"), "for another name than '127.0.0.1'"),
            (None, "does not speak TLS"),
        ):
            async with serving(own) as served:
                assert words in await refusal(served, CLIENT)
        async with serving(SERVER) as served:
            right = fingerprint_of(certificate_of(SERVER))
            for pin in (right, right.replace(":", "").lower()):
                session = await served.join(own=CLIENT, fingerprint=pin)
                await session.send(small(2))
                assert (await session.receive())[0].turn == 2
                await session.close()
            told = await refusal(served, CLIENT, fingerprint=fingerprint_of(certificate_of(other)))
            assert "has the fingerprint" in told
            assert right in told

    run(check())


def test_a_pinned_certificate_is_the_only_one_that_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers the first handshake with the pinned certificate and is another at the second gets nothing."""
    wanted = CA.issue("server", "127.0.0.1")
    found = certificate_of(wanted)
    from cutlayer.links.net import tls

    der = tls.ssl.PEM_cert_to_DER_cert(wanted.certificate.decode())
    monkeypatch.setattr(tls, "_handshake", lambda *_: der)

    async def check() -> None:
        async with serving(SERVER) as served:
            with pytest.raises(Disconnected):
                await served.join(own=CLIENT, fingerprint=fingerprint_of(found))
            assert not served.listener.sessions

    run(check())


def test_a_hello_is_told_of_when_it_leaves() -> None:
    """Once, when there is a connection to who should be there; what is raised then keeps it here."""
    left: list[str] = []

    async def check() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            for own in (None, CLIENT):
                with pytest.raises(Disconnected):
                    await connect(
                        f"127.0.0.1:{taken.getsockname()[1]}", own, "t", {"client": "c"}, patience=20,
                        leaving=lambda: left.append("to nobody"),
                    )  # fmt: skip
        async with serving(SERVER) as served:
            stranger = Authority("foreign").issue("clinic")  # who does not know the server's CA
            with pytest.raises(NetworkError):
                await served.join(own=stranger, leaving=lambda: left.append("to a stranger"))
            assert left == []
            session = await served.join(own=CLIENT, leaving=lambda: left.append("to the server"))
            assert left == ["to the server"]
            await session.close()

            def refused() -> None:
                raise PolicyRefused("most.bytes", "no more")

            await served.held(0)
            with pytest.raises(PolicyRefused):
                await served.join(own=CLIENT, leaving=refused)
            assert not served.listener.sessions

    run(check())


def test_addresses_that_cannot_be() -> None:
    for text in ("localhost", "http://x:1", ":80", "host:", "host:70000", "::1:80", "host:-1", "host:8x"):
        with pytest.raises(NetworkError, match="is no address"):
            split_address(text)
    assert split_address("[::1]:80") == ("::1", 80)
    assert split_address("a.example:443") == ("a.example", 443)

    async def nowhere() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            for own in (None, CLIENT):
                with pytest.raises(Disconnected, match=r"Nobody listens|No cutlayer server answers"):
                    await connect(f"127.0.0.1:{port}", own, "t", {"client": "c"}, patience=20)
            with pytest.raises(NetworkError, match="cannot be listened at"):
                async with serving(bind=f"127.0.0.1:{port}"):
                    pass
        with pytest.raises(NetworkError, match=r"no address of 'no\.such\.host\.invalid'"):
            async with serving(SERVER, bind="no.such.host.invalid:0"):
                pass
        with pytest.raises(NetworkError, match="anybody read and join"):
            async with serving(bind="0.0.0.0:0"):
                pass
        with pytest.raises(Refused, match="plain text stays on this machine"):
            await connect("server.example.org:443", None, "t", {"client": "c"})
        with pytest.raises(NetworkError, match="The token holds"):
            await connect("127.0.0.1:1", None, "t\n", {"client": "c"})

    run(nowhere())


def test_greetings_that_are_refused() -> None:
    good = {"client": "c", "versions": versions()}
    old = {**versions(), "wire": 0}
    wrong: list[tuple[bytes, str]] = [
        (pack_greeting(Type.HELLO, {"client": "c"}), "speaks protocol unknown"),
        (pack_greeting(Type.HELLO, {**good, "versions": old}), "wire 0"),
        (pack_greeting(Type.HELLO, {**good, "versions": [1]}), "Install one version"),
        (pack_greeting(Type.HELLO, {"versions": versions()}), "needs a name"),
        (pack_greeting(Type.HELLO, {**good, "client": 3}), "needs a name"),
        (pack_greeting(Type.HELLO, {**good, "client": "x" * 999}), "needs a name"),
        (pack_greeting(Type.HELLO, {**good, "client": "a\nb"}), "needs a name"),
        (pack_greeting(Type.WELCOME, good), "came before the HELLO"),
        (pack(Type.PING), "came before the HELLO"),
        (pack(Type.HELLO, b"[" * 5000), "no sound JSON"),
        (pack(Type.HELLO, b"[]"), "no JSON object"),
        (pack(Type.HELLO, b'{"a": NaN}'), "no sound JSON"),
        (pack(Type.HELLO, b'{"a": 1, "a": 2}'), "twice"),
        (pack(Type.HELLO, b'{"a": ' + b"9" * 9000 + b"}"), "no sound JSON"),
        (pack(Type.HELLO, b"\xff\xfe\x00"), "no sound JSON"),
        (pack(Type.HELLO, b" " * (GREETING + 1)), "is not accepted"),
        (b"", "has 0 bytes"),
        (b"GET / HTTP/1.1", "announces"),
    ]

    async def greet() -> None:
        async with serving() as served:
            for message, words in wrong:
                raw = Raw(served.port)
                await raw.write(message)
                kind, told = await raw.last_words()
                assert (kind, words in told) == (Type.REFUSED, True), (message[:40], told)
                await raw.close()
            assert served.listener.refusals.total() == len(wrong)
            assert await served.works()

    run(greet())


def test_an_admission_that_fails_is_not_the_clients_affair(caplog: pytest.LogCaptureFixture) -> None:
    async def admit(peer: str, token: str, hello: dict[str, Any]) -> dict[str, Any]:
        if hello["client"] == "early":
            raise Disconnected("The run has not begun.")
        raise RuntimeError("secret detail")

    async def knock() -> None:
        async with serving(admit=admit) as served:
            with pytest.raises(Disconnected, match=r"^The run has not begun\.$"):
                await served.join("early")
            with pytest.raises(Disconnected, match="its log says why") as caught:
                await served.join()
            assert "secret" not in str(caught.value)

    run(knock())
    assert "secret detail" in caplog.text
