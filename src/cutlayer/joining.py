"""A client that joins a server's run: it fetches the run, takes its seat, and answers what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer.agreed import AgreedSecret, load_secret
from cutlayer.audit.known import warnings
from cutlayer.audit.own import own_run, write_own
from cutlayer.config import RunConfig
from cutlayer.errors import LeftRun, NetworkError
from cutlayer.files import folder_for
from cutlayer.frames import limits_of
from cutlayer.keys import client_keys
from cutlayer.links.net.answering import Again, answer
from cutlayer.links.net.connecting import hello_of
from cutlayer.links.net.handing import LIMITS
from cutlayer.links.net.session import Session
from cutlayer.models.families import number_of_blocks
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.offered import fetched, opener, own_name
from cutlayer.outputs import alone
from cutlayer.policy import Policy, load_policy
from cutlayer.report.progress import Reporter, reporter
from cutlayer.run import Interrupted
from cutlayer.seat import Seat


@dataclass(frozen=True)
class Joined:
    """What a client has when a run is over: its folder, its part of the adapter, and in words what left its machine."""

    out: Path
    adapter: Path
    left: str


def join(
    address: str,
    *,
    data: str | Path,
    out: str | Path,
    held_out: str | Path | None = None,
    keys: str | Path | None = None,
    name: str | None = None,
    run: str | None = None,
    policy: str | Path | None = None,
    model: str | Path | None = None,
    device: str = "auto",
    secret: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    again: Again | None = None,
    progress: bool | Reporter | None = None,
) -> Joined:
    """Take part in a run until it is over.

    Args:
        address: the server's ``HOST:PORT``.
        data: the client's own text: a file, a glob or a Hub data set, in the form that the run says.
        out: the client's folder: its checkpoints, the log of what left, and its part of the adapter. A client that was
            stopped goes on from there.
        held_out: what it evaluates on, if anything.
        keys: its folder of ``cutlayer keys``; None: plain text, to this machine only.
        name: which client of the run it is, where no keys say it.
        run: which of the server's runs, where this client is in several.
        policy: the owner's policy file; None: the default one.
        model: where it has the model; ``served``: its part comes from the server; None: where the run says, or from the
            server where that is a folder of the server's own.
        device: as in a run.
        secret: a file with what the clients agreed on among themselves (``agreed``), where the run needs it.
        columns: what its files call the columns, by our name (``{"text": "body"}``), where the run says otherwise.
        again: when to try again after the connection was lost.
        progress: as of ``cutlayer.train``.

    Raises:
        CutlayerError: anything that a user can mend.
    """
    try:
        with folder_for(Path(out)):
            return asyncio.run(
                _join(
                    address, str(data), Path(out), None if held_out is None else str(held_out), keys, name, run, policy,
                    None if model is None else str(model), device, None if secret is None else load_secret(secret),
                    again, reporter(progress), columns,
                )
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        raise Interrupted("this client was stopped; the same command goes on with the run") from stop


async def _join(
    address: str, data: str, out: Path, held_out: str | None, folder: str | Path | None, name: str | None,
    run: str | None, policy_file: str | Path | None, model: str | None, device: str,
    agreed: AgreedSecret | None, again: Again | None, progress: Reporter, columns: Mapping[str, str] | None,
) -> Joined:  # fmt: skip
    keys = client_keys(folder) if folder is not None else None
    name = own_name(keys, name)
    policy = load_policy(policy_file) if policy_file is not None else Policy()
    offered = await fetched(
        opener(address, keys, policy, LIMITS), address, name, policy, progress=progress, run=run, model=model,
        device=device, again=again,
    )  # fmt: skip
    with alone(out):
        config = await offered.with_model(out)
        seat = Seat(
            config, name, data, held_out, out, policy, progress, base_name=offered.config.model, agreed=agreed,
            columns=columns,
        )  # fmt: skip
        open_session = opener(address, keys, policy, limits_of(config, load_model_config(config.model)))
        progress.note(f"joined the run at {address} as '{name}'; output folder: {out}")
        _warn(config, name, out, progress, model=offered.config.model, data=data, held_out=held_out, columns=columns)

        async def open_again(extras: Mapping[str, Any]) -> Session:
            # No turn follows from an earlier session to this one, but what was released stays counted.
            told = {**offered.hello, **seat.told(), **extras}
            return await open_session(told, lambda: seat.guard.greets(told, len(hello_of(told))))

        try:
            words = await answer(open_again, seat.handle, again=again, resent=seat.resent)
            if seat.left is not None:
                raise LeftRun(str(seat.left))
            if (result := seat.done) is None:
                raise NetworkError(f"The server ended the run before it was done: {words or 'it did not say why'}")
        except BaseException:  # an interrupt too
            for line in seat.last_words():
                progress.note(line)
            raise
        return Joined(out, result, seat.guard.told())


def _warn(
    config: RunConfig, name: str, out: Path, progress: Reporter, *, model: str, data: str, held_out: str | None,
    columns: Mapping[str, str] | None,
) -> None:  # fmt: skip
    """Say what is known that the server can read, and write the run that measures it."""
    blocks = number_of_blocks(load_model_config(config.model))
    if config.planner is not None:
        return  # the cut is not known yet
    run = own_run(config, blocks, name, model=model, data=data, held_out=held_out, columns=columns)
    command = write_own(run, out)
    for line in warnings(config, blocks, command=command, client=name):
        progress.note(line)
