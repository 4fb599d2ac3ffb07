"""A server with two tenants, over TLS: whoever is not let in, or misbehaves once he is, harms nobody else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import certificates
import cutlayer
from cutlayer.errors import CutlayerError, Refused
from cutlayer.identity import fingerprint
from cutlayer.issuing import Authority
from cutlayer.keys import client_keys
from cutlayer.links.net.connecting import connect
from cutlayer.links.net.session import Session
from cutlayer.links.net.tls import Credentials
from network import run, small
from test_service import NAMES, Two

Hello = Mapping[str, Any]


def test_strangers_and_other_tenants(tmp_path: Path) -> None:
    both = Two(tmp_path / "apart", rounds=2)
    keys = tmp_path / "keys"
    everybody = [name for names in NAMES.values() for name in names]
    made = Authority(keys, make=True)
    made.add(hosts=["localhost"], clients=[*everybody, "left-us"])
    made.revoke("left-us")
    own = {name: client_keys(keys / name) for name in everybody}
    proofs = {name: Credentials(k.ca, k.certificate, k.key) for name, k in own.items()}
    server = both.serve(keys=keys)
    address, model = f"localhost:{both.port}", fingerprint(both.tree["model"])
    counts = ("evaluation_batches", "length", "validation_batches")
    data = {"examples": 5, "label_tokens": 50, "steps_per_epoch": 2, **dict.fromkeys(counts, 0)}

    async def knock(proof: Credentials, token: str, **hello: Any) -> Session:
        return await connect(address, proof, token, hello)

    async def turned_away(said: str, proof: Credentials, token: str, **hello: Any) -> None:
        with pytest.raises(CutlayerError, match=said) as caught:
            await knock(proof, token, **hello)
        assert not any(name in str(caught.value) for name in ("fraud", "cleo", "dan") if name != hello.get("run"))

    async def strangers() -> None:
        foreign = certificates.Authority("foreign").issue("ann", trusts=None)
        trusting = Credentials(own["ann"].ca, foreign.certificate, foreign.key)
        ann = proofs["ann"], own["ann"].token
        await turned_away("not of the CA", trusting, own["ann"].token, client="ann", wants="run")
        await turned_away("do not belong to this client", ann[0], "wrong", client="ann", wants="run")
        await turned_away("do not belong to this client", ann[0], own["bob"].token, client="ann", wants="run")
        await turned_away("do not belong to this client", *ann, client="bob", wants="run")
        await turned_away("do not belong to this client", ann[0], own["bob"].token, client="bob", wants="run")
        await turned_away("do not belong to this client", ann[0], own["cleo"].token, client="bob", wants="run")
        await turned_away("No run 'fraud' here has a client 'ann'", *ann, client="ann", run="fraud", wants="run")
        await turned_away("other checksums", *ann, client="ann", model={"config.json": "0" * 64}, data=data, rounds=[])
        await turned_away("cannot be", *ann, client="ann", model=model, data={**data, "examples": -1}, rounds=[])
        await turned_away("cannot be", *ann, client="ann", model=model, data=data, rounds=["../../etc"])

    async def misbehaves() -> None:
        """Let in, and then: frames that nobody asked for, and those of another."""
        hello = {"client": "dan", "model": model, "data": data, "rounds": [], "instance": "evil"}
        for frame, turn in ((small(99, sender="dan"), 0), (small(1, sender="cleo"), 0), (None, -3)):
            session = await knock(proofs["dan"], own["dan"].token, **hello, turn=turn)
            if frame is not None:
                await session.send(frame)
            with pytest.raises(Refused, match=r"which nobody had made|is no turn"):
                await session.receive()

    run(strangers())
    run(misbehaves())
    both.ended({name: both.join(name, keys=keys) for name in NAMES["flu"]})
    assert server.poll() is None
    alone = cutlayer.train(both.alone("flu"), out=tmp_path / "flu", progress=False)
    assert both.same(alone.out, server="server/flu", names=NAMES["flu"])
    assert both.said("server").count("Refused a session of 'ann'") == 9
    server.kill()
    server.wait()
