"""``cutlayer audit``, and the View: exactly what an adversary has."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import cutlayer
from attacking import record, scored, tree, view
from cutlayer.audit.auditing import audit
from cutlayer.audit.messages import STEPS, exchanges
from cutlayer.audit.public import PublicModel, load_public
from cutlayer.audit.scores import MISSING, Guesses, Truth, auc, auc_error, score, truth_of
from cutlayer.audit.spans import spans_of
from cutlayer.audit.view import View, view_of
from cutlayer.cli.main import app
from cutlayer.contracts import Batch
from cutlayer.errors import ConfigError, DataError, MethodError, OutputError, WireError
from cutlayer.methods.attack.causal_search import CausalSearch
from cutlayer.registry import create, names
from cutlayer.report.progress import Reporter
from cutlayer.schedule import batches_of
from cutlayer.threat import Threat
from spine import MOSTLY_TWO, PARTITIONS, TWO, U, model

ROOT = Path(__file__).parents[1]
ATTACKS = {name: create("attack", name, {}) for name in names("attack")}
ON_TEXT = {  # what a run on whole texts can have that brings no text of the attacker's own
    name
    for name, attack in ATTACKS.items()
    if attack.threat.classes is None and "auxiliary" not in attack.threat.knows
}  # fmt: skip
READS_ALL = Threat(reads=STEPS, knows=("architecture",), target="inputs")


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    run = tree(model(), tmp_path, partition={"name": "u-shaped-split", "head_blocks": 1, "tail_blocks": 0})
    del run["record_wire"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    out = tmp_path / "audit"
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "run.yaml"), "--out", str(out), "--budget", "quick"])
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "audit.json").read_text())
    assert {row["attack"] for row in rows} == ON_TEXT
    for row in rows:
        assert set(row) == {
            "attack", "defense", "moment", "target", "token_recovery", "rouge_l", "auc", "positions", "controls",
            "utility", "threat", "notes", "seconds", "examples",
        }  # fmt: skip
        assert set(row["controls"]) == {"constant", "shuffled", "shuffled_auc", "random_weights"}
        assert row["utility"]["bytes_up"] > 0
    first = {row["attack"]: row for row in rows if row["moment"] == "first step"}
    assert first["causal-search"]["token_recovery"] == 1.0
    assert first["label-solve"]["token_recovery"] > 0.99
    assert "server reads your text" in " ".join(done.output.split())
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 1
    assert first["causal-search"]["examples"][0]["true"][:20] in page
    assert {key for row in rows for key in row} == _told((ROOT / "docs/audit.md").read_text())


def _told(page: str) -> set[str]:
    """The keys of ``audit.json`` that a page tells of."""
    lines = page[page.index("## audit.json") :].splitlines()
    return {key for line in lines if line.startswith("| `") for key in re.findall("`(.+?)`", line.split("|")[1])}


def test_an_audit_changes_no_number_of_the_run(tmp_path: Path) -> None:
    """Passive attacks work on a record: the run that they were played on is the run without them."""
    run = tree(model(), tmp_path, partition=U, steps=3)
    alone = cutlayer.train(run, out=tmp_path / "alone", progress=False)
    run["record_wire"] = None
    audit(run, out=tmp_path / "audit", budget="full", attacks=["label-solve"], progress=False)
    made, wanted = tmp_path / "audit/run/metrics.jsonl", alone.out / "metrics.jsonl"
    assert [json.loads(line)["loss"] for line in made.read_text().splitlines()] == [
        json.loads(line)["loss"] for line in wanted.read_text().splitlines()
    ]


@MOSTLY_TWO
def test_a_view_has_what_crossed_the_wire(partition: dict[str, Any], tmp_path: Path) -> None:
    """Two clients, accumulation and evaluation: each training micro-batch once, with the steps that are read."""
    run = tree(model(), tmp_path, partition=partition, clients=2, steps=2, gradient_accumulation=2, batch_size=2)
    run["data"]["eval"] = run["data"]["train"]
    cutlayer.train(run, out=tmp_path / "out", progress=False)
    found = record(model(), tmp_path / "again", partition=partition)
    seen = list(exchanges(_frames(tmp_path / "frames"), reads=STEPS))
    assert (
        len(seen) == len({one.key for one in seen}) == 2 * (2 + 1)
    )  # six rows each: the second step is the epoch's rest
    legs = set(STEPS) if partition is U else {"send_activations", "return_gradients"}
    assert all(set(one.tensors) == legs for one in seen)
    only = list(exchanges(_frames(tmp_path / "frames"), reads=["return_gradients"]))
    assert all(set(one.tensors) == {"return_gradients"} for one in only)
    with pytest.raises(WireError, match="no tensor of send_activations was read"):
        only[0].hidden("send_activations")
    batch = batches_of(found.config, found.data, found.config.client_names[0]).step(0)[0]
    hidden = view(found, create("attack", "causal-search", {}), rows=99).exchanges[0].hidden("send_activations")
    assert hidden.shape[:2] == batch.input_ids.shape


def _frames(folder: Path) -> Any:
    from cutlayer.wire import read_frames

    return read_frames(folder)


def test_a_view_has_nothing_that_its_threat_does_not_name(tmp_path: Path) -> None:
    found = record(model(), tmp_path, partition=U)
    public = load_public(found.config.model)
    layout = found.layouts[found.config.client_names[0]]
    seen = view_of(READS_ALL, found.read(), layout=layout, public=public, auxiliary=[torch.tensor([1, 2])])
    with pytest.raises(MethodError, match="which its threat does not name"):
        _ = seen.public
    with pytest.raises(MethodError, match="which its threat does not name"):
        _ = seen.auxiliary
    for name in ("classes", "labelled"):
        with pytest.raises(MethodError, match="which its threat does not name"):
            getattr(seen, name)
    for attack in ATTACKS.values():
        assert ("labelled" in attack.threat.knows) == (attack.threat.labelled > 0)
    knowing = replace(READS_ALL, knows=("weights", "auxiliary"))
    seen = view_of(knowing, found.read(), layout=layout, public=public, auxiliary=[torch.tensor([1, 2])])
    assert seen.public is public
    assert len(seen.auxiliary) == 1


@PARTITIONS
def test_no_truth_is_in_a_view(partition: dict[str, Any], tmp_path: Path) -> None:
    """Walk through all that a view reaches: no tensor is the private tokens, but the labels of the two-part split.

    A planted hole, the batch itself in the view, is found by the same walk.
    """
    found = record(model(), tmp_path, partition=partition)
    layout = found.layouts[found.config.client_names[0]]
    threat = replace(READS_ALL, knows=("weights",))
    seen = view_of(threat, found.read(), layout=layout, public=load_public(found.config.model), auxiliary=None)
    key = seen.exchanges[0].key
    private = [found.truth(key, "inputs").tokens]
    assert not _holds(seen, private[0])
    holed = replace(seen.exchanges[0], values={"send_activations": {"batch": private}})  # type: ignore[dict-item]
    assert _holds(replace(seen, exchanges=[holed]), private[0])


def _holds(thing: Any, private: torch.Tensor, seen: set[int] | None = None) -> bool:
    """Whether these tokens can be reached from a thing."""
    seen = seen if seen is not None else set()
    if id(thing) in seen or isinstance(thing, str | int | float | bool | type | None):
        return False
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if thing.is_floating_point() or thing.dim() != 2:
            return False
        return thing.shape == private.shape and bool((thing.long() == private).all())
    if isinstance(thing, dict):
        return any(_holds(value, private, seen) for value in thing.values())
    if isinstance(thing, list | tuple | set):
        return any(_holds(value, private, seen) for value in thing)
    if isinstance(thing, View | PublicModel) or hasattr(thing, "__dataclass_fields__"):
        return any(_holds(getattr(thing, field.name), private, seen) for field in fields(thing))
    return _holds(getattr(thing, "__dict__", {}), private, seen)


def test_scores() -> None:
    truth = Truth(torch.tensor([[1, 2, 3, 9], [4, 4, 4, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool())
    said = torch.tensor([[1, 2, MISSING, 9], [4, 5, 5, 4]])
    words = ["zero", "one", "two", "three", "four", "five"]
    found = score(Guesses({("a", 0, 0): said}), {("a", 0, 0): truth}, lambda ids: " ".join(words[i] for i in ids))
    assert found.token_recovery == pytest.approx(4 / 7)
    assert found.constant == pytest.approx(4 / 7)
    assert found.positions == 7
    assert found.rouge_l == pytest.approx((0.8 + 0.5) / 2)  # 2 of 3 with nothing wrong; 2 of 4 with 4 said
    assert found.examples[0] == ("one two three", "one two")
    nothing = score(Guesses(), {("a", 0, 0): truth}, lambda ids: "")
    assert nothing.token_recovery == nothing.rouge_l == 0.0
    assert auc([0.1, 0.2, 0.8, 0.9], [False, False, True, True]) == 1.0
    assert auc([1.0, 2.0], [True, True]) == 0.5
    assert auc_error(100, 100) == pytest.approx(0.041, abs=5e-4)
    assert auc_error(500, 500) == pytest.approx(0.018, abs=5e-4)


def test_truths_are_aligned_with_what_a_position_tells() -> None:
    ids = torch.tensor([[5, 6, 7, 0]])
    batch = Batch(ids, torch.tensor([[1, 1, 1, 0]]), None, torch.tensor([[-100, 6, 7, -100]]), 3, 2)
    assert truth_of(batch, "inputs").counts.tolist() == [[True, True, True, False]]
    labels = truth_of(batch, "labels")
    assert labels.counts.tolist() == [[True, True, False, False]]
    assert labels.tokens[0, :2].tolist() == [6, 7]
    classes = truth_of(Batch(ids, None, None, torch.tensor([2]), 4, 1), "labels")
    assert classes.tokens.tolist() == [[2]]


def test_spans_leave_padding_out_and_keep_packed_texts_apart() -> None:
    hidden = torch.zeros(2, 5, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert [(s.row, s.start, s.stop) for s in spans_of(hidden, {"mask": mask})] == [(0, 2, 5), (1, 0, 4)]
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    found = [(s.row, s.start, s.stop) for s in spans_of(hidden, {"positions": positions})]
    assert found == [(0, 0, 2), (0, 2, 5), (1, 0, 5)]
    assert len(spans_of(hidden, {})) == 2


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    run = tree(model(), tmp_path, partition=TWO)
    with pytest.raises(MethodError, match=r"There is no attack 'causal-serch'\. Did you mean 'causal-search'"):
        audit(run, out=tmp_path / "a", attacks=["causal-serch"], progress=False)
    with pytest.raises(DataError, match="holds no recorded frames"):
        audit(run, out=tmp_path / "a", frames=tmp_path / "nowhere", progress=False)
    with pytest.raises(ConfigError, match="name the attacks"):
        audit(run, out=tmp_path / "a", attacks=[], progress=False)
    with pytest.raises(ConfigError, match="Attacks are played by cutlayer audit"):
        cutlayer.train({**run, "attack": ["causal-search"]}, out=tmp_path / "b", progress=False)
    assert not (tmp_path / "b").exists()


def test_frames_that_were_recorded_earlier(tmp_path: Path) -> None:
    found = record(model(), tmp_path, partition=U)
    done = audit(
        tree(model(), tmp_path, partition=U), out=tmp_path / "audit", frames=tmp_path / "frames",
        attacks=["causal-search"], progress=False,
    )  # fmt: skip
    assert [row["moment"] for row in done.rows] == ["first step"]
    assert done.rows[0]["token_recovery"] == 1.0
    assert done.rows[0]["utility"] == {}
    attack = create("attack", "causal-search", {})
    assert scored(found, attack, view(found, attack)).token_recovery == 1.0


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    """An audit writes over its own folder: one that holds a user's ``run/`` or ``frames/`` is refused, untouched."""
    run = tree(model(), tmp_path, partition=U)
    theirs = tmp_path / "theirs"
    (theirs / "run").mkdir(parents=True)
    (theirs / "run/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty, and holds no audit\. Give another --out"):
        audit(run, out=theirs, attacks=["label-solve"], budget="quick", progress=False)
    assert (theirs / "run/notes.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="is a file"):
        audit(run, out=theirs / "run/notes.txt", attacks=["label-solve"], progress=False)
    own = tmp_path / "own"
    for _ in range(2):  # an audit's own folder is written over
        assert audit(run, out=own, attacks=["label-solve"], budget="quick", progress=False).rows


def test_a_planner_is_refused(tmp_path: Path) -> None:
    run = tree(model(), tmp_path, partition=TWO, planner="splitft-adaptive-cut")
    with pytest.raises(MethodError, match="sets the cuts, which the audit does not follow yet"):
        audit(run, out=tmp_path / "audit", progress=False)
    assert not (tmp_path / "audit").exists()


def test_what_edges_read_is_not_the_servers(tmp_path: Path) -> None:
    """With edges between, no client shows the main server anything at the client's own cut."""
    run = tree(model(), tmp_path, partition=TWO, clients=2, framework={"name": "hsfl", "edges": 2})
    with pytest.raises(DataError, match="go to other parties"):
        audit(run, out=tmp_path / "audit", budget="quick", progress=False)


def test_labels_that_are_sent_need_no_attack(tmp_path: Path) -> None:
    done = audit(tree(model(), tmp_path, partition=TWO), out=tmp_path / "audit", budget="quick", progress=False)
    assert set(done.refused) == {"bisr-sip", *(n for n, attack in ATTACKS.items() if attack.threat.target == "labels")}
    assert any("needs no attack on the labels" in line and "send them as they are" in line for line in done.verdict)


class _Fitted(CausalSearch):
    """An attack that keeps what ``prepare`` learned."""

    def prepare(self, view: View) -> None:
        self.weights = view.public.embedding

    def finish(self, view: View) -> Guesses:
        assert torch.equal(self.weights, view.public.embedding), "prepared for other weights"
        return super().finish(view)


def test_controls_do_not_spoil_what_an_attack_has_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control with other weights prepares a copy, so that the last moment is attacked with the public ones."""
    monkeypatch.setattr("cutlayer.audit.auditing._chosen", lambda attacks: [_Fitted()])
    done = audit(tree(model(), tmp_path, partition=U), out=tmp_path / "audit", budget="quick", progress=False)
    assert [row["moment"] for row in done.rows] == ["first step", "last step"]
    assert all(row["token_recovery"] == 1.0 for row in done.rows[:1])


def test_text_that_no_attack_uses_is_said(tmp_path: Path) -> None:
    said: list[str] = []

    class Notes(Reporter):
        def note(self, text: str) -> None:
            said.append(text)

    run = tree(model(), tmp_path, partition=U)
    audit(
        run, out=tmp_path / "audit", aux=run["data"]["train"], attacks=["label-solve"], budget="quick",
        progress=Notes(),
    )  # fmt: skip
    assert any("--aux changes nothing" in text for text in said)


def test_defenses_are_measured_beside_the_run_as_it_is(tmp_path: Path) -> None:
    """A row for each attack, moment and setting; the cheapest setting that stops all; a frontier on the page."""
    run = tree(model(), tmp_path, partition={**U, "tail_blocks": 0})
    run["data"]["eval"] = run["data"]["train"]
    del run["record_wire"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    out = tmp_path / "audit"
    settings = "dp-forward(noise=0.01,clip=null),dp-forward(epsilon=8)+clip-noise(multiplier=1)"
    played = ["causal-search", "label-solve"]
    call = ["audit", str(tmp_path / "run.yaml"), "--out", str(out), "--budget", "quick", "--defenses", settings]
    call += ["--attacks", ",".join(played)]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    rows = json.loads((out / "audit.json").read_text())
    names_ = ["none", "dp-forward(noise=0.01,clip=null)", "dp-forward(epsilon=8)+clip-noise"]
    assert list(dict.fromkeys(row["defense"] for row in rows)) == names_
    assert len(rows) == 3 * 2 * len(played)
    best = {name: max(row["token_recovery"] for row in rows if row["defense"] == name) for name in names_}
    assert best[names_[0]] == 1.0
    assert best[names_[1]] > 0.9
    assert best[names_[2]] < 0.3
    losses = {row["defense"]: row["utility"]["loss"] for row in rows}
    assert len(set(losses.values())) == 3
    said = " ".join(done.output.split())
    assert f"The cheapest measured setting that stops all attacks that were played is {names_[2]} (perplexity" in said
    page = (out / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "What privacy costs" in page


def test_a_setting_that_cannot_be_is_said(tmp_path: Path) -> None:
    run = tree(model(), tmp_path, partition=TWO)
    for setting, words in {
        "dp-forwrd": r"There is no defense 'dp-forwrd'.*Did you mean 'dp-forward'",
        "dp-forward(noise)": "'noise' in 'dp-forward.noise.' is no option",
        "dp-forward(noise=0.3": "is no setting of a defense",
        "clip-noise": "in the two-part split the client shows no gradient",
    }.items():
        with pytest.raises(ConfigError, match=words):
            audit(run, out=tmp_path / "audit", defenses=[setting], progress=False)
    with pytest.raises(ConfigError, match="--defenses makes a run with each"):
        audit(run, out=tmp_path / "audit", defenses=["dp-forward"], frames=tmp_path, progress=False)
    assert not (tmp_path / "audit").exists()
