"""What an audit found, in plain words for who owns the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.config import RunConfig

READS, MUCH, SOME = 0.9, 0.5, 0.05  # of the tokens, over what a constant guess has
WHAT = {"inputs": "your text", "labels": "the labels (of a language model: the text again, a token on)"}


def verdict(config: RunConfig, rows: Sequence[Mapping[str, Any]], *, labels_sent: bool) -> list[str]:
    """A sentence for what was attacked, and what follows.

    Args:
        config: the run.
        rows: of ``audit.json``.
        labels_sent: whether the clients send the labels to the server (the two-part split).
    """
    said = []
    for target, what in WHAT.items():
        if target == "labels" and labels_sent:
            said.append(f"The server needs no attack on {what}: in this partition the clients send them as they are.")
            continue
        of = [row for row in rows if row["target"] == target]
        if not of:
            said.append(f"Nothing was measured on {what}.")
            continue
        best = max(of, key=lambda row: row["token_recovery"])
        said.append(
            f"{_strength(best)} {what}: '{best['attack']}' got back {best['token_recovery']:.1%} of the tokens at the "
            f"{best['moment']} (guessing always the most frequent token: {best['controls']['constant']:.1%})."
        )
        knows = best["threat"]["knows"]
        if "weights" in knows and best["token_recovery"] > READS:
            said.append(
                "The server needs nothing for that but the messages of this run and the public weights of "
                f"'{_short(config.model)}'."
            )
    worst = max((row["token_recovery"] - row["controls"]["constant"] for row in rows), default=0.0)
    if worst > MUCH and not config.defense:
        said.append(
            "Keeping the first (and last) blocks at home hides nothing by itself while their weights are public: treat "
            "the server as one that reads along, or use a defense and measure again."
        )
    return said


def _strength(row: Mapping[str, Any]) -> str:
    over = row["token_recovery"] - row["controls"]["constant"]
    if over > READS - row["controls"]["constant"]:
        return "An honest-but-curious server reads"
    if over > MUCH:
        return "An honest-but-curious server reads most of"
    if over > SOME:
        return "An honest-but-curious server reads part of"
    return "The attacks that were played did not read"


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
