"""What a server offers to a client: the run, and where the client has no model of its own, the client's part of it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer.apart import taken
from cutlayer.build import task_of
from cutlayer.config import RunConfig
from cutlayer.errors import ConfigError, PolicyRefused, Refused
from cutlayer.fetching import SERVED, Fetch, Open, is_served
from cutlayer.identity import fingerprint, tokenizer_of
from cutlayer.keys import ClientKeys
from cutlayer.links.net.answering import Again
from cutlayer.links.net.connecting import connect
from cutlayer.links.net.session import Session
from cutlayer.links.net.tls import Credentials
from cutlayer.models.pieces import Listing
from cutlayer.policy import Policy
from cutlayer.report.progress import Reporter
from cutlayer.wire import Limits


@dataclass(frozen=True)
class Offered:
    """A run that a client may take part in.

    ``hello`` is what the client then says of itself, beside what its data are; ``listing`` what the server would hand
    of its model, if the model is to come from there.
    """

    config: RunConfig
    hello: Mapping[str, Any]
    listing: Listing | None
    fetch: Fetch

    async def with_model(self, out: Path) -> RunConfig:
        """The run with a model that is on this machine; in ``out`` where it comes from the server.

        Raises:
            Refused: what came is not what was listed.
            OutputError: it cannot be written.
        """
        if self.listing is None:
            return self.config
        folder = await self.fetch.into(out, self.listing, self.config)
        return self.config.model_copy(update={"model": str(folder)})


async def fetched(
    open_session: Open, address: str, name: str, policy: Policy, *, progress: Reporter,
    run: str | None = None, model: str | None = None, device: str = "auto", again: Again | None = None,
) -> Offered:  # fmt: skip
    """What a server offers to a client.

    Args:
        open_session: opens a session with a hello, for small frames.
        address: the server's, for messages.
        name: the client's.
        policy: its owner's.
        progress: is told what happens.
        run: which of the server's runs, where the client is in several.
        model: where the client has the model; ``served``: it comes from the server; None: where the run says, or from
            the server where that is a folder of the server's own.
        device: of the client.
        again: when to try again after a connection was lost.

    Raises:
        Refused: it offers no run with this client.
        PolicyRefused: the owner does not allow such a run.
    """
    about = {"client": name, **({"run": run} if run else {})}
    greeting = await open_session({**about, "wants": "run"})
    welcome = greeting.welcome
    await greeting.close("It has read what the run is.")
    tree = welcome.get("run")
    if not isinstance(tree, Mapping):
        raise Refused(f"The server at {address} offers no run.")
    _check_folder(model, str(tree.get("model", "")), own=welcome.get("own_model") is True)
    about["run"] = str(welcome.get("name", ""))
    config = taken(tree, model=None if model == SERVED else model, device=device)
    if name not in config.client_names:
        raise Refused(f"The run at {address} has no client '{name}'. It has: {', '.join(config.client_names)}.")

    async def open_again(hello: Mapping[str, Any]) -> Session:
        return await open_session({**hello, **about})

    fetch, listing = Fetch(open_again, name, again=again, progress=progress), None
    files: Mapping[str, str]
    if is_served(model, config, own=welcome.get("own_model") is True):
        if task_of(config) == "classification":
            raise ConfigError(
                ["a classifier's model cannot come from the server yet. Name your own copy by --model."], "the call"
            )
        listing = await fetch.listing()
        files = {"handed": listing.checksum}
    else:
        files = {**fingerprint(config.model), **tokenizer_of(config.model)}
    wrong = policy.problems(
        config, name, files=files, served=listing.checksum if listing else None, named=str(tree.get("model"))
    )
    if wrong:
        raise _refused(wrong, own=config.model if config.model != tree.get("model") else None)
    return Offered(config, {**about, "model": files}, listing, fetch)


def _check_folder(given: str | None, named: str, *, own: bool) -> None:
    """Refuse a folder that is taken for the model, and holds none.

    Args:
        given: what ``--model`` says, if anything.
        named: the model in the run.
        own: it is a folder of the server's own.

    Raises:
        ConfigError: with what to do.
    """
    folder = Path(named if given is None else given)
    if given == SERVED or not folder.is_dir() or (folder / "config.json").is_file():
        return
    if given is not None:
        said = f"--model is {folder}, a folder without a config.json. Name the folder that has your copy of '{named}'."
    else:
        how = "to get your part of it from the server, join with --model served" if own else "rename that folder"
        said = (
            f"the run's model is '{named}', and {folder.absolute()} is a folder of that name without a config.json. If "
            f"you have a copy of the model, name it by --model; {how}; or join from another folder."
        )
    raise ConfigError([said], "the call")


def _refused(wrong: Sequence[str], own: str | None) -> PolicyRefused:
    """What the policy has against a run; each sentence begins with its rule. ``own``: where her model is."""
    rules = list(dict.fromkeys(re.split("[: ]", said, maxsplit=1)[0] for said in wrong))
    said = " ".join(said.removeprefix(f"{rules[0]}: ") if len(rules) == 1 else said for said in wrong)
    if own is not None and "models" in rules:
        said += f" The name is the run's; the files in {own} are your own (--model)."
    return PolicyRefused(", ".join(rules), said)


def own_name(keys: ClientKeys | None, name: str | None) -> str:
    """The name that a client's keys give it, or without any the one that it was given."""
    if keys is None:
        if name is None:
            raise ConfigError(["without --keys, say by --name which client of the run this is."], "the call")
        return name
    if name not in (None, keys.name):
        raise ConfigError(
            [f"--name is '{name}', but the keys in {keys.folder} are those of '{keys.name}'."], "the call"
        )
    return keys.name


def opener(address: str, keys: ClientKeys | None, policy: Policy, limits: Limits) -> Callable[..., Awaitable[Session]]:
    """What opens a session with a hello, whose frames from the server are within ``limits``.

    It may be given what is to be told when the hello is about to leave (``connect``).
    """
    credentials = Credentials(keys.ca, keys.certificate, keys.key) if keys else None
    token, pinned = keys.token if keys else "", policy.server or ""

    async def opened(hello: Mapping[str, Any], leaving: Callable[[], None] = lambda: None) -> Session:
        return await connect(
            address, credentials, token, hello, limits=limits, fingerprint=pinned, leaving=leaving
        )  # fmt: skip

    return opened
