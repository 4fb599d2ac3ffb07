"""Many clients and many steps on one server (over TLS on loopback): all are served, and its memory stays as it is."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from apart import FORKS, LONG, Apart, Command, keys_for, steps
from cutlayer.joining import join
from cutlayer.links.net.answering import Again
from spine import model
from tiny import text_rows, write_rows

CLIENTS, PROCESSES = 64, 4  # a process costs 350 MB of imports, a client in it some MB


def several(address: str, names: list[str], files: dict[str, str], root: str, folder: str, keys: str) -> None:
    """Clients of one process, a thread each."""
    torch.set_num_threads(1)
    failed: list[BaseException] = []

    def one(name: str) -> None:
        try:
            join(
                address, data=files[name], out=Path(root) / name, keys=Path(keys) / name, model=folder, progress=False,
                again=Again(first=0.2, most=1.0),
            )  # fmt: skip
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raise SystemExit(len(failed))


def resident(process: Command) -> int:
    """Bytes of memory that a process has now."""
    text = Path(f"/proc/{process.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def loaded(tmp_path: Path, *, rounds: int, local: int, clients: int, processes: int) -> tuple[list[Any], list[int]]:
    """The steps of a run of so many clients, and the server's memory after each of its rounds."""
    folder = model(num_hidden_layers=3)
    names = [f"client-{number}" for number in range(clients)]
    run = Apart(
        tmp_path / "apart", model=str(folder), clients=clients, rounds=rounds, batch_size=1,
        framework={"name": "sfl-v1", "local_steps": local}, data={"max_length": 16},
    )  # fmt: skip
    files = {n: str(write_rows(run.root / f"{n}.jsonl", text_rows(2, seed=i))) for i, n in enumerate(names)}
    keys = keys_for(*names)
    server = run.serve(keys=keys)
    address, memory = f"localhost:{run.port}", list[int]()
    shares = [names[start::processes] for start in range(processes)]
    told = (files, str(run.root), str(folder), str(keys))
    crowd = [FORKS.Process(target=several, args=(address, share, *told)) for share in shares]
    for one in crowd:
        one.start()
    lines, seen, until = run.root / "server" / "metrics.jsonl", 0, time.monotonic() + 10 * LONG
    while server.poll() is None:
        assert time.monotonic() < until, run.said("server")
        done = lines.read_bytes().count(b"\n") // (clients * local) if lines.exists() else 0
        if done > seen:
            seen = done
            memory.append(resident(server))
        time.sleep(0.05)
    assert server.wait() == 0, run.said("server")
    for one in crowd:
        one.join(LONG)
        assert one.exitcode == 0
    return steps(run.root / "server"), memory


def test_clients_of_several_processes(tmp_path: Path) -> None:
    made, _ = loaded(tmp_path, rounds=2, local=1, clients=6, processes=1)
    assert len(made) == 12
    assert len({client for _, client, *_ in made}) == 6


@pytest.mark.slow
def test_64_clients_and_ten_thousand_steps(tmp_path: Path) -> None:
    """The server's memory after the first quarter of the rounds is its memory at the end, within 2 %."""
    made, memory = loaded(tmp_path, rounds=16, local=10, clients=CLIENTS, processes=PROCESSES)
    assert len(made) == 10_240
    assert len({client for _, client, *_ in made}) == CLIENTS
    print(f"server's memory by round: {[round(size / 2**20) for size in memory]} MiB")
    quarter = memory[len(memory) // 4]
    assert max(memory[len(memory) // 4 :]) <= 1.02 * quarter
