"""A comparison to be looked at, from the content of ``comparison.json``: in the terminal, as Markdown, as one page."""

from __future__ import annotations

import html
import io
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cutlayer.report.comparison import COST, MEASURES, QUALITY, Kind, Measure

AXES = {
    "steps": "optimizer steps, all clients together",
    "virtual_time": "virtual time",
    "bytes": "bytes up and down",
}
# Colours that can be told apart with any colour vision (Okabe and Ito); then lines and marks differ.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1240px;
       margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; } .plots figure { margin: 0; flex: 1 1 380px; max-width: 600px; }
svg { width: 100%; height: auto; } code { overflow-wrap: anywhere; }
"""


def written(over: Mapping[str, Any], kind: Kind, seeds: int) -> str:
    """A number with its deviation and unit; ``-`` for none, and how many seeds have it where not all do."""
    mean, deviation = over["mean"], over["deviation"]
    if mean is None:
        return "-"
    unit, scale, digits = _unit(kind, mean)
    text = f"{mean / scale:,.{digits}f}"
    if deviation is not None and (kind in ("loss", "perplexity") or float(f"{deviation / scale:.{digits}f}")):
        text += f" ± {deviation / scale:,.{digits}f}"
    return (
        text + (f" {unit}" if unit else "") + (f" ({over['count']} of {seeds} seeds)" if over["count"] < seeds else "")
    )


def _unit(kind: Kind, largest: float) -> tuple[str, float, int]:
    """Unit, how much of the plain number it is, and digits behind the point."""
    if kind == "bytes":
        sizes = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
        name = next((name for name, size in sizes.items() if abs(largest) < 1000 * size), "TB")
        return name, sizes[name], 0 if name == "B" else 1
    if kind == "seconds":
        return "s", 1.0, 1 if abs(largest) >= 100 else 3
    return "", 1.0, {"loss": 4, "perplexity": 2}.get(kind, 0)


def rows(data: Mapping[str, Any], measures: Sequence[Measure]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, without columns that no run needs."""
    results, seeds = data["results"], len(data["seeds"])
    over = {name: result["over_seeds"] for name, result in results.items()}
    shown = [m for m in measures if not m.optional or any(over[name][m.key]["count"] for name in results)]
    cells = [[name, *(written(over[name][m.key], m.kind, seeds) for m in shown)] for name in results]
    return ["run", *(m.title for m in shown)], cells


def said(value: Any) -> str:
    """A setting in words: a method's id with its options in brackets, anything else as it stands."""
    if isinstance(value, Mapping) and "name" in value:
        options = ", ".join(f"{key} {said(option)}" for key, option in value.items() if key != "name")
        return f"{value['name']} ({options})" if options else str(value["name"])
    return value if isinstance(value, str) else json.dumps(value)


