"""A framework that does not wait, over the network: its run equals the simulation that replays its recorded order."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import pytest

import cutlayer
from apart import ROWS, Apart, steps
from cutlayer.driver import Run
from cutlayer.methods.framework import _desk
from spine import TWO, U

Record = dict[str, Any]


class Replayed(_desk.Desk):
    """Merges in the recorded order, and gives each client the version of the model that it went on from there."""

    records: ClassVar[list[Record]] = []

    def __init__(self, run: Run, clients: Any, **more: Any) -> None:
        super().__init__(run, clients, **more)
        mine = [record for record in self.records if record["round"] == run.counters.rounds]
        self.batches = deque([r["client"] for r in group] for _, group in groupby(mine, key=lambda r: r["version"]))
        self.left = {client: deque(r for r in mine if r["client"] == client) for client in clients}
        self.kept: dict[str, asyncio.Future[None]] = {}  # whose upload is merged, and who waits for a later version
        self.taking: set[str] = set()  # who is given the present version, and does not have it yet

    @property
    def over(self) -> bool:
        """Whether the client that asks has made all the uploads that it made there."""
        task = asyncio.current_task()
        assert task is not None
        return not self.left[task.get_name()]

    async def exchange(self, client: str) -> None:
        self.left[client].popleft()
        await super().exchange(client)
        self.taking.discard(client)
        self._news.set()

    async def _serve(self) -> None:
        while True:
            while self.batches and not self.taking and set(self.batches[0]) <= set(self._arrived):
                self._merge(self.batches.popleft())
            self._news.clear()
            with self.run.clock.waiting("server", "uploads"):
                await self._news.wait()

    def _merge(self, batch: Sequence[str]) -> None:
        for client in batch:
            self.kept[client] = self._arrived[client].merged
            nobody = asyncio.get_running_loop().create_future()
            self._arrived[client] = replace(self._arrived[client], merged=nobody)
        super()._merge(batch)
        for client in list(self.kept):
            wanted = self.left[client][0]["base"] if self.left[client] else None
            if wanted in (None, self.run.counters.merges):
                self.kept.pop(client).set_result(None)
                self.taking |= {client} if wanted is not None else set()


@pytest.mark.parametrize("partition", [U, pytest.param(TWO, marks=pytest.mark.slow)], ids=["u-shape", "two-part"])
def test_a_run_that_does_not_wait_is_that_of_its_recorded_order(
    partition: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Apart(
        tmp_path / "apart", partition=partition, framework={"name": "async-sfl", "uploads": 3, "local_steps": 1},
        aggregator="dt-asfl", rounds=2,
    )  # fmt: skip
    server = run.serve()
    run.ended({**{name: run.join(name) for name in ROWS}, "server": server})
    records = [json.loads(line) for line in (run.root / "server" / "uploads.jsonl").read_text().splitlines()]
    assert len(records) >= 12, "three uploads of the slower in each of two rounds"
    monkeypatch.setattr(Replayed, "records", records)
    monkeypatch.setattr("cutlayer.methods.framework.async_sfl.Desk", Replayed)
    cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    again = [json.loads(line) for line in (tmp_path / "one" / "uploads.jsonl").read_text().splitlines()]
    assert again == records
    assert steps(run.root / "server") == steps(tmp_path / "one")
    assert run.same(tmp_path / "one")
