"""Bad input, bad disks and bad luck: one paragraph, exit code 2, nothing half-written. Then: what hostile users try."""

from __future__ import annotations

import copy
import json
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import cutlayer
from crash import Ended, Forge, fill
from spine import often
from tiny import CONFIGS, VOCAB, make_model, make_tokenizer, text_rows, texts, write_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the models that are needed here, good and bad."""
    root = tmp_path_factory.mktemp("models")
    make_model(root / "llama", "llama", num_hidden_layers=3)
    make_model(root / "wide", "llama", num_hidden_layers=3, hidden_size=48)
    make_model(root / "gpt2", "gpt2")
    make_model(root / "bert", "bert")
    make_model(root / "roberta", "roberta")
    make_model(root / "opt", "opt")
    T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    ).save_pretrained(root / "t5")
    make_tokenizer().save_pretrained(root / "t5")
    for name, text in (
        ("unknown-type", '{"model_type": "no-such-model", "num_hidden_layers": 2}'),
        ("no-json", "hello"),
    ):
        shutil.copytree(root / "llama", root / name)
        (root / name / "config.json").write_text(text)
    (root / "a-text").mkdir()
    (root / "a-text" / "notes.txt").write_text("not a model")
    (root / "a-file").write_text("not a model either")
    for name in ("no-weights", "cut-weights", "other-weights", "infinite", "no-tokenizer"):
        shutil.copytree(root / "llama", root / name)
    weights = root / "llama" / "model.safetensors"
    (root / "no-weights" / "model.safetensors").unlink()
    os.truncate(root / "cut-weights" / "model.safetensors", weights.stat().st_size // 2)
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if ".2." not in k}, root / "other-weights" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    tensors["model.layers.1.mlp.up_proj.weight"][0] = math.inf
    save_file(tensors, root / "infinite" / "model.safetensors", metadata={"format": "pt"})
    for file in (root / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    shutil.copytree(root / "llama", root / "small-vocabulary")  # of the model; the tokenizer knows more
    AutoModelForCausalLM.from_config(_changed("llama", vocab_size=40)).save_pretrained(root / "small-vocabulary")
    shutil.copytree(root / "llama", root / "pad-beyond")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(root / "pad-beyond")
    shutil.copytree(root / "llama", root / "no-pad")
    AutoModelForCausalLM.from_pretrained(root / "llama").save_pretrained(root / "no-pad")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(root / "no-pad")
    LlamaForSequenceClassification(_changed("llama", pad_token_id=None)).save_pretrained(root / "llama-classifier")
    tokenizer.save_pretrained(root / "llama-classifier")
    return root


def _changed(family: str, **changes: Any) -> Any:
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.fixture
def start(forge: Forge, models: Path, tmp_path: Path) -> Callable[..., Ended]:
    """Start a run of three clients in ``tmp_path``, with some keys set otherwise; it goes to ``tmp_path/out``."""

    def run(
        changes: dict[str, Any] | None = None,
        *,
        rows: Any = None,
        options: tuple[str, ...] = (),
        out: str | Path = "out",
        **how: Any,
    ) -> Ended:
        config: dict[str, Any] = {
            "model": "llama", "data": {"train": "rows.jsonl", "eval_fraction": 0.2, "max_length": 32}, "clients": 3,
            "partition": {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 0}, "batch_size": 2, "rounds": 2,
            "device": "cpu",
        }  # fmt: skip
        for key, value in copy.deepcopy(changes or {}).items():
            if key == "data" and isinstance(value, dict):
                value = {**config["data"], **value}
            config[key] = value
        config = {k: v for k, v in config.items() if v is not None}
        if isinstance(config.get("data"), dict):
            config["data"] = {k: v for k, v in config["data"].items() if v is not None}
        if isinstance(config.get("model"), str) and (models / config["model"]).exists():
            config["model"] = str(models / config["model"])
        write_rows(tmp_path / "rows.jsonl", text_rows(23) if rows is None else rows)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
        return forge.run("train", "run.yaml", *options, "--out", out, cwd=tmp_path, **how)

    return run


def finished(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    return summary


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# What is wrong, what the message must say, and after how much work it may come (an event of crash.py).
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "model-folder": ({"model": "./nowhere"}, ["The model folder './nowhere' does not exist"]),
    "model-on-the-hub": ({"model": "nobody/nothing"}, ["The model 'nobody/nothing' cannot be loaded", "Hub"]),
    "model-file": ({"model": "a-file"}, ["a-file", "Give a folder"]),
    "model-random-folder": ({"model": "a-text"}, ["a-text", "must be a folder made by save_pretrained"]),
    "model-type": ({"model": "unknown-type"}, ["unknown-type", "no-such-model"]),
    "model-config-no-json": ({"model": "no-json"}, ["no-json", "cannot be loaded"]),
    "model-no-weights": ({"model": "no-weights"}, ["no-weights", "cannot be loaded"]),
    "model-cut-weights": ({"model": "cut-weights"}, ["cut-weights", "cannot be loaded"]),
    "model-lacks-tensors": ({"model": "other-weights"}, ["other-weights", "lacks", "model.layers.2"]),
    "model-no-tokenizer": ({"model": "no-tokenizer"}, ["tokenizer", "no-tokenizer"]),
    "encoder-decoder": ({"model": "t5"}, ["t5"]),
    "cut-out-of-range-two-part": (
        {"model": "gpt2", "clients": 1, "partition": {"name": "two-part-split", "head_blocks": 9}},
        ["head_blocks is 9, but the model has 3 blocks"],
    ),
    "classifier-as-causal": ({"model": "bert", "data": {"format": "messages"}}, ["'bert' is an encoder"]),
    "classifier-without-pad": (
        {"model": "llama-classifier", "data": {"format": "classification"}}, ["padding token", "llama-classifier"],
    ),
    "cut-out-of-range": ({"partition": {"name": "u-shaped-split", "head_blocks": 7}}, ["head_blocks 7", "3 blocks"]),
    "tail-overlaps": (
        {"partition": {"name": "u-shaped-split", "head_blocks": 2, "tail_blocks": 2}}, ["overlap", "3 blocks"],
    ),
    "nothing-for-the-server": (
        {"partition": {"name": "u-shaped-split", "head_blocks": 2, "tail_blocks": 1}}, ["leave the server none"],
    ),
    "cut-negative": ({"partition": {"name": "u-shaped-split", "head_blocks": -1}}, ["head_blocks", "0 or more"]),
    "data-missing": ({"data": {"train": "nowhere.jsonl"}}, ["nowhere.jsonl", "Check the path"]),
    "data-eval-missing": ({"data": {"eval": "nowhere.jsonl", "eval_fraction": None}}, ["nowhere.jsonl"]),
    "data-folder": ({"data": {"train": "."}}, ["is a folder", "glob"]),
    "data-not-named": ({"data": {"train": None}}, ["data.train is missing"]),
    "column": ({"data": {"columns": {"text": "txet"}}}, ["no column 'txet'", "Did you mean 'text'?", "rows.jsonl"]),
    "column-ours": ({"data": {"columns": {"txt": "text"}}}, ["txt"]),
    "format-columns": ({"data": {"format": "prompt-completion"}}, ["no column 'prompt'"]),
    "no-example-for-a-client": ({"clients": 30}, ["18 rows are too few for 30 clients", "fewer clients"]),
    "nothing-left-to-train": ({"data": {"eval_fraction": 0.99}}, ["0.99 of 23 rows", "0 to train on"]),
    "option": ({"bath_size": 3}, ["bath_size", "Did you mean 'batch_size'?"]),
    "method-option": ({"framework": {"name": "sfl-v2", "local_step": 3}}, ["Did you mean 'local_steps'?"]),
    "method": ({"framework": "sfl-v3"}, ["sfl-v3", "Did you mean 'sfl-v2'?"]),
    "optimizer-option": ({"optimizer": {"name": "adamw", "momentum": 0.9}}, ["momentum", "no such argument"]),
    "clients-0": ({"clients": 0}, ["clients"]),
    "clients-twice": ({"clients": [{"name": "a"}, {"name": "a"}]}, ["a"]),
    "batch-0": ({"batch_size": 0}, ["batch_size"]),
    "accumulation-negative": ({"gradient_accumulation": -1}, ["gradient_accumulation"]),
    "rounds-0": ({"rounds": 0}, ["rounds"]),
    "steps-and-rounds": ({"steps": 3}, ["steps", "rounds"]),
    "lr-negative": ({"optimizer": {"name": "sgd", "lr": -1.0}}, ["lr"]),
    "lr-nan": ({"optimizer": {"name": "sgd", "lr": math.nan}}, ["lr"]),
    "clip-0": ({"max_grad_norm": 0.0}, ["max_grad_norm"]),
    "rank-0": ({"peft": {"name": "lora", "rank": 0}}, ["rank"]),
    "targets": ({"peft": {"name": "lora", "targets": ["no_such_layer"]}}, ["no_such_layer"]),
    "participation-0": ({"framework": {"name": "sfl-v2", "participation": 0.0}}, ["participation"]),
    "max-length-1": ({"data": {"max_length": 1}}, ["max_length"]),
    "device": ({"device": "cuda:77"}, ["cuda:77", "does not have"]),
    "device-word": ({"device": "gpu"}, ["device", "gpu"]),
    "attention": ({"attn_implementation": "flash"}, ["flash"]),
    "profile": ({"profile": "labtop"}, ["labtop", "Did you mean 'laptop'?"]),
    "infinite-weights": ({"model": "infinite"}, ["nan", "before the first step, so the model itself"]),
    "rate-too-high": ({"optimizer": {"name": "sgd", "lr": 1e30}, "checkpoint_every": 99}, ["nan at step"]),
    "rate-too-high-without-evaluation": (
        {"optimizer": {"name": "sgd", "lr": 1e38}, "data": {"eval_fraction": None}, "rounds": 1}, ["nan at step"],
    ),
    "vocabulary": ({"model": "small-vocabulary"}, ["small-vocabulary", "tokenizer", "0 to 39 only"]),
    "pad-beyond": ({"model": "pad-beyond"}, ["padding", str(VOCAB)]),
    "record-is-a-file": ({"record_wire": "rows.jsonl"}, ["rows.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_left(name: str, start: Any, tmp_path: Path) -> None:
    changes, said = WRONG[name]
    ended = start({"record_wire": "new/wire", **changes})
    ended.refused(*said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "run.yaml"]


@pytest.mark.parametrize("name", often(["gpt2", "opt", "roberta", "bert"], "gpt2", "roberta"))
def test_a_row_longer_than_the_positions(name: str, start: Any, tmp_path: Path) -> None:
    """Learned positions end at 64; said before training, in training and in evaluation data. 64 tokens are allowed."""
    classify = {"format": "classification"} if name in ("bert", "roberta") else {}
    room = 63 if name == "roberta" else 64
    short, eos = texts(8, seed=3), 0 if classify else 1

    def rows(length: int) -> list[dict[str, Any]]:
        long = " ".join(["w7"] * (length - eos))
        return [{"text": text, "label": i % 2} for i, text in enumerate([*short, long])]

    data = {"max_length": 100, "eval_fraction": None, "shuffle": False, **classify}
    wrong = {"model": name, "data": data, "clients": 1, "rounds": 1}
    start(wrong, rows=rows(room + 1)).refused(f"{room} positions", "data.max_length", "client-0")
    assert not (tmp_path / "out").exists()
    write_rows(tmp_path / "eval.jsonl", rows(room + 1))
    start({**wrong, "data": {**data, "eval": "eval.jsonl"}}).refused(f"{room} positions", "evaluation")
    ended = start(wrong, rows=rows(room))
    assert ended.code == 0, ended.err


def test_data_that_is_empty(start: Any, tmp_path: Path) -> None:
    start(rows=[]).refused("rows.jsonl", "no row")
    start(rows=[{"text": "  "}, {"text": ""}]).refused("rows.jsonl")
    start(rows=[{"text": None}]).refused("rows.jsonl, line 1")
    start(rows=[{"text": 3}]).refused("rows.jsonl, line 1")
    assert not (tmp_path / "out").exists()


def test_a_client_whose_own_file_is_empty(start: Any, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("\n \n")
    start({"clients": [{"name": "a"}, {"name": "b", "data": "own.txt"}]}).refused("own.txt")


def test_evaluation_that_is_not_finite(start: Any, tmp_path: Path) -> None:
    """The rate is so high that the first evaluation after training fails; what was good before is kept."""
    changes = {"optimizer": {"name": "sgd", "lr": 1e25}, "eval_every": 1, "rounds": 3, "clients": 1}
    start(changes).refused("nan")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("partition", ["u-shaped-split", "two-part-split"])
def test_no_gradient_checkpointing(partition: str, start: Any, tmp_path: Path) -> None:
    code = "import transformers as t; t.LlamaForCausalLM.supports_gradient_checkpointing = False"
    start({"gradient_checkpointing": True, "partition": partition}, code=code).refused("no gradient checkpointing")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_pad_token_works(start: Any, tmp_path: Path) -> None:
    assert start({"model": "no-pad"}).code == 0
    finished(tmp_path / "out")
    before = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out")
    assert start().code == 0
    after = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)  # what is padded is masked


def test_an_output_folder_in_use(start: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    start().refused("exists and is not empty", "--out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    start().refused("out")
    assert (tmp_path / "out").read_text() == "a file"


def test_an_empty_output_folder_stays_when_the_run_fails(start: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "wire").mkdir()
    start({"model": "infinite", "record_wire": "wire"}).refused("nan")
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "wire").iterdir()) == []
    assert start({"record_wire": "wire"}).code == 0


def test_a_parent_that_is_a_file(forge: Forge, start: Any, tmp_path: Path) -> None:
    start(options=("seed=1",))
    forge.run("train", "run.yaml", "--out", "rows.jsonl/out", cwd=tmp_path).refused("rows.jsonl/out", "--out")


def test_a_parent_that_does_not_exist_yet(forge: Forge, start: Any, models: Path, tmp_path: Path) -> None:
    start({"model": "infinite"}).refused("nan")
    forge.run("train", "run.yaml", "--out", "a/b/c", cwd=tmp_path).refused("nan")
    assert not (tmp_path / "a").exists()
    ended = forge.run("train", "run.yaml", f"model={models / 'llama'}", "--out", "a/b/c", cwd=tmp_path)
    assert ended.code == 0, ended.err
    finished(tmp_path / "a" / "b" / "c")


def test_stopped_by_the_user(start: Any, forge: Forge, tmp_path: Path) -> None:
    """Ctrl-C, before the first checkpoint and after it: nothing is lost, and the end is the same."""
    assert start().code == 0
    wanted = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for number in (2, 5):
        shutil.rmtree(tmp_path / "out")
        ended = start(at=("step", number), act="interrupt")
        assert ended.code == 130
        assert ended.err.startswith("Stopped: ")
        assert "Traceback" not in ended.err
        assert ended.err.endswith(" with: cutlayer train --resume out\n")
        assert ended.out.startswith("output folder: out\n")
        assert forge.run("train", "--resume", "out", cwd=tmp_path).code == 0
        found = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
        assert len(metrics(tmp_path / "out")) == 6


def test_stopped_where_no_folder_was_named(start: Any, forge: Forge, tmp_path: Path) -> None:
    """The folder that was made is told at the start, and what resumes it at the end, fit to be copied to a shell."""
    start({"model": "infinite"}).refused("nan")  # for the run file
    (tmp_path / "my run.yaml").write_text((tmp_path / "run.yaml").read_text().replace("infinite", "llama"))
    ended = forge.run("train", "my run.yaml", cwd=tmp_path, at=("step", 2), act="interrupt")
    assert ended.code == 130
    folder = ended.out.splitlines()[0].removeprefix("output folder: ")
    assert folder.startswith("outputs/my run-")
    assert (tmp_path / folder / "run.yaml").is_file()
    command = shlex.split(ended.err.partition("with: ")[2])
    assert command == ["cutlayer", "train", "--resume", folder]
    assert forge.run(*command[1:], cwd=tmp_path).code == 0
    ended = forge.run("train", "my run.yaml", cwd=tmp_path, at=("replace", 1), act="interrupt")
    assert (ended.code, ended.err) == (130, "Stopped: before anything was written.\n")


def test_two_at_once(start: Any, forge: Forge, tmp_path: Path) -> None:
    """Going on with a run that still goes on is refused: both would write the same files."""
    assert start(at=("step", 5)).code == -9
    code = f"import fcntl, os; fcntl.flock(os.open({str(tmp_path / 'out')!r}, os.O_RDONLY), fcntl.LOCK_EX)"
    forge.run("train", "--resume", "out", cwd=tmp_path, code=code).refused("Another process is at work")
    assert forge.run("train", "--resume", "out", cwd=tmp_path).code == 0


OWN = """from dataclasses import dataclass
from cutlayer.contracts import Aggregator
from cutlayer.registry import method

