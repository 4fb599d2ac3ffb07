"""Each fault that was found in other projects, and a test that would find it here."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import math
import pkgutil
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import cutlayer
import unsplit
import unsplit_clients
from cutlayer.errors import NonFinite
from cutlayer.methods.aggregator.fedavg import FedAvg
from cutlayer.methods.framework.sfl_v2 import SFLV2
from cutlayer.models.loading import load_model
from cutlayer.models.segment import Segment
from cutlayer.models.verify import verify
from cutlayer.registry import create
from cutlayer.wire import frame_length, read_frames
from spine import LR, MOSTLY_U, PARTITIONS, TWO, U, adamw, adapter, block_of, caught, equal, lines, losses, model, train  # noqa: F401
from tiny import BLOCKS, make_tokenizer, text_rows

ROOT = Path(__file__).parents[1]
SIZES = {"ann": 6, "bob": 3, "cid": 9}  # examples: one, two and three batches
ROWS = {name: text_rows(size, seed=i) for i, (name, size) in enumerate(SIZES.items())}
AT_CLIENT: dict[str, Callable[[str], bool]] = {
    "two-part-split": lambda name: block_of(name) < 1,
    "u-shaped-split": lambda name: block_of(name) < 1 or block_of(name) >= BLOCKS - 1,
}


def batches(family: str = "llama") -> dict[str, list[dict[str, torch.Tensor]]]:
    return {name: unsplit.text_batches(model(family), rows, size=3) for name, rows in ROWS.items()}


# ---------------------------------------------------------------- Plato: positions added twice


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_are_added_once(family: str) -> None:
    """The head adds learned positions; a trunk fed by inputs_embeds would add them again."""
    cuts = verify(str(model(family)), tokens=8)
    assert len(cuts) >= 8
    assert [c.largest for c in cuts] == [0.0] * len(cuts)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_added_twice_would_be_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, shape = load_model(model(family))
    base = create("peft", "lora").prepare(loaded, shape, task="causal", seed=0)
    from cutlayer.models.verify import compare

    layout = create("partition", "u-shaped-split", {"head_blocks": 1}).layout(BLOCKS)
    assert compare(base, "u", layout, tokens=8, tolerance=1e-5).exact
    twice = [path for path, kind in shape.below.items() if kind == "zero"]
    assert len(twice) == 1
    base._stand_ins[twice[0]] = base._around[twice[0]]
    base.install(None)
    assert not compare(base, "u", layout, tokens=8, tolerance=1e-5).passed


@PARTITIONS
def test_evaluation_is_of_the_function_that_was_trained(partition: dict[str, Any], tmp_path: Path) -> None:
    """Before and after: what PEFT and Transformers compute with the adapter on the same rows, over label tokens."""
    held_out = text_rows(7, seed=9)
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    out = tmp_path / "out"
    result = train(
        model("gpt2"), out, ROWS, partition=partition, framework="sfl-v2", data={"eval": str(tmp_path / "eval.jsonl")}
    )
    for when, folder in (("before", "adapter_initial"), ("after", "adapter")):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model("gpt2")), out / folder).eval()
        total = tokens = right = 0.0
        with torch.no_grad():
            for batch in unsplit.text_batches(model("gpt2"), held_out, size=3):
                count = int((batch["labels"][:, 1:] != -100).sum())
                output = plain(**batch)
                total += float(output.loss) * count
                tokens += count
                labels = batch["labels"][:, 1:]
                right += int((output.logits[:, :-1].argmax(dim=-1)[labels != -100] == labels[labels != -100]).sum())
        found = result.summary["eval"][when]
        assert found["loss"] == pytest.approx(total / tokens, abs=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
        assert found["accuracy"] == right / tokens
    before, after = (result.summary["eval"][when]["loss"] for when in ("before", "after"))
    assert abs(after - before) > 1e-3  # far more than the tolerance above


# ---------------------------------------------------------------- SplitLoRA: averaging, accumulation, schedule, traffic


@MOSTLY_U
def test_the_average_is_of_the_clients_own_tensors_after_their_updates(
    partition: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: list[Any]
) -> None:
    """Exactly three snapshots, none stale, none double, weighted by unequal sizes; against plain PEFT throughout."""
    merges: list[dict[str, Any]] = []
    original = FedAvg.merge

    def merge(self: FedAvg, before: Any, states: Any, weights: Any) -> Any:
        now = {
            c: {n: p.detach().clone() for n, p in party.slot.get().items()}
            for c, party in caught[0].parts.clients.items()
        }
        merged = original(self, before, states, weights)
        merges.append({"now": now, "states": states, "weights": weights, "merged": merged})
        return merged

    monkeypatch.setattr(FedAvg, "merge", merge)
    out = tmp_path / "out"
    framework = {"name": "sfl-v2", "order": "listed", "local_steps": 2}
    train(model(), out, ROWS, partition=partition, framework=framework, rounds=3)
    assert len(merges) == 3
    for one in merges:
        assert set(one["states"]) == set(ROWS)
        assert one["weights"] == {"ann": 6 / 18, "bob": 3 / 18, "cid": 9 / 18}
        assert all(equal(one["states"][client], one["now"][client]) for client in ROWS)
        for name in one["now"]["ann"]:
            a, b, c = (one["now"][client][name].double() for client in ("ann", "bob", "cid"))
            mean = ((6 * a + 3 * b + 9 * c) / 18).float()
            assert torch.allclose(one["merged"][name], mean, rtol=0, atol=1e-7)
    plan = [entry for _ in range(3) for entry in ("ann", "bob", "cid", "ann", "bob", "cid", ("ann", "bob", "cid"))]
    reference = unsplit_clients.sfl_v2(
        model(), out / "adapter_initial", plan, batches=batches(), sizes=SIZES, make_optimizer=adamw,
        of_client=AT_CLIENT[partition["name"]],
    )  # fmt: skip
    assert losses(out) == reference.losses
    assert all(equal(adapter(out), state) for state in reference.states.values())
    first, last = adapter(out, "adapter_initial"), adapter(out)
    trunk = [name for name in last if not AT_CLIENT[partition["name"]](name)]
    assert len(trunk) > 10
    assert not any(torch.equal(first[name], last[name]) for name in trunk)  # Petals': it cannot be trained


@pytest.mark.parametrize("accumulation", [1, 3])
@PARTITIONS
def test_accumulation_steps_once(
    partition: dict[str, Any], accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caught: list[Any]
) -> None:
    """One optimizer step a party and client-step, however many micro-batches; a metrics line each, an update each."""
    stepped: list[int] = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: (stepped.append(id(self)), original(self, *a))[1])
    result = train(
        model(), tmp_path / "out", {"ann": ROWS["cid"]}, partition=partition, steps=4, batch_size=1,
        gradient_accumulation=accumulation, optimizer={"name": "sgd", "lr": 0.1}, record_wire=str(tmp_path / "wire"),
    )  # fmt: skip
    parts = caught[0].parts
    for slot in (parts.clients["ann"].slot, parts.server.slots["shared"]):
        assert stepped.count(id(slot.optimizer)) == 4
    assert len(lines(tmp_path / "out")) == result.summary["steps"]["ann"] == 4
    shown = [line for line, _, _ in read_frames(tmp_path / "wire") if line["step_name"] == "send_activations"]
    assert len(shown) == 4 * accumulation


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return get_cosine_schedule_with_warmup(optimizer, 0, steps)


@PARTITIONS
def test_the_client_s_rate_is_scheduled_too(partition: dict[str, Any], tmp_path: Path, caught: list[Any]) -> None:
    """Cosine over each party's own steps: the trunk makes three times as many as a client."""
    out = tmp_path / "out"
    rates: dict[str, list[float]] = {}
    optimizer = {"name": "adamw", "lr": LR, "schedule": "cosine"}
    framework = {"name": "sfl-v2", "order": "listed"}
    with pytest.MonkeyPatch.context() as patch:
        original = SFLV2.round

        async def watched(self: SFLV2, run: Any, number: int) -> None:
            await original(self, run, number)
            slots = {name: party.slot for name, party in run.parts.clients.items()} | run.parts.server.slots
            for name, slot in slots.items():
                rates.setdefault(name, []).append(slot.optimizer.param_groups[0]["lr"])

        patch.setattr(SFLV2, "round", watched)
        train(model(), out, ROWS, partition=partition, framework=framework, optimizer=optimizer, rounds=4)

    def rate(done: int, total: int) -> float:
        return LR * (1 + math.cos(math.pi * done / total)) / 2

    assert rates["shared"] == pytest.approx([rate(3 * r + 2, 12) for r in range(4)])
    for client in ROWS:
        assert rates[client] == pytest.approx([rate(r, 4) for r in range(4)])
    plan = [entry for _ in range(4) for entry in (*ROWS, tuple(ROWS))]
    reference = unsplit_clients.sfl_v2(
        model(), out / "adapter_initial", plan, batches=batches(), sizes=SIZES, make_optimizer=adamw,
        make_schedule=cosine, of_client=AT_CLIENT[partition["name"]],
    )  # fmt: skip
    assert losses(out) == reference.losses
    assert equal(adapter(out), reference.states["ann"])


