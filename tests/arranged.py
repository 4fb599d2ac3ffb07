"""What the tests of selections share: planted data, what a selection is told, and a look at whole models."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cutlayer.arrangement import Speed, Told
from cutlayer.driver import Run
from cutlayer.models.segment import Segment
from spine import adapter, equal, losses, resumed, train, twin_of

DOMAINS = ((3, 50), (50, 97))  # words of each


def domain_rows(domain: int, count: int, *, seed: int, words: int = 10) -> list[dict[str, Any]]:
    """Random sentences of a domain's words."""
    draw, (low, high) = random.Random(seed), DOMAINS[domain]
    return [{"text": " ".join(f"w{draw.randrange(low, high)}" for _ in range(words))} for _ in range(count)]


def two_domains(clients: int, rows: int = 6, *, words: int = 10) -> dict[str, list[dict[str, Any]]]:
    """Clients ``c0``, ``c1``, ..., of the first and the second domain in turn."""
    return {f"c{i}": domain_rows(i % 2, rows, seed=i, words=words) for i in range(clients)}


def labelled_rows(labels: Sequence[int], *, seed: int, telling: float) -> list[dict[str, Any]]:
    """Texts with a class; ``telling`` is the part of their words that only come from the class (0 or 1) itself."""
    draw = random.Random(seed)
    rows = []
    for label in labels:
        places = [(10 + 40 * label, 50 + 40 * label) if draw.random() < telling else (3, 97) for _ in range(6)]
        rows.append({"text": " ".join(f"w{draw.randrange(*place)}" for place in places), "label": label})
    return rows


def told(sketches: Mapping[str, Sequence[float]], *, speeds: Mapping[str, Speed] | None = None, **more: Any) -> Told:
    """What a selection knows of clients with these sketches, equal in all that is not said."""
    names = list(sketches)
    return Told(
        clients=names, everybody=names, sketches={n: np.asarray(v, dtype=float) for n, v in sketches.items()},
        sizes=more.pop("sizes", dict.fromkeys(names, 1.0)),
        speeds=speeds or dict.fromkeys(names, Speed()), timed=speeds is not None, **more,
    )  # fmt: skip


def output(run: Run, client: str, batch: Mapping[str, torch.Tensor]) -> Any:
    """What the whole model of a client, as it now is, makes of a batch: with ``loss`` and ``logits``."""
    base = run.parts.base
    whole = Segment(base, "whole", range(base.anatomy.num_blocks), bottom=True, top=True)
    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in run.state(client).items()}
    with torch.no_grad():
        return whole.forward(params, **batch)


def accuracy(run: Run, client: str, batch: Mapping[str, torch.Tensor]) -> float:
    """The part of a batch whose class a client's model finds."""
    return float((output(run, client, batch).logits.argmax(-1) == batch["labels"]).float().mean())


def kill_and_resume(folder: Path, out: Path, clients: Mapping[str, Any], **run: Any) -> None:
    """A run that goes on from its first of three rounds ends as if it had not stopped."""
    train(folder, out / "whole", clients, rounds=3, checkpoint_every=1, **run)
    part = twin_of(out / "whole")
    resumed(part)
    assert losses(part) == losses(out / "whole")
    assert equal(adapter(part), adapter(out / "whole"))
    for made in sorted((out / "whole" / "adapters").glob("*")):
        assert equal(adapter(part / "adapters", made.name), adapter(out / "whole" / "adapters", made.name))
