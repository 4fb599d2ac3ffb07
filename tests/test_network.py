"""Between processes: the same losses, weights and bytes as in one, whoever is killed, and nobody else comes in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import cutlayer
from apart import ROWS, Apart, keys_for, steps
from cutlayer.apart import served
from cutlayer.errors import ConfigError, DataError, OutputError, PolicyRefused, Refused
from cutlayer.joining import join
from cutlayer.keys import server_keys
from cutlayer.serving import serve
from spine import TWO, U, model, often
from tiny import make_model, text_rows, write_rows

KINDS = {"two-part": TWO, "u-shape": U}
SAME = ("bytes", "bytes_up", "bytes_down", "frames", "steps")


QUICK = [("sfl-v2", {}, "u-shape"), ("sequential-sl", {}, "u-shape"), ("psl", {}, "two-part")]  # in the default suite
CLASSIFIER = {"model": "bert", "data": {"format": "classification", "classes": ["sad", "glad"]}}
CASES = [
    ("sfl-v1", {}), ("sequential-sl", {}), ("sfl-v2", {}), ("psl", {}), ("gsfl", {}), ("p-sl", {}), ("hsfl", {}),
    ("multisfl", {}), ("sfl-v1", {"peft": "full"}), ("sfl-v1", {"mixing": "minibatch-sfl"}),
    ("sfl-v1", {"framework": {"name": "sfl-v1", "participation": 0.5}, "rounds": 4, "seed": 1}),  # bob is the last
    ("sfl-v2", {"max_grad_norm": 0.1, "gradient_accumulation": 2}), ("sfl-v2", CLASSIFIER),
]  # fmt: skip


def both(
    run: Apart, out: Path, *joined_with: str, unequal: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The run between processes, over TLS, and in one, which must be the same; their summaries.

    Where cuts or ranks are unequal, the adapter of the run is that of one client, and only states are compared.
    """
    alone = cutlayer.train(run.simulated, out=out, progress=False).summary
    keys = keys_for(*run.files)
    server = run.serve(keys=keys)
    run.ended({"server": server, **{name: run.join(name, *joined_with, keys=keys) for name in run.files}})
    summary = run.summary()
    assert steps(run.root / "server") == steps(out)
    for key in SAME:
        assert summary[key] == alone[key], key
    losses = [[e["loss"] for e in one.get("eval", {}).get("history", [])] for one in (summary, alone)]
    assert losses[0] == losses[1]
    assert unequal or run.same(out)
    assert run.same_state(out)
    return summary, alone


@pytest.mark.parametrize(
    ("framework", "changes", "partition"),
    often(
        [(framework, changes, kind) for framework, changes in CASES for kind in KINDS],
        *QUICK,
    ),
    ids=str,
)  # fmt: skip
def test_the_network_changes_no_number(
    framework: str, changes: dict[str, Any], partition: str, tmp_path: Path
) -> None:  # fmt: skip
    """The same losses by client and step, the same weights, the same bytes and frames."""
    rounds = 2 if (framework, changes, partition) in QUICK else 3
    if "model" in changes:
        changes = {**changes, "model": str(model(changes["model"], num_hidden_layers=4))}
    told = {"framework": framework, "rounds": rounds, **changes}
    run = Apart(tmp_path / "apart", partition=KINDS[partition], eval_every=1, **told)
    summary, alone = both(run, tmp_path / "one")
    assert all("peak_memory_bytes" not in summary["parties"][name] for name in ROWS), "nobody has measured it here"
    peaks = [one["parties"]["server"]["peak_memory_bytes"] for one in (summary, alone)]
    if framework in ("sequential-sl", "sfl-v2"):
        assert peaks[0] == peaks[1]
    else:  # clients at once: how many graphs are open together depends on who is fast
        assert min(peaks) > 0


