"""Data sets of the Hugging Face Hub, read through ``datasets``, which keeps its cache under ``HF_HOME``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cutlayer.data.readers import Placed
from cutlayer.errors import DataError, suggest

EVAL_SPLITS = ("validation", "valid", "dev", "test")  # the first that is there; a test split only for want of another


def read_hub(source: str, *, split: str, not_a_file: str) -> tuple[str, list[Placed]]:
    """What to call the split in messages, and its rows.

    Args:
        source: ``owner/name`` or ``owner/name:config``.
        split: ``train``, ``eval`` (the first there is of ``EVAL_SPLITS``), or a split's own name.
        not_a_file: the start of the message if the Hub does not have it either, without a full stop.

    Raises:
        DataError: the Hub cannot be reached, has no such data set or config, or the data set has no such split.
    """
    import datasets  # takes a second to import, and most runs read files

    name, _, config = source.partition(":")
    try:
        with _no_progress_bars():
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # whatever a server, a network or a cache can throw, the user needs the same paragraph
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{not_a_file}, and as a data set it could not be loaded from the Hub at {datasets.config.HF_ENDPOINT}: "
            f"{said.rstrip('.')}. If you mean a file, check its path; if you mean a data set, check its name, the "
            "network and, for a private one, your login (hf auth login)."
        ) from error
    wanted = EVAL_SPLITS if split == "eval" else (split,)
    chosen = next((one for one in wanted if one in loaded), None)
    if chosen is None:
        there = list(loaded)
        raise DataError(
            f"The data set {source} has no split {' or '.join(repr(one) for one in wanted)}."
            f"{suggest(wanted[0], there)} Splits there: {', '.join(there)}. For evaluation, data.eval_fraction takes a "
            "part of the training rows instead."
        )
    rows = loaded[chosen].to_list()
    return f"{source} (split {chosen})", [(f"row {number}", row) for number, row in enumerate(rows, start=1)]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch off the bars of ``datasets`` and ``huggingface_hub``, and leave both as they were."""
    import datasets.utils
    import huggingface_hub.utils as hub_utils

    quiet = [bars for bars in (datasets.utils, hub_utils) if not bars.are_progress_bars_disabled()]
    for bars in quiet:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        for bars in quiet:
            bars.enable_progress_bars()
