"""A disk that fills up while organisations train: said in words, nothing half-written, and the run goes on after it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cutlayer
from apart import LONG, ROWS, Apart
from crash import fill


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path], Path]]:
    """Makes a folder a disk of a few megabytes."""
    mounted: list[Path] = []

    def mount(place: Path) -> Path:
        place.mkdir(parents=True)
        if os.geteuid():
            pytest.skip("only root may mount a small disk")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["server", "ann"])
def test_a_full_disk_stops_the_run_and_no_more(
    who: str, tmp_path: Path, small_disk: Callable[[Path], Path]
) -> None:  # fmt: skip
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=20)
    disk = small_disk(run.root / who)
    server = run.serve()
    clients = {name: run.join(name) for name in ROWS}
    until = time.monotonic() + LONG
    while not (disk / "checkpoints" / "round-000002").exists():
        assert time.monotonic() < until, run.said("server")
        time.sleep(0.005)
    fill(disk)
    assert server.wait() == 2, run.said("server")
    assert "Traceback" not in run.said("server") + run.said(who)
    said = "No space left on device" if who == "server" else "Client 'ann' refused request"
    assert said in run.said("server")
    assert "o space left" in run.said(who), run.said(who)  # its owner reads why
    assert not list(disk.rglob("*draft*"))
    (disk / "filler").unlink()
    run.ended({"server": run.serve(), **clients})
    assert run.same(cutlayer.train(run.simulated, out=tmp_path / "one").out)
