"""Local files read into rows: JSON lines, JSON, CSV, Parquet and plain text, each but Parquet also gzipped.

Reading is the same on every machine: no type is guessed (a CSV value is text, ``NA`` is two letters), nothing is cached
and nothing is fetched. UTF-8 throughout, with or without a byte-order mark.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from cutlayer.errors import DataError

Placed = tuple[str, dict[str, Any]]  # where the row stands in its file ("line 3"), and the row

LONGEST_FIELD = 2**31 - 1  # characters of one CSV value; Python's own limit of 131,072 is shorter than many documents


def suffix_of(name: str) -> str | None:
    """The ending of a file that can be read (``.jsonl``; ``.gz`` taken off), or None."""
    lower = name.lower()
    packed = lower.endswith(".gz")
    suffix = Path(lower.removesuffix(".gz")).suffix
    return suffix if suffix in READERS or (suffix == ".parquet" and not packed) else None


def read_file(path: Path) -> list[Placed]:
    """All rows of one file, in order.

    Raises:
        DataError: an unknown ending, a file that cannot be opened, is damaged, is no UTF-8, or holds something that is
            no row; with the line.
    """
    suffix = suffix_of(path.name)
    if suffix is None:
        raise DataError(
            f"{path} has an ending that cannot be read. Known: {', '.join([*READERS, '.parquet'])}; "
            "all but .parquet also with .gz."
        )
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        with _open(path) as file:
            return list(READERS[suffix](path, file))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Fetch or pack it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the path and your rights.") from error


def _open(path: Path) -> TextIO:
    # newline="" leaves line ends inside quoted CSV values alone; the other readers strip or ignore them
    if path.name.lower().endswith(".gz"):
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return open(path, encoding="utf-8-sig", newline="")


def _read_text(path: Path, file: TextIO) -> Iterator[Placed]:
    """One line is one row ``{"text": line}``, its spaces kept; blank lines are dropped."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def _read_json_lines(path: Path, file: Iterable[str]) -> Iterator[Placed]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"line {number}", _row(path, f"line {number}", _parse(path, line.strip(), first_line=number))


def _read_json(path: Path, file: TextIO) -> Iterator[Placed]:
    """One list of objects, or JSON lines."""
    text = file.read()
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path, text.split("\n"))
        return
    for number, value in enumerate(_parse(path, text, first_line=1), start=1):
        yield f"row {number}", _row(path, f"row {number}", value)


def _parse(path: Path, text: str, *, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = first_line + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        said = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise DataError(
            f"{path}, line {line} is not JSON ({said}). Each line must be one object, such as "
            '{"text": "..."}; a .json file may also be one list of objects.'
        ) from error


def _row(path: Path, place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f'{path}, {place} is a {type(value).__name__}, not an object of columns. Write {{"text": ...}}.'
        )
    return value


def _read_csv(path: Path, file: TextIO) -> Iterator[Placed]:
    """Comma-separated with a header; every value is text, as it stands."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        for values in reader:
            if not values:  # a blank line
                continue
            if header is None:
                header = values
                if len(set(header)) != len(header):
                    raise DataError(f"{path} names a column twice in its header: {', '.join(header)}. Rename one.")
                continue
            if len(values) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num} has {len(values)} values, the header has {len(header)}. "
                    'Put values with commas, quotes or line breaks in double quotes, and write a quote as "".'
                )
            yield f"line {reader.line_num}", dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV ({error}). Check its quotes.") from error
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> list[Placed]:
    import pyarrow  # comes with datasets; imported here because few runs need it
    import pyarrow.parquet

    try:
        # ParquetFile and not read_table: the latter turns folders such as "split=a/" into columns
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = file.read().to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path} is not a whole Parquet file ({str(error).splitlines()[0]}). Fetch it again."
        ) from error
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


READERS: dict[str, Callable[[Path, TextIO], Iterator[Placed]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
}
