"""``cutlayer audit``: play attacks on the messages of a run, and say how much of the private text comes back.

Each attack is played on the first training step, whose weights are public, and on the last one that was recorded;
beside it stand the controls: the best constant prediction, the same attack on messages whose positions were shuffled,
and with another model's weights in place of the public ones.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutlayer import registry
from cutlayer.audit.messages import STEPS
from cutlayer.audit.public import PublicModel, load_public
from cutlayer.audit.recording import (
    EFFORTS,
    Budget,
    Recording,
    check_folder,
    clear,
    limited,
    only_positions,
    record,
    recorded,
)
from cutlayer.audit.scores import Score
from cutlayer.audit.settings import Setting, named, with_defense
from cutlayer.audit.truths import WHOLE, promised, read_by, scored
from cutlayer.audit.verdict import verdict
from cutlayer.audit.view import View
from cutlayer.config import load_config, resolved
from cutlayer.contracts import Attack
from cutlayer.data.formats import tokenize
from cutlayer.data.sources import load_rows
from cutlayer.errors import ConfigError, MethodError, suggest
from cutlayer.files import write_text
from cutlayer.models.loading import device_named
from cutlayer.report.progress import Reporter, reporter

CONTROL_POSITIONS = 64
CONTROLS = {"standard": 2, "full": 4, "quick": 1}  # rows that controls are played on: they cost as much as the attack


@dataclass(frozen=True)
class Audited:
    """What an audit found: the rows of ``audit.json``, the attacks that this run cannot have with the reason, and the
    verdict in plain words."""

    out: Path
    rows: Sequence[Mapping[str, Any]]
    refused: Mapping[str, str]
    verdict: Sequence[str]


def audit(
    source: str | Path | Mapping[str, Any],
    *,
    out: str | Path,
    attacks: Sequence[str | Mapping[str, Any]] | None = None,
    defenses: Sequence[Setting] = (),
    aux: str | Path | None = None,
    budget: Budget = "standard",
    frames: str | Path | None = None,
    overrides: Sequence[str] = (),
    progress: bool | Reporter | None = None,
) -> Audited:
    """Attack a run.

    Args:
        source: a run file, or a mapping of its keys.
        out: the folder that gets ``audit.json`` and ``index.html``; what is there of an earlier audit is written over.
        attacks: ids, or mappings with ``name`` and options; None: all that this run can have.
        defenses: settings to measure beside the run's own, each in place of it: texts such as
            ``dp-forward(noise=0.3)+clip-noise``, mappings with ``name`` and options, or lists of these.
        aux: text of the attacker's own, in the form of the run's data.
        budget: how much is recorded and attacked.
        frames: frames of this run that were recorded earlier; None: they are recorded now.
        overrides: ``key=value`` texts.
        progress: as of ``cutlayer.train``.

    Raises:
        CutlayerError: anything that a user can mend.
    """
    shown, folder, effort = reporter(progress), Path(out), EFFORTS[budget]
    base = Path(source).parent if isinstance(source, str | Path) and Path(source).is_file() else None
    config = resolved(load_config(source, overrides), base)
    chosen = _chosen(attacks)
    if config.planner is not None:
        raise MethodError(
            f"planner '{config.planner.name}' sets the cuts, which the audit does not follow yet. Take planner: none, "
            "and give the cut to look at by partition.head_blocks."
        )
    if defenses and frames is not None:
        raise ConfigError(
            ["--defenses makes a run with each, but --frames names frames that are there. Leave one out."], "the call"
        )
    settings = [with_defense(config, setting) for setting in defenses]
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    found = recorded(config, Path(frames)) if frames is not None else record(config, folder, effort, shown)
    layout = found.layouts[found.config.client_names[0]]
    auxiliary = _auxiliary(found, aux)
    refused, playing = {}, []
    for attack in chosen:
        name = registry.card(type(attack)).id
        kinds = found.classes if attack.threat.classes is not None else None
        why = attack.threat.unmet(
            layout, task=found.task, auxiliary=auxiliary is not None, classes=None if kinds is None else len(kinds)
        )
        if why is None:
            playing.append((name, attack))
        elif attacks is not None:
            raise MethodError(f"The attack '{name}' cannot be played on this run: {why}.")
        else:
            refused[name] = why
    if not playing:
        reasons = "; ".join(f"'{name}': {why}" for name, why in refused.items())
        raise MethodError(f"No attack can be played on this run. {reasons}.")
    if aux is not None and not any("auxiliary" in attack.threat.knows for _, attack in playing):
        shown.note("none of the attacks uses text of the attacker's own, so --aux changes nothing")
    public = load_public(
        found.config.model, task=found.task, precision=found.config.precision, device=device_named(found.config.device),
        labels=found.data.labels, seed=found.config.seed,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for number, setting in enumerate([None, *settings]):
        one, of = found, named(found.config.defense)
        if setting is not None:
            of = named(setting.defense)
            shown.note(f"defense {of}: a run with it")
            one = record(setting, folder / "defenses" / str(number), effort, shown)
        for name, attack in playing:
            shown.note(f"attack '{name}': {attack.threat.words()}")
            new = list(_played(name, attack, one, public, auxiliary, effort.rows, CONTROLS[budget]))
            best = max(row["token_recovery"] for row in new)
            shown.note(f"attack '{name}', defense {of}: {best:.1%} of the {attack.threat.target}")
            rows += new
    said = verdict(found.config, rows, labels_sent=not layout.tail_at_client)
    write_text(folder / "audit.json", json.dumps(rows, indent=1))
    from cutlayer.report.audit_page import page

    write_text(folder / "index.html", page(found.config, rows, refused, said))
    return Audited(folder, rows, refused, said)


def _chosen(attacks: Sequence[str | Mapping[str, Any]] | None) -> list[Attack]:
    """The attacks, made.

    Raises:
        MethodError: there is no such one, or an option is wrong.
        ConfigError: none was named.
    """
    if attacks is not None and not attacks:
        raise ConfigError(["name the attacks, or leave --attacks out for all that the run can have."], "the call")
    known = registry.names("attack")
    made = []
    for one in known if attacks is None else attacks:
        name, options = (
            (one, {}) if isinstance(one, str) else (one["name"], {k: v for k, v in one.items() if k != "name"})
        )
        if name not in known:
            raise MethodError(f"There is no attack '{name}'.{suggest(name, known)} Known: {', '.join(known)}.")
        made.append(registry.create("attack", name, options))
    return made


def _auxiliary(found: Recording, aux: str | Path | None) -> Sequence[Tensor] | None:
    """The attacker's own texts, as tokens."""
    if aux is None:
        return None
    form = found.config.data
    rows = load_rows(str(aux), columns=form.columns, format=form.format)
    examples = tokenize(rows, form, tokenizer=found.tokenizer, task="causal", where="the file of --aux")
    return [torch.tensor(example.input_ids) for example in examples]


