"""What was private in what an adversary read: for the scorer, and for the few labels that an adversary is promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cutlayer.audit.classes import at_label, of_rows, told_of
from cutlayer.audit.messages import Exchange, Key, exchanges
from cutlayer.audit.recording import Recording
from cutlayer.audit.scores import MISSING, Guesses, Score, Truth, score
from cutlayer.audit.view import View
from cutlayer.seeds import derive
from cutlayer.threat import Threat

WHOLE = "whole run"  # the moment of attacks on rows of one label each


def read_by(found: Recording, threat: Threat) -> Mapping[str, Sequence[Exchange]]:
    """The micro-batches that an adversary with this threat reads, by moment of the run.

    Of rows of one label each it is the label's position alone, over the whole run.
    """
    classes = threat.classes is not None
    moments = {WHOLE: found.every} if classes else found.moments
    keys = {key for moment in moments.values() for key in moment}
    wanted: dict[Key, Exchange] = {}
    for one in exchanges(found.read(), reads=threat.reads):
        if one.key in keys and one.key not in wanted:
            wanted[one.key] = at_label(one, found.behind_label) if classes else one
    return {moment: [wanted[key] for key in of if key in wanted] for moment, of in moments.items()}


def truths_of(found: Recording, read: Sequence[Exchange], threat: Threat) -> dict[Key, Truth]:
    """What was private in it."""
    truths = {}
    for one in read:
        whole = found.truth(one.key, threat.target)
        if threat.classes is not None:
            whole = of_rows(whole, found.ending)
        rows, length = next(sent["hidden"].shape[:2] for sent in one.tensors.values() if "hidden" in sent)
        truths[one.key] = Truth(whole.tokens[:rows, :length], whole.counts[:rows, :length])
    return truths


def promised(found: Recording, read: Sequence[Exchange], threat: Threat) -> Mapping[Key, Tensor] | None:
    """The labels [B,1] that an adversary with this threat is told; None: none."""
    if not threat.labelled:
        return None
    generator = torch.Generator().manual_seed(derive("attack", found.config.seed, "labelled"))
    return told_of(truths_of(found, read, threat), threat.labelled, generator)


def scored(guesses: Guesses, view: View, found: Recording) -> Score:
    """How much an attack says right of what it was not told."""
    threat = view.threat
    truths = truths_of(found, view.exchanges, threat)
    if threat.labelled:
        told = view.labelled
        truths = {key: Truth(one.tokens, one.counts & (told[key] == MISSING)) for key, one in truths.items()}
    kinds = found.classes if threat.classes is not None else None
    rarer = list(kinds)[-1] if kinds is not None and len(kinds) == 2 else None
    return score(guesses, truths, found.decoder(threat.target), positive=rarer)
