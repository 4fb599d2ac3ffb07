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
def test_a_full_disk_at_the_server_stops_the_run_and_no_more(
    tmp_path: Path, small_disk: Callable[[Path], Path]
) -> None:  # fmt: skip
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=20)
    disk = small_disk(run.root / "server")
    server = run.serve()
    clients = {name: run.join(name) for name in ROWS}
    until = time.monotonic() + LONG
    while not (disk / "checkpoints" / "round-000002").exists():
        assert time.monotonic() < until, run.said("server")
        time.sleep(0.005)
    fill(disk)
    assert server.wait() == 2, run.said("server")
    assert "Traceback" not in run.said("server")
    assert "No space left on device" in run.said("server")  # its owner reads why
    assert not list(disk.rglob("*draft*"))
    (disk / "filler").unlink()
    run.ended({"server": run.serve(), **clients})
    assert run.same(cutlayer.train(run.simulated, out=tmp_path / "one").out)


@pytest.mark.slow
def test_without_a_client_whose_disk_is_full_the_others_go_on(
    tmp_path: Path, small_disk: Callable[[Path], Path]
) -> None:  # fmt: skip
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=20)
    disk = small_disk(run.root / "ann")
    server = run.serve()
    clients = {name: run.join(name) for name in ROWS}
    until = time.monotonic() + LONG
    while not (disk / "checkpoints" / "round-000002").exists():
        assert time.monotonic() < until, run.said("server")
        time.sleep(0.005)
    fill(disk)
    assert clients["bob"].wait() == 0, run.said("bob")
    assert "Client 'ann' refused request" in run.said("server"), run.said("server")
    assert "o space left" in run.said("ann"), run.said("ann")  # its owner reads why
    (disk / "filler").unlink()
    assert server.wait() == 0, run.said("server")
    assert clients["ann"].wait() == 2, run.said("ann")
    assert "Traceback" not in run.said("server") + run.said("ann")
    assert not list(disk.rglob("*draft*"))
