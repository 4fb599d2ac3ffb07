"""The limits of a run's frames: every frame of the run fits, and a larger one is refused before memory is asked for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import cutlayer
from apart import Apart
from cutlayer import joining, offered
from cutlayer.apart import offer, served
from cutlayer.config import load_config
from cutlayer.errors import Refused, WireError
from cutlayer.frames import limits_of
from cutlayer.identity import fingerprint
from cutlayer.links.net.messages import Type, pack
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.schedule import Told
from cutlayer.wire import Header, Incoming, Limits, encode
from network import LONG, Raw
from network import run as complete
from spine import TWO, often

CASES: list[dict[str, Any]] = [
    {}, {"peft": "full"}, {"framework": "sequential-sl"}, {"framework": "sfl-v1", "peft": "full", "partition": TWO},
    {"framework": "psl", "partition": TWO}, {"peft": {"name": "splitft-cut-rank", "rank": 4, "cut_rank": 2}},
    {"peft": {"name": "lora", "rank": 2, "rank_pattern": {"q_proj": 7}}}, {"framework": "hsfl"},
    {"exchange": {"name": "mu-splitfed", "perturbations": 3}, "framework": "sfl-v1", "partition": TWO},
    {"peft": {"name": "lora", "rank": 2, "targets": ["embed_tokens", "q_proj"]}}, {"precision": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("changes", often([(case,) for case in CASES], (CASES[0],), (CASES[3],), (CASES[8],)), ids=str)
def test_every_frame_of_a_run_fits(changes: dict[str, Any], tmp_path: Path) -> None:
    """And the limit is no more than the least one and a few of the largest."""
    run = Apart(tmp_path, rounds=2, eval_every=1, **changes)
    tree = {**run.simulated, "record_wire": str(tmp_path / "wire")}
    cutlayer.train(tree, out=tmp_path / "out")
    largest = max(
        sum(tensor.nbytes for tensor in tensors) for _, _, tensors in cutlayer.wire.read_frames(tmp_path / "wire")
    )
    config = load_config(tree)
    limit = limits_of(config, load_model_config(config.model)).body_bytes
    assert largest <= (limit - (1 << 20)) / 1.25 <= 60 * largest


def large(size: int, **fields: Any) -> Any:
    """A frame whose body has so many bytes."""
    header = Header("send_activations", "activations", "ask", "server", "ann", "ann", turn=1, names=("x",))
    return encode(header.but(**fields), [torch.zeros(size, dtype=torch.uint8)])


def test_nothing_is_allocated_for_a_frame_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = served(Apart(tmp_path).tree)
    limits = limits_of(config, load_model_config(config.model))
    assert limits.body_bytes < 4 << 20 < Limits().body_bytes
    head = large(limits.body_bytes + 1).head
    Incoming(large(limits.body_bytes).head, limits)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(torch, "empty", never)
    with pytest.raises(WireError, match=f"{limits.body_bytes}"):
        Incoming(head, limits)


def test_a_server_takes_no_larger_frame_than_its_run_has(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart")
    config = served(run.tree)
    limit = limits_of(config, load_model_config(config.model)).body_bytes
    server = run.serve()

    async def told() -> tuple[Type | None, str]:
        raw = Raw(run.port)
        told = asdict(Told(examples=7, label_tokens=70, steps_per_epoch=3, evaluation_batches=2))
        await raw.greet("ann", model=fingerprint(config.model), data=told, rounds=[], turn=0, instance="i")
        await raw.write(pack(Type.FRAME_HEAD, large(limit + 1, sender="ann", receiver="server").head))
        found = await raw.last_words()
        await raw.close()
        return found

    try:
        kind, words = complete(told())
        assert kind is Type.REFUSED
        assert str(limit) in words
        assert server.poll() is None
    finally:
        server.kill()
        server.wait(LONG)


def test_a_client_takes_no_larger_frame_than_its_run_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session of the run has the run's limits; the one before it takes small frames only."""
    run = Apart(tmp_path / "apart")
    config = served(run.tree)
    taken: list[int] = []

    class Greeting:
        def __init__(self) -> None:
            self.welcome = {"run": offer(config)}

        async def close(self, reason: str) -> None:
            pass

    async def connect(*_: Any, limits: Limits, **__: Any) -> Greeting:
        taken.append(limits.body_bytes)
        if len(taken) > 1:
            raise Refused("enough")
        return Greeting()

    monkeypatch.setattr(offered, "connect", connect)
    with pytest.raises(Refused, match="enough"):
        joining.join(
            "localhost:1", data=run.files["ann"], out=tmp_path / "out", name="ann", model=run.tree["model"],
            progress=False,
        )  # fmt: skip
    assert taken[0] <= 32 << 20
    assert taken[1:] == [limits_of(config, load_model_config(config.model)).body_bytes]
