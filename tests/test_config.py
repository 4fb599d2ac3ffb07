"""The configuration: each kind of mistake is one clear sentence, all come at once, and a run survives its dump."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cutlayer import registry
from cutlayer.config import DataConfig, OptimizerConfig, RunConfig, check_profile, dump, load_config, resolved
from cutlayer.config_check import DRIVEN
from cutlayer.config_optimizer import SCHEDULES, UNFIT_ARGUMENTS
from cutlayer.config_read import parse_value
from cutlayer.errors import ConfigError, DataError, MethodError

SMALL = "model: tiny\ndata: {train: rows.jsonl}\n"
JARGON = ("Input should be", "Extra inputs", "type=", "pydantic", "Value error", "Field required")

CODEC = '''"""Keep the k largest."""
from dataclasses import dataclass, field
from cutlayer.registry import method

@method("codec")
@dataclass
class Keep:
    """Keep the k largest."""
    ratio: float = 0.1
    shape: tuple[int, int] = (2, 3)
    names: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; it must be in (0, 1].")
'''


@pytest.fixture
def codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("cutlayer.config_check.DRIVEN", (*DRIVEN, "codec"))
    file = tmp_path / "keep.py"
    file.write_text(CODEC)
    return str(file)


def mistakes(source: str | Path | dict, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    found = caught.value.problems
    assert not any(word in problem for problem in found for word in JARGON), found
    assert not any("\n" in problem for problem in found), found
    return found


# What is wrong, and the sentences that must come (their beginnings); nothing else may come.
MISTAKES = {
    "unknown key": ("modle: x\n", ["modle: a run has no key 'modle'. Did you mean 'model'?"]),
    "unknown key of data": ("data.pakking=true", ["data.pakking: data has no key 'pakking'. Did you mean 'packing'?"]),
    "unknown key of a client": (
        "clients: [{name: a, hed_blocks: 2}]\n",
        ["clients.0.hed_blocks: clients.0 has no key 'hed_blocks'. Did you mean 'head_blocks'? Keys: name, data"],
    ),
    "unknown key of a client's data": (
        "clients: [{name: a, data: {train: x, evel: y}}]\n",
        ["clients.0.data.evel: clients.0.data has no key 'evel'. Keys: train, format, columns."],
    ),
    "unknown optimizer argument": (
        "optimizer: {weigth_decay: 0.1}\n",
        ["optimizer.weigth_decay: 'adamw' has no such argument. Did you mean 'weight_decay'? Keys: name, lr"],
    ),
    "argument of another optimizer": (
        "optimizer: {name: sgd, betas: [0.9, 0.99]}\n",
        ["optimizer.betas: 'sgd' has no such argument."],
    ),
    "argument of the wrong type": ("optimizer.betas=fast", ["optimizer.betas is 'fast': must be a list of numbers."]),
    "argument with too few entries": ("optimizer.betas=[0.9]", ["optimizer.betas is [0.9]: has too few entries."]),
    "argument that PyTorch refuses": (
        "optimizer.betas=[0.9, 1.5]",
        ["optimizer: PyTorch's AdamW refuses these values: Invalid beta parameter at index 1: 1.5."],
    ),
    "argument for captured graphs": ("optimizer.capturable=true", ["optimizer.capturable: 'adamw' has no"]),
    "unknown optimizer": ("optimizer.name=adamv", ["optimizer.name is 'adamv'. Did you mean 'adam"]),
    "unfit optimizer": ("optimizer.name=LBFGS", ["optimizer.name is 'lbfgs', which does not work here: it evaluates"]),
    "unknown schedule": ("optimizer.schedule=cosin", ["optimizer.schedule is 'cosin'. Did you mean 'cosine'?"]),
    "warm-up without use": ("optimizer.warmup=10", ["optimizer.warmup is 10, but the schedule 'constant'"]),
    "half a step of warm-up": ("optimizer.warmup=1.5", ["optimizer.warmup is 1.5: must be a whole number of steps"]),
    "not a number": ("optimizer.lr=.nan", ["optimizer.lr is nan: must be a finite number."]),
    "text for a number": ("optimizer.lr=high", ["optimizer.lr is 'high': must be a number."]),
    "text for a whole number": ("batch_size='4'", ["batch_size is '4': must be a whole number."]),
    "part of a whole number": ("batch_size=1.5", ["batch_size is 1.5: must be a whole number."]),
    "truth for a number": ("seed=true", ["seed is true: must be a whole number."]),
    "text for truth": ("data.packing=maybe", ["data.packing is 'maybe': must be true or false."]),
    "number for text": ("model=5", ["model is 5: must be a text"]),
    "nothing for text": ("model=null", ["model is null: must be a text"]),
    "nothing for a number": ("batch_size=null", ["batch_size is null: must be a whole number."]),
    "an override with nothing": (
        "rounds=",
        ["the override 'rounds=' cannot be read: there is nothing after the '='; write null for no value, '' for an"],
    ),
    "an option of the wrong type": (
        "framework.local_steps='8'",
        ["framework: framework 'sfl-v2': option 'local_steps' is '8': must be a whole number."],
    ),
    "truth for an option that is a number": (
        "peft.rank=true", ["peft: peft 'lora': option 'rank' is True: must be a whole number."],
    ),
    "a pattern that is none": ("peft.targets='q_(proj'", ["peft: peft 'lora': 'q_(proj' is no regular expression:"]),
    "no targets": ("peft.targets=[]", ["peft: peft 'lora': targets is empty"]),
    "an adapter without effect": ("peft.alpha=0", ["peft: peft 'lora': alpha is 0"]),
    "different cuts": (
        "clients: [{name: a}, {name: b, head_blocks: 1}, {name: c, head_blocks: 2}]\nframework: sequential-sl\n",
        ["client 'b' has another cut (head_blocks, tail_blocks) than 'a', but framework 'sequential-sl' hands"],
    ),
    "a cut beside a planner": (
        "clients: [{name: a}, {name: b, head_blocks: 1}]\nplanner: splitft-adaptive-cut\n",
        ["client 'b' has head_blocks, but planner 'splitft-adaptive-cut' sets all cuts. Leave head_blocks out"],
    ),
    "a profile for some": (
        "clients: [{name: a, profile: laptop}, {name: b}, {name: c}]\n",
        ["clients 'b' and 'c' have no profile, but other clients have one"],
    ),
    "value for a mapping": ("data=rows.jsonl", ["data is 'rows.jsonl': must be a mapping {key: value}."]),
    "number for a method": ("peft=3", ["peft is 3: must be a method's id, or {name: id, option: value}."]),
    "too small": ("gradient_accumulation=0", ["gradient_accumulation is 0: must be at least 1."]),
    "fraction too large": ("data.eval_fraction=1", ["data.eval_fraction is 1: must be less than 1."]),
    "not a choice": ("data.format=promt-completion", ["data.format is 'promt-completion'. Did you mean 'prompt"]),
    "not a precision": ("precision=int8", ["precision is 'int8'. Allowed: float32, bfloat16, float16."]),
    "no device": ("device=cude", ["device is 'cude'. Did you mean 'cuda'? Allowed: auto, cpu, cuda, cuda:0,"]),
    "no clients": ("clients=0", ["clients is 0: must be at least 1."]),
    "empty clients": ("clients=[]", ["clients is an empty list."]),
    "clients as text": ("clients=three", ["clients is 'three': must be a number of clients, or a list of clients"]),
    "client without name": ("clients=[{head_blocks: 1}]", ["clients.0.name is missing. It is a name."]),
    "same name": ("clients=[{name: a}, {name: b}, {name: A}]", ["clients.2.name is 'A', as clients.0.name ('a')."]),
    "name with a slash": ("clients=[{name: a/b}]", ["clients.0.name is 'a/b'. A name has letters, digits"]),
    "name that climbs": ("clients=[{name: ..}]", ["clients.0.name is '..'. A name has letters, digits"]),
    "name with a line break": ('clients=[{name: "a\\n"}]', ["clients.0.name is 'a"]),
    "long name": (f"clients=[{{name: {'x' * 65}}}]", ["clients.0.name is 'xxx"]),
    "reserved name": ("clients=[{name: Server}]", ["clients.0.name is 'Server', which is the name of a party"]),
    "negative cut of a client": ("clients=[{name: a, head_blocks: -1}]", ["clients.0.head_blocks is -1: must be at"]),
    "tail without one": (
        "partition: two-part-split\nclients: [{name: a, tail_blocks: 1}]\n",
        ["clients.0: partition 'two-part-split' has no option 'tail_blocks'."],
    ),
    "two lengths": ("rounds: 3\nsteps: 5\n", ["rounds and steps are given; a run has one length."]),
    "two evaluations": ("data: {train: x, eval: y, eval_fraction: 0.1}\n", ["data.eval and data.eval_fraction are"]),
    "nothing to evaluate": ("eval_every=1", ["eval_every is given, but there is nothing to evaluate on."]),
    "early stop that never looks": (
        "data: {train: x, eval: y}\nearly_stop: {patience: 2}\n",
        ["early_stop is given, but without eval_every it would never look."],
    ),
    "early stop without patience": ("early_stop={}", ["early_stop.patience is missing."]),
    "packing of labels": (
        "data: {train: x, format: classification, packing: true}\n",
        ["data.packing cannot be used with the format 'classification'"],
    ),
    "column of another format": (
        "data: {train: x, columns: {promt: q}}\n",
        ["data.columns.promt: the format 'text' has no 'promt'. It has: text, label."],
    ),
    "no text at all": ("data: {}\n", ["data.train is missing. It is a file, a glob or a Hub data set."]),
    "no text for one": (
        "data: {}\nclients: [{name: a, data: x}, {name: b}]\n",
        ["data.train is missing. It is a file, a glob or a Hub data set. The clients with no data of their own need"],
    ),
    "two tasks": (
        "clients: [{name: a}, {name: b, data: {train: x, format: classification}}]\n",
        ["Some clients have the format 'classification' and others not."],
    ),
    "unknown framework": ("framework=sfl-v3", ["framework: There is no framework 'sfl-v3'. Did you mean 'sfl-v2'?"]),
    "unknown division": ("data.division=idd", ["data.division: There is no data 'idd'. Did you mean 'iid'?"]),
    "unknown option": (
        "framework.local_step=2",
        ["framework: framework 'sfl-v2' has no option 'local_step'. Did you mean 'local_steps'? Options:"],
    ),
    "option that is needed": ("data.division=by-column", ["data.division: data 'by-column' needs the option"]),
    "method without a name": ("partition: {head_blocks: 2}\n", ["partition does not say which method."]),
    "method file that is not there": ("codec=nope.py", ["codec.up: The method file nope.py does", "codec.down: The"]),
    "unknown engine": ("engine=locl", ["engine is 'locl'. Did you mean 'local'?"]),
    "unknown option of an engine": ("engine.gpus=1", ["engine.gpus: engine has no key 'gpus'."]),
    "option of another engine": ("engine.num_gpus=1", ["engine.num_gpus is given, but engine is 'local'"]),
    "actors without a GPU": ("engine: ray\ndevice: cuda\n", ["device is 'cuda', but the actors of engine"]),
    "an engine that is no name": ("engine=3", ["engine is 3: must be local or ray, or {name: ray, option: value}."]),
    "reports to come": ("report_to=wandb", ["report_to is wandb, which does not work yet."]),
    "a server that does nothing": (
        "profiles={server: {flops: 1.0e+12, workers: 0}}",
        ["profiles.server: 'workers' is a whole number from 1 on, not 0"],
    ),
    "always lost": ("fails=1.0", ["fails is 1.0: must be less than 1."]),
    "lost before the start": ("fails=[-1]", ["fails.0 is -1: must be at least 0."]),
    "lost in words": ("fails=often", ["fails is 'often': must be a probability, or a list of rounds."]),
    "a client that is always lost": ("clients=[{name: a, fails: 1}]", ["clients.0.fails is 1: must be less than 1."]),
    "clusters for a trunk of all": (
        "framework: psl\nselection: {name: csfl, sketch: tokens}\n",
        [
            "selection 'csfl' makes clusters, which framework 'psl' cannot follow as it is. Take framework: sfl-v1 or "
            "sfl-v2."
        ],
    ),
    "groups for a trunk of all": (
        "framework: sfl-v2\nselection: {name: parallelsfl, sketch: tokens}\n",
        [
            "selection 'parallelsfl' makes groups and hosts, which framework 'sfl-v2' cannot follow as it is. Take "
            "framework: {name: gsfl, groups: selection}."
        ],
    ),
    "profile of another kind": ("profile=3", ["profile is 3: must be a preset's name, or a mapping of numbers."]),
    "key given twice": ("seed: 1\nrounds: 2\nseed: 3\n", ["line 5: the key 'seed' is given twice (first in line 3)."]),
    "key that is no text": ("5: x\n", ["a run has the key 5, which is no text."]),
    "override without value": ("model", ["the override 'model' cannot be read: there is no '=' in it"]),
    "broken override": ("optimizer.betas=[1", ["the override 'optimizer.betas=[1' cannot be read:"]),
    "override of an unknown key": ("frmework.local_steps=8", ["frmework: a run has no key 'frmework'. Did you"]),
    "override inside a value": ("model.name=x", ["model.name cannot be set: model is 'tiny', which has no parts."]),
    "override of an absent client": ("clients.3.head_blocks=1", ["clients.3 does not exist: clients is a list of 3"]),
    "override with an empty part": ("optimizer..lr=1", ["the override 'optimizer..lr' has an empty name in it."]),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_each_mistake_is_one_sentence_and_brings_no_other(what: str) -> None:
    said, expected = MISTAKES[what]
    text, overrides = (SMALL, [said]) if not said.endswith("\n") else (SMALL + said, [])
    if said.startswith("data:"):
        text = "model: tiny\n" + said
    if "clients.3" in said:
        text += "clients: 3\n"
    found = mistakes(text, overrides)
    assert len(found) == len(expected), found
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning), problem


def test_all_mistakes_come_at_once() -> None:
    found = mistakes(
        "data: {trian: x, format: texts, packing: 3}\nclients: [{name: a b}, {nam: b}]\nframework: sfl-v3\n"
        "planner: smart\n"
        "optimizer: {lrr: 1, schedule: cosin}\nrounds: 1\nsteps: 2\nbatch_size: 0\nsede: 3\nrounds: 4\n",
        ["framework.x=1", "seed"],
    )
    keys = [
        "line 10: the key 'rounds'", "the override 'seed'", "model is missing", "data.format", "data.packing is 3",
        "data.trian", "clients.1.name", "clients.1.nam:", "batch_size", "sede", "rounds and steps", "framework",
        "planner", "optimizer.schedule", "optimizer.lrr",
    ]  # fmt: skip
    for key in keys:
        assert any(problem.startswith(key) for problem in found), (key, found)
    assert len(found) == len(keys), found


def test_a_wrong_value_raises_no_false_alarm_elsewhere() -> None:
    assert (
        len(mistakes(SMALL + "data: {train: x, eval: 3}\nearly_stop: {patience: 1}\neval_every: 1\n")) == 2
    )  # + twice
    assert (
        len(mistakes("model: m\ndata: {train: x, eval_fracton: 0.1}\nearly_stop: {patience: 1}\neval_every: 1\n")) == 1
    )
    assert len(mistakes(SMALL, ["rounds=x", "steps=3"])) == 1


@pytest.mark.parametrize("family", [f for f in ("planner", "mixing", "overlap", "objective", "defense", "codec",
                                                "monitor", "attack") if not registry.names(f)])  # fmt: skip
def test_a_family_without_methods_takes_none_and_refuses_the_rest(family: str) -> None:
    assert load_config(SMALL, [f"{family}=none"]).build_all(family) == []
    assert load_config(SMALL).build(family) is None
    for found in (mistakes(SMALL, [f"{family}=x"]), mistakes(SMALL, [f"{family}={{name: x, y: 1}}"])):
        assert all(f"There is no {family} 'x'. Known: none yet." in problem for problem in found)


FULL = """
model: some/model
data:
  train: data/*.jsonl
  eval_fraction: 5e-2
  format: prompt-completion
  columns: {prompt: context, completion: ref}
  division: {name: label-dirichlet, alpha: 1}
clients:
  - {name: clinic-a, data: a.jsonl, head_blocks: 2}
  - {name: clinic.b, data: {train: b.csv, columns: {prompt: q}}, tail_blocks: 0}
  - {name: "12"}
framework: {name: sequential-sl}
optimizer: {name: SGD, lr: 2e-4, momentum: 0.9, schedule: cosine, warmup: 0.1}
steps: 7
eval_every: 2
early_stop: {patience: 3}
precision: bf16
max_grad_norm: 1
record_wire: "2e-4"
"""


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        (SMALL, []),
        (SMALL, ["partition=two-part-split", "epochs=2", "aggregator.weight_by=tokens"]),
        (SMALL, ["peft=full", "optimizer={name: adam, betas: [0.9, 0.95], eps: 1e-12}", "clients=1", "seed=7"]),
        (SMALL, ['model="2024-01-01"', 'data.train="null"', 'data.eval="yes"', 'data.columns={text: "1e3"}']),
        (
            SMALL,
            ['data.train="2:30"', 'data.eval="+.5e-3"', "data.columns.text='# no, a: b'"],
        ),
        (SMALL, ["peft.rank_pattern={q_proj: 4}", "optimizer.warmup=5", "optimizer.schedule=linear"]),
        (SMALL, ["model=Gemüse/模型", "codec=CODEC", "codec.down.ratio=1e-2"]),
        (FULL, []),
    ],
)
def test_a_dumped_run_loads_as_it_was(source: str, overrides: list[str], codec: str) -> None:
    config = load_config(source, [text.replace("CODEC", codec) for text in overrides])
    text = dump(config)
    assert load_config(text) == config
    assert dump(load_config(text)) == text
    assert load_config(config) == config


def test_the_dump_spells_out_every_default(codec: str) -> None:
    text = dump(load_config(SMALL, [f"codec.up={codec}"]))
    for said in ("rounds: 10", "local_steps: 1", "rank: 8", "tail_blocks: 0", "ratio: 0.1", "shape: [2, 3]",
                 "names: {}", "down: none", "planner: none", "max_length: 1024", "lr: 0.0002"):  # fmt: skip
        assert said in text, text
    again = dump(RunConfig(model="tiny", data=DataConfig(train="rows.jsonl")))
    assert again == dump(load_config(SMALL))


def test_values_are_read_as_meant() -> None:
    config = load_config(FULL)
    assert config.optimizer.lr == 2e-4
    assert config.optimizer.name == "sgd"
    assert config.optimizer.arguments == {"momentum": 0.9}
    assert config.optimizer.warmup_steps(25) == 3
    assert load_config(SMALL).optimizer.warmup_steps(25) == 0
    assert config.optimizer.torch_class.__name__ == "SGD"
    assert config.precision == "bfloat16"
    assert config.length == ("steps", 7)
    assert config.data.eval_fraction == 0.05
    assert load_config(SMALL).length == ("rounds", 10)
    assert load_config(SMALL, ["epochs=2"]).length == ("epochs", 2)
    for text, value in {
        "2e-4": 2e-4,
        "1E3": 1e3,
        "1.e-3": 1e-3,
        ".5e1": 5.0,
        "3": 3,
        "true": True,
        "null": None,
        "~": None,
    }.items():
        assert parse_value(text) == value
        assert type(parse_value(text)) is type(value)
    for text in ("*.jsonl", "a: b: c", "cuda:0", "2024-01-01", "x #y", "@x", "%", "# 3", "---"):
        assert parse_value(text) == text
    for text in ("", "  "):
        with pytest.raises(ValueError, match="write null for no value"):
            parse_value(text)
    assert parse_value("''") == ""


def test_clients_by_number_and_by_name() -> None:
    config = load_config(FULL)
    assert load_config(SMALL).client_names == ["client-0", "client-1", "client-2"]
    assert config.client_names == ["clinic-a", "clinic.b", "12"]
    assert config.data_of("clinic-a").train == "a.jsonl"
    assert config.data_of("12").train == "data/*.jsonl"
    assert config.data_of("clinic-a").columns == config.data.columns
    assert config.data_of("clinic.b").columns == {"prompt": "q"}
    assert config.data_of("clinic.b").format == "prompt-completion"
    assert config.partition_spec("clinic-a").options["head_blocks"] == 2
    assert config.partition_spec("clinic.b").options["tail_blocks"] == 0
    assert load_config("model: m\ndata: {}\nclients: [{name: a, data: x}]\n").data_of("a").train == "x"


def test_overrides_reach_every_place() -> None:
    config = load_config(
        SMALL + "framework: sfl-v2\n",
        ["framework.local_steps=8", "clients=3", "clients.1.head_blocks=3", "clients.1.name=b",
         "partition.tail_blocks=1", "partition.head_blocks=3",
         "data.division=by-column", "data.division.column=clinic", "clients.0.data=x", "clients.0.data.columns.text=y",
         "optimizer.momentum=0.5", "optimizer.name=sgd", "early_stop.patience=2", "eval_every=1", "data.eval=v*.jsonl",
         "max_grad_norm=1", "seed=1", "seed=2"],
    )  # fmt: skip
    assert config.framework.options["local_steps"] == 8
    assert config.build("framework").local_steps == 8
    assert config.client_names == ["client-0", "b", "client-2"]
    assert config.client("b").head_blocks == 3
    assert config.partition.name == "u-shaped-split"
    assert config.partition.options["tail_blocks"] == 1
    assert config.data.division.options == {"column": "clinic"}
    assert config.build("data").column == "clinic"
    assert config.data_of("client-0").train == "x"
    assert config.data_of("client-0").columns == {"text": "y"}
    assert config.optimizer.arguments == {"momentum": 0.5}
    assert config.early_stop.patience == 2
    assert config.data.eval == "v*.jsonl"
    assert config.seed == 2
    mapped = load_config({"model": "m", "data": {"train": Path("x")}}, {"framework.local_steps": 2, "steps": 3})
    assert mapped.framework.options["local_steps"] == 2
    assert mapped.length == ("steps", 3)
    assert mapped.data.train == "x"
    assert load_config(SMALL + "rounds: 3\n", ["rounds=null", "steps=2"]).length == ("steps", 2)


def test_overrides_of_lists_and_of_codecs(codec: str) -> None:
    config = load_config(SMALL, [f"codec={codec}", "codec.ratio=0.5", "codec.up.ratio=0.25"])
    assert (config.build("codec.up").ratio, config.build("codec.down").ratio) == (0.25, 0.5)
    assert [one.ratio for one in config.build_all("codec")] == [0.25, 0.5]
    with pytest.raises(MethodError, match="2 methods"):
        config.build("codec")
    (wrong,) = mistakes(SMALL, ["defense=dp", "defense.0.epsilon=8"])
    assert wrong.startswith("defense.0: There is no defense 'dp'. Known: ")
    assert "ratio is 2.0; it must be in (0, 1]." in mistakes(SMALL, [f"codec.down={{name: {codec}, ratio: 2}}"])[0]


def test_a_mapping_that_is_given_is_not_changed() -> None:
    given = {"model": "m", "data": {"train": "x"}, "framework": "sfl-v2"}
    load_config(given, {"framework.local_steps": 3, "data.shuffle": False})
    assert given == {"model": "m", "data": {"train": "x"}, "framework": "sfl-v2"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty."),
        (b"- a\n", "the top level is a list; it must be a mapping"),
        (b"just a text\n", "the top level is the single value 'just a text'"),
        (b"model: m\n\tdata: 3\n", "line 2, column 1: this is not YAML"),
        (b"model: [m\n", "line 2, column 1: this is not YAML"),
        (b"model: !!python/object/apply:os.getcwd []\n", "line 1, column 8: this is not YAML"),
        (b"? [a, b]\n: 3\n", "line 1, column 3: this is not YAML: while constructing a mapping, found unhashable key."),
        (b"model: \xff\xfe\n", "it is no UTF-8 text (byte 7). Save it as UTF-8."),
    ],
)
def test_a_file_that_is_no_run_says_where(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    (problem,) = mistakes(file)
    assert problem.startswith(said)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "no.yaml")[0].startswith(f"there is no such file (looked for {tmp_path / 'no.yaml'})")
    assert "folder" in mistakes(tmp_path)[0]
    with pytest.raises(ConfigError, match=r"1 mistake in no\.yaml"):
        load_config("no.yaml")


def test_profiles_are_checked_where_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    def profile_from(value: object) -> None:
        if value != "laptop":
            raise ConfigError(["There is no profile 'x'.", "speed is -1."])

    monkeypatch.setitem(sys.modules, "cutlayer.costs", SimpleNamespace(profile_from=profile_from))
    assert check_profile(None) == check_profile("laptop") == []
    assert len(check_profile({"speed": -1})) == 2
    assert load_config(SMALL, ["profile=laptop"]).profile == "laptop"
    found = mistakes(SMALL, ["clients=[{name: a, profile: {speed: -1}}, {name: b, profile: laptop}]"])
    assert found == ["clients.0.profile: There is no profile 'x'.", "clients.0.profile: speed is -1."]


def test_schedules_and_arguments_are_those_of_the_libraries() -> None:
    import inspect

    import torch
    from transformers.optimization import get_scheduler
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULES) <= {kind.value for kind in SchedulerType}
    probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for name in SCHEDULES:
        get_scheduler(name, probe, num_warmup_steps=1, num_training_steps=10)
    assert set(UNFIT_ARGUMENTS) <= set(inspect.signature(torch.optim.AdamW).parameters)


@pytest.mark.parametrize("name", ["adamw", "AdamW", "sgd", "adam", "adafactor", "rmsprop", "Adagrad", "nadam", "muon"])
def test_pytorchs_optimizers_pass_by_any_case(name: str) -> None:
    assert load_config(SMALL, [f"optimizer.name={name}"]).optimizer == OptimizerConfig(name=name)


@pytest.mark.parametrize(
    "family", sorted({"planner", "mixing", "overlap", "objective", "defense", "codec", "monitor"} - {*DRIVEN})
)
def test_a_method_that_nothing_would_use_is_refused(family: str, tmp_path: Path) -> None:
    """It can be loaded, but who names a defense must not believe that it is on."""
    file = tmp_path / "mine.py"
    file.write_text(CODEC.replace('"codec"', f'"{family}"'))
    found = mistakes(SMALL, [f"{family}={file}"])
    assert found
    assert all("nothing in this version uses" in problem for problem in found)


def test_resolved_paths_hold_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, here = tmp_path / "runs", tmp_path / "here"
    for folder in (runs, here, runs / "tiny"):
        folder.mkdir()
    for file in (runs / "rows.jsonl", runs / "own.jsonl", here / "valid-1.jsonl"):
        file.write_text('{"text": "a"}\n')
    monkeypatch.setattr("cutlayer.config_check.DRIVEN", (*DRIVEN, "codec"))
    (runs / "keep.py").write_text(CODEC)
    (runs / "run.yaml").write_text(
        "model: tiny\ndata: {train: rows.jsonl, eval: valid-*.jsonl}\ncodec: {up: keep.py}\nrecord_wire: wire\n"
        "clients: [{name: a, data: own.jsonl}, {name: b}]\n"
    )
    monkeypatch.chdir(here)
    config = load_config(Path("../runs/run.yaml"))
    whole = resolved(config, Path("../runs"))
    assert whole.model == str(runs / "tiny")
    assert whole.record_wire == str(here / "wire")
    assert whole.data.train == str(runs / "rows.jsonl")
    assert whole.data.eval == str(here / "valid-*.jsonl")
    assert whole.data_of("a").train == str(runs / "own.jsonl")
    assert whole.codec.up.name == str(runs / "keep.py")
    monkeypatch.chdir(tmp_path)
    assert load_config(dump(whole)) == whole
    assert resolved(whole, None) == whole
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        resolved(config, None)
    assert resolved(load_config("model: some/model\ndata: {train: own/set}\n"), runs).data.train == "own/set"


def test_check_names_what_a_hand_made_run_has_wrong() -> None:
    config = RunConfig(model="m", data=DataConfig(train="x"), rounds=1, steps=1, framework="sfl-v9")
    with pytest.raises(ConfigError) as caught:
        config.check()
    assert len(caught.value.problems) == 2
    RunConfig(model="m", data=DataConfig(train="x")).check()