@method("aggregator")
@dataclass
class Own(Aggregator):
    def merge(self, before, states, weights):
        return GIVEN
"""


def test_a_method_file_that_fails(start: Any, tmp_path: Path) -> None:
    """It is the user's own mistake, and said in words, nonsense that it gives too."""
    (tmp_path / "own.py").write_text(OWN.replace("GIVEN", "1 / 0"))
    start({"aggregator": "own.py"}).refused(
        f"The method file {tmp_path / 'own.py'} fails in line 9, in merge: ZeroDivisionError: division by zero."
    )
    assert not (tmp_path / "out").exists()
    (tmp_path / "own.py").write_text(OWN.replace("GIVEN", "None"))
    start({"aggregator": "own.py"}).refused("The aggregator Own gave no tensors by name but NoneType.")
    (tmp_path / "own.py").write_text(OWN.replace("GIVEN", "{n: t[:1, :1] for n, t in states['client-0'].items()}"))
    start({"aggregator": "own.py"}).refused("The aggregator Own gives", "of shape [1, 1], but it is [")
    assert not (tmp_path / "out").exists()


def test_a_run_file_is_no_run_to_resume(start: Any, forge: Forge, tmp_path: Path) -> None:
    """The folder is the user's own; nothing is written into it."""
    start({"model": "infinite"}).refused("nan")
    before = sorted(tmp_path.iterdir())
    forge.run("train", "--resume", ".", cwd=tmp_path).refused("not written by a run", "cutlayer train run.yaml")
    assert sorted(tmp_path.iterdir()) == before


