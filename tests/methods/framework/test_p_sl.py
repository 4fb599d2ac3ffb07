"""The row's check: no head leaves its client, a stranger's head inverts nothing, and the cache halves forgetting."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting import rows

import joint
import unsplit
from cutlayer.driver import Run
from cutlayer.errors import CutlayerError
from cutlayer.methods.framework.p_sl import PrivateHeads
from cutlayer.models.segment import Segment
from cutlayer.wire import read_frames
from spine import MOSTLY_U, PARTITIONS, TWO, U, adapter, caught, equal, losses, model, often, resumed, train, twin_of  # noqa: F401
from tiny import text_rows

ROWS = {name: text_rows(3 + 3 * (i % 2), seed=i) for i, name in enumerate(("ann", "bob", "cid"))}
FORMS = pytest.mark.parametrize("form", ["sequential", "parallel"])


def psl(**options: Any) -> dict[str, Any]:
    return {"name": "p-sl", **options}


@PARTITIONS
@FORMS
def test_no_head_leaves_its_client(form: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """On the wire there is no tensor of parameters at all; unequal cuts too, where one's head is another's trunk."""
    wire = tmp_path / "wire"
    train(
        model(num_hidden_layers=5), tmp_path / "out", ROWS, partition=partition, rounds=3, cuts={"ann": 0, "bob": 2},
        framework=psl(form=form, participation=0.6), record_wire=str(wire),
    )  # fmt: skip
    trained = set(caught[0].parts.base.initial)
    frames = 0
    for line, header, _ in read_frames(wire):
        assert line["kind"] != "state"
        assert not set(header.names) & trained
        frames += 1
    assert frames > 10
    assert caught[0].meter.by_step["aggregate"] == 0


@FORMS
def test_heads_start_apart_and_stay_apart(form: str, tmp_path: Path, caught: list[Run]) -> None:
    """Each its own draw of LoRA's A at the start, and of the trunk's copies one average at the end."""
    lazy = {"name": "sgd", "lr": 0.0}
    train(model(), tmp_path / "start", ROWS, framework=psl(form=form), rounds=1, optimizer=lazy)
    start = caught[0]
    heads = [start.parts.clients[name].slot.get() for name in ROWS]
    initial = start.parts.base.initial
    for name, tensor in heads[0].items():
        assert torch.equal(tensor, initial[name])
        same = [torch.equal(tensor, head[name]) for head in heads[1:]]
        assert same == [".lora_B." in name] * 2
        for head in heads[1:]:
            assert float(head[name].abs().max()) <= float(tensor.abs().max()) * 1.5  # drawn alike
    train(model(), tmp_path / "out", ROWS, framework=psl(form=form, local_steps=2, participation=0.6), rounds=3)
    states = [caught[1].state(client) for client in ROWS]
    own = caught[1].parts.clients["ann"].names("own")
    for name in states[0]:
        assert all(torch.equal(states[0][name], s[name]) for s in states[1:]) == (name not in own), name


def test_the_cache_is_for_late_joiners_only(tmp_path: Path) -> None:
    """Where all were there from the start, who sits out a round is not mixed in."""
    for cache in (0, 4):
        train(model(), tmp_path / str(cache), ROWS, framework=psl(cache=cache, participation=0.3), rounds=5)
    assert losses(tmp_path / "4") == losses(tmp_path / "0")


def test_moments_of_the_trunks_are_kept_averaged_or_reset(tmp_path: Path, caught: list[Run]) -> None:
    """After the merge: each its own, all one mean of these, or none."""
    kept = {}
    for moments in ("keep", "average", "reset"):
        train(model(), tmp_path / moments, ROWS, framework=psl(form="parallel", cache=0, moments=moments), rounds=1)
        slots = [caught[-1].parts.server.slots[client].get(optimizer=True) for client in ROWS]
        kept[moments] = [{n: t for n, t in slot.items() if "exp_avg" in n.split("/")} for slot in slots]
    assert not any(kept["reset"])
    assert all(kept["average"])
    for name, mean in kept["average"][0].items():
        own = [moment[name] for moment in kept["keep"]]
        assert not torch.equal(own[0], own[1]) or not own[0].any()
        assert all(torch.equal(moment[name], mean) for moment in kept["average"])
        sizes = [len(rows) / sum(map(len, ROWS.values())) for rows in ROWS.values()]
        assert torch.allclose(mean, sum(m * s for m, s in zip(own, sizes, strict=True)), rtol=0, atol=1e-8), name


def test_one_client_is_sequential_sl(tmp_path: Path) -> None:
    """Alone, without a cache, it is sequential SL."""
    train(model(), tmp_path / "p", {"ann": ROWS["ann"]}, framework=psl(cache=0), rounds=4)
    train(model(), tmp_path / "s", {"ann": ROWS["ann"]}, framework="sequential-sl", rounds=4)
    assert losses(tmp_path / "p") == losses(tmp_path / "s")


@PARTITIONS
def test_an_old_step_is_mixed_into_the_trunks_gradient(
    partition: dict[str, Any], tmp_path: Path, caught: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD, w = 0.25: the late client's own part moves by its gradient, the trunk by 0.75 of it and 0.25 of the old."""
    clients = {"ann": ROWS["bob"], "bob": ROWS["ann"]}  # six rows: two micro-batches of three
    sgd = {"name": "sgd", "lr": joint.LR}
    states: list[dict[str, dict[str, torch.Tensor]]] = []
    original = PrivateHeads.round

    async def noted(self: PrivateHeads, run: Run, number: int) -> None:
        await original(self, run, number)
        states.append({c: {n: t.clone() for n, t in run.state(c).items()} for c in run.clients})

    monkeypatch.setattr(PrivateHeads, "round", noted)
    train(
        model(), tmp_path / "out", clients, partition=partition, steps=1, optimizer=sgd, gradient_accumulation=2,
        goings={"bob": {"joins": 1}},
        framework=psl(heads="public", cache_weight=0.25, keeps="gradient"),
    )  # fmt: skip
    before, after = states
    own = caught[0].parts.clients["bob"].names("own")

    def gradients(state: dict[str, torch.Tensor], batches: list[Any]) -> dict[str, torch.Tensor]:
        reference = joint.load(model(), tmp_path / "out" / "adapter_initial")
        plain = {n.removeprefix("base_model.model."): p for n, p in reference.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, p in plain.items():
                p.copy_(state[name])
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
        for batch, count in zip(batches, counts, strict=True):
            (reference(**batch).loss * (count / sum(counts))).backward()
        return {n: p.grad for n, p in plain.items()}

    new = gradients(before["bob"], unsplit.text_batches(model(), clients["bob"], size=3))
    initial = {n: p.detach() for n, p in caught[0].parts.base.initial.items()}
    # Two-part: ann's old hidden states, from where her head was, through the trunk as it is now, with her labels.
    # U-shape: the same, but with the gradient that her tail gave for the old trunk.
    batches = unsplit.text_batches(model(), clients["ann"], size=3)
    mixed = {n: initial[n] if n in own else before["ann"][n] for n in initial}
    old = gradients(mixed, batches)
    for name, tensor in after["bob"].items():
        moved = (before["bob"][name] - tensor) / joint.LR
        if name in own:
            assert torch.allclose(moved, new[name], rtol=0, atol=1e-5), name
        elif partition is TWO:
            assert torch.allclose(moved, 0.75 * new[name] + 0.25 * old[name], rtol=0, atol=1e-5), name
        elif ".lora_B." in name:  # the old gradient is of the trunk before ann's step: near, and not the same
            wanted = 0.75 * new[name] + 0.25 * old[name]
            assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.95, name


def rise(
    out: Path, partition: dict[str, Any], patch: pytest.MonkeyPatch, *, steps: int = 40, **options: Any
) -> tuple[float, float]:
    """The early clients' mean held-out loss when the late one joins, and how much it is higher after its steps."""
    early = ("ann", "bob")
    held_out = {c: unsplit.text_batches(model(), rows(c, 5, start=3), size=5)[0] for c in early}
    seen: list[float] = []
    original = PrivateHeads.round

    async def measured(self: PrivateHeads, run: Run, number: int) -> None:
        await original(self, run, number)
        base = run.parts.base
        whole = Segment(base, "whole", range(base.anatomy.num_blocks), bottom=True, top=True)
        with torch.no_grad():
            found = [
                float(
                    whole.forward(
                        {**run.parts.clients[c].slot.params, **run.parts.server.slots["shared"].params}, **held_out[c]
                    ).loss
                )
                for c in early
            ]
        seen.append(sum(found) / len(found))

    with patch.context() as inner:
        inner.setattr(PrivateHeads, "round", measured)
        train(
            model(), out, {c: rows(c, 10) for c in (*early, "cid")}, partition=partition, steps=steps, batch_size=5,
            framework=psl(**options), goings={"cid": {"joins": steps}}, peft="full",
            optimizer={"name": "adamw", "lr": 5e-3},
        )  # fmt: skip
    assert len(seen) == 2 * steps
    return seen[steps - 1], seen[-1] - seen[steps - 1]


@pytest.mark.parametrize("partition", [TWO, pytest.param(U, marks=pytest.mark.slow)], ids=["two-part", "u-shape"])
def test_the_cache_keeps_a_late_joiner_from_erasing_the_early(
    partition: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in the U-shape, that an old gradient of the trunk's output does not: it is worse than no cache."""
    at_join, without = rise(tmp_path / "without", partition, monkeypatch, cache=0)
    again, kept = rise(tmp_path / "with", partition, monkeypatch, cache=2)
    assert again == at_join  # nobody was late yet
    assert without > 0.1
    assert kept < 0.5 * without
    if partition is U:
        _, pushed = rise(tmp_path / "gradient", partition, monkeypatch, cache=2, keeps="gradient")
        assert pushed > without


@MOSTLY_U
@pytest.mark.parametrize("form", often(["sequential", "parallel"], "parallel"))
def test_the_cache_is_bounded_dropped_and_in_checkpoints(
    form: str, partition: dict[str, Any], tmp_path: Path, caught: list[Run]
) -> None:
    changes = {
        "partition": partition, "steps": 3, "checkpoint_every": 1, "gradient_accumulation": 2,
        "framework": psl(form=form, cache=2), "goings": {"cid": {"joins": 3}}, "max_grad_norm": 0.5,
        "profiles": dict(zip(ROWS, ("laptop+dsl", "phone+4g", "laptop+5g"), strict=True)),
    }  # fmt: skip
    train(model(), tmp_path / "whole", ROWS, **changes)
    cache = caught[0].framework._cache
    assert {client: len(steps) for client, steps in cache.entries.items()} == {"ann": 2, "bob": 2, "cid": 2}
    assert cache.bytes > 0
    part = twin_of(tmp_path / "whole")
    resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    for client in ROWS:
        assert equal(adapter(part, f"adapters/{client}"), adapter(tmp_path / "whole", f"adapters/{client}"))
    again = caught[-1].framework._cache
    assert again.bytes == cache.bytes
    before = again.bytes
    caught[-1].framework.forget("ann")
    assert "ann" not in again.entries
    assert again.bytes < before
    caught[-1].framework.forget("nobody")


def inverted(victim: dict[str, torch.Tensor], surrogate: dict[str, torch.Tensor], run: Run, ids: torch.Tensor) -> float:
    """The share of tokens found by a search, position by position, for the one whose hidden state is nearest."""
    head = run.parts.clients["ann"].head
    vocabulary = torch.arange(run.parts.base.model.config.vocab_size)

    def hidden(params: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = head.forward({n: torch.nn.Parameter(t) for n, t in params.items()}, input_ids=tokens)
        return out

    seen, known = hidden(victim, ids), ids[:, :0]
    for position in range(ids.shape[1]):
        tried = torch.stack([torch.cat([row.expand(len(vocabulary), -1), vocabulary[:, None]], 1) for row in known])
        found = [
            int((hidden(surrogate, tries)[:, -1] - seen[i, position]).norm(dim=-1).argmin())
            for i, tries in enumerate(tried)
        ]
        known = torch.cat([known, torch.tensor(found)[:, None]], 1)
    return float((known == ids).float().mean())


def test_a_strangers_head_inverts_nothing(tmp_path: Path, caught: list[Run]) -> None:
    """A surrogate search in place of an attack. Random heads: at the level of guessing the commonest token. One public
    base with separate LoRA: all is found, whatever the seeds; the row expects little protection, this shows none."""
    ids = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(5))
    common = {"rounds": 2, "partition": TWO}
    train(model(), tmp_path / "random", ROWS, framework=psl(heads="random"), peft="full", **common)
    train(model(), tmp_path / "lora", ROWS, framework=psl(), **common)
    found = {}
    for name, run in zip(("random", "lora"), caught, strict=True):
        heads = {c: {n: t.detach().clone() for n, t in run.parts.clients[c].slot.get().items()} for c in ("ann", "bob")}
        found[name] = inverted(heads["ann"], heads["ann"], run, ids), inverted(heads["ann"], heads["bob"], run, ids)
    constant = float(torch.bincount(ids.flatten()).max()) / ids.numel()
    assert found["random"][0] == 1.0
    assert found["random"][1] <= constant
    assert found["lora"] == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache": -1}, "cache is -1"),
        ({"cache_weight": 2.0}, "cache_weight is 2.0"),
        ({"form": "both"}, "option 'form'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=said):
        train(model(), tmp_path / "out", ROWS, partition=U, framework=psl(**options))