# One client's text is soon learnt, the other's never, so that their cuts part.
UNLIKE = {**ROWS, "ann": [{"text": "w5 w6 w7 w8 w5 w6 w7 w8 w5 w6"} for _ in range(7)]}
PLANNED: dict[str, Any] = {
    "planner": {"name": "splitft-adaptive-cut", "every": 2, "cut": 1, "least": 0, "gamma": 2.0},
    "optimizer": {"name": "adamw", "lr": 0.05}, "rounds": 8, "eval_every": 1,
}  # fmt: skip
CUT_RANK = {"peft": {"name": "splitft-cut-rank", "rank": 4, "cut_rank": 2, "alpha": 4}, "aggregator": "lora-products"}
MOVES = [
    (framework, changes, kind) for framework in ("sfl-v1", "sfl-v2") for changes in ({}, CUT_RANK)
    for kind in ("two-part", "u-shape")
]  # fmt: skip


@pytest.mark.parametrize(
    ("framework", "changes", "partition"), often(MOVES, ("sfl-v2", CUT_RANK, "u-shape")), ids=str
)  # fmt: skip
def test_cuts_move_between_processes(
    framework: str, changes: dict[str, Any], partition: str, tmp_path: Path
) -> None:  # fmt: skip
    """A planner moves blocks up and down: the same cuts, losses, weights and bytes."""
    run = Apart(tmp_path / "apart", UNLIKE, framework=framework, partition=KINDS[partition], **PLANNED, **changes)
    summary, alone = both(run, tmp_path / "one", unequal=True)
    assert summary["cuts"] == alone["cuts"]
    assert {name: len(one["moves"]) > 0 for name, one in summary["cuts"].items()} == dict.fromkeys(ROWS, True)


@pytest.mark.slow
def test_cuts_move_in_a_model_that_was_handed(tmp_path: Path) -> None:
    """A client that has no model gets all blocks that a planner may give it."""
    run = Apart(tmp_path / "apart", UNLIKE, framework="sfl-v2", **PLANNED)
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    server = run.serve()
    run.ended({"server": server, **{name: run.join(name, model=False) for name in ROWS}})
    assert run.summary()["cuts"] == alone.summary["cuts"]
    assert steps(run.root / "server") == steps(alone.out)


@pytest.mark.slow
@pytest.mark.parametrize("partition", [TWO, U], ids=["two-part", "u-shape"])
def test_cuts_by_what_devices_can_do(partition: dict[str, Any], tmp_path: Path) -> None:
    """The profiles are of the run file; time is what it takes."""
    link = {"up_mbps": 100, "down_mbps": 100, "rtt_ms": 1}
    clients = [{"name": "ann", "profile": {"flops": 1e9, **link}}, {"name": "bob", "profile": {"flops": 5e9, **link}}]
    run = Apart(
        tmp_path / "apart", framework="sfl-v1", partition=partition, clients=clients, eval_every=1,
        planner={"name": "capability-cut", "serves": "parallel", "every": 2},
    )  # fmt: skip
    summary, alone = both(run, tmp_path / "one")
    assert summary["cuts"] == alone["cuts"]
    assert len({one["head_blocks"] for one in summary["cuts"].values()}) == 2
    assert summary["virtual_seconds"] is None


ALLOTTED: dict[str, Any] = {
    "peft": {"name": "hsplitlora", "ranks": [1, 2, 4], "budget": 1500, "budgets": {"bob": 900}, "server_budget": 3000,
             "warm_up": 2, "refresh": 2},
    "aggregator": "lora-products", "rounds": 6, "eval_every": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("framework", "changes", "partition"),
    often(
        [(framework, {}, kind) for framework in ("sfl-v1", "sfl-v2") for kind in ("two-part", "u-shape")]
        + [("sfl-v2", PLANNED, "two-part"), ("sfl-v2", PLANNED, "u-shape")],
        ("sfl-v1", {}, "two-part"),
    ),
    ids=str,
)  # fmt: skip
def test_ranks_by_importance_between_processes(
    framework: str, changes: dict[str, Any], partition: str, tmp_path: Path
) -> None:  # fmt: skip
    run = Apart(tmp_path / "apart", UNLIKE, framework=framework, partition=KINDS[partition], **{**ALLOTTED, **changes})
    summary, alone = both(run, tmp_path / "one", unequal=True)
    assert summary["ranks"] == alone["ranks"]
    assert all(one["decided_after_round"] is not None for one in summary["ranks"].values())
    assert len(set(summary["ranks"]["ann"]["ranks"].values())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [CUT_RANK, ALLOTTED], ids=["splitft-cut-rank", "hsplitlora"])
