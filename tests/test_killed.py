"""A party, killed at any of the eleven steps, over TLS: it is started again, and the end is as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

import cutlayer
from apart import ROWS, Apart, keys_for
from cutlayer.step import STEP_NAMES
from spine import U, often
from striking import Fate

OWN = ("partition", "head_forward", "send_activations", "tail_step", "send_gradients", "head_backward", "aggregate")
CASES = [(who, step) for who in ("server", "ann") for step in STEP_NAMES] + [("ann itself", step) for step in OWN]


@pytest.mark.parametrize(
    ("who", "step"), often(CASES, ("server", "trunk_backward"), ("ann", "send_gradients")), ids=str
)
def test_a_party_killed_at_a_step_changes_nothing(who: str, step: str, tmp_path: Path) -> None:
    """``ann`` dies as the server comes to the step; ``ann itself``: as she does, or with the reply not yet sent."""
    run, keys = Apart(tmp_path / "apart", framework="sfl-v2", partition=U, rounds=4), keys_for(*ROWS)
    after = run.root / "server" / "checkpoints" / "round-000002" if step != "partition" else None
    if who == "ann itself" and after is not None:
        after = run.root / "ann" / "checkpoints" / "round-000002"
    victim = {"server": None, "ann": run.root / "ann.pid", "ann itself": None}[who]
    fate = Fate(step, after, victim)
    server = run.serve(keys=keys, fate=None if who == "ann itself" else fate)
    fates = {"ann": fate} if who == "ann itself" else {}
    clients = {name: run.join(name, keys=keys, fate=fates.get(name)) for name in ROWS}
    killed = server if who == "server" else clients["ann"]
    assert killed.wait() == -9, run.said("server") + run.said("ann")
    if who == "server":
        server = run.serve(keys=keys)
    else:
        clients["ann"] = run.join("ann", keys=keys)
    run.ended({**clients, "server": server})
    assert run.same(cutlayer.train(run.simulated, out=tmp_path / "one", progress=False).out)
