"""``cutlayer methods``: what can be put into a run."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.table import Table

from cutlayer.cli.console import console, guarded
from cutlayer.errors import MethodError, suggest


@guarded()
def methods(
    family: Annotated[str | None, typer.Option(help="Only this family, such as framework or codec.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the methods that there are, by family."""
    from cutlayer import registry

    if family is not None and family not in registry.FAMILIES:
        known = ", ".join(registry.FAMILIES)
        near = suggest(family, registry.FAMILIES)
        raise MethodError(f"'{family}' is no family of methods.{near} Families: {known}.")
    cards = registry.cards(family)
    if as_json:
        keys = ("id", "family", "summary", "paper", "needs")
        rows = [{key: dataclasses.asdict(card)[key] for key in keys} for card in cards]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not cards:
        typer.echo(f"There is no method of the family '{family}' yet.")
        return
    table = Table("family", "id", "what it does", "paper", "needs")
    for card in cards:
        table.add_row(card.family, card.id, card.summary, card.paper, ", ".join(card.needs))
    console().print(table)
