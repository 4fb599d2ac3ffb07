"""Each party loads only what it owns, and parts that were loaded apart are the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from cutlayer import registry
from cutlayer.errors import ModelError
from cutlayer.models.loading import Part, load_model
from cutlayer.models.segment import Base, Segment
from spine import often
from tiny import BLOCKS, CLASSIFIERS, FAMILIES, VOCAB, make_model

HEAD, TAIL = 1, 1
CLIENT = Part(0, HEAD, bottom=True, top=True, also=range(BLOCKS - TAIL, BLOCKS))
TRUNK = Part(HEAD, BLOCKS - TAIL, bottom=False, top=False)
BELOW = Part(0, HEAD, bottom=True, top=False)  # the two-part client
ABOVE = Part(HEAD, BLOCKS, bottom=False, top=True)  # and its server


def task_of(family: str) -> str:
    return "classification" if family in CLASSIFIERS else "causal"


def sharded(folder: Path, family: str, size: str = "6KB") -> Path:
    """A random model whose checkpoint has many shards."""
    whole = make_model(folder / "whole", family)
    auto = AutoModelForSequenceClassification if family in CLASSIFIERS else AutoModelForCausalLM
    auto.from_pretrained(whole).save_pretrained(folder / "shards", max_shard_size=size)
    return folder / "shards"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = sharded(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (3, 9), generator=source)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 8:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def peft() -> Any:
    return registry.create("peft", "lora", {"rank": 4})


def tell_apart(base: Base) -> None:
    """Adapter values away from zero, by name."""
    with torch.no_grad():
        for name, parameter in base.initial.items():
            source = torch.Generator().manual_seed(sum(name.encode()))
            parameter.add_(torch.randn(parameter.shape, generator=source) * 0.05)


# ---------------------------------------------------------------- a part is that part of the model

# Learned and rotary positions, a final norm registered before the blocks, projections, ties, embeddings in a module of
# their own, and classifiers.
SOME = ("gpt2", "opt-projected", "llama-tied", "gemma3", "distilbert")
OFTEN = pytest.mark.parametrize("family", often(FAMILIES, *SOME))

PARTS = {"whole": None, "client": CLIENT, "trunk": TRUNK, "below": BELOW, "above": ABOVE}


@dataclass
class Loaded:
    """A part that was loaded alone: its frozen tensors by name, its adapter's first values, and the part itself."""

    frozen: dict[str, torch.Tensor]
    adapter: dict[str, torch.Tensor]
    base: Base


@pytest.fixture(scope="module")
def loaded_of(folder_of: Any) -> Any:
    made: dict[str, dict[str, Loaded]] = {}

    def make(family: str) -> dict[str, Loaded]:
        if family not in made:
            made[family] = {}
            for name, part in PARTS.items():
                model, shape = load_model(folder_of(family), task=task_of(family), part=part)
                frozen = dict(model.named_parameters(remove_duplicate=False))
                assert not any(p.requires_grad or p.is_meta for p in frozen.values())
                base = peft().prepare(model, shape, task=task_of(family), seed=5)
                initial = {n: p.detach().clone() for n, p in base.initial.items()}
                made[family][name] = Loaded(frozen, initial, base)
        return made[family]

    return make


@OFTEN
def test_parts_hold_their_tensors_and_no_others(family: str, loaded_of: Any) -> None:
    whole = loaded_of(family)["whole"]
    shape, config = whole.base.anatomy, whole.base.model.config
    for name in ("client", "trunk", "below", "above"):
        held = loaded_of(family)[name].frozen
        owned = {n for n in whole.frozen if PARTS[name].owns(shape.owner(n))}
        if name == "above" and config.tie_word_embeddings and shape.causal:
            # the head reads the embedding's matrix: with tied weights its holder needs a copy
            owned |= {n for n in whole.frozen if whole.frozen[n] is whole.frozen[f"{shape.embedding}.weight"]}
        assert set(held) == owned
        assert all(torch.equal(held[n], whole.frozen[n]) for n in held)


@OFTEN
def test_adapters_of_parts_are_those_of_the_whole(family: str, loaded_of: Any) -> None:
    """The same keys, each held once, and the same first values, whoever injects them."""
    whole = loaded_of(family)["whole"].adapter
    for pair in (("client", "trunk"), ("below", "above")):
        held = [loaded_of(family)[name].adapter for name in pair]
        assert sum(map(len, held)) == len(whole)
        together = {name: tensor for one in held for name, tensor in one.items()}
        assert set(together) == set(whole)
        assert all(torch.equal(together[n], whole[n]) for n in whole)
    assert any(float(t.abs().max()) > 0 for n, t in whole.items() if "lora_A" in n)


@OFTEN
def test_parts_loaded_apart_compute_what_the_uncut_model_does(family: str, loaded_of: Any) -> None:
    """Difference 0.0, U-shaped (client with both ends, trunk) and two-part (client below, server above)."""
    ids, mask = inputs()
    bases = {name: loaded.base for name, loaded in loaded_of(family).items()}
    for base in bases.values():
        tell_apart(base)
    with torch.no_grad():
        whole = bases["whole"].model(input_ids=ids, attention_mask=mask).logits
        client, trunk, below, above = (bases[name] for name in ("client", "trunk", "below", "above"))
        head = Segment(client, "head", range(HEAD), bottom=True)
        middle = Segment(trunk, "trunk", range(HEAD, BLOCKS - TAIL))
        tail = Segment(client, "tail", range(BLOCKS - TAIL, BLOCKS), top=True)
        hidden = head.forward(client.initial, input_ids=ids, attention_mask=mask)
        hidden = middle.forward(trunk.initial, hidden=hidden, attention_mask=mask)
        u_shaped = tail.forward(client.initial, hidden=hidden, attention_mask=mask).logits
        head = Segment(below, "head", range(HEAD), bottom=True)
        rest = Segment(above, "tail", range(HEAD, BLOCKS), top=True)
        hidden = head.forward(below.initial, input_ids=ids, attention_mask=mask)
        two_part = rest.forward(above.initial, hidden=hidden, attention_mask=mask).logits
    assert float((u_shaped - whole).abs().max()) == 0.0
    assert float((two_part - whole).abs().max()) == 0.0
    assert float(whole.std()) > 0