# Checkpoints.


@pytest.fixture(scope="module")
def killed(forge: Forge, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; each test takes a copy."""
    root = tmp_path_factory.mktemp("killed")
    write_rows(root / "rows.jsonl", text_rows(23))
    config = {"model": str(models / "llama"), "data": "rows.jsonl", "clients": 2, "rounds": 4, "device": "cpu",
              "partition": {"name": "u-shaped-split", "head_blocks": 1}}  # fmt: skip
    config["data"] = {"train": str(root / "rows.jsonl")}
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    assert forge.run("train", "run.yaml", "--out", "out", cwd=root, at=("step", 6)).code == -9
    assert sorted(p.name for p in (root / "out" / "checkpoints").iterdir()) == ["round-000001", "round-000002"]
    return root


def _flip(file: Path, where: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 1
    file.write_bytes(data)


def _garbage(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "checkpoint.json").write_text(text) and None


def _other_steps(folder: Path) -> None:
    file = folder / "checkpoint.json"
    before = file.read_text()
    file.write_text(before.replace('"rounds": 2', '"rounds": 1').replace('"lines": 4', '"lines": 3'))
    assert file.read_text() != before


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": lambda f: _flip(f / "server.safetensors", 0.7),
    "flipped-header": lambda f: _flip(f / "client-client-1.safetensors", 0.01),
    "truncated": lambda f: os.truncate(f / "server.safetensors", 1000),
    "emptied": lambda f: os.truncate(f / "server.safetensors", 0),
    "missing": lambda f: (f / "client-client-0.safetensors").unlink(),
    "no-manifest": lambda f: (f / "checkpoint.json").unlink(),
    "not-json": _garbage("hello"),
    "empty-manifest": _garbage(""),
    "a-list": _garbage("[]"),
    "nothing-in-it": _garbage("{}"),
    "wrong-types": _garbage('{"files": 3, "version": 1}'),
    "deep": _garbage("[" * 100_000),
    "no-utf-8": lambda f: (f / "checkpoint.json").write_bytes(b"\xff\xfe{"),
    "counters-changed": _other_steps,
    "emptied-folder": lambda f: [child.unlink() for child in f.iterdir()],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint(name: str, killed: Path, forge: Forge, tmp_path: Path) -> None:
    """It is never used; the one before it is, once the damaged one is deleted as the message says."""
    shutil.copytree(killed / "out", tmp_path / "out")
    newest = tmp_path / "out" / "checkpoints" / "round-000002"
    DAMAGE[name](newest)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    forge.run("train", "--resume", tmp_path / "out").refused(str(newest), "Delete the folder", "go on from")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    if name in ("flipped", "counters-changed"):
        shutil.rmtree(newest)
        assert forge.run("train", "--resume", tmp_path / "out").code == 0
        assert len(metrics(tmp_path / "out")) == 8


def test_a_checkpoint_of_another_run(killed: Path, forge: Forge, tmp_path: Path) -> None:
    shutil.copytree(killed / "out", tmp_path / "out")
    file = tmp_path / "out" / "run.yaml"
    file.write_text(file.read_text().replace("batch_size: 4", "batch_size: 3").replace("seed: 0", "seed: 7"))
    forge.run("train", "--resume", tmp_path / "out").refused("belongs to another run", "batch_size, seed", "--out")


def test_a_checkpoint_of_another_version(killed: Path, forge: Forge, tmp_path: Path) -> None:
    shutil.copytree(killed / "out", tmp_path / "out")
    file = tmp_path / "out" / "checkpoints" / "round-000002" / "checkpoint.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 99'))
    forge.run("train", "--resume", tmp_path / "out").refused("version 99")


def test_a_damaged_run_file(killed: Path, forge: Forge, tmp_path: Path) -> None:
    shutil.copytree(killed / "out", tmp_path / "out")
    (tmp_path / "out" / "run.yaml").write_bytes(b"\xff\xfe: [")
    forge.run("train", "--resume", tmp_path / "out").refused("run.yaml")


def test_an_adapter_of_another_model(forge: Forge, start: Any, models: Path, tmp_path: Path) -> None:
    assert start().code == 0
    out = tmp_path / "out"
    assert forge.run("generate", models / "llama", out / "adapter", "w3 w4", "--max-new-tokens", "4").code == 0
    for other in ("wide", "gpt2"):
        forge.run("generate", models / other, out / "adapter", "w3").refused(other, "adapter", "Name the base")
    (out / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    forge.run("generate", models / "llama", out / "adapter", "w3").refused("adapter")


# A full disk: a real one, of a few megabytes, filled up at a chosen moment.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


FULL = {  # moment: (event, whether there is a checkpoint by then, what is named)
    "initial-adapter": (("save_adapter", 1), False, "adapter_initial"),
    "metrics": (("flush", 1), False, "metrics.jsonl"),
    "first-checkpoint": (("save_file", 1), False, "checkpoint"),
    "frames": (("frame", 60), True, "wire"),
    "later-metrics": (("flush", 2), True, "cannot be written"),
    "checkpoint": (("save_file", 6), True, "checkpoint"),
    "manifest": (("replace", 5), True, "checkpoint"),
    "adapter": (("save_adapter", 2), True, "adapter"),
    "summary": (("summarize", 1), True, "summary.json"),
}


@dataclass(frozen=True)
class Whole:
    """How a run ends that nothing happens to."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    frames: bytes

    @staticmethod
    def of(out: Path, wire: Path) -> Whole:
        weights = load_file(out / "adapter" / "adapter_model.safetensors")
        return Whole(weights, [line["loss"] for line in metrics(out)], (wire / "frames.bin").read_bytes())


@pytest.fixture(scope="module")
def known() -> dict[str, Whole]:
    """What the first of the tests with a full disk leaves for the others."""
    return {}


@pytest.mark.parametrize("moment", often(list(FULL), "first-checkpoint", "checkpoint"))
def test_a_full_disk(
    moment: str, start: Any, forge: Forge, disk: Path, tmp_path: Path, known: dict[str, Whole]
) -> None:
    """Refused in words; when there is space again the run goes on (or starts again) and ends with the same weights."""
    at, resumable, named = FULL[moment]
    if not known:
        assert start({"record_wire": str(tmp_path / "whole-wire"), "rounds": 3}, out="whole").code == 0
        known["whole"] = Whole.of(tmp_path / "whole", tmp_path / "whole-wire")
    wire = (disk if moment == "frames" else tmp_path) / "wire"
    ended = start({"record_wire": str(wire), "rounds": 3}, out=disk / "out", at=at, act=f"fill:{disk}")
    ended.refused(named, "No space left", "Free some space", "--resume" if resumable else "start the run again")
    assert (disk / "out").exists() == resumable
    assert wire.exists() == resumable
    assert not list(disk.rglob(".*draft*"))
    if resumable:  # and once more, while it is still full
        forge.run("train", "--resume", disk / "out").refused("Free some space")
    (disk / "filler").unlink()
    command = ("--resume", disk / "out") if resumable else ("run.yaml", "--out", disk / "out")
    again = forge.run("train", *command, cwd=tmp_path)
    assert again.code == 0, again.err
    found, wanted = Whole.of(disk / "out", wire), known["whole"]
    assert found.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(found.weights[name], wanted.weights[name]) for name in wanted.weights)
    assert (found.losses, found.frames) == (wanted.losses, wanted.frames)


