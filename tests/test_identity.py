"""What a checkpoint must be of: the settings, the content of method files, and the base model, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from crash import Forge
from cutlayer import identity
from cutlayer.config import load_config
from cutlayer.engine import identity as identity_of_run
from cutlayer.errors import MethodError, ModelError
from cutlayer.identity import fingerprint, other_model, tokenizer_of
from cutlayer.policy import load_policy
from tiny import make_model, text_rows, write_rows

MEAN = """from dataclasses import dataclass
from cutlayer.contracts import Aggregator
from cutlayer.registry import method

@method("aggregator")
@dataclass
class Mean(Aggregator):
    share: float = 1.0

    def merge(self, before, states, weights):
        first = next(iter(states.values()))
        return {name: sum(state[name] for state in states.values()) / len(states) for name in first}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=3)


def of(model: Path, **changes: Any) -> dict[str, str]:
    return identity_of_run(load_config({"model": str(model), "data": {"train": "rows.jsonl"}, **changes}))


def change(model: Path, file: str = "model.safetensors") -> None:
    """One number of one tensor."""
    if file == "config.json":
        config = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        return
    tensors = load_file(model / file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(tensors, model / file, metadata={"format": "pt"})


def test_settings_are_part_of_it_but_not_where_files_lie(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "moved")
    plain = of(base)
    assert set(plain) == {"settings", "method files", "base model files"}
    assert json.loads(plain["base model files"]).keys() == {"config.json", "model.safetensors"}
    clients = [{"name": "a", "data": "x.jsonl"}]
    for same in (
        of(tmp_path / "moved"), of(base, data={"train": "elsewhere.jsonl"}), of(base, device="cpu"),
        of(base, record_wire="wire"), of(base, checkpoint_every=7), of(base, verify="always"),
    ):  # fmt: skip
        assert same == plain
    for other in (
        of(base, seed=1), of(base, peft={"name": "lora", "rank": 4}), of(base, clients=clients),
        of(base, data={"train": "rows.jsonl", "eval": "v.jsonl"}), of(base, data={"train": "x", "max_length": 7}),
        of(base, precision="bfloat16"), of(base, framework="sequential-sl"),
    ):  # fmt: skip
        assert other["settings"] != plain["settings"]
    assert of(base, clients=clients) == of(base, clients=[{"name": "a", "data": "y.jsonl"}])


def test_a_method_file_is_its_content_and_its_options(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(MEAN)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "name.py").write_text(MEAN)
    first = of(base, aggregator=str(tmp_path / "mean.py"))
    assert of(base, aggregator=str(tmp_path / "other" / "name.py")) == first
    assert of(base)["method files"] == "{}"
    options = of(base, aggregator={"name": str(tmp_path / "mean.py"), "share": 0.5})
    assert options["settings"] != first["settings"]
    (tmp_path / "mean.py").write_text(MEAN + "# a comment\n")
    changed = of(base, aggregator=str(tmp_path / "mean.py"))
    assert {key for key in first if first[key] != changed[key]} == {"method files"}


def test_it_is_asked_once(base: Path, tmp_path: Path) -> None:
    """What is changed while a run goes on is not what the run was made of."""
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "mean.py").write_text(MEAN)
    source = {"model": str(tmp_path / "model"), "data": {"train": "x"}, "aggregator": str(tmp_path / "mean.py")}
    config = load_config(source)
    before = identity_of_run(config)
    change(tmp_path / "model")
    (tmp_path / "mean.py").unlink()
    assert identity_of_run(config) == before
    with pytest.raises(MethodError, match=r"mean\.py cannot be read"):
        identity.identity_of(config)
    assert config == config.model_copy()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_other_weights_and_other_configurations_are_told_apart(file: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    assert fingerprint(str(tmp_path / "model")) == fingerprint(str(base))
    change(tmp_path / "model", file)
    before, after = fingerprint(str(base)), fingerprint(str(tmp_path / "model"))
    assert [name for name in before if before[name] != after[name]] == [file]


def test_what_is_not_read_does_not_count(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    for name in ("README.md", "pytorch_model.bin", "consolidated.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("other")
    assert fingerprint(str(tmp_path / "model")) == fingerprint(str(base))


def test_another_tokenizer_is_told_apart_where_both_have_the_file(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "model")
    for name, text in (("tokenizer.json", "{}"), ("special_tokens_map.json", "{}")):
        (tmp_path / "model" / name).write_text(text)
    model = str(tmp_path / "model")
    own, tokens = fingerprint(model), tokenizer_of(model)
    assert {"tokenizer.json", "special_tokens_map.json"} <= tokens.keys()
    assert not other_model(own, tokens, {**fingerprint(model), **tokenizer_of(model)}, "ann")
    assert not other_model(own, tokens, fingerprint(model), "ann")  # of an earlier version
    (tmp_path / "model/merges.txt").write_text("a b\n")
    (tmp_path / "model/tokenizer_config.json").write_text("{}")
    assert not other_model(own, tokens, {**fingerprint(model), **tokenizer_of(model)}, "ann")
    file = tmp_path / "model/tokenizer.json"
    file.write_text(file.read_text() + " ")
    told = {**fingerprint(model), **tokenizer_of(model)}
    said = "The tokenizer is another here, .*: tokenizer.json has another checksum than with 'ann'"
    assert re.match(said, other_model(own, tokens, told, "ann"))
    for wrong in (told | {"config.json": "0"}, told | {"more": "0"}, tokens, {}, None, "x", {"handed": "0"}):
        assert other_model(own, tokens, wrong, "ann").startswith("The model is another here")
    assert tokenizer_of("nobody/has-this") == {}


def test_shards_and_old_formats(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = fingerprint(str(tmp_path / "shards"))
    assert {"config.json", "model.safetensors.index.json"} < shards.keys()
    assert len(shards) == 2 + len(list((tmp_path / "shards").glob("*.safetensors"))) > 4
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"files of the model in .*shards cannot be read"):
        fingerprint(str(tmp_path / "shards"))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old" / "pytorch_model.bin")
    assert fingerprint(str(tmp_path / "old")).keys() == {"config.json", "pytorch_model.bin"}


def test_a_large_file_is_read_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is its content's. A later process knows it from a note, until the file is another."""
    monkeypatch.setattr(identity, "LARGE", 1000)
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, plain = [], identity._read
    monkeypatch.setattr(identity, "_read", lambda path: read.append(path.name) or plain(path))

    def told(*, later: bool = True) -> str:
        if later:
            identity._remembered.cache_clear()
        return fingerprint(str(tmp_path))["model.safetensors"]

    file, content = tmp_path / "model.safetensors", bytes(range(256)) * 40
    (tmp_path / "config.json").write_text("{}")
    file.write_bytes(content)
    assert told() == told() == told(later=False) == hashlib.sha256(content).hexdigest()
    assert read.count("model.safetensors") == 1
    times = file.stat()
    changed = content[:5000] + b"x" + content[5001:]
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times, of the same size
    assert told() == hashlib.sha256(changed).hexdigest()
    (note,) = (tmp_path / "cache/cutlayer/checksums").iterdir()
    for damaged in ("", "{}", "[]", json.dumps({**json.loads(note.read_text()), "sha256": "y"})):
        note.write_text(damaged)
        assert told() == hashlib.sha256(changed).hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where nothing can be written
    assert told() == hashlib.sha256(changed).hexdigest()


def test_what_has_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could change again within the same tick of the clock."""
    monkeypatch.setattr(identity, "LARGE", 1000)
    monkeypatch.setattr(identity, "SETTLED", 3600.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2000)
    fingerprint(str(tmp_path))
    assert not (tmp_path / "cache").exists()


def in_the_cache(model: Path, cache: Path, name: str) -> None:
    """A model as the Hub's cache has it: links to files that git, or their SHA-256, gave names."""
    folder, commit = cache / f"models--{name.replace('/', '--')}", "a" * 40
    for made in ("blobs", f"snapshots/{commit}", "refs"):
        (folder / made).mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    for file in model.iterdir():
        content = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if file.suffix == ".safetensors":
            blob = hashlib.sha256(content).hexdigest()
        (folder / "blobs" / blob).write_bytes(content)
        (folder / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{blob}")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_and_the_hub_s_cache_have_the_same_checksums(
    sharded: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a server with the one and a client with the other are of one run."""
    from transformers import AutoModelForCausalLM

    folder = base
    if sharded:
        folder = tmp_path / "shards"
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="20KB")
    in_the_cache(folder, tmp_path / "hub", "owner/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = fingerprint("owner/model")
    assert found == fingerprint(str(folder))
    assert len(found) > 4 if sharded else len(found) == 2
    assert found == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in found}
    snapshot = tmp_path / "hub/models--owner--model/snapshots" / ("a" * 40)
    assert fingerprint(str(snapshot)) == found


def test_a_policy_knows_large_weights_by_their_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder, too, and above the size up to which files were once read whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with (tmp_path / "model.safetensors").open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    run = load_config({"model": str(tmp_path), "data": {"train": "x"}})
    for models, problems in ([f"sha256:{checksum}"], []), (["sha256:" + "0" * 64], [checksum]):
        said = load_policy({"models": models}).problems(run, "client-0")
        assert len(said) == len(problems)
        assert all(checksum in one for one in said)


HUB_SCRIPT = """
import json
from transformers import AutoModelForCausalLM
from cutlayer.identity import fingerprint
from cutlayer.policy import load_policy
found = []
for name in ("owner/model", "owner/changed"):
    before = fingerprint(name)
    AutoModelForCausalLM.from_pretrained(name)
    found.append([before, fingerprint(name)])
print(json.dumps(found))
"""


def test_a_model_of_the_hub_is_known_by_its_files_in_the_cache(base: Path, tmp_path: Path) -> None:
    (tmp_path / "hub/models/owner").mkdir(parents=True)
    for name in ("model", "changed"):
        shutil.copytree(base, tmp_path / "hub/models/owner" / name)
    change(tmp_path / "hub/models/owner/changed")
    with HubServer(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT], env=hub.environment(tmp_path / "home"),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, found = zip(*json.loads(done.stdout), strict=True)
    assert before == ({"name": "owner/model"}, {"name": "owner/changed"})
    assert found[0].keys() == {"config.json", "model.safetensors"}
    assert [name for name in found[0] if found[0][name] != found[1][name]] == ["model.safetensors"]


# A run that is taken up again.


@pytest.fixture(scope="module")
def killed(forge: Forge, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was killed after its first round; each test takes a copy."""
    root = tmp_path_factory.mktemp("killed")
    shutil.copytree(base, root / "model")
    (root / "mean.py").write_text(MEAN)
    write_rows(root / "rows.jsonl", text_rows(12))
    config = {"model": "model", "data": {"train": "rows.jsonl"}, "clients": 2, "rounds": 2, "device": "cpu",
              "partition": {"name": "u-shaped-split", "head_blocks": 1}, "aggregator": "mean.py"}  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    assert forge.run("train", "run.yaml", "--out", "out", cwd=root, at=("step", 3)).code == -9
    return root


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Path:
    """The killed run in another place; its run file's paths go there."""
    shutil.copytree(killed, tmp_path / "here")
    file = tmp_path / "here" / "out" / "run.yaml"
    file.write_text(file.read_text().replace(str(killed), str(tmp_path / "here")))
    return tmp_path / "here"


def test_a_run_that_was_moved_with_its_files_goes_on(copy: Path, forge: Forge) -> None:
    ended = forge.run("train", "--resume", copy / "out", cwd=copy.parent)
    assert ended.code == 0, ended.err
    summary = json.loads((copy / "out" / "summary.json").read_text())
    assert (copy / "out" / summary["adapter"] / "adapter_model.safetensors").is_file()


def test_other_base_weights_are_refused(copy: Path, forge: Forge) -> None:
    change(copy / "model")
    forge.run("train", "--resume", copy / "out").refused(
        "belongs to another run: its base model files differ (model.safetensors)", "Resume with the same model"
    )


def test_another_method_file_and_all_that_differs_is_said(copy: Path, forge: Forge) -> None:
    (copy / "mean.py").write_text(MEAN.replace("/ len(states)", "/ 3"))
    forge.run("train", "--resume", copy / "out").refused("its method files differ (aggregator). Resume")
    change(copy / "model", "config.json")
    file = copy / "out" / "run.yaml"
    file.write_text(file.read_text().replace("batch_size: 4", "batch_size: 3"))
    forge.run("train", "--resume", copy / "out").refused(
        "its settings differ (batch_size), its method files differ (aggregator), its base model files differ (config."
    )