def test_killed_parties_find_their_cuts_again(changes: dict[str, Any], tmp_path: Path) -> None:
    """Killed after blocks have moved: cuts, ranks and importance are those of the round that all hold."""
    run = Apart(tmp_path / "apart", UNLIKE, framework="sfl-v2", **{**changes, **PLANNED, "rounds": 14})
    server = run.serve()
    clients = {name: run.join(name) for name in ROWS}
    run.kill_after("ann", clients["ann"], 4)
    clients["ann"] = run.join("ann")
    run.kill_after("server", server, 8)
    server = run.serve()
    run.ended({**clients, "server": server})
    assert "going on after round" in run.said("bob")
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert run.summary()["cuts"] == alone.summary["cuts"]
    assert any(moved[0] < 4 for one in alone.summary["cuts"].values() for moved in one["moves"])
    assert run.same_state(alone.out)
    assert steps(run.root / "server") == steps(alone.out)


def keys_of(folder: Path) -> Path:
    """Keys for a server and all clients."""
    clients = [word for name in ROWS for word in ("--client", name)]
    command = [sys.executable, "-m", "cutlayer", "keys", "--out", str(folder), "--host", "localhost", *clients]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.slow  # one party killed: test_killed.py
def test_killed_parties_change_nothing(tmp_path: Path) -> None:
    """Over TLS between processes: a client is killed, then the server; each comes back, and the end is the same."""
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=12)
    keys = keys_of(tmp_path / "keys")
    server = run.serve(keys=keys)
    clients = {name: run.join(name, keys=keys) for name in ROWS}
    run.kill_after("ann", clients["ann"], 3)
    clients["ann"] = run.join("ann", keys=keys)
    run.kill_after("server", server, 7)
    server = run.serve(keys=keys)
    run.ended({**clients, "server": server})
    assert "All go back to the last round that everybody holds" in run.said("server")
    assert "going on after round" in run.said("bob")
    alone = cutlayer.train(run.simulated, out=tmp_path / "one")
    assert run.same(alone.out)
    assert steps(run.root / "server") == steps(tmp_path / "one")


def test_early_stop_needs_evaluation_data_of_who_evaluates(tmp_path: Path) -> None:
    """The run file need name no file of it; a run without is refused in words, and may be joined again with it."""
    run = Apart(tmp_path / "apart", eval_every=1, early_stop={"patience": 9}, rounds=1, data={"eval": None})
    brought = ("--eval", run.valid)
    server = run.serve()
    clients = {"ann": run.join("ann"), "bob": run.join("bob", *brought)}
    assert server.wait() == 2, run.said("server")
    said = "early_stop is given, but 'ann', whose model is now the run's, has brought no evaluation data"
    assert said in run.said("server")
    assert "Traceback" not in run.said("server")
    assert [client.wait() for client in clients.values()] == [2, 2]
    server = run.serve()
    run.ended({**{name: run.join(name, *brought) for name in ROWS}, "server": server})
    assert [one["round"] for one in run.summary()["eval"]["history"]] == [0, 1]


