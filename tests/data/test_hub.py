"""Data sets and models of a local Hub, in other processes: the libraries read HF_ENDPOINT when they are imported."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import HubServer

HUB_SCRIPT = """
import json
from cutlayer.data.sources import load_rows
from cutlayer.errors import DataError
def show(source, split, columns={}):
    try:
        found = load_rows(source, columns=columns, format="text", split=split)
    except DataError as error:
        found = str(error)
    print(json.dumps(found))
show("owner/tiny", "train", {"text": "body"})
show("owner/tiny", "eval", {"text": "body"})
show("owner/tiny", "test", {"text": "body"})
show("owner/tiny", "train")
show("owner/none", "train")
show("owner/tiny:german", "train")
import datasets.utils
assert not datasets.utils.are_progress_bars_disabled()
"""


def test_a_data_set_of_the_hub(tmp_path):
    repository = tmp_path / "hub" / "datasets" / "owner" / "tiny"
    repository.mkdir(parents=True)
    (repository / "train.jsonl").write_text('{"body": "one"}\n{"body": ""}\n{"body": "two"}\n')
    (repository / "validation.jsonl").write_text('{"body": "three"}\n')
    (tmp_path / "work").mkdir()
    with HubServer(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT],
            env=hub.environment(tmp_path / "home"),
            cwd=tmp_path / "work",
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    train, held_out, split, column, absent, config = map(json.loads, done.stdout.splitlines())
    assert train == [{"body": "one", "text": "one"}, {"body": "two", "text": "two"}]
    assert held_out == [{"body": "three", "text": "three"}]
    assert "no split 'test'" in split
    assert "train, validation" in split
    assert "no column 'text'" in column
    assert "Columns there: body" in column
    assert "is no file here" in absent
    assert "doesn't exist on the Hub" in absent
    assert hub.url in absent
    assert "german" in config
    assert "Generating" not in done.stderr  # no progress bars
    assert os.listdir(tmp_path / "work") == []


MODEL_SCRIPT = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("owner/model")
print(sum(p.sum().item() for p in model.parameters()), AutoTokenizer.from_pretrained("owner/model")("a b").input_ids)
"""


@pytest.mark.slow  # test_parts.py loads a model of it
def test_the_server_also_serves_models_in_shards(tmp_path, words):
    """The model side relies on this server; it is tested where it lives."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    model.save_pretrained(tmp_path / "hub/models/owner/model", max_shard_size="4KB")
    words.save_pretrained(tmp_path / "hub/models/owner/model")
    with HubServer(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", MODEL_SCRIPT],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    total, ids = done.stdout.split(maxsplit=1)
    assert float(total) == pytest.approx(sum(p.sum().item() for p in model.parameters()))
    assert json.loads(ids) == [4, 5]
    assert sum(path.endswith(".safetensors") for path in hub.sent) > 1
