"""The server's side: a run's trunk beside a Flower strategy, which draws the clients and merges their parts.

Flower's main thread sends the messages of a round and waits; meanwhile ``cutlayer.federation`` makes the round's steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cutlayer import checkpoint
from cutlayer.apart import served
from cutlayer.build import open_model
from cutlayer.config import dump
from cutlayer.federation import Federation
from cutlayer.flower.records import record_of
from cutlayer.flower.rounds import Rounds, check
from cutlayer.keys import server_keys
from cutlayer.outputs import OURS, alone
from cutlayer.preflight import preflight
from cutlayer.report.progress import Reporter, reporter
from cutlayer.run import Result
from cutlayer.wire import Meter


def train(
    grid: Any,
    source: str | Path | Mapping[str, Any],
    *,
    strategy: Any,
    bind: str,
    address: str,
    out: str | Path,
    keys: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    patience: float = 600.0,
    timeout: float = 3600.0,
    progress: bool | Reporter | None = None,
) -> Result:
    """Make a run whose rounds and step 11 are Flower's: what a ServerApp's main function calls.

    Args:
        grid: as Flower hands it to the ServerApp.
        source: a run file or its keys; ``rounds`` are those of the strategy, and its framework has one trunk for all.
        strategy: any of Flower's, or one's own.
        bind: ``HOST:PORT`` to listen at; port 0: any that is free.
        address: ``HOST:PORT`` where the nodes reach that; port 0: the one listened at.
        out: a new folder.
        keys: the server's folder of ``cutlayer keys``; None: plain text, on this machine only.
        overrides: as of ``cutlayer.train``.
        patience: seconds that the clients of a round are waited for.
        timeout: seconds that Flower waits for a round.
        progress: as of ``cutlayer.train``.

    Raises:
        CutlayerError: anything that a user can mend.
    """
    config, folder, shown = served(source, overrides), Path(out), reporter(progress)
    preflight(config, folder)
    _, blocks = open_model(config)
    check(config, blocks)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        checkpoint.write_text(folder / "run.yaml", OURS + dump(config))
        meter = Meter(Path(config.record_wire) if config.record_wire else None)
        with meter, Federation(config, folder, server_keys(keys) if keys else None, meter, patience, shown) as trunk:
            port = trunk.listen(bind)
            host, _, said = address.rpartition(":")
            rounds = Rounds(grid, trunk, f"{host}:{port if said == '0' else said}")
            result = strategy.start(
                grid=rounds, initial_arrays=record_of(trunk.initial()), num_rounds=config.length[1], timeout=timeout
            )
            return trunk.finished(dict(result.arrays.to_torch_state_dict()))
