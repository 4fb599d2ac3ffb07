"""Comparisons: the numbers are those of the runs, nothing is made twice, and what cannot be compared is refused."""

from __future__ import annotations

import json
import re
import shlex
import xml.dom.minidom
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import cutlayer
from cutlayer import comparison
from cutlayer.cli.main import app
from cutlayer.comparison import Comparison, compare
from cutlayer.errors import CheckpointError, ConfigError, CutlayerError, OutputError
from cutlayer.report.comparison import MEASURES, Trial, evaluations, measured, reached, spread, summarize
from cutlayer.report.comparison_page import band, markdown, page, rows, table, written
from cutlayer.run import Interrupted
from spine import lines, often
from test_cli import printed, run
from tiny import make_model, text_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = ("sfl-v2", "sequential-sl")


@dataclass
class Place:
    """A folder with a tiny model, data, and run files that are written as they are asked for."""

    root: Path
    base: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str, **changes: Any) -> str:
        path = self.root / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        data = {**self.base["data"], **changes.pop("data", {})}
        path.write_text(yaml.safe_dump({**self.base, **changes, "data": data}))
        return str(path)

    def both(self, **changes: Any) -> list[str]:
        return [self.file(name, framework=name, **changes) for name in FRAMEWORKS]


def place_at(root: Path) -> Place:
    make_model(root / "model", "llama", num_hidden_layers=3)
    write_rows(root / "rows.jsonl", text_rows(12))
    write_rows(root / "valid.jsonl", text_rows(4))  # rows of the training data, so that their loss falls
    return Place(root, {
        "model": str(root / "model"),
        "data": {"train": str(root / "rows.jsonl"), "eval": str(root / "valid.jsonl"), "max_length": 16},
        "clients": 2, "partition": {"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 1},
        "peft": {"name": "lora", "rank": 2}, "optimizer": {"name": "adamw", "lr": 0.01},
        "batch_size": 3, "rounds": 2, "eval_every": 1, "profile": "laptop", "device": "cpu",
    })  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return place_at(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def done(place: Place) -> Comparison:
    """Two frameworks, two seeds."""
    return compare(place.both(), out=place.root / "done", seeds=2)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a run was made")


class Counting:
    """Counts steps, and keeps the notes; stops at step ``until`` as a user does."""

    def __init__(self, until: int | None = None) -> None:
        self.until, self.steps, self.notes = until, 0, list[str]()

    def start(self, total_steps: int) -> None:
        pass

    def update(self, record: Mapping[str, Any]) -> None:
        self.steps += 1
        if self.steps == self.until:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stop(self) -> None:
        pass


def test_every_run_is_made_with_every_seed(done: Comparison) -> None:
    folders = sorted(path.name for path in (done.out / "runs").iterdir())
    assert folders == [f"{name}-seed{seed}" for name in sorted(FRAMEWORKS) for seed in (0, 1)]
    assert done.summary["seeds"] == [0, 1]
    for name in FRAMEWORKS:
        for seed in (0, 1):
            there = yaml.safe_load((done.out / f"runs/{name}-seed{seed}/run.yaml").read_text())
            assert (there["seed"], there["framework"]["name"]) == (seed, name)
    said = (ROOT / "docs/compare.md").read_text().split("```")
    tree = next(part for part in said if part.startswith("\nDIR/"))
    assert {path.name for path in done.out.iterdir()} == {
        word.split("/")[0] for word in re.findall(r"^  (\S+)", tree, re.M)
    }


def test_the_numbers_are_those_of_the_runs(done: Comparison) -> None:
    data = json.loads((done.out / "comparison.json").read_text())
    assert data == json.loads(json.dumps(done.summary))
    for name in FRAMEWORKS:
        result = data["results"][name]
        losses = []
        for seed in ("0", "1"):
            folder = done.out / "runs" / f"{name}-seed{seed}"
            summary, one = json.loads((folder / "summary.json").read_text()), result["seeds"][seed]
            assert one["summary"] == summary
            measures = one["measures"]
            assert measures["loss"] == summary["eval"]["after"]["loss"] == one["curve"][-1]["loss"]
            assert measures["perplexity"] == summary["eval"]["after"]["perplexity"]
            assert (measures["bytes_up"], measures["bytes_down"]) == (summary["bytes_up"], summary["bytes_down"])
            assert measures["virtual_seconds"] == summary["virtual_seconds"] > 0
            peaks = {party: held["peak_memory_bytes"] for party, held in summary["parties"].items()}
            assert measures["server_memory"] == peaks.pop("server")
            assert measures["client_memory"] == max(peaks.values())
            assert [point["round"] for point in one["curve"]] == [0, 1, 2]
            assert one["curve"][-1]["steps"] == sum(summary["steps"].values()) == 4
            losses.append(measures["loss"])
        mean = sum(losses) / 2
        over = result["over_seeds"]["loss"]
        assert over["mean"] == pytest.approx(mean, abs=1e-12)
        assert over["deviation"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5, abs=1e-12)
        assert over["count"] == 2
        shown = f"{mean:.4f} ± {over['deviation']:.4f}"
        for suffix in ("md", "html"):
            assert shown in (done.out / f"comparison.{suffix}").read_text()
        assert shown in printed(table(data), width=160)
    assert data["versions"]["cutlayer"] == cutlayer.__version__
    words = shlex.split(data["command"])
    assert words[:2] == ["cutlayer", "compare"]
    assert words[4:] == ["--seeds", "2", "--out", str(done.out)]


def test_the_default_target_is_one_that_every_run_reached(done: Comparison) -> None:
    finals = {
        (name, seed): one["measures"]["loss"]
        for name, result in done.summary["results"].items()
        for seed, one in result["seeds"].items()
    }
    worst = max(finals, key=lambda key: finals[key])
    assert done.summary["target"]["loss"] == finals[worst]
    assert f"of {worst[0]}, seed {worst[1]}" in done.summary["target"]["from"]
    for result in done.summary["results"].values():
        assert result["over_seeds"]["time_to_target"]["count"] == 2
        for one in result["seeds"].values():
            assert 0 < one["measures"]["time_to_target"] <= one["measures"]["virtual_seconds"]
            assert one["measures"]["steps_to_target"] <= 4


def test_the_page_is_whole(done: Comparison) -> None:
    text = done.page.read_text()
    assert not re.search(r"https?:|<script|<link|<img|src=|@import", text)
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 3
    for svg, label in zip(svgs, ("optimizer steps", "virtual time (", "bytes up and down ("), strict=True):
        xml.dom.minidom.parseString(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))
        for word in (*FRAMEWORKS, label, "evaluation loss", "target"):
            assert word in svg
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)
    assert page(done.summary) == text  # nothing of the moment is in it
    assert markdown(done.summary) == (done.out / "comparison.md").read_text()


