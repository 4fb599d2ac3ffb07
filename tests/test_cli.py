"""The command line: what it hands on, what it prints, and that a mistake is one paragraph and exit code 2."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import cutlayer
from cutlayer import registry
from cutlayer.cli.console import ADVICE
from cutlayer.cli.main import app
from cutlayer.errors import DataError, ModelError
from cutlayer.report.progress import Quiet, RichProgress, readable
from cutlayer.report.tables import dry_run_table, summary_table

SUMMARY = {
    "framework": "sfl-v2",
    "partition": "u-shaped-split",
    "clients": ["clinic-a", "clinic-b"],
    "parties": {
        "clinic-a": {"blocks": "embeddings, blocks 0-1", "parameters": 1000, "trainable_parameters": 10,
                     "peak_memory_bytes": 4_200_000},
        "server": {"blocks": "blocks 2-7", "parameters": 31_000, "trainable_parameters": 300,
                   "peak_memory_bytes": 12_345},
    },
    "eval": {"before": {"loss": 3.25, "perplexity": 25.79}, "after": {"loss": 2.5, "perplexity": 12.1825},
             "history": []},
    "bytes": {"partition": 100, "send_activations": 2_000_000, "tail_step": 0},
    "tokens_per_second": 1234.5,
    "adapter": "adapter",
}  # fmt: skip
OUT = Path("/a/very/[bold]/long path/" + "x" * 200)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as end:
        app(list(arguments))
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    return int(end.value.code or 0), said.out, said.err


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for ``cutlayer.run``: keeps what ``train`` and ``dry_run`` are called with."""
    kept: list[dict[str, Any]] = []

    def train(source: Any, **options: Any) -> Any:
        kept.append({"source": source, **options})
        return SimpleNamespace(summary=SUMMARY, out=OUT)

    def dry_run(source: Any, overrides: Any) -> Any:
        kept.append({"source": source, "overrides": overrides})
        return SimpleNamespace(summary=SUMMARY)

    stand_in(monkeypatch, SimpleNamespace(train=train, dry_run=dry_run))
    return kept


def stand_in(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    monkeypatch.setitem(sys.modules, "cutlayer.run", module)
    monkeypatch.setattr(cutlayer, "run", module, raising=False)


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train(source: Any, **options: Any) -> Any:
        raise error

    stand_in(monkeypatch, SimpleNamespace(train=train))


def test_help_is_quick_and_needs_no_pytorch() -> None:
    code = "import sys, cutlayer.cli.main as m; print({'torch', 'transformers', 'peft'} & set(sys.modules)); m.main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("set()")
    for name in ("train", "plan", "verify", "methods", "generate", "keys", "serve", "join"):
        assert f"  {name} " in done.stdout


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"cutlayer {cutlayer.__version__}\n")


def test_train_hands_on_what_was_given(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "run.yaml", "seed=1", "data.train=a=b", "--out", "there")
    (call,) = calls
    assert code == 0
    assert isinstance(call.pop("progress"), RichProgress)
    assert call == {
        "source": "run.yaml",
        "out": Path("there"),
        "resume": None,
        "overrides": ["seed=1", "data.train=a=b"],
    }
    assert "sfl-v2, u-shaped-split, 2 clients" in out
    assert f"Result: {OUT}/adapter\n" in out


def test_train_takes_a_run_from_overrides_alone(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "train", "model=m", "data.train=x")[0] == 0
    assert calls[0]["source"] == {}
    assert calls[0]["overrides"] == ["model=m", "data.train=x"]


