"""cutlayer: split-learning fine-tuning of Hugging Face language models.

A client keeps its text and the ends of the model, a server trains the middle; hidden states and gradients cross. Start
reading at ``cutlayer/step.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlayer.config import RunConfig
    from cutlayer.run import Result

__all__ = ["__version__", "train"]
__version__ = version("cutlayer")


def train(
    run: str | Path | Mapping[str, Any] | RunConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    **overrides: Any,
) -> Result:
    """Make a run: ``cutlayer.train("run.yaml", rounds=3, **{"framework.local_steps": 8})``.

    Args:
        run: a run file, or a mapping of its keys.
        out: the folder that gets the result.
        resume: the folder of a run to go on with; then ``run`` is not needed.
        **overrides: keys of the run, dotted ones too.

    Returns:
        the folder, the adapter and the summary.

    Raises:
        cutlayer.errors.CutlayerError: for whatever a user can mend.
    """
    from cutlayer.run import train as carry_out

    return carry_out(run, out=out, resume=resume, overrides=overrides)
