"""``cutlayer methods``: what can be put into a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cutlayer.cli.console import console, guarded
from cutlayer.errors import MethodError, suggest

if TYPE_CHECKING:
    from cutlayer.registry import Card

KEYS = ("id", "family", "summary", "paper", "needs")  # of a card, in JSON


@guarded()
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show the card of this method, with its options.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only this family, such as framework or codec.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the methods that there are, by family, or show one of them with all its options.

    cutlayer methods capability-cut
    """
    from cutlayer import registry

    if family is not None and family not in registry.FAMILIES:
        known = ", ".join(registry.FAMILIES)
        near = suggest(family, registry.FAMILIES)
        raise MethodError(f"'{family}' is no family of methods.{near} Families: {known}.")
    if name is not None:
        _show(name, family, as_json)
        return
    cards = registry.cards(family)
    if as_json:
        _print_json([_card(card) for card in cards])
        return
    if not cards:
        typer.echo(f"There is no method of the family '{family}' yet.")
        return
    table = Table("family", "id", "what it does", "paper", "needs")
    for card in cards:
        table.add_row(card.family, card.id, card.summary, card.paper, ", ".join(card.needs))
    console().print(table)


def _show(name: str, family: str | None, as_json: bool) -> None:
    """The method of this name; more than one where families have one each."""
    from cutlayer import registry
    from cutlayer.options import options_of

    if name.endswith(".py") and family is None:
        raise MethodError(f"'{name}' is a method file. Say of which family, such as --family codec.")
    families = [family] if family else list(registry.FAMILIES)
    there = {one: registry.names(one) for one in families}
    found = families if name.endswith(".py") else [one for one in families if name in there[one]]
    if not found:
        known = [ident for names in there.values() for ident in names]
        of = f" of the family '{family}'" if family else ""
        raise MethodError(
            f"There is no method '{name}'{of}.{suggest(name, known)} cutlayer methods lists all that there are."
        )
    classes = [registry.load(one, name) for one in found]
    if as_json:
        _print_json([
            {**_card(registry.card(cls)), "options": [dataclasses.asdict(one) for one in options_of(cls)]}
            for cls in classes
        ])  # fmt: skip
        return
    for cls in classes:
        console().print(card_of(registry.card(cls), options_of(cls)))


def card_of(card: Card, options: Sequence[Any]) -> Group:
    """A method's card and its options, as they are shown."""
    parts: list[RenderableType] = [Text(f"{card.family}: {card.id}", style="bold"), Text(card.summary)]
    parts += [Text(f"paper: {card.paper}")] if card.paper else []
    parts += [Text(f"needs: {', '.join(card.needs)}")] if card.needs else []
    if not options:
        return Group(*parts, Text("It has no options."))
    table = Table("option", "default", "")
    for one in options:
        table.add_row(Text(one.name), Text(one.default or "must be given"), Text(one.about))
    return Group(*parts, table)


def _card(card: Card) -> dict[str, Any]:
    return {key: dataclasses.asdict(card)[key] for key in KEYS}


def _print_json(rows: Sequence[Any]) -> None:
    typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