def test_what_differs_is_listed(done: Comparison) -> None:
    assert list(done.summary["differences"]) == ["framework"]
    assert done.summary["differences"]["framework"]["sfl-v2"]["local_steps"] == 1
    assert "| framework | sfl-v2 (local_steps 1," in markdown(done.summary)


def test_a_complete_run_is_not_made_again(
    done: Comparison, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done.out / "runs").rglob("*")}
    texts = {path: path.read_text() for path in done.out.glob("comparison.*")}
    monkeypatch.setattr("cutlayer.run._carry_out", never)
    code, out, err = run(capsys, "compare", *place.both(), "--seeds", "2", "--out", str(done.out))
    assert (code, err) == (0, "")
    assert "run 4 of 4: sequential-sl, seed 1 is complete" in out
    assert f"Page: {done.page}" in out
    assert {path: path.stat().st_mtime_ns for path in (done.out / "runs").rglob("*")} == before
    assert {path: path.read_text() for path in done.out.glob("comparison.*")} == texts


def test_more_runs_and_seeds_make_only_what_is_missing(done: Comparison, place: Place, tmp_path: Path) -> None:
    few = compare(place.both()[:1], out=tmp_path / "out", overrides=["seed=1"])
    assert few.summary["seeds"] == [1]
    counting = Counting()
    more = compare(place.both()[:1], out=tmp_path / "out", seeds=2, progress=counting)
    assert counting.steps == 4  # of seed 0
    assert [note.split(" (")[0] for note in counting.notes if note.startswith("run ")] == [
        "run 1 of 2: sfl-v2, seed 0 starts", "run 2 of 2: sfl-v2, seed 1 is complete",
    ]  # fmt: skip
    for seed in ("0", "1"):
        one, whole = (made.summary["results"]["sfl-v2"]["seeds"][seed]["measures"] for made in (more, done))
        assert {**one, "steps_to_target": 0, "time_to_target": 0} == {
            **whole, "steps_to_target": 0, "time_to_target": 0,
        }  # fmt: skip


