"""Clients with defenses, and what is seen of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import cutlayer
from cutlayer.assembly import assemble
from cutlayer.build import load_base, prepare_data, tokenizer_of
from cutlayer.config import load_config
from cutlayer.contracts import Batch
from cutlayer.parties.client import ClientParty
from cutlayer.parties.defending import Defending, Passing
from cutlayer.wire import Header, read_frames
from spine import U, model
from tiny import text_rows, write_rows

ROWS = text_rows(8, seed=3)


def run_of(root: Path, defense: Sequence[Any], **changes: Any) -> dict[str, Any]:
    """A short run of one client that evaluates, with padded batches and accumulation."""
    root.mkdir(parents=True, exist_ok=True)
    data = {
        "train": str(write_rows(root / "rows.jsonl", ROWS)), "format": "text", "max_length": 24,
        "eval": str(write_rows(root / "valid.jsonl", text_rows(4, seed=9))),
    }  # fmt: skip
    return {
        "model": str(model(num_hidden_layers=4)), "data": data, "clients": 1, "partition": U,
        "peft": {"name": "lora", "rank": 2, "alpha": 4}, "batch_size": 3, "gradient_accumulation": 2, "steps": 2,
        "device": "cpu", "optimizer": {"name": "adamw", "lr": 1e-2}, "defense": list(defense), **changes,
    }  # fmt: skip


def trained(root: Path, defense: Sequence[Any], **changes: Any) -> Any:
    """Such a run, made."""
    return cutlayer.train(run_of(root, defense, **changes), out=root / "out", progress=False)


def client(root: Path, defense: Sequence[Any], **changes: Any) -> ClientParty:
    """The client of such a run, before its first step."""
    config = load_config(run_of(root, defense, **changes))
    data = prepare_data(config, tokenizer_of(config))
    party = assemble(config, load_base(config, labels=data.labels, device="cpu"), data).clients["client-0"]
    assert isinstance(party, ClientParty)
    return party


def defending(root: Path, defense: Sequence[Any], **changes: Any) -> Defending:
    """Its defenses."""
    found = client(root, defense, **changes).defending
    assert found is not None
    return found


def passing(batch: Batch, step: int = 0) -> Passing:
    """A micro-batch of training."""
    return Passing(step, 0, True, batch)


def whole_batch(rows: int, length: int, *, seed: int = 0, vocabulary: int = 60) -> Batch:
    """A batch without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    return Batch(ids, None, None, ids.clone(), rows * length, rows * (length - 1))


def two_gaussians(
    count: int, size: int, *, share: float = 0.5, spreads: tuple[float, float] = (1.0, 0.5), gap: float = 4.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients [N,D] of two classes, of which class each is [N], and the direction [D] between the means.

    Args:
        count: how many.
        size: of each.
        share: of the first class.
        spreads: the standard deviation of a number in either.
        gap: between the means.
        seed: of the draw.
    """
    draw = torch.Generator().manual_seed(seed)
    first = torch.arange(count) < round(share * count)
    line = torch.randn(size, generator=draw)
    line /= line.norm()
    around = torch.where(first, *map(torch.tensor, spreads))[:, None] * torch.randn(count, size, generator=draw)
    return around + torch.where(first, 0.75, -0.25)[:, None] * gap * line, first, line


def head_states(folder: Path, blocks: int, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states [B,T,H] behind so many blocks of a saved causal model."""
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = loaded(input_ids=ids, output_hidden_states=True).hidden_states[blocks]
    return found


def inverted(
    states: torch.Tensor, ids: torch.Tensor, shown: torch.Tensor, truth: torch.Tensor, *, seed: int = 0
) -> float:
    """The share of tokens that a two-layer map, trained on pairs of states [N,H] and tokens [N], reads from others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = states.mean(0), states.std(0) + 1e-6
        reader = torch.nn.Sequential(
            torch.nn.Linear(states.shape[1], 128), torch.nn.GELU(), torch.nn.Linear(128, int(ids.max()) + 1)
        )
        optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(reader((states - mean) / std), ids).backward()
            optimizer.step()
    with torch.no_grad():
        return float((reader((shown - mean) / std).argmax(1) == truth).double().mean())


def frames(root: Path) -> Iterator[tuple[Header, Mapping[str, torch.Tensor]]]:
    """The frames of a run with ``record_wire: root``, with their tensors by name."""
    for _, header, tensors in read_frames(root):
        yield header, dict(zip(header.names, tensors, strict=True))