def test_a_part_without_an_adapted_layer_trains_nothing(folder_of: Any) -> None:
    """A client that holds the embedding and the LM head only: LoRA on blocks leaves it without a trainable tensor."""
    ends = Part(0, 0, bottom=True, top=True)
    model, shape = load_model(folder_of("llama"), part=ends)
    base = peft().prepare(model, shape, task="causal", seed=5)
    assert base.initial == {}


def test_a_target_that_no_layer_has_is_an_error(folder_of: Any) -> None:
    model, shape = load_model(folder_of("llama"))
    with pytest.raises(ModelError, match=r"PEFT cannot put its adapter into this model: .*nowhere"):
        registry.create("peft", "lora", {"targets": ["nowhere"]}).prepare(model, shape, task="causal", seed=0)


# ---------------------------------------------------------------- only the shards that are needed


def files_of(folder: Path, part: Part, shape: Any) -> tuple[set[str], set[str]]:
    """The shards with a tensor of ``part``, and the others."""
    files = {path.name for path in folder.glob("*.safetensors")}
    needed = set()
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            if any(part.owns(shape.owner(key.replace("embed_out", "lm_head"))) for key in opened.keys()):  # noqa: SIM118
                needed.add(file)
    return needed, files - needed


@pytest.mark.parametrize(
    ("family", "mine"),
    [
        ("gpt2", CLIENT), ("gpt2", TRUNK), ("llama", CLIENT), ("llama", TRUNK), ("llama-tied", CLIENT), ("opt", BELOW),
        ("gpt_neox", CLIENT), ("gpt_neox", TRUNK), ("gemma3", BELOW), ("distilbert", CLIENT), ("distilbert", TRUNK),
    ],
    ids=lambda v: v if isinstance(v, str) else {CLIENT: "client", TRUNK: "trunk", BELOW: "head"}[v],
)  # fmt: skip
def test_a_party_works_with_the_other_s_shards_deleted(family: str, mine: Part, folder_of: Any, tmp_path: Path) -> None:
    source, task = folder_of(family), task_of(family)
    whole, shape = load_model(source, task=task)
    _, spare = files_of(source, mine, shape)
    assert spare, "the shards are too large for this test"
    folder = tmp_path / "part"
    folder.mkdir()
    for path in source.iterdir():
        if path.name not in spare:
            (folder / path.name).symlink_to(path)
    part, _ = load_model(folder, task=task, part=mine)
    tensors = dict(whole.named_parameters())
    assert all(torch.equal(p, tensors[n]) for n, p in part.named_parameters())
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder, task=task)  # the whole needs them


HUB_SCRIPT = """
import json, sys
from cutlayer.models.loading import Part, load_model
model, _ = load_model("owner/model", part=Part(START, STOP, bottom=False, top=False))
print(json.dumps({name: float(p.double().sum()) for name, p in model.named_parameters()}))
"""


def test_from_the_hub_only_the_needed_shards_are_downloaded(folder_of: Any, tmp_path: Path) -> None:
    source = folder_of("llama")
    (tmp_path / "hub/models/owner").mkdir(parents=True)
    (tmp_path / "hub/models/owner/model").symlink_to(source, target_is_directory=True)
    whole, shape = load_model(source)
    script = HUB_SCRIPT.replace("START", str(TRUNK.start)).replace("STOP", str(TRUNK.stop))
    with HubServer(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", script], env=hub.environment(tmp_path / "home"), capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tensors = {n: float(p.double().sum()) for n, p in whole.named_parameters() if TRUNK.owns(shape.owner(n))}
    assert found == tensors
    sent = {Path(path).name for path in hub.sent if path.endswith(".safetensors")}
    needed, spare = files_of(source, TRUNK, shape)
    assert sent == needed
    assert len(spare) > 3


# ---------------------------------------------------------------- what cannot be loaded


def test_a_checkpoint_that_lacks_a_tensor_is_refused(folder_of: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path / "whole", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for part in (None, TRUNK):
        with pytest.raises(ModelError, match=r"lacks 1 tensors, for instance 'model\.layers\.1\.mlp\.up_proj\.weight'"):
            load_model(folder, part=part)
    load_model(folder, part=Part(0, 1, bottom=True, top=False))  # it is not this party's


def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "whole", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelError):
        load_model(folder)


def test_new_classifier_weights_are_the_same_for_every_party(tmp_path: Path) -> None:
    """A checkpoint without a classification head: the head is drawn from the seed, by name."""
    folder = make_model(tmp_path / "lm", "llama")
    options: dict[str, Any] = {"task": "classification", "labels": ["a", "b", "c"]}
    whole, _ = load_model(folder, seed=4, **options)
    again, _ = load_model(folder, seed=4, part=ABOVE, **options)
    other, _ = load_model(folder, seed=5, **options)
    assert torch.equal(whole.score.weight, again.score.weight)
    assert not torch.equal(whole.score.weight, other.score.weight)
