"""What is refused before a row or a weight is read, all of it at once, and with nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cutlayer
import cutlayer.run
from cutlayer.errors import ConfigError, CutlayerError, MethodError, ModelError, OutputError
from cutlayer.outputs import OURS
from cutlayer.run import dry_run
from spine import TWO, model
from tiny import text_rows, write_rows


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CutlayerError]:
    """The error of a run that is refused early; it fails if anything is read or written before."""

    def too_late(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("data or weights were read")

    monkeypatch.setattr(cutlayer.run, "prepare_data", too_late)
    monkeypatch.setattr(cutlayer.run, "load_base", too_late)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", text_rows(6))

    def refuse(family: str = "llama", out: str = "out", **changes: Any) -> CutlayerError:
        before = sorted(tmp_path.rglob("*"))
        config = {"model": str(model(family)), "data": {"train": "rows.jsonl"}, "partition": TWO, **changes}
        with pytest.raises(CutlayerError) as caught:
            cutlayer.train(config, out=out)
        assert sorted(tmp_path.rglob("*")) == before
        return caught.value

    return refuse


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is there")
def test_a_device_that_is_not_there(said: Any, tmp_path: Path) -> None:
    assert "device is 'cuda', which this machine does not have" in str(said(device="cuda"))
    config = {"model": str(model()), "data": {"train": "rows.jsonl"}, "device": "cuda", "partition": TWO}
    assert dry_run(config).summary["parties"]  # which is for another machine


@pytest.mark.parametrize(
    ("peft", "told"),
    [
        ({"targets": ["q_prj", "v_proj"]}, "'q_prj', which no layer of this model is. Did you mean 'q_proj' or"),
        ({"targets": ["layers.7.mlp.up_proj"]}, ".mlp.up_proj' or 'layers."),
        ({"targets": ["v_proj", "zzz"]}, "'zzz', which no layer of this model is. Layers: down_proj, embed_tokens,"),
        ({"targets": "q_proj"}, "for the end of it write the list [q_proj]"),
        ({"targets": r".*layers\.[0-9]\.mlp\.upp_proj"}, "upp_proj', which no layer of this model is."),
        ({"targets": ["mlp"]}, "'mlp', which means 'model.layers.0.mlp', a LlamaMLP; PEFT adapts single"),
        ({"targets": ["input_layernorm"]}, "'model.layers.0.input_layernorm', a LlamaRMSNorm"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern has 'q_prj', which no adapted layer is. Did you mean 'q_proj'"),
        ({"targets": ["v_proj"], "rank_pattern": {"q_proj": 2}}, "'q_proj', which no adapted layer is."),
        ({"rank": 33}, "rank is 33, but no layer that gets it can have a rank above 32."),
        ({"rank": 17, "targets": ["k_proj"]}, "above 16"),
        ({"rank_pattern": {"k_proj": 17}}, "rank_pattern gives 'k_proj' the rank 17, but no layer"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit(peft: dict[str, Any], told: str, said: Any) -> None:
    error = said(peft={"name": "lora", **peft})
    assert isinstance(error, MethodError)
    assert told in str(error)
    assert len(str(error).splitlines()) == 1


def test_several_mistakes_of_an_adapter_come_at_once(said: Any) -> None:
    error = str(said(peft={"name": "lora", "targets": ["q_prj", "k_proj", "vproj"], "rank": 99}))
    assert all(told in error for told in ("'q_prj'", "'vproj'", "rank is 99"))
    with pytest.raises(MethodError, match="'q_prj'"):
        dry_run({"model": str(model()), "data": {"train": "rows.jsonl"}, "partition": TWO, "peft": {
            "name": "lora", "targets": ["q_prj", "k_proj"]
        }})  # fmt: skip


@pytest.mark.parametrize(("family", "layers"), [("gpt2", ["c_attn", "wte"]), ("bert", ["query", "word_embeddings"])])
def test_layers_that_are_not_linear_have_names_too(family: str, layers: list[str], said: Any) -> None:
    data = {"train": "rows.jsonl", "format": "classification" if family == "bert" else "text"}
    error = said(family, peft={"name": "lora", "targets": [*layers, "zzz"]}, data=data)
    assert "targets has 'zzz'" in str(error)
    assert all(layer in str(error).partition("Layers: ")[2] for layer in layers)


def test_the_layer_that_a_classifier_trains_whole_takes_no_adapter(said: Any) -> None:
    data = {"train": "rows.jsonl", "format": "classification"}
    error = said("bert", peft={"name": "lora", "targets": ["query", "classifier"]}, data=data)
    assert "'classifier', which no layer of this model is" in str(error)


def test_an_attention_that_there_is_not(said: Any) -> None:
    assert "attn_implementation is 'sdap'. Did you mean 'sdpa'? 'llama' has: eager, sdpa," in str(
        said(attn_implementation="sdap")
    )
    assert "attn_implementation is 'paged|nothing'" in str(said(attn_implementation="paged|nothing"))
    assert "which cannot be had here" in str(said(attn_implementation="nobody/no-kernel"))


def test_a_model_that_cannot_be_cut(said: Any) -> None:
    error = said("bert")
    assert isinstance(error, ModelError)
    assert "each position sees its own label" in str(error)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("rows.jsonl", "is a file. Name a new folder."),
        ("rows.jsonl/wire", "is below"),
        ("out", "is in the output folder out"),
        ("out/wire", "is in the output folder out"),
        ("../{name}/out/wire", "is in the output folder out"),
        (".", "has the output folder out in it"),
        ("used", "holds the frames of another run"),
    ],
)
def test_a_record_where_it_cannot_be(record: str, told: str, said: Any, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "frames.bin").touch()
    error = said(record_wire=record.format(name=tmp_path.name))
    assert isinstance(error, ConfigError)
    assert error.problems[0].startswith("record_wire names ")
    assert told in error.problems[0]


def test_an_output_folder_in_use(said: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").touch()
    error = said(out="mine")
    assert isinstance(error, OutputError)
    assert str(error) == "mine exists and is not empty. Give another --out."
    (tmp_path / "mine" / "run.yaml").touch()  # a user's own run file
    assert "--resume" not in str(said(out="mine"))
    (tmp_path / "mine" / "run.yaml").write_text(OURS)
    assert "not empty. Go on with its run by --resume mine, or give another --out." in str(said(out="mine"))
    assert "rows.jsonl exists and is a file" in str(said(out="rows.jsonl"))


def test_a_folder_that_cannot_be_made(said: Any, tmp_path: Path) -> None:
    long = "x" * 300
    assert "The output folder" in str(said(out=long))
    assert "The output folder" in str(said(out=f"new/{long}"))
    error = str(said(record_wire=f"wire/{long}"))
    assert "The folder of record_wire" in error
    assert "Name another." in error


def test_all_comes_at_once(said: Any) -> None:
    error = said(
        attn_implementation="sdap", record_wire="out", peft={"name": "lora", "targets": ["q_prj"]}, device="cuda:99"
    )
    assert isinstance(error, ConfigError)
    told = ["device is 'cuda:99'", "attn_implementation is", "peft 'lora': targets has 'q_prj'", "record_wire names"]
    assert [problem.startswith(start) for problem, start in zip(error.problems, told, strict=True)] == [True] * 4
