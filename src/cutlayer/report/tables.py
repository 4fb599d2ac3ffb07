"""The tables at the end of a run and of a dry run: who held what, what it brought, what crossed the wire."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cutlayer.report.progress import readable


def summary_table(summary: Mapping[str, Any], out: Path) -> Group:
    """What a finished run is shown as, from its summary.json and the folder that this is in."""
    parts: list[RenderableType] = [_head(summary), parties_table(summary["parties"])]
    if summary.get("eval"):
        parts.append(evaluation_table(summary["eval"]))
    parts.append(bytes_table(summary["bytes"]))
    if summary.get("tokens_per_second") is not None:
        parts.append(Text(f"{summary['tokens_per_second']:,.0f} tokens a second"))
    if summary.get("adapter"):
        parts.append(Text(f"Result: {out / summary['adapter']}", no_wrap=True, overflow="ignore"))
    return Group(*parts)


def dry_run_table(summary: Mapping[str, Any]) -> Group:
    """What a run would be: the same keys, ``memory_bytes`` for each party and ``bytes`` of one step of one client."""
    parts: list[RenderableType] = [_head(summary), parties_table(summary["parties"])]
    parts.append(Text("Memory is a rough estimate: runs were seen to need 0.3 to 1.8 times as much."))
    if "cuts" in summary:
        parts.append(cuts_table(summary["cuts"], summary["planner"]))
    elif planner := summary.get("planner"):
        parts.append(Text(f"The planner {planner} sets the cuts once the data are read; these are the partition's."))
        parts.append(Text("cutlayer plan reads the data and shows the planner's."))
    parts.append(bytes_table(summary["bytes"], title="bytes of one step of one client"))
    return Group(*parts)


def cuts_table(cuts: Mapping[str, Mapping[str, Any]], planner: str) -> Table:
    """The cut that each client begins with, those that it may get, and what is predicted of it."""
    table = Table("client", title=f"what planner {planner} begins with", title_justify="left")
    for name in ("head blocks", "may be", "tail blocks", "own step", "memory"):
        table.add_column(name, justify="right")
    for name, cut in cuts.items():
        seconds = cut["step_seconds"]
        table.add_row(
            Text(name),
            str(cut["head_blocks"]),
            "{}-{}".format(*cut["bounds"]),
            str(cut["tail_blocks"]),
            "-" if seconds is None else f"{seconds:.3g} s",
            readable(cut["memory_bytes"]),
        )
    return table


def _head(summary: Mapping[str, Any]) -> Text:
    clients = summary["clients"]
    count = clients if isinstance(clients, int) else len(clients)
    return Text(f"{summary['framework']}, {summary['partition']}, {count} client{'s' if count != 1 else ''}")


def parties_table(parties: Mapping[str, Mapping[str, Any]]) -> Table:
    """Who holds which blocks, how many parameters, how many of them trained, and the memory."""
    table = Table("party", "blocks", title="who held what", title_justify="left")
    for name in ("parameters", "trained", "memory"):
        table.add_column(name, justify="right")
    for name, party in parties.items():
        memory = party.get("peak_memory_bytes", party.get("memory_bytes"))
        table.add_row(
            Text(name),
            Text(str(party["blocks"])),
            f"{party['parameters']:,}",
            f"{party['trainable_parameters']:,}",
            "-" if memory is None else readable(memory),
        )
    return table


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """Loss and perplexity before and after."""
    shown = {when: evaluation[when] for when in ("before", "after") if when in evaluation}
    measures = list(dict.fromkeys(key for values in shown.values() for key in values))
    table = Table("evaluation", title_justify="left")
    for measure in measures:
        table.add_column(measure, justify="right")
    for when, values in shown.items():
        table.add_row(when, *(f"{values[key]:,.4f}" if key in values else "-" for key in measures))
    return table


def bytes_table(counted: Mapping[str, int], title: str = "what crossed the wire") -> Table:
    """Bytes by step name where there were any, and their sum."""
    table = Table("step", title=title, title_justify="left", show_footer=True)
    table.columns[0].footer = "all"
    table.add_column("bytes", justify="right", footer=f"{sum(counted.values()):,}")
    table.add_column("", justify="right", footer=readable(sum(counted.values())))
    for step, count in counted.items():
        if count:
            table.add_row(step, f"{count:,}", readable(count))
    return table
