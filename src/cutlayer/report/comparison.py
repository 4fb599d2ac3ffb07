"""A comparison in numbers: each measure of each run and seed, mean and deviation over seeds, and curves.

All of it comes from what the runs wrote: ``summary.json``, and ``metrics.jsonl`` where the former says nothing of the
moment of an evaluation. ``comparison.json`` is what ``summarize`` returns; table and page are made from that alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from cutlayer.errors import CheckpointError

Point = Mapping[str, Any]  # round, loss, steps, virtual_time (where there is one), bytes_up, bytes_down
Kind = Literal["loss", "perplexity", "count", "seconds", "bytes"]


@dataclass(frozen=True)
class Measure:
    """A column of the table: the key of its number, its heading, and how the number is written."""

    key: str
    title: str
    kind: Kind
    optional: bool = False  # no column where no run has it


QUALITY = (
    Measure("loss", "eval loss", "loss"),
    Measure("perplexity", "perplexity", "perplexity"),
    Measure("steps_to_target", "steps to target", "count"),
    Measure("time_to_target", "virtual time to target", "seconds"),
    Measure("virtual_seconds", "virtual time", "seconds"),
)
COST = (
    Measure("bytes_up", "bytes up", "bytes"),
    Measure("bytes_down", "bytes down", "bytes"),
    Measure("client_memory", "client memory", "bytes"),
    Measure("server_memory", "server memory", "bytes"),
    Measure("waiting_mean", "waiting, mean client", "seconds", optional=True),
    Measure("waiting_worst", "waiting, worst client", "seconds", optional=True),
)
MEASURES = (*QUALITY, *COST)


@dataclass(frozen=True)
class Trial:
    """One run with one seed, as it ended: its folder and its summary, or why there is none."""

    name: str
    seed: int
    folder: Path
    summary: Mapping[str, Any] | None
    failed: str = ""


def evaluations(folder: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of a run, each with the steps, the bytes and the virtual time before it.

    Where the summary does not say these, they are those of the steps in ``metrics.jsonl``: without set-up, merges and
    evaluations.
    """
    history = summary.get("eval", {}).get("history", [])
    if _placed(summary):
        return [dict(record) for record in history]
    clocked = summary.get("virtual_seconds") is not None
    done = {round_.number: round_.done for round_ in _rounds(folder, clocked=clocked)}
    return [{**done[record["round"]], **record} for record in history]


def _placed(summary: Mapping[str, Any]) -> bool:
    """Whether a summary says itself what was done before each evaluation."""
    wanted = ["steps", "bytes_up", "bytes_down"]
    wanted += ["virtual_time"] if summary.get("virtual_seconds") is not None else []
    return all(key in record for record in summary.get("eval", {}).get("history", []) for key in wanted)


