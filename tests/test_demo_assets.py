"""The committed demo model and data are what the scripts in ``demo/`` make, and are fit for the demo."""

import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
MODEL = DEMO / "model"
sys.path.insert(0, str(DEMO))

import clinic_notes  # noqa: E402
import general_text  # noqa: E402
import grammar  # noqa: E402
import make_data  # noqa: E402
import make_model  # noqa: E402


def read_jsonl(name: str) -> list[dict[str, str]]:
    lines = (DEMO / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return read_jsonl("train.jsonl") + read_jsonl("valid.jsonl")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MODEL / "TRAINING.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def documents(record: dict[str, Any]) -> list[str]:
    """The text that the base model has read; it takes seconds to make."""
    return list(itertools.islice(general_text.general_documents(make_model.TEXT_SEED), record["documents"]))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture
def torch_settings() -> Any:
    """Training sets the thread count and deterministic operations for the whole process: put them back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


# -- the data --------------------------------------------------------------------------------------------------------


def test_data_files_are_exactly_what_make_data_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--out", str(tmp_path)])
    make_data.main()
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / "data" / name).read_bytes()


def test_data_has_three_clinics_of_unequal_size_interleaved() -> None:
    train, valid = read_jsonl("train.jsonl"), read_jsonl("valid.jsonl")
    assert Counter(row["clinic"] for row in train) == {"clinic-a": 260, "clinic-b": 200, "clinic-c": 140}
    assert Counter(row["clinic"] for row in valid) == {"clinic-a": 39, "clinic-b": 30, "clinic-c": 21}
    assert {row["clinic"] for row in train[:20]} == set(clinic_notes.CLINICS)
    assert {tuple(row) for row in train + valid} == {("clinic", "prompt", "completion")}


def test_validation_rows_are_not_in_train() -> None:
    train = {row["prompt"] for row in read_jsonl("train.jsonl")}
    valid = {row["prompt"] for row in read_jsonl("valid.jsonl")}
    assert len(valid) == 90
    assert not train & valid


def test_notes_repeat_the_facts_of_their_prompt(rows: list[dict[str, str]]) -> None:
    def numbers(text: str) -> set[str]:
        return set("".join(char if char.isdigit() else " " for char in text).split())

    for row in rows:
        told = numbers(row["prompt"].replace("SpO2", ""))
        if row["clinic"] == "clinic-c":  # the narrative leaves out the age
            told -= numbers(row["prompt"].splitlines()[1])
        assert told <= numbers(row["completion"]), row


def test_general_text_holds_no_clinic_notes(rows: list[dict[str, str]], documents: list[str]) -> None:
    """No line of any note or prompt is in the text the base model has read, but for the bare ``Temperature: 37.1``."""
    lines = {line for row in rows for line in (row["prompt"] + row["completion"]).splitlines() if line}
    lines -= {line for line in lines if line.startswith("Temperature: ")}  # the weather reports have this line too
    seen = {line for document in documents for line in document.splitlines()}
    assert not lines & seen
    assert not any(line.startswith(("Note:", "Patient:", "Subjective:", "Assessment:", "Triage:")) for line in seen)


# -- the general text and its grammar --------------------------------------------------------------------------------


def test_general_text_is_the_one_that_was_trained_on(
    record: dict[str, Any], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {make_model.TEXT_SEED: documents}
    monkeypatch.setattr(make_model, "general_documents", lambda seed: iter(made[seed]))
    assert make_model.text_sha256(record["documents"]) == record["text_sha256"]


def test_general_text_is_varied_and_complete() -> None:
    documents = list(itertools.islice(general_text.general_documents(5), 3000))
    text = "\n".join(documents)
    assert len(set(text.lower().replace(".", " ").replace(",", " ").split())) > 2000
    assert len(set(documents)) > 2950
    assert not set("{}[]%@|") & set(text)


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (grammar.past("carry"), "carried"),
        (grammar.past("stop"), "stopped"),
        (grammar.past("catch"), "caught"),
        (grammar.third("wash"), "washes"),
        (grammar.ing("bake"), "baking"),
        (grammar.plural("guinea pig"), "guinea pigs"),
        (grammar.plural("wolf"), "wolves"),
        (grammar.join_list(["a", "b", "c"]), "a, b and c"),
        (grammar.finish("a@ apple. a@ uniform. a@ 80-year-old"), "An apple. A uniform. An 80-year-old"),
    ],
)
def test_grammar(made: str, wanted: str) -> None:
    assert made == wanted


# -- the model -------------------------------------------------------------------------------------------------------


def test_model_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {
        "TRAINING.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 9_000_000


def test_weights_are_bfloat16_and_the_recorded_ones(record: dict[str, Any]) -> None:
    with safe_open(MODEL / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest() == record["weights_sha256"]


def test_model_is_a_llama_of_two_to_four_million_parameters(model: Any, record: dict[str, Any]) -> None:
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers == 8
    assert model.config.tie_word_embeddings
    assert model.config.attention_dropout == 0
    assert 2_000_000 < model.num_parameters() < 4_000_000
    assert model.num_parameters() == record["parameters"]


def test_tokenizer_special_tokens(tokenizer: Any, model: Any) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_tokenizer_round_trips_text(tokenizer: Any, rows: list[dict[str, str]]) -> None:
    texts = ["Hello  wörld 123/45\n\n  tab\t— 😀", " leading and trailing ", *(row["completion"] for row in rows[:50])]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompt_and_completion_tokenize_apart_as_together(tokenizer: Any, rows: list[dict[str, str]]) -> None:
    for row in rows:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        assert prompt + completion == tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert len(prompt) + len(completion) < 224


def test_tokenizer_is_reproduced(tokenizer: Any) -> None:
    made = make_model.train_tokenizer()
    assert made.get_vocab() == tokenizer.get_vocab()


@pytest.mark.usefixtures("torch_settings")
def test_training_begins_with_the_recorded_losses(tokenizer: Any, record: dict[str, Any]) -> None:
    batches = make_model.Batches(tokenizer, make_model.TEXT_SEED)
    losses = make_model.pretrain(make_model.new_model(tokenizer), batches, steps=3)
    assert losses == pytest.approx(record["first_losses"][:3], rel=1e-3)


def test_model_has_learnt_general_english(model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    loss = make_model.held_out_loss(model, tokenizer, batches=1)
    assert loss < 0.4 * math.log(len(tokenizer))
    assert loss == pytest.approx(record["held_out_loss"], rel=0.1)