def secret_rows() -> list[dict[str, Any]]:
    """Prompts and completions in columns with telling names; lengths differ, so there is padding."""
    texts = text_rows(8, seed=4, shortest=4, longest=12)
    return [
        {
            "diagnosis_question": " ".join(row["text"].split()[:2]),
            "diagnosis_answer": " " + " ".join(row["text"].split()[2:]),
        }
        for row in texts
    ]


@pytest.mark.parametrize("side", ["right", "left"])
def test_neither_labels_nor_tokens_nor_text_leave_a_u_shaped_client(side: str, tmp_path: Path) -> None:
    rows = secret_rows()
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    columns = {"prompt": "diagnosis_question", "completion": "diagnosis_answer"}
    data = {
        "format": "prompt-completion", "columns": columns, "completion_only": True, "padding_side": side,
        "eval": str(tmp_path / "eval.jsonl"),
    }  # fmt: skip
    train(
        model(), tmp_path / "out", {"ann": rows, "bob": rows[::-1]}, framework="sfl-v2", data=data,
        record_wire=str(tmp_path / "wire"), rounds=2,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    ids = [tokenizer(r["diagnosis_question"] + r["diagnosis_answer"])["input_ids"] + [2] for r in rows]
    assert len({len(row) for row in ids}) > 2
    seen = 0
    for line, header, tensors in read_frames(tmp_path / "wire"):
        for name, tensor in zip(header.names, tensors, strict=True):
            if line["step_name"] in ("partition", "aggregate"):
                assert tensor.is_floating_point()
                continue
            seen += 1
            if name == "hidden":
                assert tensor.is_floating_point()
                assert tensor.dim() == 3
                flat = tensor.flatten().tolist()
                for row in ids:  # as they are, shifted or cast to float
                    assert not contains(flat, row[:3])
                    assert not contains(flat, row[1:4])
            elif name == "positions":
                assert tensor.dtype == torch.int32
                assert side == "left"
                mask = tensors[header.names.index("mask")].int()
                assert torch.equal(tensor, (mask.cumsum(-1) - 1).clamp(min=0).int())
            else:
                assert (name, tensor.dtype) == ("mask", torch.bool)
                # a function of row lengths alone: no prompt is masked here
                lengths = tensor.sum(-1)
                assert set(lengths.tolist()) <= {len(row) for row in ids}
                steps = torch.arange(tensor.shape[1])
                left = tensor.shape[1] - lengths if side == "left" else torch.zeros_like(lengths)
                assert torch.equal(tensor, (steps >= left[:, None]) & (steps < (left + lengths)[:, None]))
        assert header.kind != "activations" or "labels" not in header.names
        if line["step_name"] in ("send_activations", "return_activations", "send_gradients", "return_gradients"):
            told = {k for k in header.values if k not in ("update", "graph", "head_weight", "last", "needs_gradient")}
            assert told == set()
    assert seen > 20
    raw = (tmp_path / "wire" / "frames.bin").read_bytes()
    words = [row["diagnosis_answer"].strip() for row in rows]
    for text in (*columns.values(), *columns, *words, "</s>", "completion_only"):
        assert text.encode() not in raw
    for row in ids:  # three tokens in a row, in any width
        for kind in ("q", "i", "h", "f", "d"):
            assert struct.pack(f"<3{kind}", *row[:3]) not in raw
            assert struct.pack(f"<3{kind}", *row[2:5]) not in raw
    for kind in ("q", "i", "h"):
        assert struct.pack(f"<2{kind}", -100, -100) not in raw
    index = (tmp_path / "wire" / "frames.jsonl").read_text()
    assert not any(text in index for text in (*columns.values(), "label"))


def contains(flat: list[float], row: list[int]) -> bool:
    return any(flat[i : i + len(row)] == row for i in range(len(flat) - len(row) + 1) if flat[i] == row[0])


@PARTITIONS
def test_a_step_carries_its_hidden_states_and_nothing_beside(partition: dict[str, Any], tmp_path: Path) -> None:
    """No keys, values or whole logits: bytes are the tensors named here plus a small frame each."""
    rows = [{"text": " ".join(f"w{40 + 5 * i + j}" for j in range(7))} for i in range(6)]
    train(model(), tmp_path / "out", {"ann": rows}, partition=partition, rounds=3, record_wire=str(tmp_path / "wire"))
    hidden = 3 * 8 * 32 * 4  # B, T (7 words and the end), H, float32
    labels = 3 * 8 * 4 if partition is TWO else 0
    up, down = hidden + labels, hidden
    if partition is U:
        up, down = 2 * hidden, 2 * hidden
    frames = 4 if partition is TWO else 6  # each leg, and the request of the first and the word after the last
    for line in lines(tmp_path / "out"):
        assert up < line["bytes_up"] < up + 200 * frames
        assert down < line["bytes_down"] < down + 200 * frames
    sizes = {(line["bytes_up"], line["bytes_down"]) for line in lines(tmp_path / "out")}
    assert len(sizes) == 1  # whatever the numbers
    for line, header, tensors in read_frames(tmp_path / "wire"):
        assert line["length"] == frame_length(header, [t.shape for t in tensors], [t.dtype for t in tensors])
        assert set(header.names) <= ({"hidden", "labels"} if partition is TWO else {"hidden"})


# ---------------------------------------------------------------- SplitLLM: a file that is gone, aliases


def test_every_module_imports() -> None:
    """What is left of a deleted file is found here, and not by the first who uses that part."""
    names = [found.name for found in pkgutil.walk_packages(cutlayer.__path__, "cutlayer.")]
    assert len(names) > 60
    extra = [] if importlib.util.find_spec("flwr") else ["cutlayer.flower"]  # in an environment of its own
    for name in names:
        if not name.endswith("__main__") and name not in extra:
            importlib.import_module(name)


@PARTITIONS
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_no_two_parties_share_a_weight(peft: str, partition: dict[str, Any], tmp_path: Path, caught: list[Any]) -> None:
    """Storages of all slots (weights and moments) and of the base are disjoint, before and after merges."""
    train(model(), tmp_path / "out", ROWS, partition=partition, framework="sfl-v2", peft=peft)
    parts = caught[0].parts
    slots = {**{n: p.slot for n, p in parts.clients.items()}, "server": parts.server.slots["shared"]}
    trained = {id(p) for s in slots.values() for p in s.params.values()}
    assert not trained & {id(p) for p in parts.base.initial.values()}
    parts.base.bind(parts.base.initial)
    held = {n: list(s.get(optimizer=True).values()) for n, s in slots.items()}
    held["base"] = list({id(p): p for p in parts.base.model.parameters()}.values())
    assert all(len(tensors) > 2 for tensors in held.values())
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, n) for n, ts in held.items() for t in ts if t.numel())
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        assert end <= start, (one, other)
    before = {n: s.get() for n, s in slots.items()}
    before = {n: {k: t.clone() for k, t in state.items()} for n, state in before.items()}
    with torch.no_grad():
        for parameter in slots["ann"].params.values():
            parameter.add_(1.0)
    assert all(equal(before[n], slots[n].get()) == (n != "ann") for n in slots)