def training_losses(folder: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The mean loss of each round over its label tokens, for runs that evaluate nothing."""
    _, *rounds = _rounds(folder, clocked=summary.get("virtual_seconds") is not None)
    return [{"round": made.number, "loss": made.loss / max(made.tokens, 1), **made.done} for made in rounds]


@dataclass
class _Round:
    """What ``metrics.jsonl`` tells of a round: how many were made with it, its loss, and what all of them took."""

    number: int
    done: dict[str, Any]
    loss: float = 0.0  # summed over label tokens
    tokens: int = 0


def _rounds(folder: Path, *, clocked: bool) -> list[_Round]:
    """The rounds of a run, with one before the first in which nothing was done."""
    path = folder / "metrics.jsonl"
    nothing = {"steps": 0, "bytes_up": 0, "bytes_down": 0} | ({"virtual_time": 0.0} if clocked else {})
    rounds = [_Round(0, nothing)]
    try:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if line["round"] + 1 != rounds[-1].number:
                rounds.append(_Round(line["round"] + 1, dict(rounds[-1].done)))
            made = rounds[-1]
            made.loss += line["loss"] * line["label_tokens"]
            made.tokens += line["label_tokens"]
            made.done["steps"] += 1
            made.done["bytes_up"] += line["bytes_up"]
            made.done["bytes_down"] += line["bytes_down"]
            if clocked:
                made.done["virtual_time"] = max(made.done["virtual_time"], line["virtual_time"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}). Put it back, or delete its folder and run the comparison again."
        ) from error
    return rounds


def reached(points: Sequence[Point], target: float, axis: str) -> float | None:
    """Where the loss first is at or below ``target``, by linear interpolation between evaluations.

    Args:
        points: the evaluations, in order.
        target: the loss.
        axis: in what to measure: ``steps``, ``virtual_time``, ``bytes_up`` or ``bytes_down``.

    Returns:
        None if the target was not reached, or nothing was measured in ``axis``.
    """
    if not points or any(axis not in point for point in points):
        return None
    if points[0]["loss"] <= target:
        return float(points[0][axis])
    for before, after in pairwise(points):
        if after["loss"] <= target:
            part = (before["loss"] - target) / (before["loss"] - after["loss"])
            return float(before[axis] + part * (after[axis] - before[axis]))
    return None


def measured(summary: Mapping[str, Any], points: Sequence[Point], target: float | None) -> dict[str, float | None]:
    """Every measure of one run with one seed; None for what it does not have."""
    clients = [party for name, party in summary["parties"].items() if name in summary["clients"]]
    servers = [party for name, party in summary["parties"].items() if name not in summary["clients"]]
    waiting = list((summary.get("waiting") or {}).values())
    after = summary.get("eval", {}).get("after", {})
    return {
        "loss": after.get("loss"),
        "perplexity": after.get("perplexity"),
        "steps_to_target": None if target is None else reached(points, target, "steps"),
        "time_to_target": None if target is None else reached(points, target, "virtual_time"),
        "virtual_seconds": summary.get("virtual_seconds"),
        "bytes_up": summary["bytes_up"],
        "bytes_down": summary["bytes_down"],
        "client_memory": max((party["peak_memory_bytes"] for party in clients), default=None),
        "server_memory": max((party["peak_memory_bytes"] for party in servers), default=None),
        "waiting_mean": statistics.fmean(waiting) if waiting else None,
        "waiting_worst": max(waiting) if waiting else None,
    }


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (None of one value) and number of the values that there are."""
    there = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(there) if there else None,
        "deviation": statistics.stdev(there) if len(there) > 1 else None,
        "count": len(there),
    }


def chosen_target(trials: Sequence[Trial], given: float | None) -> dict[str, Any] | None:
    """The target loss and where it is from; by default one that every run reached. None without evaluations."""
    finals = [(t.summary["eval"]["after"]["loss"], t) for t in trials if t.summary and "eval" in t.summary]
    if not finals:
        return None
    if given is not None:
        return {"loss": given, "from": "as given"}
    loss, worst = max(finals, key=lambda pair: pair[0])
    which = f"of {worst.name}, seed {worst.seed}"
    return {"loss": loss, "from": f"the worst loss at the end of a run ({which}), so that every run reached it"}