def test_a_run_file_may_have_a_sign_in_its_name(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "lr=1.yaml"
    file.write_text("model: m\n")
    assert run(capsys, "train", str(file), "seed=1")[0] == 0
    assert calls[0]["source"] == str(file)


def test_resume_needs_no_run_file(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train", "--resume", "there")[0] == 0
    assert calls[0]["source"] is None
    assert calls[0]["resume"] == Path("there")


def test_a_dry_run_shows_who_would_hold_what(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "run.yaml", "seed=1", "--dry-run")
    assert code == 0
    assert calls == [{"source": "run.yaml", "overrides": ["seed=1"]}]
    assert "embeddings, blocks 0-1" in out
    assert "bytes of one step of one client" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "Give a run file"),
        (["train", "a.yaml", "b.yaml"], "Only one run file can be given, but there are a.yaml, b.yaml."),
        (["train", "a.yaml", "seed", "=", "3"], "Only one run file can be given"),
        (["train", "a.yaml", "--resume", "out"], "--resume takes the run as it was"),
        (["train", "seed=1", "--resume", "out"], "--resume takes the run as it was"),
        (["train", "--out", "x", "--resume", "out"], "--resume goes on in its own folder"),
        (["train", "--dry-run", "--resume", "out"], "--resume goes on in its own folder"),
        (["train", "a.yaml", "--ot", "x"], "No such option: --ot"),
        (["trian"], "No such command 'trian'."),
        (["verify"], "Missing argument"),
        (["verify", "m", "--cut", "-1"], "Invalid value for '--cut'"),
        (["verify", "m", "--cut", "two"], "Invalid value for '--cut'"),
        (["verify", "m", "--precision", "int8"], "Invalid value for '--precision'"),
        (
            ["verify", "m", "--partition", "u-shape-split"],
            "There is no partition 'u-shape-split'. Did you mean 'u-shaped-",
        ),
        (
            ["methods", "--family", "codecs"],
            "'codecs' is no family of methods. Did you mean 'codec'? Families: framework",
        ),
        (["methods", "sfl-lea"], "There is no method 'sfl-lea'. Did you mean 'sfl-leo'? cutlayer methods lists all"),
        (["methods", "sfl-leo", "--family", "planner"], "There is no method 'sfl-leo' of the family 'planner'."),
        (["methods", "own.py"], "'own.py' is a method file. Say of which family, such as --family codec."),
        (["plan"], "Give a run file: cutlayer plan run.yaml"),
        (["generate", "m", "a"], "Missing argument"),
    ],
)
def test_usage_errors_are_readable_and_exit_with_2(
    arguments: list[str], said: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out, calls) == (2, "", [])
    assert said in err


def test_all_mistakes_of_a_run_file_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run [red].yaml"
    file.write_text("modle: x\ndata: {train: x}\nframework: sfl-v3\n")
    code, out, err = run(capsys, "train", str(file), "batch_size=0", "--out", str(tmp_path / "out"))
    assert (code, out) == (2, "")
    assert err.startswith(f"Error: 4 mistakes in {file}:\n  - model is missing.")
    assert len(err.splitlines()) == 5
    assert not (tmp_path / "out").exists()


def test_a_run_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", "no.yaml")
    assert code == 2
    assert "Error: 1 mistake in no.yaml:\n  - there is no such file" in err


def test_an_error_is_printed_as_it_stands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    message = "The file /a/[bold]b[/bold]/:smile:/" + "long " * 60 + "is empty."
    failing(monkeypatch, DataError(message))
    assert run(capsys, "train", "run.yaml") == (2, "", f"Error: {message}\n")


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, DataError("empty"))
    monkeypatch.setenv("CUTLAYER_DEBUG", "1")
    with pytest.raises(SystemExit) as end:
        app(["train", "run.yaml"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("Error: empty\n")


@pytest.mark.parametrize("number", sorted(ADVICE))
def test_errors_of_disk_and_rights_say_what_where_and_what_to_do(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, OSError(number, os.strerror(number), "/out/adapter"))
    said = f"Error: /out/adapter: {os.strerror(number).lower()}. {ADVICE[number]}\n"
    assert run(capsys, "train", "run.yaml") == (2, "", said)


def test_a_full_disk_under_a_library_that_is_not_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, RuntimeError("I/O error: No space left on device (os error 28)"))
    code, _, err = run(capsys, "train", "run.yaml")
    assert code == 2
    assert ADVICE[errno.ENOSPC] in err


def test_too_little_memory_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, MemoryError())
    code, _, err = run(capsys, "train", "run.yaml")
    assert code == 2
    assert "Take a smaller batch_size" in err


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyboardInterrupt("go on with: cutlayer train --resume 'my out'"))
    assert run(capsys, "train", "run.yaml") == (130, "", "Stopped: go on with: cutlayer train --resume 'my out'\n")
    failing(monkeypatch, KeyboardInterrupt())
    assert run(capsys, "train", "run.yaml") == (130, "", "Stopped: before anything was written.\n")


@pytest.mark.parametrize("error", [KeyError("x"), FileNotFoundError(2, "No such file", "inner"), OSError("odd")])
def test_our_own_mistakes_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        app(["train", "run.yaml"])
    assert "Please report it" in caught.value.__notes__[0]


def comparison(passed: bool = True, exact: bool = True) -> Any:
    return SimpleNamespace(
        partition="u-shaped-split", head_blocks=2, trunk_blocks=5, tail_blocks=1, loss=0.0 if exact else 3e-7,
        logits=0.0, gradients=0.0, tolerance=1e-5, exact=exact, passed=passed,
    )  # fmt: skip