def _differing(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = list(data["results"])
    lines = [[key, *(said(values[name]) for name in names)] for key, values in data["differences"].items()]
    return ["setting", *names], lines


def _notes(data: Mapping[str, Any]) -> list[str]:
    return [*(f"FAILED: {which}: {why}" for which, why in data["failed"].items()), *data["notes"]]


def table(data: Mapping[str, Any]) -> Group:
    """What a comparison is shown as in the terminal."""
    parts = []
    for title, measures in (("quality and time", QUALITY), ("what it cost", COST)):
        headings, lines = rows(data, measures)
        shown = Table(title=title, title_justify="left")
        for number, heading in enumerate(headings):
            shown.add_column(heading, justify="right" if number else "left", overflow="fold")
        for line in lines:
            shown.add_row(*map(Text, line))
        parts.append(shown)
    return Group(*parts, *(Text(note) for note in _notes(data)))


def markdown(data: Mapping[str, Any]) -> str:
    """The content of ``comparison.md``."""
    text = f"# {_title(data)}\n\n{_grid(*rows(data, MEASURES), right=True)}\n"
    text += "".join(f"- {_plain(note)}\n" for note in _notes(data))
    if data["differences"]:
        text += f"\n## What differs\n\n{_grid(*_differing(data), right=False)}"
    return f"{text}\n{_made_by(data)}\n"


def _title(data: Mapping[str, Any]) -> str:
    return f"Comparison: {', '.join(data['results'])}"


def _made_by(data: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return f"Command: `{data['command']}`\n\nVersions: {versions}."


def _grid(headings: Sequence[str], lines: Sequence[Sequence[str]], *, right: bool) -> str:
    rule = ["---", *("---:" if right else "---" for _ in headings[1:])]
    return "".join(f"| {' | '.join(map(_plain, line))} |\n" for line in (headings, rule, *lines))


def _plain(text: str) -> str:
    """A text that Markdown takes for nothing but text, on one line."""
    return re.sub(r"([\\|*<`\[])", r"\\\1", " ".join(text.split()))


def page(data: Mapping[str, Any]) -> str:
    """The content of ``comparison.html``: all in one file that loads nothing."""
    plots = "".join(_figure(data, axis) for axis in AXES)
    differing = ""
    if data["differences"]:
        differing = f"<h2>What differs</h2>{_html_table(*_differing(data), words=True)}"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(data))
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return (
        "<!DOCTYPE html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(_title(data))}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n<h1>{html.escape(_title(data))}</h1>\n"
        f"{_html_table(*rows(data, MEASURES))}\n<ul>{notes}</ul>\n"
        f"<h2>{data['curve'].capitalize()}</h2>\n<p>A line: the mean over seeds; the band around it: ± the sample "
        f'standard deviation over them.</p>\n<div class="plots">{plots}</div>\n{differing}\n'
        f"<h2>How it was made</h2><p><code>{html.escape(data['command'])}</code></p>"
        f"<p>{html.escape(versions)}</p>\n</body></html>\n"
    )


def _html_table(headings: Sequence[str], lines: Sequence[Sequence[str]], *, words: bool = False) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>\n" for line in lines)
    kind = ' class="words"' if words else ""
    return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


@dataclass(frozen=True)
class Band:
    """A run's line: the mean over seeds of place and loss at each evaluation, and how far the losses spread."""

    at: list[float]
    mean: list[float]
    deviation: list[float]


def band(curves: Sequence[Sequence[Mapping[str, Any]]], axis: str) -> Band | None:
    """The line of one run from its curves, one a seed, over the rounds that all of them have; None without ``axis``."""
    if not curves or any(place(point, axis) is None for curve in curves for point in curve):
        return None
    by_round = [{point["round"]: point for point in curve} for curve in curves]
    found = Band([], [], [])
    for number in by_round[0]:
        points = [curve[number] for curve in by_round if number in curve]
        if len(points) == len(curves):
            losses = [point["loss"] for point in points]
            found.at.append(statistics.fmean(place(point, axis) or 0.0 for point in points))
            found.mean.append(statistics.fmean(losses))
            found.deviation.append(statistics.stdev(losses) if len(losses) > 1 else 0.0)
    return found if found.at else None


def place(point: Mapping[str, Any], axis: str) -> float | None:
    """Where a point is on an axis; None if that was not measured."""
    keys = ("bytes_up", "bytes_down") if axis == "bytes" else (axis,)
    return float(sum(point[key] for key in keys)) if all(key in point for key in keys) else None


def _figure(data: Mapping[str, Any], axis: str) -> str:
    bands = {
        name: found
        for name, result in data["results"].items()
        if (found := band([seed["curve"] for seed in result["seeds"].values()], axis))
    }
    caption = f"{data['curve'].capitalize()} against {AXES[axis]}"
    if not bands:
        return f"<figure><figcaption>{caption}: no run measured it.</figcaption></figure>"
    absent = [name for name in data["results"] if name not in bands]
    left_out = f" Not measured in {', '.join(absent)}." if absent else ""
    drawn = drawing(data, bands, axis)
    return f"<figure>{drawn}<figcaption>{caption}.{html.escape(left_out)}</figcaption></figure>\n"


def drawing(data: Mapping[str, Any], bands: Mapping[str, Band], axis: str) -> str:
    """One plot as an SVG element that can stand beside others in a page."""
    import matplotlib
    from matplotlib.figure import Figure

    kind: Kind = {"virtual_time": "seconds", "bytes": "bytes"}.get(axis, "count")  # type: ignore[assignment]
    unit, scale, _ = _unit(kind, max(max(line.at) for line in bands.values()))
    names = list(data["results"])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": axis, "font.size": 11}):
        figure = Figure(figsize=(6.0, 4.4), layout="constrained")
        axes = figure.subplots()
        for name, line in bands.items():
            number = names.index(name)
            at = [value / scale for value in line.at]
            colour, style = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
            axes.plot(at, line.mean, style, color=colour, marker=MARKS[number % len(MARKS)], markersize=4, label=name)
            low = [mean - off for mean, off in zip(line.mean, line.deviation, strict=True)]
            high = [mean + off for mean, off in zip(line.mean, line.deviation, strict=True)]
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        handles, labels = list(axes.lines), [name.replace("$", r"\$") for name in bands]
        if data["target"] is not None:
            handles.append(axes.axhline(data["target"]["loss"], color="#666666", linewidth=1, linestyle=(0, (2, 2))))
            labels.append(f"target {data['target']['loss']:.4f}")
        axes.set_xlabel(f"{AXES[axis]} ({unit})" if unit else AXES[axis])
        axes.set_ylabel(data["curve"])
        axes.grid(alpha=0.25)
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=10)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), axis)


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as an element of a page: without what only a file needs, and with ids of its own."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r'\bid="', f'id="{prefix}-', element)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", element)
