"""What a run shows while it goes: a live bar in a terminal, a line now and then in a log, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cutlayer.logs import LogReporter


class Reporter(Protocol):
    """What a run tells while it goes."""

    def start(self, total_steps: int) -> None:
        """The run begins; ``update`` will be called ``total_steps`` times."""

    def update(self, record: Mapping[str, Any]) -> None:
        """A client finished an optimizer step; ``record`` is its line of metrics.jsonl."""

    def note(self, text: str) -> None:
        """Something worth a line: an evaluation, a checkpoint, a warning."""

    def stop(self) -> None:
        """The run is over, or broken off; may be called twice."""


class Quiet:
    """Shows nothing."""

    def start(self, total_steps: int) -> None:
        """Nothing."""

    def update(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


def reporter(wanted: bool | Reporter | None) -> Reporter:
    """What a run is told to, as ``train`` is asked: True, False, a reporter, or None to see whether anybody looks."""
    if wanted is not None and not isinstance(wanted, bool):
        return wanted
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    watched = console.is_jupyter or (sys.stderr is not None and sys.stderr.isatty())
    return RichProgress(console) if (watched if wanted is None else wanted) else Quiet()


class RichProgress:
    """A live bar with loss, tokens a second and bytes sent; without a terminal a plain line every ``every`` seconds.

    In a notebook the bar needs ipywidgets; without it there are lines.

    Args:
        console: where to print.
        every: seconds between two lines where there is no terminal; the first and the last step are always printed.
        clock: seconds, for the rate.
        label: what each line begins with; with one there is no bar, as others write to the console, too.
    """

    def __init__(
        self, console: Console, *, every: float = 10.0, clock: Callable[[], float] = time.monotonic, label: str = ""
    ) -> None:
        self._console = console
        self._label = label
        self._every = every
        self._clock = clock
        self._bar: Progress | None = None
        self._total = self._done = self._tokens = self._bytes = 0
        self._started = self._printed = 0.0

    def start(self, total_steps: int) -> None:
        """The run begins."""
        self.stop()
        self._total, self._done, self._tokens, self._bytes = total_steps, 0, 0, 0
        self._started = self._clock()
        console = self._console
        if not self._label and (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[said]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task("train", total=total_steps, said="")
            self._bar.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """A client finished an optimizer step."""
        self._done += 1
        self._tokens += record["tokens"]
        self._bytes += record["bytes_up"] + record["bytes_down"]
        now = self._clock()
        rate = self._tokens / max(now - self._started, 1e-9)
        said = f"loss {record['loss']:.4f}  {rate:,.0f} tokens/s  {readable(self._bytes)} sent"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, said=said)
        elif self._done in (1, self._total) or now - self._printed >= self._every:
            self._printed = now
            self._line(f"step {self._done}/{self._total}  round {record['round']}  {record['client']}  {said}")

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._line(text)

    def stop(self) -> None:
        """Take the bar down, leaving its last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        self._console.print(
            f"{self._label}: {text}" if self._label else text,
            markup=False,
            highlight=False,
            emoji=False,
            soft_wrap=True,
        )

    def labelled(self, label: str) -> RichProgress:
        """One for another run at the same time, whose lines begin with ``label``."""
        return RichProgress(self._console, every=self._every, clock=self._clock, label=label)


class _Labelled:
    """A reporter's view of one of several runs."""

    def __init__(self, shown: Reporter, label: str) -> None:
        self._shown, self._label = shown, label

    def start(self, total_steps: int) -> None:
        self._shown.start(total_steps)

    def update(self, record: Mapping[str, Any]) -> None:
        self._shown.update({**record, "run": self._label})

    def note(self, text: str) -> None:
        self._shown.note(f"{self._label}: {text}")

    def stop(self) -> None:
        self._shown.stop()


def labelled(shown: Reporter, label: str) -> Reporter:
    """What one of several runs at a time is told to; its notes begin with ``label``, its records have it as ``run``."""
    if not label:
        return shown
    return shown.labelled(label) if isinstance(shown, RichProgress | LogReporter) else _Labelled(shown, label)


def readable(count: float) -> str:
    """A number of bytes with a unit of a thousand: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