def test_verify_tells_by_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import cutlayer.models.verify as module

    given: dict[str, Any] = {}
    answer: list[Any] = [comparison(), comparison(exact=False)]

    def compare(model: str, **options: Any) -> list[Any]:
        given.update(model=model, **options)
        if not answer:
            raise ModelError("no such family")
        return answer

    monkeypatch.setattr(module, "verify", compare)
    code, out, _ = run(capsys, "verify", "some/model", "--cut", "2", "--tail", "1", "--partition", "u-shaped-split")
    assert code == 0
    assert "Split equals unsplit: all 2 cuts of some/model are within the tolerance, 1 bit for bit." in out
    assert given == {
        "model": "some/model", "cut": 2, "tail": 1, "partition": "u-shaped-split", "precision": "float32",
        "attn_implementation": None, "tokens": 16, "task": "causal", "device": "auto",
    }  # fmt: skip
    answer.append(comparison(passed=False, exact=False))
    code, out, _ = run(capsys, "verify", "some/model", "--precision", "bfloat16", "--task", "classification")
    assert code == 1
    assert "DIFFERS" in out
    assert "NOT EQUAL: 1 of 3 cuts" in out
    assert (given["precision"], given["task"], given["cut"]) == ("bfloat16", "classification", None)
    answer.clear()
    assert run(capsys, "verify", "some/model") == (2, "", "Error: no such family\n")


def test_methods_are_listed_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "methods", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {(row["family"], row["id"]) for row in rows} == {(c.family, c.id) for c in registry.cards()}
    assert all(list(row) == ["id", "family", "summary", "paper", "needs"] for row in rows)
    code, out, _ = run(capsys, "methods", "--family", "partition")
    assert code == 0
    assert "u-shaped-split" in out
    assert "sfl-v2" not in out
    assert json.loads(run(capsys, "methods", "--family", "unlearning", "--json")[1]) == []
    assert "no method of the family 'unlearning' yet" in run(capsys, "methods", "--family", "unlearning")[1]


def test_a_method_is_shown_with_its_card_and_its_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "methods", "sfl-leo")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "aggregator: sfl-leo"
    assert lines[1].startswith("Weigh an upload by its client's data and a penalty for its delay")
    assert lines[2].startswith("paper: SFL-LEO, arXiv:2504.13479")
    assert lines[3] == "needs: a framework that lets clients run on: async-sfl"
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert ["d_max", "8", "the last delay that counts, in versions; null: all do"] in rows
    assert ["column", "must be given"] in [
        [cell.strip() for cell in line.strip("│").split("│")][:2]
        for line in run(capsys, "methods", "by-column")[1].splitlines()
    ]
    assert run(capsys, "methods", "mhsl", "--family", "aggregator")[1].endswith("It has no options.\n")
    (told,) = json.loads(run(capsys, "methods", "sfl-leo", "--json")[1])
    assert list(told) == ["id", "family", "summary", "paper", "needs", "options"]
    assert told["options"][3] == {"name": "buffer", "default": "1", "about": "uploads that are merged together"}
    own = tmp_path / "own.py"
    own.write_text((registry.ROOT / "aggregator/sfl_leo.py").read_text())
    shown = run(capsys, "methods", str(own), "--family", "aggregator")[1]
    assert shown == out.replace("aggregator: sfl-leo", "aggregator: own")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two tiny random models with a tokenizer, an adapter of the first, and the first saved whole."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<s>", *"abcdefg"])}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = {}
    for name, width, layers in (("base", 16, 2), ("wide", 32, 2), ("deep", 16, 3), ("shallow", 16, 1)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>").save_pretrained(folder / name)
        made[name] = str(folder / name)
    base = LlamaForCausalLM.from_pretrained(made["base"])
    get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        folder / "adapter"
    )
    made["adapter"] = str(folder / "adapter")
    return made