@pytest.mark.parametrize("until", often([2, 7], 7))
def test_an_interrupted_comparison_goes_on(until: int, done: Comparison, place: Place, tmp_path: Path) -> None:
    """In the first run before its first checkpoint, and in the second after one."""
    with pytest.raises(Interrupted, match="same command again"):
        compare(place.both(), out=tmp_path / "out", seeds=2, progress=Counting(until))
    assert not (tmp_path / "out" / "comparison.json").exists()
    counting = Counting()
    made = compare(place.both(), out=tmp_path / "out", seeds=2, progress=counting)
    assert counting.steps == {2: 16, 7: 10}[until]  # of 16; step 7 is the first after a checkpoint with 6
    for name in FRAMEWORKS:
        there, wanted = (dict(one.summary["results"][name]["over_seeds"]) for one in (made, done))
        for memory in ("client_memory", "server_memory"):  # that of the first step since the resume
            del there[memory], wanted[memory]
        assert there == wanted


def test_a_stopped_command_says_how_to_go_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "train", train)
    code, _, err = run(capsys, "compare", *place.both(), "--out", str(tmp_path / "out"))
    assert code == 130
    assert err == "Stopped: what was done is kept. Give the same command again, and it goes on from there.\n"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that must be refused before any run is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "train", never)
        code, out, err = run(capsys, "compare", *arguments)
    assert (code, out) == (2, "")
    return err


DIFFERENT: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": "other"}),
    ("data.train", {"data": {"train": "other.jsonl"}}),
    ("data.eval", {"data": {"eval": "other.jsonl"}}),
    ("data.format", {"data": {"format": "prompt-completion", "columns": {}}}),
    ("data.max_length", {"data": {"max_length": 12}}),
    ("the number of clients", {"clients": 3}),
    ("the length", {"rounds": 3}),
    ("seed", {"seed": 3}),
]


