"""An audit to be looked at, from the content of ``audit.json``: a table in the terminal, and one page of HTML."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from cutlayer.config import RunConfig
from cutlayer.report.comparison_page import COLOURS, STYLE

Row = Mapping[str, Any]
HEADS = (
    "attack", "on", "moment", "defense", "recovered", "ROUGE-L", "AUC", "constant", "shuffled", "other weights",
    "perplexity",
)  # fmt: skip
LEGEND = (
    "Recovered: the share of private positions whose token was guessed right. AUC: of an attack that tells two labels "
    "apart, how often it ranks one of the rarer above one of the other (0.5: chance). Constant: the best that guessing "
    "one token for all positions gives. Shuffled: the same attack on messages whose positions were mixed. Other "
    "weights: with a model of another start in place of the public one; an attack that falls to the constant there "
    "needs the public weights."
)


def table(rows: Sequence[Row]) -> Table:
    """A row for each attack and moment."""
    shown = Table(*HEADS, title="Share of the private tokens that came back")
    for row in rows:
        shown.add_row(*_cells(row))
    return shown


def page(config: RunConfig, rows: Sequence[Row], refused: Mapping[str, str], verdict: Sequence[str]) -> str:
    """One page that needs no other file."""
    said = "".join(f"<p><strong>{html.escape(line)}</strong></p>" for line in verdict)
    not_played = "".join(f"<li><code>{html.escape(n)}</code>: {html.escape(why)}</li>" for n, why in refused.items())
    threats = {row["attack"]: row["threat"] for row in rows}
    listed = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_threat(threat))}</td></tr>"
        for name, threat in threats.items()
    )
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in HEADS)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Privacy audit</title><style>{STYLE}
.pair td {{ white-space: normal; text-align: left; width: 50%; }}</style></head><body>
<h1>What the server can read: {html.escape(config.model.rstrip("/").rsplit("/", 1)[-1])}</h1>
{said}
<h2>Attacks</h2>
<div class="wide"><table><tr>{heads}</tr>{"".join(map(_line, rows))}</table></div>
<p>{LEGEND}</p>
{_picture(rows)}
{_frontier(rows)}
<h2>True and recovered text</h2>
{"".join(map(_pairs, rows))}
<h2>Who attacks</h2>
<table class="words">{listed}</table>
{f"<h2>Not played</h2><ul>{not_played}</ul>" if refused else ""}
</body></html>
"""


def _cells(row: Row) -> list[str]:
    controls = row["controls"]
    numbers = [
        row["token_recovery"], row["rouge_l"], row["auc"], controls["constant"], controls["shuffled"],
        controls["random_weights"],
    ]  # fmt: skip
    shown = ["-" if number is None else f"{number:.3f}" for number in numbers]
    return [
        row["attack"], row["target"], row["moment"], row["defense"], *shown, _number(row["utility"].get("perplexity")),
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _line(row: Row) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>"


def _pairs(row: Row) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(pair['true'])}</td><td>{html.escape(pair['recovered'])}</td></tr>"
        for pair in row["examples"]
    )
    name = f"{row['attack']}, {row['moment']}, defense: {row['defense']}"
    return f"<h3>{html.escape(name)}</h3><table class='pair'><tr><th>true</th><th>recovered</th></tr>{cells}</table>"


def _threat(threat: Mapping[str, Any]) -> str:
    steps = ", ".join(step.replace("_", " ") for step in threat["reads"])
    knows = ", ".join(threat["knows"]) or "nothing"
    kind = "active" if threat["active"] else "passive"
    return f"{kind} {threat['attacker']}; reads {steps}; knows {knows}; after the {threat['target']}"


def _picture(rows: Sequence[Row]) -> str:
    """Recovery by attack, with the constant guess as a mark, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['attack']}, {row['moment']}, {row['defense']}" for row in rows]
    places = list(range(len(rows)))
    axes.barh(places, [row["token_recovery"] for row in rows], color=COLOURS[0], height=0.6)
    axes.plot([row["controls"]["constant"] for row in rows], places, "|", color=COLOURS[6], markersize=16)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the private tokens that came back (line: a constant guess)")
    return _drawn(figure)


def _frontier(rows: Sequence[Row]) -> str:
    """What comes back against what the defense costs in perplexity, a point a setting and target, as SVG.

    Nothing where there is one setting only, or nothing to evaluate on.
    """
    from matplotlib.figure import Figure

    points: dict[tuple[str, str], tuple[float, float]] = {}  # by target and setting: the cost, and the most recovered
    for row in rows:
        if row["utility"].get("perplexity") is not None:
            key = row["target"], row["defense"]
            cost, most = points.get(key, (row["utility"]["perplexity"], 0.0))
            points[key] = cost, max(most, row["token_recovery"])
    if len({setting for _, setting in points}) < 2:
        return ""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, target in enumerate(sorted({target for target, _ in points})):
        of = {setting: point for (t, setting), point in points.items() if t == target}
        costs, recovered = zip(*of.values(), strict=True)
        axes.plot(costs, recovered, "o" if number == 0 else "s", color=COLOURS[number], label=target, alpha=0.8)
        for setting, point in of.items():
            axes.annotate(setting, point, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_ylim(-0.03, 1.05)
    if min(cost for cost, _ in points.values()) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("perplexity on the evaluation data after the recorded run (left: cheap)")
    axes.set_ylabel("most that an attack got back (below: private)")
    axes.legend(title="after the")
    return f"<h2>What privacy costs</h2>{_drawn(figure)}"


def _drawn(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    found = text.getvalue()
    return f"<figure>{found[found.index('<svg') :]}</figure>"