def test_generate_prints_the_same_text_each_time(tiny: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", tiny["base"], tiny["adapter"], "a b c", "--max-new-tokens", "5", "--device", "cpu"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out.startswith("a b c")
    assert run(capsys, *arguments)[1] == out
    assert run(capsys, *arguments[:2], tiny["base"], *arguments[3:])[1] == out  # the new adapter changes nothing
    assert run(capsys, *arguments, "--temperature", "0.7")[0] == 0


@pytest.mark.parametrize(
    ("model", "adapter", "prompt", "said"),
    [
        ("base", "nowhere", "a", "The adapter folder 'nowhere' does not exist."),
        ("/nowhere", "adapter", "a", "The model folder '/nowhere' does not exist."),
        ("wide", "adapter", "a", "was not tuned from"),
        ("deep", "adapter", "a", "its num_hidden_layers is 2, there it is 3."),
        ("wide", "moved", "a", "does not fit"),
        ("deep", "moved", "a", "it lacks 14 tensors"),
        ("shallow", "moved", "a", "14 of its tensors have no place"),
        ("base", "wide", "a", "its hidden_size is 32, there it is 16."),
        ("base", "empty", "a", "holds neither adapter_config.json nor config.json."),
        ("base", "broken", "a", "adapter_config.json' cannot be read:"),
        ("base", "classifier", "a", "is for the task SEQ_CLS; it writes no text."),
        ("base", "cut", "a", "does not fit"),
        ("base", "adapter", "", "The prompt is empty"),
        ("base", "adapter", "a " * 30, "The prompt has 30 tokens; with 5 new ones that is more than the 32 positions"),
    ],
)
def test_generate_refuses_what_does_not_fit(
    model: str, adapter: str, prompt: str, said: str, tiny: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = dict(tiny)
    for name in ("empty", "broken", "classifier", "cut", "moved"):
        made[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    config = json.loads((Path(tiny["adapter"]) / "adapter_config.json").read_text())
    (tmp_path / "cut" / "adapter_config.json").write_text(json.dumps(config))
    weights = (Path(tiny["adapter"]) / "adapter_model.safetensors").read_bytes()
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    config_of_moved = config | {"base_model_name_or_path": "gone", "target_modules": [
        "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"
    ]}  # fmt: skip
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(config_of_moved))
    (tmp_path / "moved" / "adapter_model.safetensors").write_bytes(weights)
    (tmp_path / "classifier" / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    code, out, err = run(
        capsys, "generate", made.get(model, model), made.get(adapter, adapter), prompt, "--max-new-tokens", "5"
    )
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def printed(thing: Any, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(thing, crop=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_summary_shows_who_held_what_and_what_it_brought() -> None:
    lines = printed(summary_table(SUMMARY, OUT), width=80).splitlines()
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    assert ["clinic-a", "embeddings, blocks 0-1", "1,000", "10", "4.2 MB"] in rows
    assert ["before", "3.2500", "25.7900"] in rows
    assert ["after", "2.5000", "12.1825"] in rows
    assert ["send_activations", "2,000,000", "2.0 MB"] in rows
    assert ["all", "2,000,100", "2.0 MB"] in rows
    assert not any("tail_step" in line for line in lines)
    assert f"Result: {OUT}/adapter" in lines
    without = {key: value for key, value in SUMMARY.items() if key not in ("eval", "adapter", "tokens_per_second")}
    assert "perplexity" not in printed(summary_table(without | {"clients": 1}, OUT))
    assert "1 client\n" in printed(dry_run_table(without | {"clients": 1}))


def record(loss: float, **other: Any) -> dict[str, Any]:
    return {"step": 0, "round": 1, "client": "a[b]", "loss": loss, "tokens": 50, "bytes_up": 400_000,
            "bytes_down": 100_000, "seconds": {}, **other}  # fmt: skip


def test_without_a_terminal_progress_is_a_line_now_and_then() -> None:
    times = iter([0.0, 1.0, 2.0, 11.5, 12.0, 13.0])
    console = Console(file=io.StringIO(), width=40)
    progress = RichProgress(console, every=10.0, clock=lambda: next(times))
    progress.start(5)
    for number in range(5):
        progress.update(record(3.0 - number))
    progress.note("a [note] that is longer than the console is wide")
    progress.stop()
    progress.stop()
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 1/5  round 1  a[b]  loss 3.0000  50 tokens/s  500.0 kB sent",
        "step 3/5  round 1  a[b]  loss 1.0000  13 tokens/s  1.5 MB sent",
        "step 5/5  round 1  a[b]  loss -1.0000  19 tokens/s  2.5 MB sent",
        "a [note] that is longer than the console is wide",
    ]


def test_in_a_terminal_progress_is_a_bar() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    progress = RichProgress(console)
    progress.start(2)
    progress.update(record(3.0))
    progress.note("halfway")
    progress.update(record(2.5))
    progress.stop()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "halfway" in text
    assert "2/2" in text
    assert "loss 2.5000" in text
    assert "1.0 MB sent" in text


def test_quiet_takes_everything_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Quiet()
    progress.start(1)
    progress.update(record(1.0))
    progress.note("x")
    progress.stop()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5e12, "5.0 TB")]
)
def test_bytes_are_readable(count: float, said: str) -> None:
    assert readable(count) == said


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -c 'from cutlayer.cli.main import main; main()' methods --json | head -c 1",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