@pytest.mark.parametrize(("key", "changes"), DIFFERENT, ids=[key for key, _ in DIFFERENT])
def test_what_makes_no_comparison_is_refused_by_its_key(
    key: str, changes: dict[str, Any], place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(place.root / "other.jsonl", text_rows(6, seed=3))
    make_model(place.root / "other", "llama", num_hidden_layers=3)
    files = [place.file("one"), place.file("two"), place.file("odd", **changes)]
    capsys.readouterr()  # what saving a model draws
    err = refused(capsys, *files, "--out", str(tmp_path / "out"))
    assert err.startswith("Error: 1 mistake in the comparison:\n")
    assert re.search(rf"  - {re.escape(key)} differs: .* in one, two; .* in odd\.", err)
    assert ("seed=0" if key == "seed" else "--allow-different") in err
    assert not (tmp_path / "out").exists()


def test_all_differences_are_told_at_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    odd = place.file("odd", seed=1, clients=1, rounds=None, steps=2)
    err = refused(capsys, place.file("one"), odd)
    assert "3 mistakes in the comparison" in err
    for said in ("clients differs: 2 in one; 1 in odd", "length differs: rounds=2 in one; steps=2 in odd", "seed diff"):
        assert said in err


def test_clients_with_other_data_of_their_own_are_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name in ("rows", "valid"):
        clients = [{"name": "ann", "data": str(place.root / f"{name}.jsonl")}, {"name": "bob"}]
        files.append(place.file(name, clients=clients))
    assert "the clients' own data differs: " in refused(capsys, *files)


def test_differences_may_be_allowed_and_are_marked(place: Place, tmp_path: Path) -> None:
    longer = place.file("longer", rounds=3, data={"division": {"name": "by-column", "column": "label"}})
    made = compare([place.file("one"), longer], out=tmp_path / "out", allow_different=True)
    first, *notes = made.summary["notes"]
    assert first == "NOT THE SAME TASK: the length differs: rounds=2 in one; rounds=3 in longer."
    assert "The runs differ in data.division: the texts are divided differently over the clients." in notes
    assert "The runs made different numbers of steps (those of all clients): one 4, longer 6." in notes
    assert made.summary["differences"]["rounds"] == {"one": 2, "longer": 3}
    assert made.summary["differences"]["data.division"]["one"] == "iid"
    assert first in made.page.read_text()
    assert "--allow-different" in made.summary["command"]


def test_other_settings_in_the_same_place_are_refused(
    done: Comparison, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refused(capsys, *place.both(), "optimizer.lr=0.02", "batch_size=2", "--seeds", "2", "--out", str(done.out))
    assert "runs/sfl-v2-seed0 was begun with other settings (batch_size, optimizer.lr)" in err
    assert "another --out" in err


def test_content_that_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the data, of a method that is a file: the numbers that are there would be of something else."""
    monkeypatch.chdir(tmp_path)
    own, out = place_at(tmp_path), tmp_path / "out"
    method = tmp_path / "everybody.py"
    method.write_text((ROOT / "src/cutlayer/methods/selection/all.py").read_text())
    files = [own.file("plain"), own.file("mine", selection="./everybody.py")]
    compare(files, out=out)
    monkeypatch.setattr("cutlayer.run._carry_out", never)
    before = method.read_text()
    method.write_text(f"{before}\n# changed\n")
    with pytest.raises(CheckpointError, match=r"runs/mine-seed0 was begun with other method files \(selection\)"):
        compare(files, out=out)
    method.write_text(before)
    write_rows(tmp_path / "valid.jsonl", text_rows(4, seed=2))
    with pytest.raises(CheckpointError, match=r"runs/plain-seed0 was begun with other data files \(data.eval\)"):
        compare(files, out=out)
    write_rows(tmp_path / "valid.jsonl", text_rows(4))
    assert compare(files, out=out).page.is_file()


def test_folders_of_others_are_left_alone(done: Comparison, place: Place, tmp_path: Path) -> None:
    files = place.both()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file is a file\. Give another --out"):
        compare(files, out=tmp_path / "file")
    with pytest.raises(OutputError, match=r"is a run\. Give another --out"):
        compare(files, out=done.out / "runs" / "sfl-v2-seed0")
    strange = tmp_path / "out" / "runs" / "sfl-v2-seed0"
    strange.mkdir(parents=True)
    (strange / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something that is not of this comparison"):
        compare(files, out=tmp_path / "out")
    assert (strange / "thesis.tex").read_text() == "mine"
    (tmp_path / "out" / "made_of.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"made_of\.json is damaged"):
        compare(files, out=tmp_path / "out")


def test_what_cannot_work_is_refused_before_anything_is_trained(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = place.file("deep", partition={"name": "u-shaped-split", "head_blocks": 7})
    err = refused(capsys, place.file("one"), deep, "--out", str(tmp_path / "out"))
    assert err.startswith("Error: deep: ")
    assert len(err.splitlines()) == 1
    assert "nowhere.yaml:\n  - there is no such file" in refused(capsys, str(place.root / "nowhere.yaml"))
    assert "has no option 'local_stes'. Did you mean" in refused(capsys, *place.both(), "framework.local_stes=2")


def test_a_failed_run_is_a_result_too(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = place.file("bad", optimizer={"name": "adamw", "lr": 0.01, "eps": 0.0})
    good = place.file("good")
    code, out, err = run(capsys, "compare", bad, good, "--out", str(tmp_path / "out"))
    assert (code, err) == (1, "Failed: 1 of the runs failed; see above.\n")
    assert "FAILED: bad, seed 0: " in out
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(data["failed"]) == ["bad, seed 0"]
    assert data["results"]["bad"]["seeds"] == {}
    assert data["results"]["good"]["over_seeds"]["loss"]["count"] == 1
    assert "of good, seed 0" in data["target"]["from"]
    assert "bad, seed 0" in (tmp_path / "out" / "comparison.html").read_text()
    lone = compare([bad], out=tmp_path / "lone")
    assert rows(lone.summary, MEASURES)[1] == [["bad", *["-"] * 9]]


def test_a_method_that_fails_in_its_run_stops_no_other(place: Place, tmp_path: Path) -> None:
    """At the second merge, which no look before the run can see."""
    own = tmp_path / "own.py"
    own.write_text(
        "from dataclasses import dataclass\n"
        "from cutlayer.contracts import Aggregator\n"
        "from cutlayer.errors import MethodError\n"
        "from cutlayer.registry import method\n"
        '@method("aggregator", paper="mine")\n'
        "@dataclass\n"
        "class Own(Aggregator):\n"
        '    """Mine."""\n'
        "    merges: int = 0\n"
        "    def merge(self, before, states, weights):\n"
        "        self.merges += 1\n"
        "        if self.merges > 1:\n"
        '            raise MethodError("it cannot go on")\n'
        "        return next(iter(states.values()))\n"
    )
    bad = place.file("bad", aggregator=str(own), framework="sfl-v1", rounds=2)
    good = place.file("good", framework="sfl-v1", rounds=2)
    made = compare([bad, good], out=tmp_path / "out", progress=False)
    assert list(made.summary["failed"]) == ["bad, seed 0"]
    assert made.summary["results"]["good"]["over_seeds"]["loss"]["count"] == 1


def test_runs_without_a_server_have_no_memory_of_one(place: Place, tmp_path: Path) -> None:
    ring = place.file("ring", framework="ringsfl")
    made = compare([ring, place.file("sfl", framework="sfl-v1")], out=tmp_path / "out", progress=False)
    found = {name: one["over_seeds"]["server_memory"]["mean"] for name, one in made.summary["results"].items()}
    assert found["ring"] is None
    assert found["sfl"] > 0


def test_without_profiles_there_is_no_virtual_time(place: Place, tmp_path: Path) -> None:
    without = place.file("without", profile=None)
    made = compare({"with": place.file("one"), "without": without}, out=tmp_path / "out")
    over = {name: result["over_seeds"] for name, result in made.summary["results"].items()}
    assert over["with"]["virtual_seconds"]["count"] == over["with"]["time_to_target"]["count"] == 1
    assert over["without"]["virtual_seconds"]["mean"] is over["without"]["time_to_target"]["mean"] is None
    assert over["without"]["steps_to_target"]["count"] == 1
    notes = "\n".join(made.summary["notes"])
    assert "No virtual time of without: without a profile there is no clock." in notes
    assert "The runs differ in profile: " in notes
    headings, lines = rows(made.summary, MEASURES)
    assert lines[1][headings.index("virtual time to target")] == "-"
    text = made.page.read_text()
    assert "against virtual time. Not measured in without." in text
    neither = compare([without], out=tmp_path / "neither")
    assert "No virtual time: without a profile there is no clock." in "\n".join(neither.summary["notes"])
    assert "against virtual time: no run measured it." in neither.page.read_text()
    assert neither.page.read_text().count("<svg") == 2
    assert "One seed (0)" in "\n".join(neither.summary["notes"])
    assert neither.summary["differences"] == {}


def test_without_evaluation_there_are_training_losses(place: Place, tmp_path: Path) -> None:
    file = place.file("blind", data={"eval": None}, eval_every=None)
    made = compare([file], out=tmp_path / "out", target=1.0)
    assert made.summary["target"] is None
    assert made.summary["curve"] == "training loss"
    one = made.summary["results"]["blind"]["seeds"]["0"]
    assert one["measures"]["loss"] is one["measures"]["steps_to_target"] is None
    steps = lines(tmp_path / "out/runs/blind-seed0")
    for number, point in enumerate(one["curve"]):
        of = [line for line in steps if line["round"] == number]
        mean = sum(line["loss"] * line["label_tokens"] for line in of) / sum(line["label_tokens"] for line in of)
        assert point["loss"] == pytest.approx(mean, abs=1e-12)
        assert (point["round"], point["steps"]) == (number + 1, 2 * (number + 1))
    assert one["curve"][-1]["bytes_up"] == sum(line["bytes_up"] for line in steps)
    assert one["curve"][-1]["virtual_time"] == max(line["virtual_time"] for line in steps)
    assert "Nothing was evaluated" in made.page.read_text()


def test_frames_go_to_a_folder_for_each_run(place: Place, tmp_path: Path) -> None:
    compare([place.file("one")], out=tmp_path / "out", seeds=2, overrides={"record_wire": str(tmp_path / "wire")})
    assert sorted(path.parent.name for path in tmp_path.glob("wire/*/frames.bin")) == ["one-seed0", "one-seed1"]


def test_runs_of_python(place: Place, tmp_path: Path) -> None:
    tree = yaml.safe_load(Path(place.file("one")).read_text())
    runs = {"small": {**tree, "peft": {"name": "lora", "rank": 1}}, "large": {**tree, "peft": {"name": "lora"}}}
    made = cutlayer.compare(runs, out=tmp_path / "out", rounds=1, **{"optimizer.lr": 0.02})
    assert made.summary["differences"] == {"peft.rank": {"small": 1, "large": 8}}
    assert made.summary["command"].startswith("cutlayer.compare from Python, runs small, large: rounds=1")
    assert cutlayer.compare(runs, out=tmp_path / "out", rounds=1, **{"optimizer.lr": 0.02}).page == made.page
    with pytest.raises(ConfigError, match="1 mistake in the run 'small'"):
        cutlayer.compare({"small": {**tree, "bach_size": 1}}, out=tmp_path / "no")


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], "give run files"),
        ({}, "there is no run"),
        ([{"model": "m"}], "give run files, or a mapping of names to runs"),
        ({"a/b": "x.yaml"}, "'a/b' cannot be a run's name"),
        (["a.yaml", "./b/../a.yaml"], "a.yaml is given twice"),
        (["a.yaml", "a.yml"], "one name but for their ending"),
    ],
)
def test_names_that_cannot_be(runs: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=re.escape(said)):
        compare(runs, out=tmp_path)


def test_files_of_one_name_get_their_folders_names() -> None:
    named = comparison._named
    assert list(named(["a.yaml", "sub/b.yaml"])) == ["a", "b"]
    assert list(named(["/x/a/run.yaml", "/x/b/run.yaml", "/x/a/other.yaml"])) == ["a-run", "b-run", "a-other"]
    assert list(named(["/x/run.yaml", "/y/x/run.yaml"])) == ["x-run", "y-x-run"]


def test_usage(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = place.file("one")
    assert "Missing argument" in refused(capsys)
    assert "Give the run files to compare" in refused(capsys, "seed=1")
    assert "Invalid value for '--seeds'" in refused(capsys, one, "--seeds", "0")
    assert "--target is a loss" in refused(capsys, one, "--target", "nan")
    with pytest.raises(SystemExit):
        app(["compare", "--help"])
    assert "--allow-different" in capsys.readouterr().out
    monkeypatch.chdir(place.root)
    kept: dict[str, Any] = {}

    def stand_in(files: list[str], **options: Any) -> Any:
        kept.update(options, files=files)
        raise ConfigError(["enough"])

    monkeypatch.setattr(comparison, "compare", stand_in)
    run(capsys, "compare", one, "rounds=3", "--target", "2.5", "--seeds", "4")
    assert (kept["files"], kept["overrides"], kept["target"], kept["seeds"]) == ([one], ["rounds=3"], 2.5, 4)
    assert kept["out"] is None


def test_the_place_of_a_comparison_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It follows from the runs, so the same command goes on."""
    monkeypatch.chdir(tmp_path)
    own = place_at(tmp_path)
    monkeypatch.setattr(comparison, "_carry_out", lambda configs, *_: [Trial(n, 0, tmp_path, None) for n in configs])
    made = compare(own.both())
    assert made.out == Path("outputs/compare-sfl-v2-sequential-sl")
    assert made.page.is_file()


# Numbers that can be checked by hand.


def points(*values: tuple[float, float]) -> list[dict[str, Any]]:
    """Evaluations by loss and virtual time; the steps are ten times the time."""
    return [
        {"round": number, "loss": loss, "virtual_time": time, "steps": int(10 * time)}
        for number, (loss, time) in enumerate(values)
    ]


def test_the_way_to_the_target_is_interpolated() -> None:
    curve = points((5.0, 0.0), (3.0, 10.0), (3.5, 20.0), (2.5, 30.0))
    assert reached(curve, 4.0, "virtual_time") == 5.0  # halfway from 5 to 3
    assert reached(curve, 3.5, "virtual_time") == 7.5
    assert reached(curve, 3.0, "virtual_time") == 10.0
    assert reached(curve, 2.75, "virtual_time") == 27.5  # three quarters of the way from 3.5 to 2.5
    assert reached(curve, 2.75, "steps") == 275.0
    assert reached(curve, 2.4, "virtual_time") is None
    assert reached(curve, 6.0, "virtual_time") == 0.0  # there from the start
    assert reached(curve, 4.0, "bytes_up") is None  # not measured
    assert reached([], 4.0, "steps") is None


def test_mean_and_deviation_over_seeds() -> None:
    assert spread([1.0, 2.0, None, 3.0]) == {"mean": 2.0, "deviation": 1.0, "count": 3}
    assert spread([1.0]) == {"mean": 1.0, "deviation": None, "count": 1}
    assert spread([None]) == {"mean": None, "deviation": None, "count": 0}


def test_a_band_is_over_the_rounds_that_all_seeds_have() -> None:
    long, short = points((5.0, 0.0), (3.0, 10.0), (2.0, 20.0)), points((6.0, 0.0), (3.0, 14.0))
    found = band([long, short], "virtual_time")
    assert found is not None
    assert (found.at, found.mean) == ([0.0, 12.0], [5.5, 3.0])
    assert found.deviation == [pytest.approx(0.5**0.5), 0.0]
    assert band([long, short], "bytes") is None
    assert band([], "steps") is None


def over(mean: float | None, deviation: float | None = None, count: int = 2) -> dict[str, Any]:
    return {"mean": mean, "deviation": deviation, "count": count}


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (over(2.34567, 0.0123), "loss", "2.3457 ± 0.0123"),
        (over(2.0, 0.0), "loss", "2.0000 ± 0.0000"),
        (over(12345.6, None), "perplexity", "12,345.60"),
        (over(1_234_567, 100_000), "bytes", "1.2 ± 0.1 MB"),
        (over(1_234_567, 10), "bytes", "1.2 MB"),
        (over(999, 3), "bytes", "999 ± 3 B"),
        (over(3e15), "bytes", "3,000.0 TB"),
        (over(12.5, 0.25), "seconds", "12.500 ± 0.250 s"),
        (over(1234.5, 10.0), "seconds", "1,234.5 ± 10.0 s"),
        (over(40.0, None, 1), "count", "40 (1 of 2 seeds)"),
        (over(None, None, 0), "seconds", "-"),
    ],
)
def test_numbers_are_written_with_unit_and_deviation(value: Any, kind: Any, text: str) -> None:
    assert written(value, kind, 2) == text


