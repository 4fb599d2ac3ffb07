"""Classifiers whose checkpoint already has a head: it is kept, with its classes, or the run is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import cutlayer
import unsplit
from cutlayer.errors import DataError, ModelError
from cutlayer.models.heads import head_of
from spine import LR, PARTITIONS, TWO, adapter, equal, losses, train
from tiny import CLASSIFIERS, make_model, make_tokenizer, texts, write_rows

NAMES = ["sad", "angry", "neutral", "glad"]
LABELS = ["glad", "neutral", "glad", "sad", "sad", "neutral", "glad", "sad"]  # sorted they would have other numbers


def checkpoint(folder: Path, family: str = "bert", names: list[str] | None = None, **changes: Any) -> Path:
    """A random classifier with a head for these classes."""
    names = names or NAMES
    about = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    return make_model(folder, family, **{**about, **changes})


def without_head(folder: Path, source: Path) -> Path:
    """The encoder alone, as a pretrained base is saved."""
    AutoModel.from_pretrained(source).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows_of(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in zip(texts(len(labels)), labels, strict=True)]


def run(folder: Path, out: Path, labels: list[Any], **changes: Any) -> Any:
    given = {"steps": 6, "data": {"format": "classification"}, **changes}
    return train(folder, out, {"client-0": rows_of(labels)}, **given)


def reference(folder: Path, out: Path, numbers: list[int]) -> unsplit.Unsplit:
    batches = unsplit.text_batches(folder, rows_of(numbers), size=3, label=True)
    steps = [[batches[number % len(batches)]] for number in range(6)]
    return unsplit.train(
        folder, steps, adapter=out / "adapter_initial", classifier=True,
        make_optimizer=lambda params: torch.optim.AdamW(params, lr=LR),
    )  # fmt: skip


@PARTITIONS
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_trained_head_is_kept_with_its_classes(family: str, partition: dict[str, Any], tmp_path: Path) -> None:
    """Four classes in the checkpoint, three in the data, by name: as plain Transformers does with its numbers."""
    folder, out = checkpoint(tmp_path / "model", family), tmp_path / "out"
    summary = run(folder, out, LABELS, partition=partition).summary
    assert summary["labels"] == NAMES
    unsplit_run = reference(folder, out, [NAMES.index(label) for label in LABELS])
    assert [loss for _, loss in losses(out)] == unsplit_run.losses
    assert equal(adapter(out), unsplit_run.state)


def test_numbers_are_those_of_the_head(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    numbers = [NAMES.index(label) for label in LABELS]
    run(folder, tmp_path / "names", LABELS)
    assert run(folder, tmp_path / "numbers", numbers).summary["labels"] == NAMES
    assert losses(tmp_path / "names") == losses(tmp_path / "numbers")


def test_a_head_without_names_gets_those_of_the_data(tmp_path: Path) -> None:
    """As many runs as not: the classifier was saved with LABEL_0, ... and the data has names."""
    folder, out = make_model(tmp_path / "model", "bert", num_labels=4), tmp_path / "out"
    assert AutoConfig.from_pretrained(folder).id2label[3] == "LABEL_3"
    assert run(folder, out, LABELS).summary["labels"] == ["glad", "neutral", "sad", "LABEL_3"]
    unsplit_run = reference(folder, out, [["glad", "neutral", "sad"].index(label) for label in LABELS])
    assert [loss for _, loss in losses(out)] == unsplit_run.losses


def test_a_base_gets_a_new_head_which_the_next_run_keeps(tmp_path: Path) -> None:
    """Full fine-tuning saves the classes with the model, and goes on from there."""
    base = without_head(tmp_path / "base", checkpoint(tmp_path / "model"))
    assert head_of(base) is None
    first = run(base, tmp_path / "first", LABELS, peft="full")
    assert first.summary["labels"] == ["glad", "neutral", "sad"]
    config = AutoConfig.from_pretrained(first.adapter)
    assert config.id2label == {0: "glad", 1: "neutral", 2: "sad"}
    assert config.label2id == {"glad": 0, "neutral": 1, "sad": 2}
    second = run(first.adapter, tmp_path / "second", ["sad", "neutral"] * 4, peft="full")
    assert second.summary["labels"] == first.summary["labels"]
    saved = load_file(first.adapter / "model.safetensors"), load_file(second.adapter / "model.safetensors")
    assert saved[0]["classifier.weight"].shape == saved[1]["classifier.weight"].shape == (3, 32)
    model = AutoModelForSequenceClassification.from_pretrained(first.adapter)
    batch = unsplit.text_batches(first.adapter, rows_of([2, 1, 2]), size=3, label=True)[0]
    assert losses(tmp_path / "second")[0][1] == model(**batch).loss.item()


def test_causal_runs_have_no_labels(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    summary = train(folder, tmp_path / "out", {"client-0": rows_of([0, 1, 0])}, rounds=1).summary
    assert "labels" not in summary


def test_classes_that_do_not_fit_the_head_are_refused(tmp_path: Path) -> None:
    folder, out = checkpoint(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(DataError, match=r"trained for sad, angry, neutral, glad, and nobody knows .* 'joyful'"):
        run(folder, out, ["joyful", "sad"] * 4)
    with pytest.raises(DataError, match=r"5 classes \(0, 1, 2, 3, 4\), but the classification head of .* has 4"):
        run(folder, out, [0, 4] * 4)
    assert not out.exists()


def test_heads_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    several = checkpoint(tmp_path / "several", problem_type="multi_label_classification")
    with pytest.raises(ModelError, match="problem_type 'multi_label_classification', and here each text has one class"):
        head_of(several)
    with pytest.raises(ModelError, match="problem_type 'regression'"):
        head_of(checkpoint(tmp_path / "score", names=["stars"]))

    tagger = tmp_path / "tagger"
    AutoModelForTokenClassification.from_pretrained(checkpoint(tmp_path / "m")).save_pretrained(tagger)
    with pytest.raises(ModelError, match="not that of a BertForSequenceClassification: it was saved as BertForToken"):
        head_of(tagger)

    half = checkpoint(tmp_path / "half", "distilbert")
    tensors = load_file(half / "model.safetensors")
    del tensors["pre_classifier.weight"]
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="with 3 of the 4 tensors"):
        head_of(half)

    other = checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "label2id": {"sad": 1, "angry": 0}}))
    with pytest.raises(ModelError, match=r"contradicts itself: id2label is .*'sad'"):
        head_of(other)
    fewer = {"id2label": {0: "sad", 1: "glad"}, "label2id": {"sad": 0, "glad": 1}}
    (other / "config.json").write_text(json.dumps({**config, **fewer}))
    with pytest.raises(
        ModelError, match=r"has 'classifier\.\w+' in the shape \[4.* \(with 2 classes\) it should be \[2"
    ):
        head_of(other)


def test_a_sharded_head_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    AutoModelForSequenceClassification.from_pretrained(checkpoint(tmp_path / "m")).save_pretrained(
        folder, max_shard_size="6KB"
    )
    found = head_of(folder)
    assert found is not None
    assert found.names == NAMES
    assert found.numbers == {name: number for number, name in enumerate(NAMES)}
    assert not found.unnamed


def test_clients_that_alone_say_classification(tmp_path: Path) -> None:
    """Each client has its own file and format; the format of the run's own data, which nobody uses, does not matter."""
    folder = checkpoint(tmp_path / "model")
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows_of(LABELS))), "format": "classification"}
    config = {
        "model": str(folder), "data": {}, "rounds": 1, "clients": [{"name": "ann", "data": data}],
        "partition": TWO, "framework": "sequential-sl",
    }  # fmt: skip
    assert cutlayer.train(config, out=tmp_path / "out").summary["labels"] == NAMES
    held_out = write_rows(tmp_path / "eval.jsonl", rows_of(LABELS))
    with pytest.raises(DataError, match="The format of the evaluation data is 'text', but the model's task is class"):
        cutlayer.train({**config, "data": {"eval": str(held_out)}}, out=tmp_path / "other")