def summarize(
    trials: Sequence[Trial],
    *,
    target: float | None,
    differences: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
    **about: Any,
) -> dict[str, Any]:
    """The content of ``comparison.json``.

    Args:
        trials: every run with every seed.
        target: the loss asked for, or None to choose one.
        differences: by dotted key of the run file, the value of each run.
        notes: what is to be kept in mind with the numbers; more are added here.
        about: further keys, which come first.
    """
    aim = chosen_target(trials, target)
    evaluated = aim is not None
    loss = aim["loss"] if aim is not None else None
    results: dict[str, Any] = {}
    for name in dict.fromkeys(trial.name for trial in trials):
        seeds: dict[str, Any] = {}
        for trial in trials:
            if trial.name == name and trial.summary is not None:
                points = (evaluations if evaluated else training_losses)(trial.folder, trial.summary)
                seeds[str(trial.seed)] = {
                    "folder": str(trial.folder),
                    "measures": measured(trial.summary, points if evaluated else [], loss),
                    "curve": points,
                    "summary": trial.summary,
                }
        over = {m.key: spread(seed["measures"][m.key] for seed in seeds.values()) for m in MEASURES}
        results[name] = {"over_seeds": over, "seeds": seeds}
    failed = {f"{trial.name}, seed {trial.seed}": trial.failed for trial in trials if trial.failed}
    seeds_made = list(dict.fromkeys(trial.seed for trial in trials))
    data: dict[str, Any] = {
        **about,
        "seeds": seeds_made,
        "target": aim,
        "curve": "evaluation loss" if evaluated else "training loss",
        "differences": {key: dict(values) for key, values in differences.items()},
        "failed": failed,
        "results": results,
    }
    there = [
        name
        for name, result in results.items()
        if evaluated and any(seed["curve"] and seed["curve"][0]["loss"] <= loss for seed in result["seeds"].values())
    ]
    early = (
        [f"The loss was at the target before any step in {', '.join(there)}. Give a lower --target."] if there else []
    )
    return {**data, "notes": [*notes, *early, *_doubts(results), *_how(data)]}


def _how(data: Mapping[str, Any]) -> list[str]:
    """How the numbers were made."""
    seeds, results = data["seeds"], data["results"]
    aim: Mapping[str, Any] | None = data["target"]
    said = []
    if len(seeds) > 1:
        listed = ", ".join(map(str, seeds))
        said.append(f"A number is the mean over the seeds {listed}, ± the sample standard deviation over them.")
    else:
        said.append(f"One seed ({seeds[0]}): the numbers say nothing of chance. Take more with --seeds.")
    made = {name: result["over_seeds"] for name, result in results.items() if result["seeds"]}
    if not made:
        return []
    if aim is None:
        said.append("Nothing was evaluated, so there is no loss and no target. Set data.eval or data.eval_fraction.")
    else:
        said.append(
            f"Target loss: {aim['loss']:.4f}, {aim['from']}. Steps (those of all clients) and virtual time to it are "
            "interpolated linearly between evaluations; '-' where it was not reached."
        )
    without = [name for name, over in made.items() if over["virtual_seconds"]["count"] == 0]
    if without:
        of = f" of {', '.join(without)}" if len(without) < len(made) else ""
        said.append(f"No virtual time{of}: without a profile there is no clock. Give one, such as profile=laptop+4g.")
    summaries = [seed["summary"] for result in results.values() for seed in result["seeds"].values()]
    if aim is None or not all(map(_placed, summaries)):
        said.append(
            "In the curves, a point is at the end of the last step before it, and its bytes are those of the steps "
            "alone: without set-up, merges and evaluations."
        )
    said.append("Bytes: the length of all frames of a run, evaluation and set-up included.")
    said.append(
        "Memory: of the largest client and of the server, counted from the tensors that each held; activations are "
        "those of its first step (of a run that was resumed, the first one since)."
    )
    return said


def _doubts(results: Mapping[str, Any]) -> list[str]:
    """What makes the runs less alike than their files say, seen from what they wrote."""
    said = []
    steps = {
        name: " or ".join(sorted({str(sum(seed["summary"]["steps"].values())) for seed in result["seeds"].values()}))
        for name, result in results.items()
        if result["seeds"]
    }
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in steps.items())
        said.append(f"The runs made different numbers of steps (those of all clients): {listed}.")
    seeds = [seed for result in results.values() for seed in result["seeds"].values()]
    facts: list[dict[str, Any]] = [
        {**seed["summary"]["versions"], "device": seed["summary"]["device"]} for seed in seeds
    ]
    for key in dict.fromkeys(key for fact in facts for key in fact):
        values = list(dict.fromkeys(str(fact.get(key)) for fact in facts))
        if len(values) > 1:
            said.append(f"The runs were made with different {key}: {', '.join(values)}.")
    if seeds and all(len(seed["curve"]) == 2 for seed in seeds):
        said.append(
            "Each curve has two points only. More evaluations (eval_every=1) show more and place the target better."
        )
    return said