def _played(
    name: str, attack: Attack, found: Recording, public: PublicModel, auxiliary: Sequence[Tensor] | None, rows: int,
    control_rows: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """An attack's rows of ``audit.json``: one a moment of the run."""
    threat = attack.threat
    layout = found.layouts[found.config.client_names[0]]
    empty = View(
        threat, [], layout, found.config.seed, public if "weights" in threat.knows else None,
        auxiliary if "auxiliary" in threat.knows else None, found.classes if "classes" in threat.knows else None,
    )  # fmt: skip
    attack.prepare(empty)
    for moment, every in read_by(found, threat).items():
        whole = moment == WHOLE
        read = every if whole else limited(every, rows)
        seen = replace(empty, exchanges=read, _labelled=promised(found, read, threat))
        began = time.monotonic()
        guesses = attack.finish(seen)
        seconds = time.monotonic() - began
        got = scored(guesses, seen, found)
        short = read if whole else limited(read, control_rows)
        if threat.causal and threat.reads == STEPS[:1]:  # what fails at the beginning of a text fails behind it
            short = [only_positions(one, CONTROL_POSITIONS) for one in short]
        few = replace(seen, exchanges=short)
        other = _control(attack, few.with_other_weights(), found).token_recovery if "weights" in threat.knows else None
        shuffled = _control(attack, few.shuffled(), found)
        yield {
            "attack": name, "defense": named(found.config.defense), "moment": moment, "target": threat.target,
            "token_recovery": got.token_recovery, "rouge_l": got.rouge_l, "auc": got.auc,
            "positions": got.positions,
            "controls": {
                "constant": got.constant,
                "shuffled": shuffled.token_recovery,
                "shuffled_auc": shuffled.auc,
                "random_weights": other,
            },
            "utility": _utility(found), "threat": threat.told(), "notes": dict(guesses.notes), "seconds": seconds,
            "examples": [{"true": true, "recovered": said} for true, said in got.examples],
        }  # fmt: skip


def _control(attack: Attack, view: View, found: Recording) -> Score:
    """How an attack does on a control."""
    fresh = copy.deepcopy(attack)  # what the attack itself has prepared stays as it is
    fresh.prepare(replace(view, exchanges=[]))
    return scored(fresh.finish(view), view, found)


def _utility(found: Recording) -> dict[str, Any]:
    """What the run reached and cost; empty where frames were recorded earlier."""
    summary = found.summary
    if not summary:
        return {}
    after = summary.get("eval", {}).get("after", {})
    return {
        "loss": after.get("loss"), "perplexity": after.get("perplexity"), "steps": sum(summary["steps"].values()),
        "bytes_up": summary["bytes_up"], "bytes_down": summary["bytes_down"], "seconds": summary["seconds"],
    }  # fmt: skip
