"""What a command writes to stderr while it works: a line of text an event, or of JSON for who collects logs.

A line of JSON has ``time`` (UTC, RFC 3339), ``level``, ``logger`` and ``event`` (a sentence), the fields of the process
(``run``, ``client``), and what the event is about: ``client``, ``peer`` (an address), ``reason``, ``round``, ``step``.
Nothing here is a token, a key, or text of anybody's data.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

LOG = logging.getLogger("cutlayer")
FORMATS, LEVELS = ("text", "json"), ("debug", "info", "warning", "error")
_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # of each record; the others are about it


def set_up(form: str, level: str, **fields: str) -> None:
    """Have this process write its log.

    Args:
        form: ``text`` or ``json``.
        level: the least that is written of what cutlayer says; of libraries it is warnings.
        fields: of each line of JSON.
    """
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _Stderr)]:
        root.removeHandler(old)
    handler = _Stderr()
    handler.setFormatter(JsonLines(fields) if form == "json" else TextLines())
    root.addHandler(handler)
    LOG.setLevel(level.upper())
    if form == "json":
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its own lines are not JSON
        logging.captureWarnings(True)
        sys.excepthook = _crashed


def as_json() -> bool:
    """Whether this process writes JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def rfc3339(seconds: float) -> str:
    """A time in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the moment: a bar that is shown redirects it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            stream: TextIO = sys.stderr
            stream.write(self.format(record) + "\n")
            stream.flush()
        except OSError:
            self.handleError(record)


class JsonLines(logging.Formatter):
    """A JSON object a line."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__()
        self.fields = {name: value for name, value in fields.items() if value}

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        # What begins with an underscore is of a library that marks all records of its process, as Ray does.
        about = {
            name: value
            for name, value in vars(record).items()
            if name not in _USUAL and not name.startswith("_") and value not in (None, "")
        }
        line: dict[str, Any] = {
            "time": rfc3339(record.created), "level": record.levelname.lower(), "logger": record.name,
            "event": record.getMessage(), **self.fields, **about,
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Time, level and sentence."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, and the traceback that belongs to it."""
        line = f"{rfc3339(record.created)} {record.levelname.lower()}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class LogReporter:
    """Tells a run's progress to the log: its notes, and a step now and then.

    Args:
        every: seconds between two lines about steps; those between are of the level ``debug``.
        clock: in seconds.
        fields: of each line: the run, the client.
    """

    def __init__(self, *, every: float = 10.0, clock: Callable[[], float] = time.monotonic, **fields: str) -> None:
        self._every, self._clock, self._fields = every, clock, fields
        self._done = self._total = 0
        self._told: float | None = None

    def start(self, total_steps: int) -> None:
        """The run begins."""
        self._done, self._total, self._told = 0, total_steps, None
        LOG.info("training: %d steps to make", total_steps, extra={**self._fields, "steps": total_steps})

    def update(self, record: Mapping[str, Any]) -> None:
        """A client finished an optimizer step."""
        self._done += 1
        now = self._clock()
        due = self._told is None or now - self._told >= self._every or self._done == self._total
        self._told = now if due else self._told
        about = {key: record[key] for key in ("client", "round", "step", "loss", "bytes_up", "bytes_down")}
        LOG.log(
            logging.INFO if due else logging.DEBUG, "step %d of %d", self._done, self._total,
            extra={**self._fields, **about},
        )  # fmt: skip

    def note(self, text: str) -> None:
        """Something worth a line."""
        LOG.info("%s", text, extra=self._fields)

    def labelled(self, label: str) -> LogReporter:
        """One for another run at the same time, of that name."""
        return LogReporter(every=self._every, clock=self._clock, **{**self._fields, "run": label})

    def stop(self) -> None:
        """Nothing: what ended it is told by others."""


def _crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A mistake of ours, as a line."""
    LOG.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
