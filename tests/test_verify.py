"""The check at the start of a run: which models it compares with their uncut selves, and how it refuses some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, CodeGenConfig, CTRLConfig, XGLMConfig, XLMRobertaConfig

from cutlayer.errors import ConfigError, ModelError, NotExact
from cutlayer.models import verify as checks
from cutlayer.models.standins import Skip
from spine import model, train
from tiny import BLOCKS, VOCAB, make_tokenizer, text_rows

ROWS = {"client-0": text_rows(4)}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NOT_TO_BE_CUT = {
    "ctrl": lambda: CTRLConfig(
        vocab_size=VOCAB, n_embd=32, dff=48, n_layer=BLOCKS, n_head=4, n_positions=64, **SPECIAL
    ),
    "xglm": lambda: XGLMConfig(
        vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=BLOCKS, attention_heads=4, max_position_embeddings=64,
        **SPECIAL,
    ),
}  # fmt: skip


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The family of each model that is compared."""
    families: list[str] = []
    original = checks.compare

    def compare(base: Any, *args: Any, **options: Any) -> Any:
        families.append(base.model.config.model_type)
        return original(base, *args, **options)

    monkeypatch.setattr(checks, "compare", compare)
    return families


def test_unknown_families_are_compared_at_the_start(compared: list[str], tmp_path: Path) -> None:
    """Known ones only where the run says so."""
    for family, changes in (("bloom", {}), ("llama", {}), ("llama", {"verify": "always"})):
        train(model(family), tmp_path / f"{family}{len(changes)}", ROWS, rounds=1, **changes)
    assert compared == ["bloom", "llama"]


def test_a_large_unknown_family_is_compared_on_request(
    compared: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checks, "LARGE", 1000)
    with pytest.raises(ModelError, match=r"'bloom' is not known .* not compared .* unasked\. Set verify: always"):
        train(model("bloom"), tmp_path / "unasked", ROWS, rounds=1)
    assert not (tmp_path / "unasked").exists()
    assert not compared
    train(model("llama"), tmp_path / "known", ROWS, rounds=1)
    train(model("bloom"), tmp_path / "asked", ROWS, rounds=1, verify="always")
    assert compared == ["bloom"]


def test_a_difference_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Skip, "forward", lambda self, hidden, *args, **options: hidden * 1.01)
    with pytest.raises(
        NotExact, match=r"'llama' is known to be cut exactly, but it is not: .* differs .* by 0\."
    ) as known:
        train(model(), tmp_path / "known", ROWS, rounds=1, verify="always")
    assert known.value.difference > 1e-4
    assert not (tmp_path / "known").exists()


def test_never_is_no_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verify is 'never'"):
        train(model(), tmp_path / "out", ROWS, verify="never")


@pytest.mark.parametrize("family", NOT_TO_BE_CUT)
def test_a_family_that_fails_when_cut(family: str, tmp_path: Path) -> None:
    """CTRL scales in place what it is given, XGLM adds positions of another shape: nobody knew, the check finds out."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(NOT_TO_BE_CUT[family]()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match=f"'{family}' got through a small batch uncut, but failed on it when cut"):
        train(folder, tmp_path / "out", ROWS, rounds=1)
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_uncut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not said to be the cut's fault."""

    def fails(*args: Any) -> Any:
        raise IndexError("no such token.")

    monkeypatch.setattr(checks, "_uncut", fails)
    with pytest.raises(ModelError, match=r"'bloom' fails on a small batch even uncut \(IndexError: no such token\)"):
        train(model("bloom"), tmp_path / "out", ROWS, rounds=1)


def other_family(folder: Path, config: Any) -> Path:
    """A random model of a family that is not on the list."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_family_whose_configuration_names_no_padding(tmp_path: Path) -> None:
    """CodeGen's has no ``pad_token_id`` at all; it is cut exactly, and trained."""
    config = CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64)
    folder = other_family(tmp_path / "codegen", config)
    assert all(found.passed for found in checks.verify(str(folder), cut=1))
    train(folder, tmp_path / "out", ROWS, rounds=1)


def test_an_encoder_of_any_family_learns_no_text(tmp_path: Path) -> None:
    """Not by its name: a change of the last token changes what is said before it."""
    config = XLMRobertaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, **SPECIAL,
    )  # fmt: skip
    folder = other_family(tmp_path / "xlm-roberta", config)
    for look in (lambda: checks.verify(str(folder), cut=1), lambda: train(folder, tmp_path / "out", ROWS, rounds=1)):
        with pytest.raises(ModelError, match="each position sees its own label"):
            look()
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """Transformers makes an empty one of nothing, which would turn every word into the unknown one."""
    folder = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(model()).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"knows no word|cannot be loaded"):
        train(folder, tmp_path / "out", ROWS, rounds=1)
    assert not (tmp_path / "out").exists()