def test_a_run_that_nobody_can_evaluate_says_so(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", eval_every=1, rounds=1, data={"eval": None})
    run.ended({"server": run.serve(), **{name: run.join(name) for name in ROWS}})
    assert run.said("server").count("nothing is evaluated: no client has brought evaluation data") == 1
    assert "eval" not in run.summary()


@pytest.mark.slow
def test_what_a_server_remembers_of_samples_outlives_it(tmp_path: Path) -> None:
    """From the second epoch on clients send the numbers of what they have shown, to a server that was killed too."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("may_leave: {sample_numbers: true}\n")
    cached = {"exchange": {"name": "splitfrozen", "cache": True}, "framework": "sfl-v1", "partition": TWO}
    run = Apart(tmp_path / "apart", **cached, rounds=9)
    server = run.serve()
    clients = {name: run.join(name, "--policy", str(policy)) for name in ROWS}
    run.kill_after("server", server, 5)
    run.ended({**clients, "server": run.serve()})
    alone = cutlayer.train(run.simulated, out=tmp_path / "one", progress=False)
    assert steps(run.root / "server") == steps(alone.out)
    assert run.same_state(alone.out)


@pytest.mark.slow
def test_a_server_that_is_stopped_at_once_says_how_to_go_on(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", framework="psl", rounds=12)
    server = run.serve("--drain", "0")
    clients = {name: run.join(name) for name in ROWS}
    assert run.kill_after("server", server, 4, gently=True) == 130
    assert "The same command goes on with the run" in run.said("server")
    assert "Traceback" not in run.said("server")
    run.ended({"server": run.serve(), **clients})
    assert run.same(cutlayer.train(run.simulated, out=tmp_path / "one").out)


@pytest.mark.slow
def test_a_client_that_stays_away_ends_the_run_where_that_is_wanted(tmp_path: Path) -> None:
    """Its name is told; serving again goes on from the last common round, and the end is the same."""
    run = Apart(tmp_path / "apart", framework="sfl-v2", rounds=12)
    server = run.serve("--patience", "3", "--absent", "end")
    clients = {name: run.join(name) for name in ROWS}
    run.kill_after("bob", clients["bob"], 3)
    assert server.wait() == 2, run.said("server")
    assert "Client 'bob' is gone: it has been away for 3 seconds" in run.said("server")
    server = run.serve()
    clients["bob"] = run.join("bob")
    run.ended({**clients, "server": server})
    assert run.same(cutlayer.train(run.simulated, out=tmp_path / "one").out)


def test_a_policy_names_the_server(tmp_path: Path) -> None:
    """A client whose owner pinned another server's certificate tells this one nothing; the right pin lets it in.

    The model is judged by its name in the run, not by where its files are; and files may have columns of other names.
    """
    run = Apart(tmp_path / "apart", rounds=1)
    keys = keys_for(*ROWS)
    right = server_keys(keys / "server").fingerprint
    server = run.serve(keys=keys)
    pins = {name: tmp_path / f"{name}.yaml" for name in ("right", "wrong")}
    name = Path(run.tree["model"]).name  # as the run calls it; the client says where it is
    pins["right"].write_text(f"server: '{right}'\nmodels: ['{name}']\n")
    pins["wrong"].write_text(f"server: '{right[:-2] + ('00' if right[-2:] != '00' else '01')}'\n")
    refused = run.join("ann", "--policy", str(pins["wrong"]), keys=keys)
    assert refused.wait() == 2
    assert "is expected. Ask the operator whether the certificate was renewed" in run.said("ann")
    assert "client 'ann' is here" not in run.said("server")
    body = write_rows(tmp_path / "body.jsonl", [{"body": row["text"]} for row in ROWS["ann"]])
    held_out = write_rows(tmp_path / "held-out.jsonl", [{"body": row["text"]} for row in text_rows(4, seed=9)])
    other = {"ann": ("--data", str(body), "--eval", str(held_out)), "bob": ()}
    lost = run.join("ann", "--policy", str(pins["right"]), *other["ann"], keys=keys)
    assert lost.wait() == 2
    assert "has no column 'text'" in run.said("ann")
    assert "(cutlayer join: --columns text=<column>)" in run.said("ann")
    other["ann"] += ("--columns", "text=body")
    pinned = {name: run.join(name, "--policy", str(pins["right"]), *other[name], keys=keys) for name in ROWS}
    run.ended({**pinned, "server": server})
    assert yaml.safe_load((run.root / "ann" / "audit.yaml").read_text())["data"]["columns"] == {"text": "body"}
    assert run.same(cutlayer.train(run.simulated, out=tmp_path / "one", progress=False).out)


def test_a_policy_is_kept(tmp_path: Path) -> None:
    """A client whose owner forbids labels is not in a two-part run; nothing is loaded, and nothing leaves."""
    run = Apart(tmp_path / "apart", partition=TWO)
    policy = tmp_path / "policy.yaml"
    policy.write_text("may_leave: {labels: false}\n")
    own = run.tree["model"]
    server = run.serve()
    try:
        with pytest.raises(PolicyRefused, match="labels"):
            join(
                f"localhost:{run.port}", data=run.files["ann"], out=run.root / "ann", name="ann",
                model=run.tree["model"], policy=policy, progress=False,
            )  # fmt: skip
        assert not (run.root / "ann" / "sent.jsonl").exists()
        rules = (
            (
                "models: [gpt5]",
                rf"The policy's rule models refuses: the run's model is '{Path(own).name}'; allowed: gpt5",
            ),
            ("models: [gpt5]", rf"the files in {own} are your own \(--model\)"),
            ("models: [gpt5]\nhead_blocks: 3", "The policy's rules models, head_blocks refuse: models: the run"),
        )
        for text, said in rules:
            policy.write_text(f"{text}\n")
            with pytest.raises(PolicyRefused, match=said):
                join(
                    f"localhost:{run.port}", data=run.files["ann"], out=run.root / "ann", name="ann", model=own,
                    policy=policy, progress=False,
                )  # fmt: skip
        with pytest.raises(Refused, match="The run that it is in has no name here: leave out --run"):
            join(
                f"localhost:{run.port}", data=run.files["ann"], out=run.root / "ann", name="ann", run="other",
                model=own, progress=False,
            )  # fmt: skip
        with pytest.raises(Refused, match="No run here has a client 'eve'"):
            join(
                f"localhost:{run.port}", data=run.files["ann"], out=run.root / "eve", name="eve",
                model=run.tree["model"], progress=False,
            )  # fmt: skip
        tokens = tmp_path / "tokens"
        shutil.copytree(own, tokens)
        (tokens / "tokenizer.json").write_text((tokens / "tokenizer.json").read_text() + " ")
        with pytest.raises(Refused, match=r"The tokenizer is another here, .*tokenizer\.json has another checksum"):
            join(
                f"localhost:{run.port}", data=run.files["ann"], out=run.root / "ann", name="ann", model=str(tokens),
                progress=False,
            )  # fmt: skip
        other = make_model(tmp_path / "other", "llama", num_hidden_layers=4, seed=5)
        with pytest.raises(Refused, match="The model is another here"):
            join(
                f"localhost:{run.port}", data=run.files["ann"], out=run.root / "ann", name="ann", model=str(other),
                progress=False,
            )  # fmt: skip
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"format": "classification", "classes": ["sad"]}}, "must name two classes or more"),
        ({"fails": 0.5}, "is for simulated clients"),
        ({"data": {"eval_fraction": 0.5}}, "cutlayer join --eval"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_over_a_network_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart", **changes)
    with pytest.raises(ConfigError, match=said):
        served(str(run.file))


def test_a_classifier_s_classes_must_be_known(tmp_path: Path) -> None:
    """To the server, which sees no label; and a label that is none of them is refused where it is."""
    about: dict[str, Any] = {"model": str(model("bert", num_hidden_layers=4))}
    run = Apart(tmp_path / "apart", **about, data={"format": "classification"})
    with pytest.raises(ConfigError, match=r"data\.classes is missing"):
        serve(str(run.file), bind="localhost:0", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    run = Apart(tmp_path / "other", **about, data={"format": "classification", "classes": ["good", "bad"]})
    rows = [{"text": "w3 w4", "label": label} for label in ("good", "ugly")]
    server = run.serve()
    try:
        with pytest.raises(DataError, match="'ugly', which is none of the run's classes: good, bad"):
            join(
                f"localhost:{run.port}", data=write_rows(run.root / "rows.jsonl", rows), out=run.root / "ann",
                name="ann", model=run.tree["model"], progress=False,
            )  # fmt: skip
    finally:
        server.kill()
        server.wait()


def test_the_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    run = Apart(tmp_path / "apart")
    cutlayer.train(run.simulated, out=tmp_path / "one")
    before = (tmp_path / "one" / "run.yaml").read_text()
    with pytest.raises(OutputError, match="holds another run"):
        serve(str(run.file), bind="localhost:0", out=tmp_path / "one", progress=False)
    assert (tmp_path / "one" / "run.yaml").read_text() == before


def test_nothing_of_the_server_s_machine_is_offered(tmp_path: Path) -> None:
    from cutlayer.apart import offer

    run = Apart(tmp_path / "apart", record_wire=str(tmp_path / "wire"))
    told = str(offer(served(str(run.file))))
    assert str(tmp_path) not in told
    assert write_rows(tmp_path / "x.jsonl", text_rows(1)).name not in told
