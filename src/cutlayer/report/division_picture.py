"""``division.svg``: for each client a bar of its size, and of its shares of the classes of length and of label."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

ROWS = 100  # clients that are drawn
COLORS = 20  # labels with a color of their own; the rest of many share one
LEFT, SIZES, SHARES, GAP, RIGHT = 1.4, 1.6, 3.6, 0.8, 0.2  # inches
TOP, LEGEND, LINE = 0.6, 0.3, 0.18
COLUMNS = 5  # of a legend
SETTINGS: Any = {
    "font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "cutlayer", "text.usetex": False, "text.parse_math": False,
}  # fmt: skip


class _Sheet:
    """Boxes and texts on a page, in inches from its upper left corner."""

    def __init__(self) -> None:
        self.corners: list[list[tuple[float, float]]] = []
        self.colors: list[Any] = []
        self.texts: list[tuple[float, float, str, dict[str, Any]]] = []

    def box(self, left: float, top: float, wide: float, high: float, color: Any) -> None:
        if wide:
            right, low = left + wide, top + high
            self.corners.append([(left, top), (right, top), (right, low), (left, low)])
            self.colors.append(color)

    def text(self, left: float, middle: float, text: str, **style: Any) -> None:
        self.texts.append((left, middle, text, {"va": "center", **style}))

    def svg(self, width: float, height: float) -> str:
        with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the viewer's fonts write the text, not ours
            figure = Figure(figsize=(width, height))  # not pyplot's, which keeps figures and looks for a screen
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
            axes.set_axis_off()
            # one collection, and no axis: thousands of patches and ticks would take seconds
            axes.add_collection(PolyCollection(self.corners, facecolors=self.colors, linewidths=0), autolim=False)
            for left, middle, text, style in self.texts:
                axes.text(left, middle, text, **style)
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", bbox_inches=None, metadata={"Date": None, "Title": "who got what"})
        return drawn.getvalue()


def draw(found: Mapping[str, Any]) -> str:
    """The picture of what ``division.describe`` found, as SVG; the same numbers give the same text."""
    clients = list(found["clients"])[:ROWS]
    histograms = found["histograms"]
    tall = max(0.1, min(0.26, 10 / len(clients)))  # inches of a row
    bar, size = 0.8 * tall, max(4.0, min(8.0, 60 * tall))  # size of its texts in points
    middles = [TOP + (row + 0.5) * tall for row in range(len(clients) + 1)]  # the first is of all clients
    sheet = _Sheet()
    note = "numbers beside bars: Jensen-Shannon distance from all"
    if len(clients) < len(found["clients"]):
        note = f"the first {ROWS} of {len(found['clients'])} clients; {note}"
    sheet.text(0.1, 0.18, f"who got what ({note})")

    counts = [found["all"]["examples"] / len(found["clients"])]
    counts += [found["clients"][client]["examples"] for client in clients]
    sheet.text(LEFT, TOP - 0.12, "examples")
    for middle, name, count in zip(middles, ["all (mean)", *clients], counts, strict=True):
        sheet.text(LEFT - 0.06, middle, _readable(name, most=20), ha="right", size=size)
        wide = (SIZES - 0.5) * count / max(counts)
        sheet.box(LEFT, middle - bar / 2, wide, bar, "#4c72b0")
        sheet.text(LEFT + wide + 0.05, middle, f"{count:,.0f}", size=size)

    left = LEFT + SIZES + 0.3
    bottom = below = middles[-1] + tall / 2
    for name, histogram in histograms.items():
        names, colors, rows = _parts(name, histogram, clients)
        said = "length in tokens" if name == "length" else name
        sheet.text(left, TOP - 0.12, f"{said}: mean distance {histogram['mean_distance']:.3f}")
        for middle, shares in zip(middles, rows, strict=True):
            for start, share, color in zip(np.cumsum([0, *shares[:-1]]), shares, colors, strict=True):
                sheet.box(left + SHARES * start, middle - bar / 2, SHARES * share, bar, color)
        for middle, client in zip(middles[1:], clients, strict=True):
            sheet.text(left + SHARES + 0.05, middle, f"{histogram['distance'][client]:.2f}", size=size)
        for number, (text, color) in enumerate(zip(names, colors, strict=True)):
            line, column = divmod(number, COLUMNS)
            x, y = left + column * SHARES / COLUMNS, bottom + LEGEND + line * LINE
            sheet.box(x, y - 0.05, 0.1, 0.1, color)
            sheet.text(x + 0.14, y, text, size=6)
            below = max(below, y)
        left += SHARES + GAP
    return sheet.svg(left - GAP + 0.4 + RIGHT, below + LEGEND)


def _parts(name: str, histogram: Mapping[str, Any], clients: Sequence[str]) -> tuple[list[str], list[Any], list[Any]]:
    """The classes' names, their colors, and their shares of all and of each client."""
    names, counts = histogram["classes"], np.array([histogram["all"], *(histogram["clients"][c] for c in clients)])
    if name == "length":
        names = [f"{low}-{high}" if low < high else f"{low}" for low, high in names]
        colors = [matplotlib.colormaps["viridis"](part) for part in np.linspace(0.05, 0.95, len(names))]
    else:
        if len(names) > COLORS:
            first = np.argsort(-counts[0], kind="stable")
            kept, rest = first[: COLORS - 1], first[COLORS - 1 :]
            counts = np.concatenate([counts[:, kept], counts[:, rest].sum(axis=1, keepdims=True)], axis=1)
            names = [*(names[i] for i in kept), f"{len(rest)} others"]
        palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
        colors = [palette(number) for number in range(len(names))]
    return [_readable(text) for text in names], colors, (counts / counts.sum(axis=1, keepdims=True)).tolist()


def _readable(text: str, *, most: int = 12) -> str:
    """A name as XML can have it, and as there is room."""
    shown = "".join(char if char.isprintable() else "?" for char in text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"
