"""cutlayer: split-learning fine-tuning of Hugging Face language models.

A client keeps its text and the ends of the model, a server trains the middle; hidden states and gradients cross. Start
reading at ``cutlayer/step.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlayer.comparison import Comparison
    from cutlayer.config import RunConfig
    from cutlayer.report.progress import Reporter
    from cutlayer.run import Result

__all__ = ["__version__", "compare", "train"]
__version__ = version("cutlayer")


def train(
    run: str | Path | Mapping[str, Any] | RunConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool | Reporter | None = None,
    **overrides: Any,
) -> Result:
    """Make a run: ``cutlayer.train("run.yaml", rounds=3, **{"framework.local_steps": 8})``.

    A keyword sets the key of its name; an inner key is written with dots, which Python takes in a mapping only.

    Args:
        run: a run file, or a mapping of its keys.
        out: the folder that gets the result.
        resume: the folder of a run to go on with; then ``run`` is not needed.
        progress: True shows a bar with loss, tokens a second and bytes, False nothing, None a bar if there is a
            terminal or a notebook for it; or an object that is told of every step.
        **overrides: keys of the run, dotted ones too.

    Returns:
        the folder, the adapter and the summary.

    Raises:
        cutlayer.errors.CutlayerError: for whatever a user can mend.
    """
    from cutlayer.run import train as carry_out

    return carry_out(run, out=out, resume=resume, overrides=overrides, progress=progress)


def compare(
    runs: Sequence[str | Path] | Mapping[str, str | Path | Mapping[str, Any] | RunConfig],
    *,
    out: str | Path | None = None,
    seeds: int = 1,
    target: float | None = None,
    allow_different: bool = False,
    progress: bool | Reporter | None = None,
    **overrides: Any,
) -> Comparison:
    """Make several runs on the same model, data and seeds, and put what they gave side by side.

    ``cutlayer.compare(["a.yaml", "b.yaml"], seeds=3, out="outputs/ab", rounds=20)``

    Args:
        runs: run files; or, by name, run files and mappings of a run's keys.
        out: the folder of the comparison; the same call with the same folder makes nothing twice.
        seeds: make each run with so many seeds, from that of the run files.
        target: the loss to measure the time to; by default one that every run reached.
        allow_different: compare runs that differ in model, data, number of clients or length.
        progress: as for ``train``.
        **overrides: keys of all runs, dotted ones too.

    Returns:
        the folder, the page, and the content of ``comparison.json``.

    Raises:
        cutlayer.errors.CutlayerError: for whatever a user can mend.
    """
    from cutlayer.comparison import compare as carry_out

    return carry_out(
        runs, out=out, seeds=seeds, target=target, allow_different=allow_different, overrides=overrides,
        progress=progress,
    )  # fmt: skip