def test_what_was_received_is_not_the_sender_s(tmp_path: Path, caught: list[Any]) -> None:
    """An in-place operation of a receiver (here: on everything that crosses) changes nothing at the sender."""
    from cutlayer.links import local

    original = local.decode
    sent: list[tuple[list[bytes], Any]] = []

    def decode(frame: Any) -> Any:
        header, tensors = original(frame)
        before = [bytes(part) for part in frame.body]
        addresses = {t.data_ptr() for t in tensors if t.numel()}
        for part, tensor in zip(frame.body, tensors, strict=True):
            if part.nbytes:
                start = torch.frombuffer(part, dtype=torch.uint8).data_ptr()
                assert start not in addresses
                kept = tensor.clone()
                tensor.zero_()
                assert [bytes(p) for p in frame.body] == before
                tensor.copy_(kept)
        sent.append((before, header))
        return header, tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "decode", decode)
        train(model(), tmp_path / "out", ROWS, framework="sfl-v2", rounds=1)
    assert len(sent) > 20
    train(model(), tmp_path / "again", ROWS, framework="sfl-v2", rounds=1)
    assert equal(adapter(tmp_path / "out"), adapter(tmp_path / "again"))


# ---------------------------------------------------------------- VFLAIR-LLM, and what users complain of


def test_no_pickle_no_eval_and_no_anomaly_mode_in_the_sources() -> None:
    files = sorted((ROOT / "src").rglob("*.py"))
    assert len(files) > 50
    forbidden = re.compile(
        r"\bpickle\b|\bmarshal\b|\btorch\.(?:load|save)\(|weights_only\s*=\s*False|(?<![\w.])(?:eval|exec)\("
        r"|set_detect_anomaly|trust_remote_code\s*=\s*True|BEGIN [A-Z ]*PRIVATE KEY|shell=True"
    )
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            told = line.replace("There is no pickle", "")
            assert not forbidden.search(told), f"{file}:{number}: {line}"