def test_a_disk_that_is_full_from_the_start(start: Any, forge: Forge, disk: Path, tmp_path: Path) -> None:
    start({"model": "infinite"})
    fill(disk)
    ended = forge.run("train", "run.yaml", "--out", disk / "out", cwd=tmp_path)
    ended.refused(str(disk / "out"), "--out")
    assert [p.name for p in disk.iterdir()] == ["filler"]


def test_a_read_only_disk(start: Any, forge: Forge, models: Path, disk: Path, tmp_path: Path) -> None:
    assert start(at=("step", 5)).code == -9
    shutil.move(tmp_path / "out", disk / "out")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    forge.run("train", "run.yaml", "--out", disk / "new", cwd=tmp_path).refused(str(disk / "new"), "--out")
    forge.run("train", "--resume", disk / "out").refused("Read-only", str(disk / "out"))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert forge.run("train", "--resume", disk / "out").code == 0


# What hostile (and ordinary) users try.


def test_relative_paths_from_another_folder(forge: Forge, models: Path, tmp_path: Path) -> None:
    """A run file in a folder with spaces and unicode, its data beside it, started and resumed from elsewhere."""
    there = tmp_path / "Ein Ordner für [Läufe] 100%"
    (there / "daten").mkdir(parents=True)
    write_rows(there / "daten" / "a ü.jsonl", text_rows(12))
    (there / "daten" / "b.txt").write_bytes("\r\n".join(texts(9)).encode() + b"\r\n")
    shutil.copytree(models / "llama", there / "modell é")
    config = {
        "model": "modell é", "data": {"train": "daten/a*.jsonl", "eval": "daten/b.txt"}, "batch_size": 2, "rounds": 3,
        "clients": [{"name": "klinik-a"}, {"name": "klinik-b", "data": {"train": "daten/b.txt"}}], "device": "cpu",
        "partition": {"name": "two-part-split", "head_blocks": 1}, "record_wire": "draht ß",
    }  # fmt: skip
    (there / "lauf ñ.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    elsewhere, third = tmp_path / "elsewhere", tmp_path / "third"
    elsewhere.mkdir()
    third.mkdir()
    command = ("train", there / "lauf ñ.yaml", "--out", "aus gabe/ö")
    ended = forge.run(*command, cwd=elsewhere, at=("step", 5))
    assert ended.code == -9, ended.err
    out = elsewhere / "aus gabe" / "ö"
    ended = forge.run("train", "--resume", out, cwd=third)
    assert ended.code == 0, ended.err
    summary = finished(out)
    assert summary["clients"] == ["klinik-a", "klinik-b"]
    assert (elsewhere / "draht ß" / "frames.bin").stat().st_size == sum(summary["bytes"].values())
    assert list(third.iterdir()) == []


def rarely(*case: Any) -> Any:
    """A case of the slow suite."""
    return pytest.param(*case, marks=pytest.mark.slow)


def test_line_ends_do_not_matter(start: Any, tmp_path: Path) -> None:
    lines = texts(9)
    losses = []
    for end in ("\n", "\r\n"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "lines.txt").write_bytes(end.join(lines).encode())
        assert start({"data": {"train": "lines.txt"}}).code == 0
        losses.append([line["loss"] for line in metrics(tmp_path / "out")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        rarely({"clients": 1}, 23),
        ({"clients": 1, "framework": "sequential-sl", "data": {"eval_fraction": None}}, 1),
        rarely({"clients": 20, "data": {"eval_fraction": None}, "rounds": 1}, 21),
        rarely({"batch_size": 500, "gradient_accumulation": 7}, 23),
        ({"optimizer": {"name": "adamw", "schedule": "linear", "warmup": 100}}, 23),
        ({"rounds": None, "epochs": 2, "clients": 4, "framework": {"name": "sfl-v2", "local_steps": 3}}, 23),
        rarely({"rounds": None, "steps": 5, "framework": {"name": "sfl-v2", "local_steps": 2}}, 23),
        ({"rounds": 9, "eval_every": 1, "early_stop": {"patience": 1, "min_delta": 50.0}}, 23),
        ({"optimizer": {"name": "sgd", "lr": 0.0}}, 23),
        rarely({"gradient_checkpointing": True, "max_grad_norm": 0.1}, 23),
        ({"precision": "bfloat16"}, 23),
    ],
    ids=["one-client", "one-row", "20-clients-21-rows", "large-batch", "short-of-warmup", "epochs", "steps",
         "early-stop", "rate-0", "gradient-checkpointing", "bfloat16"],
)  # fmt: skip
def test_odd_but_allowed(changes: dict[str, Any], rows: int, start: Any, tmp_path: Path) -> None:
    ended = start(changes, rows=text_rows(rows))
    assert ended.code == 0, ended.err
    out = tmp_path / "out"
    summary, lines = finished(out), metrics(out)
    assert all(math.isfinite(line["loss"]) and line["label_tokens"] > 0 for line in lines)
    assert len(lines) == sum(summary["steps"].values())
    if "epochs" in changes:  # 18 rows to train on, 5, 5, 4 and 4 of them in batches of 2
        assert list(summary["steps"].values()) == [6, 6, 4, 4]
    if "steps" in changes:
        assert set(summary["steps"].values()) == {5}
    if "early_stop" in changes:
        assert (summary["rounds"], summary["stopped_early"]) == (1, True)
    if changes.get("optimizer", {}).get("lr") == 0.0:
        first, last = (load_file(out / name / "adapter_model.safetensors") for name in ("adapter_initial", "adapter"))
        assert all(torch.equal(first[name], last[name]) for name in first)
    if summary.get("eval"):
        loss, perplexity = (summary["eval"]["after"][k] for k in ("loss", "perplexity"))
        assert perplexity == pytest.approx(math.exp(loss))


@pytest.mark.parametrize("participation", often([0.34, 0.5], 0.34))
def test_steps_are_those_of_each_client_whoever_takes_part(participation: float, start: Any, tmp_path: Path) -> None:
    """``steps`` counts optimizer steps of a client, also where only some take part in a round."""
    ended = start({"rounds": None, "steps": 4, "framework": {"name": "sfl-v2", "participation": participation}})
    assert ended.code == 0, ended.err
    assert set(finished(tmp_path / "out")["steps"].values()) == {4}


def test_a_perplexity_beyond_every_number(start: Any, models: Path, tmp_path: Path) -> None:
    """A loss of over a thousand is a number; e to its power is not, and the summary is JSON all the same."""
    loud = tmp_path / "loud"
    shutil.copytree(models / "llama", loud)
    tensors = load_file(loud / "model.safetensors")
    tensors["lm_head.weight"] *= 1e6
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    assert start({"model": str(loud), "optimizer": {"name": "sgd", "lr": 0.0}}).code == 0
    summary = finished(tmp_path / "out")
    assert summary["eval"]["before"]["loss"] > 1000
    assert math.isfinite(summary["eval"]["before"]["perplexity"])


@pytest.mark.parametrize("partition", ["u-shaped-split", "two-part-split"])
def test_prompts_that_leave_no_room_for_a_label(partition: str, models: Path, tmp_path: Path) -> None:
    """Some micro-batches have no label at all: the loss stays the mean over the label tokens of the step."""
    rows = [
        {"prompt": " ".join(["w5"] * (40 if i % 3 else 4)) + " ", "completion": "w6 w7 w8" + " w9" * i}
        for i in range(12)
    ]
    train = write_rows(tmp_path / "rows.jsonl", rows)
    config = {
        "model": str(models / "llama"), "clients": 1, "steps": 4, "batch_size": 1, "gradient_accumulation": 3,
        "data": {"train": str(train), "format": "prompt-completion", "max_length": 20, "shuffle": False},
        "device": "cpu",
        "partition": {"name": partition, "head_blocks": 1}, "optimizer": {"name": "sgd", "lr": 0.0},
    }  # fmt: skip
    cutlayer.train(config, out=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(models / "llama")
    tokenizer = AutoTokenizer.from_pretrained(models / "llama")
    lines = metrics(tmp_path / "out")
    assert len(lines) == 4
    for number, line in enumerate(lines):
        total, count = 0.0, 0
        for row in rows[3 * number : 3 * number + 3]:
            ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
            ids = [i for k, i in enumerate(ids) if not (k == len(ids) - 2 and i == tokenizer.eos_token_id)][:20]
            border = len(tokenizer(row["prompt"])["input_ids"])
            labels = torch.tensor([[-100] * border + ids[border:]])[:, : len(ids)]
            kept = int((labels[:, 1:] != -100).sum())
            if kept:
                total += float(model(input_ids=torch.tensor([ids]), labels=labels).loss) * kept
                count += kept
        assert line["label_tokens"] == count > 0
        assert line["loss"] == pytest.approx(total / count, abs=1e-5)


def test_no_label_at_all_in_a_step(models: Path, tmp_path: Path) -> None:
    """A whole step without a label token changes nothing and its loss is a number; the next one does, and has one."""
    long = " ".join(["w5"] * 40) + " "
    rows = [{"prompt": p, "completion": "w6 w7"} for p in (long, long, "w3 ", "w4 ")]
    train = write_rows(tmp_path / "rows.jsonl", rows)
    for partition in ("u-shaped-split", "two-part-split"):
        config = {
            "model": str(models / "llama"), "clients": 1, "batch_size": 2, "device": "cpu",
            "data": {"train": str(train), "format": "prompt-completion", "max_length": 20, "shuffle": False},
            "partition": {"name": partition, "head_blocks": 1}, "max_grad_norm": 1.0,
            "optimizer": {"name": "sgd", "lr": 0.1},  # AdamW would still decay the weights
        }  # fmt: skip
        for steps in (1, 2):
            out = tmp_path / f"{partition}-{steps}"
            cutlayer.train({**config, "steps": steps}, out=out)
            first, last = (
                load_file(out / name / "adapter_model.safetensors") for name in ("adapter_initial", "adapter")
            )
            assert all(torch.equal(first[name], last[name]) for name in first) == (steps == 1)
        lines = metrics(out)
        assert [line["label_tokens"] > 0 for line in lines] == [False, True]
        assert lines[0]["loss"] == 0.0
        assert 3 < lines[1]["loss"] < 6  # about the logarithm of 97 words


def test_a_run_given_as_text(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML text from Python, without an output folder: one is made under outputs/, whatever the text holds."""
    monkeypatch.chdir(tmp_path)
    train = write_rows(tmp_path / "rows.jsonl", text_rows(6))
    text = f"model: {models / 'llama'}\ndata: {{train: {train}}}\nclients: 1\nrounds: 1\ndevice: cpu\n"
    result = cutlayer.train(text + "partition: {name: two-part-split, head_blocks: 1}\n")
    assert result.out.parent == Path("outputs")
    assert result.out.name.startswith("run-")
    finished(tmp_path / result.out)
