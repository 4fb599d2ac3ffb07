"""From ``data.train`` in a run file to checked rows: a file, a glob, or a data set on the Hub.

A source is looked for as a file first (from the current folder, then from the run file's folder), then as a glob, and
only then, if it looks like ``owner/name`` or ``owner/name:config``, on the Hub.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cutlayer.data.fields import FIELDS, check_row
from cutlayer.data.hub import read_hub
from cutlayer.data.readers import Placed, read_file, suffix_of
from cutlayer.errors import DataError, suggest

log = logging.getLogger("cutlayer")

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


def load_rows(
    source: str, *, base: Path | None = None, columns: Mapping[str, str], format: str, split: str = "train"
) -> list[dict[str, Any]]:
    """The rows of a source, in file order (a glob's files in sorted order), checked against the format.

    A row keeps the file's columns and has ours beside them: with ``columns={"prompt": "context"}`` it has ``prompt``
    and ``context``. (If the file has a ``prompt`` of its own, ours takes its place.) Everything after this function
    reads our names only; a division may read any column. In the format ``text``, rows of blank text are dropped.

    Args:
        source: a file, a glob or a Hub name, as in ``data.train``.
        base: the run file's folder, where relative paths are looked for if the current folder does not have them.
        columns: our name -> the file's column, for the names that differ. Beside those of the format, ``label`` may be
            named in every format, for a division over labels.
        format: a format of ``DataConfig``.
        split: which split of a Hub data set: ``train``, or ``eval`` for the first there is of ``validation``,
            ``valid``, ``dev`` and ``test``, or a split's own name. Files have no splits.

    Raises:
        DataError: nothing is found, a file is empty or damaged, a column is missing or has values of the wrong type.
    """
    _check_columns(columns, format)
    found = _locate(source, base)
    if found is None:
        where, placed = read_hub(source, split=split, not_a_file=_not_found(source, base))
        rows = _checked(where, placed, columns, format)
    else:
        where, paths = found
        rows = [row for path in paths for row in _checked(str(path), read_file(path), columns, format)]
        if format == "classification" and all(suffix_of(path.name) == ".csv" for path in paths):
            _whole_numbers(rows)
    if not rows:
        raise DataError(f"{where} has no row with anything in it. Put at least one example there.")
    return rows


def resolve_source(source: str, base: Path | None) -> str:
    """What goes into the resolved run file: a path or a glob made absolute, a Hub name as it is.

    Raises:
        DataError: it is neither a file, nor a glob that matches, nor shaped like a Hub name.
    """
    found = _locate(source, base)
    return source if found is None else found[0]


def _roots(base: Path | None) -> list[Path]:
    return [Path.cwd(), *([] if base is None else [Path(os.path.abspath(base))])]


def _absolute(root: Path, source: str) -> Path:
    return Path(os.path.normpath(root / os.path.expanduser(source)))


def _locate(source: str, base: Path | None) -> tuple[str, list[Path]] | None:
    """The absolute path or glob and the files it names, or None for what can only be a data set on the Hub."""
    for root in _roots(base):
        path = _absolute(root, source)
        if os.path.isdir(path):
            raise DataError(f"{path} is a folder. Name its files with a glob, such as {source.rstrip('/')}/*.jsonl.")
        if os.path.exists(path):
            return str(path), [path]
    if glob.has_magic(source):
        for root in _roots(base):
            # the root is escaped: its own name may hold characters that a glob would read
            pattern = os.path.normpath(os.path.join(glob.escape(str(root)), os.path.expanduser(source)))
            files = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
            if files:
                return pattern, [Path(name) for name in files]
        tried = " or ".join(str(root) for root in _roots(base))
        raise DataError(f"No file matches the glob '{source}' in {tried}. Check the pattern and the folder.")
    if _may_be_hub(source):
        return None
    raise DataError(f"{_not_found(source, base)}. Check the path; a data set on the Hub is written owner/name.")


def _may_be_hub(source: str) -> bool:
    """Whether a source is shaped like a Hub name; what ends like a data file is meant as one."""
    return HUB_NAME.fullmatch(source) is not None and suffix_of(source) is None


def _not_found(source: str, base: Path | None) -> str:
    tried = " or ".join(dict.fromkeys(str(_absolute(root, source)) for root in _roots(base)))
    return f"'{source}' is no file here (looked for {tried})"


def _check_columns(columns: Mapping[str, str], format: str) -> None:
    known = list(dict.fromkeys([*FIELDS[format], "label"]))
    for ours in columns:
        if ours not in known:
            raise DataError(
                f"data.columns names '{ours}', which the format '{format}' does not have.{suggest(ours, known)} "
                f"It has: {', '.join(known)}. Write our name first, then the file's column."
            )


def _checked(where: str, placed: Sequence[Placed], columns: Mapping[str, str], format: str) -> list[dict[str, Any]]:
    """The rows with our names set, after a look at every value that the format needs."""
    there = list(dict.fromkeys(key for _, row in placed for key in row))
    names = {ours: columns.get(ours, ours) for ours in [*FIELDS[format], *columns]}
    for ours, theirs in names.items():
        if placed and theirs not in there:
            raise DataError(
                f"{where} has no column '{theirs}'.{suggest(theirs, there)} Columns there: {', '.join(there)}. "
                f"Set data.columns: {{{ours}: <column>}} (cutlayer join: --columns {ours}=<column>)."
            )
    rows = []
    for place, row in placed:
        row = {**row, **{ours: row.get(theirs) for ours, theirs in names.items()}}
        if problem := check_row(row, format, names):
            raise DataError(f"{where}, {place}: {problem}")
        rows.append(row)
    if format != "text":
        return rows
    kept = [row for row in rows if row["text"].strip()]
    if 0 < len(kept) < len(rows):
        log.warning("%s: %d of %d rows have blank text and are dropped.", where, len(rows) - len(kept), len(rows))
    return kept


def _whole_numbers(rows: Sequence[dict[str, Any]]) -> None:
    """Turn the labels of a CSV file into ints if all of them are whole numbers: a CSV file cannot say so itself."""
    if all(row["label"].isdecimal() and str(int(row["label"])) == row["label"] for row in rows):
        for row in rows:
            row["label"] = int(row["label"])