def test_anomaly_mode_is_off_in_a_step(tmp_path: Path) -> None:
    seen = []
    original = Segment.forward

    def forward(self: Segment, *args: Any, **options: Any) -> Any:
        seen.append(torch.is_anomaly_enabled())
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segment, "forward", forward)
        train(model(), tmp_path / "out", {"ann": ROWS["bob"]}, rounds=1)
    assert seen == [False] * 3


@PARTITIONS
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_an_adapter_of_nans_is_no_success(peft: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """The very last update may be the one that spoils it (0 / 0 without eps), when no loss comes after it to tell."""
    out = tmp_path / "out"
    with pytest.raises(NonFinite, match=r"not finite.*optimizer\.lr"):
        train(
            model(), out, {"ann": ROWS["bob"]}, partition=partition, rounds=1, peft=peft,
            optimizer={"name": "adamw", "lr": LR, "eps": 0.0},
        )  # fmt: skip
    assert not (out / "adapter").exists()
    assert not (out / "model").exists()
    assert not (out / "summary.json").exists()


@PARTITIONS
def test_a_loss_of_nan_stops_the_run_and_names_the_step(partition: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NonFinite) as caught_error:
        train(
            model(), tmp_path / "out", {"ann": ROWS["bob"]}, partition=partition, rounds=3,
            optimizer={"name": "adamw", "lr": LR, "eps": 0.0},
        )  # fmt: skip
    assert "client 'ann'" in str(caught_error.value)
    assert "at step 1" in str(caught_error.value)
    where = "in step 4 trunk_forward" if partition is TWO else "in step 6 tail_step"
    assert where in caught_error.value.__notes__


def test_memory_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each round no graph is open, no gradient waits, and there are no more tensors than after the others."""
    counts: list[tuple[int, int]] = []
    original = SFLV2.round

    async def watched(self: SFLV2, run: Any, number: int) -> None:
        await original(self, run, number)
        assert run.parts.server.open_graphs == 0
        for party in run.parts.clients.values():
            assert party._open == {}
            assert party.slot.idle
        assert all(slot.idle for slot in run.parts.server.slots.values())
        for slot in (run.parts.server.slots["shared"], *(p.slot for p in run.parts.clients.values())):
            assert all(parameter.grad is None for parameter in slot.params.values())
        if number % 2:
            gc.collect()
            found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
            counts.append((len(found), sum(t.numel() for t in found)))

    monkeypatch.setattr(SFLV2, "round", watched)
    rows = {name: text_rows(6, seed=i, shortest=5, longest=5) for i, name in enumerate(ROWS)}
    train(
        model(),
        tmp_path / "out",
        rows,
        framework="sfl-v2",
        rounds=6,
        optimizer={"name": "adamw", "lr": 1e-3},
    )
    assert len(counts) == 3
    assert len(set(counts)) == 1


def test_a_further_client_is_no_further_base(tmp_path: Path, caught: list[Any]) -> None:
    """One frozen base for all simulated clients; each has its adapter and its moments."""
    for number in (1, 4):
        clients = {f"c{i}": ROWS["bob"] for i in range(number)}
        train(model(), tmp_path / f"{number}", clients, framework="sfl-v2", rounds=1)
    one, four = (run.parts for run in caught)
    assert len({id(party.head.base) for party in four.clients.values()} | {id(four.base)}) == 1
    frozen = [
        sum(p.numel() for n, p in parts.base.model.named_parameters() if n not in parts.base.initial)
        for parts in (one, four)
    ]
    assert frozen[0] == frozen[1] > 0
    head = one.clients["c0"].head
    assert all(party.head is four.clients["c0"].head for party in four.clients.values())
    assert head.names == four.clients["c0"].head.names


def test_the_package_says_which_versions_it_ran_with(tmp_path: Path) -> None:
    """Peers that copied modelling code are stuck on an old Transformers; no modelling code is copied here."""
    result = train(model(), tmp_path / "out", {"ann": ROWS["bob"]}, rounds=1)
    assert {"torch", "transformers", "peft", "cutlayer"} <= set(result.summary["versions"])
    assert cutlayer.__version__ == result.summary["versions"]["cutlayer"]
    for file in (ROOT / "src").rglob("*.py"):
        assert not re.search(
            r"scaled_dot_product_attention|\bclass \w*(Attention|DecoderLayer|RotaryEmbedding)\b", file.read_text()
        )
