"""The frames that are attacked: a short run with the wire recorded, or frames that were recorded earlier.

Also the truth, which is made anew from the run's own data and never from frames.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cutlayer.audit.messages import STEPS, Exchange, Key, exchanges
from cutlayer.audit.scores import Truth, truth_of
from cutlayer.build import Data, layouts_of, prepare_data, task_of, tokenizer_of
from cutlayer.config import RunConfig, load_config
from cutlayer.config_write import tree_of
from cutlayer.contracts import IGNORE, Layout
from cutlayer.errors import DataError, OutputError
from cutlayer.models.families import number_of_blocks
from cutlayer.models.loading import load_config as load_model_config
from cutlayer.outputs import holds_a_run
from cutlayer.report.progress import Reporter
from cutlayer.schedule import batches_of
from cutlayer.wire import Header, read_frames

Budget = Literal["quick", "standard", "full"]
Frame = tuple[dict[str, Any], Header, list[Tensor]]


@dataclass(frozen=True)
class Effort:
    """How much an audit does: optimizer steps that are recorded (None: the run's own length), and rows attacked."""

    steps: int | None
    rows: int


EFFORTS: Mapping[Budget, Effort] = {"quick": Effort(8, 2), "standard": Effort(40, 8), "full": Effort(None, 16)}


@dataclass(frozen=True)
class Recording:
    """The frames of a run, and what is known of it.

    Args:
        config: the run.
        frames: the folder with its frames.
        summary: the run's own, with what it cost; empty where frames were recorded earlier.
    """

    config: RunConfig
    frames: Path
    summary: Mapping[str, Any]

    @cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return tokenizer_of(self.config)

    @cached_property
    def data(self) -> Data:
        """The private data: for the scorer only."""
        return prepare_data(self.config, self.tokenizer)

    @cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """Who holds which blocks, by client."""
        return layouts_of(self.config, number_of_blocks(load_model_config(self.config.model)))

    @property
    def task(self) -> str:
        """``causal`` or ``classification``."""
        return task_of(self.config)

    def read(self) -> Iterator[Frame]:
        """All frames, in order."""
        yield from read_frames(self.frames)

    @cached_property
    def moments(self) -> Mapping[str, Sequence[Key]]:
        """Which micro-batches are attacked: those of the first training step, and of the last one that was recorded.

        Only of clients that hold what the first of them holds, as one adversary's tools are for one cut.

        Raises:
            DataError: no training step was recorded.
        """
        keys = self.every
        last = max(key[1] for key in keys)
        found = {"first step": [key for key in keys if key[1] == min(k[1] for k in keys)]}
        if last:
            found["last step"] = [key for key in keys if key[1] == last]
        return found

    @cached_property
    def every(self) -> Sequence[Key]:
        """All training micro-batches of the clients that hold what the first of them holds.

        Raises:
            DataError: none was recorded.
        """
        first = self.layouts[self.config.client_names[0]]
        keys = [
            one.key
            for one in exchanges(self.read(), reads=STEPS[:1])
            if self.layouts.get(one.client) == first and "hidden" in one.tensors[STEPS[0]]
        ]
        if not keys:
            raise DataError(
                f"In the frames in {self.frames} no client shows the server itself a training step. They are of "
                "another run, or the clients' messages go to other parties (edges, other clients), whom the audit "
                "does not play yet."
            )
        return list(dict.fromkeys(keys))

    @cached_property
    def classes(self) -> Mapping[int, float] | None:
        """The labels of a run whose rows have one each, with the share of each, the most frequent first; else None."""
        found: Counter[int] = Counter()
        if self.config.data.packing:
            return None
        for example in (one for examples in self.data.train.values() for one in examples):
            labels = (
                [example.label] if example.labels is None else [one for one in example.labels[1:] if one != self.ending]
            )
            own = [label for label in labels if label is not None and label != IGNORE]
            if len(own) > 1 or own != labels[-1:]:
                return None
            found.update(own)
        return {label: count / found.total() for label, count in found.most_common()}

    @property
    def ending(self) -> int | None:
        """The token that every row of a language model ends with, if there is one."""
        end: int | None = self.tokenizer.eos_token_id
        return end if self.task == "causal" and self.config.data.append_eos else None

    @property
    def behind_label(self) -> int | None:
        """How many positions of a row stand behind the one at which its only label is predicted; None: it is the
        first."""
        return None if self.task == "classification" else 1 + (self.ending is not None)

    def decoder(self, target: str) -> Callable[[Sequence[int]], str]:
        """What makes text of inputs, or of labels, which of a classifier are its classes."""
        names = self.data.labels
        if target == "inputs" or names is None:
            decode: Callable[[Sequence[int]], str] = self.tokenizer.decode
            return decode
        return lambda ids: " ".join(names[number] for number in ids)

    def truth(self, key: Key, target: str) -> Truth:
        """What was private in a micro-batch."""
        client, step, micro = key
        return truth_of(batches_of(self.config, self.data, client).step(step)[micro], target)


def limited(found: Sequence[Exchange], rows: int) -> list[Exchange]:
    """The first so many rows of exchanges; the last one is cut."""
    kept, left = [], rows
    for one in found:
        if left <= 0:
            break
        kept.append(only_rows(one, left))
        left -= rows_of(one)
    return kept


def rows_of(one: Exchange) -> int:
    """How many rows [B] a micro-batch has."""
    return next(len(tensor) for found in one.tensors.values() for tensor in found.values())


def only_rows(one: Exchange, count: int) -> Exchange:
    """The first rows of a micro-batch."""
    cut = {step: {name: tensor[:count] for name, tensor in found.items()} for step, found in one.tensors.items()}
    return replace(one, tensors=cut)


def only_positions(one: Exchange, count: int) -> Exchange:
    """The first positions of a micro-batch's activations: of a causal head a batch of shorter texts."""
    cut = {
        step: {name: tensor[:, :count] if tensor.dim() > 1 else tensor for name, tensor in found.items()}
        for step, found in one.tensors.items()
        if step == STEPS[0]
    }
    return replace(one, tensors=cut)


def check_folder(out: Path) -> None:
    """Refuse a folder with anything but an earlier audit, since an audit writes over what it finds.

    Raises:
        OutputError: there is.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} exists and is a file. Give another --out.")
    ours = (out / "audit.json").is_file() or holds_a_run(out / "run")
    if out.is_dir() and not ours and any(out.iterdir()):
        raise OutputError(f"{out} exists, is not empty, and holds no audit. Give another --out.")


def clear(out: Path) -> None:
    """Take away what an earlier audit recorded in its folder."""
    for folder in ("frames", "run", "defenses"):
        shutil.rmtree(out / folder, ignore_errors=True)


def record(config: RunConfig, out: Path, effort: Effort, progress: Reporter) -> Recording:
    """Make a run like this one, as long as the effort says, with its wire recorded.

    Args:
        config: the run.
        out: gets ``frames/`` and ``run/``.
        effort: how much to record.
        progress: is told of every step.
    """
    from cutlayer.run import train

    tree = tree_of(config)
    frames, run = out / "frames", out / "run"
    tree |= {"record_wire": str(frames), "attack": [], "early_stop": None, "eval_every": None}
    if effort.steps is not None:
        tree |= {"rounds": None, "epochs": None, "steps": effort.steps, "checkpoint_every": effort.steps}
    made = load_config({key: value for key, value in tree.items() if value is not None})
    result = train(made, out=run, progress=progress, warn=False)
    return Recording(made, frames, result.summary)


def recorded(config: RunConfig, frames: Path) -> Recording:
    """Frames that a run with ``record_wire`` left.

    Raises:
        DataError: there are none.
    """
    if not (frames / "frames.jsonl").is_file():
        raise DataError(f"{frames} holds no recorded frames (frames.jsonl). A run writes them with record_wire: DIR.")
    return Recording(config, frames, {})
