"""``cutlayer keys``: certificates and tokens for a server and its clients."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cutlayer.cli.console import console, guarded

if TYPE_CHECKING:
    from cutlayer.issuing import Issued


@guarded()
def keys(
    out: Annotated[Path, typer.Option(help="The folder of the CA; made, or added to.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Further clients.")] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="A name or IP address that clients reach the server by; may be repeated.")
    ] = None,
    client: Annotated[list[str] | None, typer.Option(help="A client that gets keys; may be repeated.")] = None,
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long new certificates are good.")] = 365,
    revoke: Annotated[list[str] | None, typer.Option(help="A client that is let in no more; may be repeated.")] = None,
    renew: Annotated[
        list[str] | None, typer.Option(help="A client, or server, that gets new keys for its old; may be repeated.")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show who has keys, until when, and who was revoked.")] = False,
) -> None:
    """Make the keys with which a server and its clients know each other.

    DIR/server/ is the server's folder, DIR/NAME/ that of a client: hand each to its party over a safe way, whole, and
    keep DIR/ca/ to yourself. Called again it adds clients and changes nothing that is there:

        cutlayer keys --out keys --host train.example.org --client clinic-a clinic-b

    A data owner puts the fingerprint of the server's certificate, which is printed, into her policy.
    """
    clients = [*(client or []), *(more or [])]
    others = [bool(clients or (host and not renew)), bool(revoke), bool(renew), show]
    if more and not client:
        raise typer.BadParameter(f"What is to be done with {', '.join(more)}? Clients to add come after --client.")
    if sum(others) != 1:
        raise typer.BadParameter("Give one of --client (with --host the first time), --revoke, --renew, --list.")

    from cutlayer.issuing import SERVER, authority

    where = console()
    with authority(out, make=others[0]) as ca:
        if others[0]:
            made = ca.add(hosts=host or [], clients=clients, days=days)
            for name in [SERVER, *dict.fromkeys(clients)]:
                kept = "" if name in made else " (was there, and is kept)"
                where.print(f"{out / name}{kept}", soft_wrap=True)
        for name in revoke or []:
            ca.revoke(name)
            where.print(f"{name} is let in no more. A server that uses {out / SERVER} knows at once; one on another "
                        f"machine needs {out / SERVER / 'clients.json'}.", soft_wrap=True)  # fmt: skip
        for name in renew or []:
            ca.renew(name, hosts=host or [] if name == SERVER else [], days=days)
            where.print(
                f"{out / name} has new keys; the old ones of {name} are void. Hand the folder on.", soft_wrap=True
            )
        if show:
            where.print(table(ca.parties.values()))
        elif SERVER in ca.parties:
            where.print(f"The server's fingerprint: {ca.parties[SERVER].fingerprint}", soft_wrap=True)


def table(parties: Iterable[Issued]) -> Table:
    """A row for each party: name, hosts, end, state, and the fingerprint of its certificate."""
    shown = Table("name", "hosts", "good until", "", "fingerprint")
    for party in parties:
        shown.add_row(party.name, ", ".join(party.hosts), party.until[:10], party.state(), party.fingerprint)
    return shown
