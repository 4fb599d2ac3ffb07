"""``cutlayer profile``: how fast this machine is, as the lines of a run file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cutlayer.cli.console import console, guarded, hush
from cutlayer.cli.train import split_arguments
from cutlayer.errors import ConfigError


@guarded()
def profile(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN.yaml key=value", help="The run file, and fields to set otherwise."),
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Of the model's first blocks; by default a client's head.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; by default data.max_length.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps are timed.")] = 10,
    link: Annotated[
        str | None, typer.Option(help="The link, which one machine cannot measure: 4g, 5g, dsl, fibre or lan.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the profile to this file too (YAML).")] = None,
) -> None:
    """Measure this machine for the virtual clock and for planners.

    Trains some blocks of the run's model on a random batch and prints a profile: FLOP/s by the cost model, and free
    memory. Copy the lines under profile, or under a client, of a run file. Only the blocks' weights are read:

        cutlayer profile run.yaml --link dsl
    """
    source, overrides = split_arguments(arguments or [])
    if source is None and not overrides:
        raise typer.BadParameter("Give a run file: cutlayer profile run.yaml")

    import yaml

    from cutlayer.config import load_config, resolved
    from cutlayer.profiles import LINKS, profile_from
    from cutlayer.profiling import measure

    if link is not None and link not in LINKS:
        raise ConfigError([f"--link is '{link}'; known: {', '.join(LINKS)}."], "the call")
    hush()
    where = console()
    given: str | Mapping[str, Any] = {} if source is None else source
    base = Path(source).parent if source else None
    found = measure(resolved(load_config(given, overrides), base), blocks=blocks, length=length, steps=steps)
    lines: dict[str, Any] = {**found.profile(), **({"link": link} if link else {})}
    profile_from(lines)  # what is printed can be read back
    where.print(
        f"{found.blocks} block{'s' if found.blocks > 1 else ''} on {found.device}, {found.rows} x {found.length} "
        f"tokens: forward {found.forward * 1e3:.2f} ms, backward {found.backward * 1e3:.2f} ms (median of {steps}; "
        f"half of the steps within {found.spread:.0%})"
    )
    if found.spread > 0.25:
        where.print("The steps differ much: other work is running here. Measure again when the machine is quiet.")
    if link is None:
        where.print("The link is not measured; it counts as lan unless link, or up_mbps, down_mbps and rtt_ms, is set.")
    text = yaml.safe_dump({"profile": lines}, sort_keys=False)
    where.print(text, end="", highlight=False)
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError([f"{out} cannot be written: {error.strerror}."], "the call") from error