def summary(**changes: Any) -> dict[str, Any]:
    party = {"peak_memory_bytes": 100}
    return {
        "clients": ["ann", "bob"], "parties": {"ann": party, "bob": {"peak_memory_bytes": 300}, "server": party},
        "steps": {"ann": 1, "bob": 1}, "bytes_up": 10, "bytes_down": 20, "virtual_seconds": 8.0, "versions": {},
        "device": "cpu", "eval": {"after": {"loss": 1.0, "perplexity": 2.7}, "history": [
            {"round": 0, "loss": 3.0, "steps": 0, "virtual_time": 0.5, "bytes_up": 1, "bytes_down": 2},
            {"round": 1, "loss": 1.0, "steps": 2, "virtual_time": 8.0, "bytes_up": 10, "bytes_down": 20},
        ]}, **changes,
    }  # fmt: skip


def test_what_a_summary_says_of_its_evaluations_is_used(tmp_path: Path) -> None:
    told = summary()
    assert evaluations(tmp_path, told) == told["eval"]["history"]  # there is no metrics.jsonl to look into
    del told["eval"]["history"][1]["bytes_up"]
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is missing or damaged"):
        evaluations(tmp_path, told)
    rows_ = [
        {"round": 0, "loss": 1.0, "label_tokens": 1, "bytes_up": 3, "bytes_down": 4, "virtual_time": time}
        for time in (2.0, 1.5)
    ]
    write_rows(tmp_path / "metrics.jsonl", rows_)
    assert evaluations(tmp_path, told)[1]["bytes_up"] == 6
    assert evaluations(tmp_path, told)[1]["bytes_down"] == 20  # that was told
    for record in told["eval"]["history"]:
        del record["virtual_time"]
    assert [record["virtual_time"] for record in evaluations(tmp_path, told)] == [0.0, 2.0]


