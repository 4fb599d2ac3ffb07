"""What an audit found, in plain words for who owns the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.audit.scores import auc_error
from cutlayer.config import RunConfig

READS, MUCH, SOME = 0.9, 0.5, 0.05  # of the tokens, over what a constant guess has
WHAT = {"inputs": "your text", "labels": "the labels (of a language model: the text again, a token on)"}
Row = Mapping[str, Any]


def verdict(config: RunConfig, rows: Sequence[Row], *, labels_sent: bool) -> list[str]:
    """A sentence for what was attacked, and what follows.

    Args:
        config: the run.
        rows: of ``audit.json``; the first are those of the run as it is.
        labels_sent: whether the clients send the labels to the server (the two-part split).
    """
    own = rows[0]["defense"]
    now = [row for row in rows if row["defense"] == own]
    said = []
    for target, what in WHAT.items():
        if target == "labels" and labels_sent:
            said.append(f"The server needs no attack on {what}: in this partition the clients send them as they are.")
            continue
        said += _about(what, [row for row in now if row["target"] == target], config)
    if max(map(_over, now)) > MUCH and not config.defense:
        said.append(
            "Keeping the first (and last) blocks at home hides nothing by itself while their weights are public: treat "
            "the server as one that reads along, or use a defense and measure again."
        )
    others = list(dict.fromkeys(row["defense"] for row in rows if row["defense"] != own))
    if others:
        said.append(_of_defenses(rows, own, others))
    return said


def _about(what: str, of: Sequence[Row], config: RunConfig) -> list[str]:
    """What was found of one target."""
    if not of:
        return [f"Nothing was measured on {what}."]
    best = max(of, key=_over)
    thing, when = ("label", "over") if best["threat"]["classes"] else ("token", "at")
    if _ranked(best) > best["token_recovery"] - best["controls"]["constant"]:
        return [
            f"{_strength(best)} {what}: '{best['attack']}' tells two labels apart with an AUC of {best['auc']:.3f} "
            f"{when} the {best['moment']} (guessing: 0.5)."
        ]
    said = [
        f"{_strength(best)} {what}: '{best['attack']}' got back {best['token_recovery']:.1%} of the {thing}s {when} "
        f"the {best['moment']} (guessing always the most frequent {thing}: {best['controls']['constant']:.1%})."
    ]
    if "weights" in best["threat"]["knows"] and best["token_recovery"] > READS:
        said.append(
            "The server needs nothing for that but the messages of this run and the public weights of "
            f"'{_short(config.model)}'."
        )
    return said


def _of_defenses(rows: Sequence[Row], own: str, others: Sequence[str]) -> str:
    """Which of the measured settings is the cheapest that stops all attacks that were played."""
    worst = {setting: max(_over(row) for row in rows if row["defense"] == setting) for setting in others}
    stops = [setting for setting in others if worst[setting] <= SOME]
    if not stops:
        best = min(others, key=lambda setting: worst[setting])
        return (
            f"None of the {len(others)} measured defense settings stops all attacks. The nearest is {best}: an attack "
            f"still gets {worst[best]:.1%} of the tokens more than a constant guess{_price(rows, own, best)}."
        )
    costs = {setting: _utility(rows, setting).get("loss") for setting in stops}
    known = {setting: cost for setting, cost in costs.items() if cost is not None}
    if not known:
        names = ", ".join(stops)
        return f"These settings stop all attacks that were played: {names}. Give data.eval to see what they cost."
    cheapest = min(known, key=lambda setting: known[setting])
    return (
        f"The cheapest measured setting that stops all attacks that were played is {cheapest}"
        f"{_price(rows, own, cheapest)}. An attack that is not here may do better."
    )


def _price(rows: Sequence[Row], own: str, setting: str) -> str:
    """What a setting costs against the run as it is."""
    before, after = _utility(rows, own), _utility(rows, setting)
    if before.get("perplexity") is None or after.get("perplexity") is None:
        return ""
    size = (after["bytes_up"] + after["bytes_down"]) / (before["bytes_up"] + before["bytes_down"])
    return (
        f" (perplexity {after['perplexity']:.2f} in place of {before['perplexity']:.2f} after {after['steps']} steps, "
        f"{size:.2f} times the bytes, {after['seconds'] / before['seconds']:.2f} times the seconds)"
    )


def _utility(rows: Sequence[Row], setting: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row["utility"] for row in rows if row["defense"] == setting)
    return found


def _over(row: Row) -> float:
    """How much more an attack got back than a guess would: of tokens, or of the order of two labels."""
    return float(max(row["token_recovery"] - row["controls"]["constant"], _ranked(row)))


def _ranked(row: Row) -> float:
    """How far the AUC is above chance, from 0 to 1, less what chance alone makes of so few labels."""
    more = row["positions"] * row["controls"]["constant"]
    less = row["positions"] - more
    if row["auc"] is None or less < 1:
        return 0.0
    return max(0.0, 2 * (float(row["auc"]) - 2 * auc_error(less, more)) - 1)


def _strength(row: Row) -> str:
    over = _over(row)
    if row["token_recovery"] > READS and over > 0:
        return "An honest-but-curious server reads"
    if over > MUCH:
        return "An honest-but-curious server reads most of"
    if over > SOME:
        return "An honest-but-curious server reads part of"
    return "The attacks that were played did not read"


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
