"""Who got what: how many examples each client has, how long they are and of which class, and how far that is from all.

The picture is the simulation's. It is made on the researcher's machine, which has everybody's data, from the tokenised
examples before they are packed. Between real parties each of these numbers is a client's private fact: no party asks
for one here, and none of it ever crosses the wire.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cutlayer.checkpoint import write_text
from cutlayer.contracts import Example, Row
from cutlayer.errors import OutputError

NUMBERS, PICTURE = "division.json", "division.svg"
CLASSES = 10  # of length, with about equally many examples in each
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
SHOWN = 12  # clients in the table on the terminal; the file has all


def describe(
    examples: Mapping[str, Sequence[Example]],
    rows: Mapping[str, Sequence[Row]],
    *,
    names: Sequence[str] | None,
    column: str | None,
) -> dict[str, Any]:
    """The content of ``division.json``.

    Args:
        examples: of each client, before packing.
        rows: what they were made from.
        names: of a classifier's classes.
        column: else the column that the rows were divided by; it is left out if some client's rows lack it.
    """
    lengths = {client: np.array([len(e.input_ids) for e in mine]) for client, mine in examples.items()}
    everything = np.concatenate(list(lengths.values()))
    ends = np.unique(np.quantile(everything, np.arange(1, CLASSES + 1) / CLASSES, method="inverted_cdf"))
    of_length = {client: _counts(np.searchsorted(ends, mine), len(ends)) for client, mine in lengths.items()}
    starts = [int(everything.min()), *(ends[:-1] + 1).tolist()]
    histograms = {"length": _compared(of_length, classes=[[a, b] for a, b in zip(starts, ends.tolist(), strict=True)])}
    if names is not None:
        numbers = {client: [e.label for e in mine] for client, mine in examples.items()}
        of_class = {client: _counts(mine, len(names)) for client, mine in numbers.items()}
        histograms["label"] = _compared(of_class, classes=list(names))
    elif column is not None and all(isinstance(row.get(column), int | str) for mine in rows.values() for row in mine):
        values = {client: [str(row[column]) for row in mine] for client, mine in rows.items()}
        known = {value: number for number, value in enumerate(sorted({v for mine in values.values() for v in mine}))}
        of_value = {client: _counts([known[v] for v in mine], len(known)) for client, mine in values.items()}
        histograms[f"column {column}"] = _compared(of_value, classes=list(known))
    sizes = {client: _sizes(mine, lengths[client]) for client, mine in examples.items()}
    total = {key: sum(size[key] for size in sizes.values()) for key in ("examples", "tokens", "label_tokens")}
    return {"clients": sizes, "all": {**total, "length": _spread(everything)}, "histograms": histograms}


def _sizes(examples: Sequence[Example], lengths: np.ndarray) -> dict[str, Any]:
    return {
        "examples": len(examples),
        "tokens": int(lengths.sum()),
        "label_tokens": sum(example.label_tokens for example in examples),
        "length": _spread(lengths),
    }


def _spread(lengths: np.ndarray) -> dict[str, float]:
    found = {
        f"p{100 * q:.0f}": float(value) for q, value in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)
    }
    return {"mean": float(lengths.mean()), "min": int(lengths.min()), **found, "max": int(lengths.max())}


def _counts(numbers: Any, size: int) -> np.ndarray:
    return np.bincount(np.asarray(numbers), minlength=size)


def _compared(counts: Mapping[str, np.ndarray], *, classes: Sequence[Any]) -> dict[str, Any]:
    """Histograms over ``classes``, and how far each is from that of all clients together."""
    whole = np.sum(list(counts.values()), axis=0)
    distances = {client: distance(mine, whole) for client, mine in counts.items()}
    return {
        "classes": classes,
        "all": whole.tolist(),
        "clients": {client: mine.tolist() for client, mine in counts.items()},
        "distance": distances,
        "mean_distance": float(np.mean(list(distances.values()))),
    }


def distance(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """The Jensen-Shannon distance of two histograms: the root of the divergence in nats, 0 to sqrt(ln 2) = 0.83."""
    p, q = (np.asarray(counts, dtype=float) / np.sum(counts) for counts in (left, right))
    middle = (p + q) / 2
    nats = sum(float(np.sum(x[x > 0] * np.log(x[x > 0] / middle[x > 0]))) for x in (p, q)) / 2
    return float(np.sqrt(max(nats, 0.0)))  # equal histograms may come out as -1e-17


def table_of(found: Mapping[str, Any]) -> Table:
    """A line for each of the first clients, and one for all."""
    table = Table(
        box=None, title="who got what (distance: Jensen-Shannon, from all)", title_justify="left", pad_edge=False
    )
    table.add_column("client")
    for name in ("examples", "tokens", "label tokens", "mean length", "10-90 %"):
        table.add_column(name, justify="right")
    for name in found["histograms"]:
        table.add_column(f"distance, {name}", justify="right")
    clients = list(found["clients"])
    for client in clients[:SHOWN]:
        far = [histogram["distance"][client] for histogram in found["histograms"].values()]
        table.add_row(Text(client), *_cells(found["clients"][client]), *(f"{d:.3f}" for d in far))
    if len(clients) > SHOWN:
        table.add_row(f"and {len(clients) - SHOWN} more")
    far = [histogram["mean_distance"] for histogram in found["histograms"].values()]
    table.add_row("all, mean distance", *_cells(found["all"]), *(f"{d:.3f}" for d in far))
    return table


def _cells(size: Mapping[str, Any]) -> list[str]:
    length = size["length"]
    counts = [f"{size[key]:,}" for key in ("examples", "tokens", "label_tokens")]
    return [*counts, f"{length['mean']:.1f}", f"{length['p10']:.0f}-{length['p90']:.0f}"]


def told(found: Mapping[str, Any]) -> str:
    """The table as text, for a line of the run's progress."""
    console = Console(file=io.StringIO(), width=160, color_system=None)
    with console.capture() as capture:
        console.print(table_of(found))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def save(found: Mapping[str, Any], folder: Path, *, anew: bool) -> bool:
    """Write ``division.json`` and ``division.svg``, each whole or not at all; whether anything was written.

    Args:
        found: what ``describe`` found.
        folder: the run's output folder.
        anew: also where they are there already, as at the start of a run.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    missing = [name for name in (NUMBERS, PICTURE) if anew or not (folder / name).is_file()]
    for name in missing:
        if name == PICTURE:
            from cutlayer.report.division_picture import draw  # matplotlib takes a second to import

            text = draw(found)
        else:
            text = json.dumps(found, indent=1) + "\n"
        try:
            write_text(folder / name, text)
        except OSError as error:
            raise OutputError(f"{folder / name} cannot be written: {error}.") from error
    return bool(missing)