def test_waiting_is_shown_where_it_was_measured(tmp_path: Path) -> None:
    waiting = summary(waiting={"ann": 1.0, "bob": 4.0})
    found = measured(waiting, waiting["eval"]["history"], 2.0)
    assert (found["waiting_mean"], found["waiting_worst"]) == (2.5, 4.0)
    assert (found["client_memory"], found["server_memory"]) == (300, 100)
    assert (found["time_to_target"], found["steps_to_target"]) == (4.25, 1.0)
    trials = [Trial("a|b<c>", 0, tmp_path, waiting), Trial("plain", 0, tmp_path, summary(device="cuda"))]
    about = {"command": "cutlayer compare", "versions": {}}
    data = summarize(trials, target=2.0, differences={}, notes=["Look <here>."], **about)
    headings, cells = rows(data, MEASURES)
    assert cells[0][headings.index("waiting, worst client")] == "4.000 s"
    assert cells[1][headings.index("waiting, worst client")] == "-"
    assert "The runs were made with different device: cpu, cuda." in data["notes"]
    assert "Each curve has two points only." in "\n".join(data["notes"])
    assert data["target"] == {"loss": 2.0, "from": "as given"}
    assert "| a\\|b\\<c> |" in markdown(data)
    text = page(data)
    assert "<td>a|b&lt;c&gt;</td>" in text
    assert "Look &lt;here&gt;." in text
    data = summarize([Trial("plain", 0, tmp_path, summary())], target=2.0, differences={}, notes=[], **about)
    assert "waiting, mean client" not in rows(data, MEASURES)[0]
    assert not [note for note in data["notes"] if "before any step" in note]
    data = summarize([Trial("plain", 0, tmp_path, summary())], target=3.0, differences={}, notes=[], **about)
    assert "The loss was at the target before any step in plain. Give a lower --target." in data["notes"]


def test_every_measure_and_key_is_documented(done: Comparison) -> None:
    text = (ROOT / "docs/compare.md").read_text()

    def first(heading: str) -> set[str]:
        part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        return {key for line in re.findall(r"^\| (.*?) \|", part, re.M) for key in re.findall(r"`(\w+)`", line)}

    assert first("The measures") == {measure.key for measure in MEASURES}
    assert first("comparison.json") == set(done.summary)
    for key in (*comparison.EQUAL_DATA, "--seeds n", "--target LOSS", "--allow-different"):
        assert f"`{key}`" in text


def test_a_name_with_signs_of_its_own_is_drawn(tmp_path: Path) -> None:
    trials = [Trial(name, 0, tmp_path, summary()) for name in ("$x$", "_under", "a & b")]
    data = summarize(trials, target=None, differences={}, notes=[], command="", versions={})
    for svg in re.findall(r"<svg.*?</svg>", page(data), re.DOTALL):
        for word in ("$x$", "_under", "a &amp; b"):
            assert word in svg
