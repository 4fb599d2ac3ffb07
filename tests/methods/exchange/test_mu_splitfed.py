"""The row's check: estimates like the gradient, parameters put back, one number down, no graph, and what tau gains."""

# ruff: noqa: F811 - a fixture that is imported

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import cutlayer
from cutlayer.config import load_config
from cutlayer.driver import Run
from cutlayer.errors import ConfigError
from cutlayer.report.plan import plan
from cutlayer.seeds import derive
from cutlayer.wire import read_frames
from cutlayer.zeroth import Probe, directions, estimate, slope, two_points
from spine import TWO, U, adapter, caught, equal, lines, losses, model, resumed, train  # noqa: F401
from tiny import text_rows, write_rows

NAMES = ("ann", "bob", "cid")
ROWS = {name: text_rows(6 + i, seed=i) for i, name in enumerate(NAMES)}
PROFILES = dict(zip(NAMES, ("laptop+dsl", "phone+4g", "workstation+lan"), strict=True))
MU = "mu-splitfed"


def run(out: Path, rows: Any = ROWS, **changes: Any) -> Any:
    """Three clients in ``sfl-v1``, two parts, SGD."""
    sgd = {"name": "sgd", "lr": 1e-3}
    given = {"partition": TWO, "framework": "sfl-v1", "exchange": MU, "optimizer": sgd, **changes}
    return train(given.pop("model", model()), out, rows, **given)


@contextmanager
def saved_tensors() -> Iterator[list[int]]:
    """The sizes of all that autograd saves inside."""
    found: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


@pytest.mark.parametrize(("size", "count"), [(24, 240), pytest.param(200, 2000, marks=pytest.mark.slow)])
def test_estimates_point_along_the_gradient(size: int, count: int, tmp_path: Path, caught: list[Run]) -> None:
    """(a) Their cosine with autograd's gradient is sqrt(P / (P + d + 1)): a slice of lora_B, one row of 32 tokens."""
    changes: dict[str, Any] = {"peft": {"name": "lora", "rank": 8, "alpha": 16}, "exchange": "plain"}
    run(tmp_path / "out", {"ann": [{"text": " ".join(f"w{3 + i}" for i in range(32))}]}, rounds=1, **changes)
    client, base = caught[0].parts.clients["ann"], caught[0].parts.base
    whole = base.segment("whole", range(base.anatomy.num_blocks), bottom=True, top=True)
    params = {name: Parameter(tensor.detach().clone()) for name, tensor in base.initial.items()}
    batch = client.batches.step(0)[0]
    assert batch.input_ids.shape[1] >= 32
    name = next(name for name in params if "lora_B" in name)

    def loss() -> torch.Tensor:
        found: torch.Tensor = whole.forward(params, input_ids=batch.input_ids, labels=batch.labels).loss
        return found

    loss().backward()
    assert params[name].grad is not None
    gradient = params[name].grad.reshape(-1)[:size]
    part = Parameter(params[name].detach().reshape(-1)[:size].clone())
    assert len(part) == size

    def at_part() -> float:
        params[name].data.view(-1)[:size] = part.data
        return float(loss())

    probe, seeds = Probe(count, 1e-3, copy=True), range(count)
    slopes = [slope(two_points({"part": part}, seed, probe, at_part), probe) for seed in seeds]
    found = estimate({"part": part}, seeds, slopes)["part"]
    cosine = float(torch.cosine_similarity(found, gradient, dim=0))
    assert abs(cosine - math.sqrt(count / (count + size + 1))) < 0.03


@pytest.mark.parametrize("copy", [True, False])
def test_parameters_are_put_back(copy: bool) -> None:
    """(b) After 1000 looks around: with a copy to the bit.

    Without one the check's 1e-6 does not hold: 3000 roundings of numbers of 0.1 to 0.4 walk at random to 1e-6 and a
    little above. So the copy is the default, as the check says.
    """
    torch.manual_seed(0)
    params = {"a": Parameter(torch.randn(4, 64) * 0.1), "b": Parameter(torch.zeros(64, 4))}
    params["tied"] = params["a"]
    before = {name: tensor.detach().clone() for name, tensor in params.items()}
    for seed in range(1000):
        points = two_points(params, seed, Probe(1, 1e-3, copy), lambda: params["a"].detach().clone())
    u = next(u for name, _, u in directions(params, 999) if name == "a")
    assert torch.allclose(points[0] - points[1], 2e-3 * u, atol=1e-6)
    for name, tensor in params.items():
        assert torch.equal(tensor, before[name]) if copy else torch.allclose(tensor, before[name], rtol=0, atol=5e-6)


def test_an_error_leaves_the_parameters_as_they_were() -> None:
    params = {"a": Parameter(torch.ones(3))}

    def fails() -> float:
        raise ArithmeticError

    for copy in (True, False):
        with pytest.raises(ArithmeticError):
            two_points(params, 0, Probe(1, 1e-3, copy), fails)
        assert torch.allclose(params["a"], torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "profiles"), [(1, PROFILES), pytest.param(2, {}, marks=pytest.mark.slow)])
def test_one_number_comes_down_and_nobody_builds_a_graph(
    count: int, profiles: dict[str, str], tmp_path: Path, caught: list[Run]
) -> None:
    """(c) The frames of a step, what autograd saves, and the time of forward passes."""
    wire = tmp_path / "wire"
    with saved_tensors() as saved:
        done = run(
            tmp_path / "out", exchange={"name": MU, "tau": 3, "perturbations": count}, record_wire=str(wire),
            profiles=profiles, model=model(dropout=0.1),
        )  # fmt: skip
    assert saved == []
    assert all(party["memory"]["activations"] == 0 for party in done.summary["parties"].values())
    frames = [(line, header, tensors) for line, header, tensors in read_frames(wire) if line["step_name"] not in
              ("partition", "aggregate")]  # fmt: skip
    up = [(h.names, t) for line, h, t in frames if line["step_name"] == "send_activations" and "plus.0" in h.names]
    down = [(h.names, t) for line, h, t in frames if line["sender"] == "server" and t]
    assert len(up) == len(down) == 6
    looked = [f"{side}.{n}" for n in range(count) for side in ("plus", "minus")]
    for names, tensors in up:
        assert set(names) - {"mask"} == {"hidden", "labels", *looked}
        named = dict(zip(names, tensors, strict=True))
        for n in range(count):  # h0 lies between the two, and not at them
            middle = (named[f"plus.{n}"] + named[f"minus.{n}"]) / 2
            assert torch.allclose(middle, named["hidden"], atol=1e-4)
            assert not torch.equal(named[f"plus.{n}"], named["hidden"])
    assert {names for names, _ in down} == {("slopes",)}
    assert {tensors[0].numel() for _, tensors in down} == {count}
    party, virtual = caught[0].parts.server, caught[0].counters.virtual
    assert {slot.version for slot in party.slots.values()} == {2}
    if profiles:
        assert virtual["head_backward"] == virtual.get("trunk_backward", 0.0) == 0
        run(tmp_path / "plain", exchange="plain", profiles=profiles)
        plain = caught[1].counters.virtual
        assert virtual["head_forward"] == pytest.approx((1 + 2 * count) * plain["head_forward"])
    with saved_tensors() as saved:
        run(tmp_path / "again", exchange="plain")
    assert saved


def test_the_step_is_the_formula(tmp_path: Path, caught: list[Run]) -> None:
    """One step of one client against the algorithm written out on the whole model, and the merge's global rate."""
    rows = {"ann": text_rows(3)}
    exchange = {"name": MU, "tau": 2, "server_rate": 3.0, "global_rate": 0.5, "copy": False}
    run(tmp_path / "out", rows, exchange=exchange, rounds=1)
    parts = caught[0].parts
    client, route = parts.clients["ann"], parts.routes["ann"]
    base, batch, mu, lr = parts.base, client.batches.step(0)[0], 1e-3, 1e-3
    head, tail = client.head, base.segment("tail", route[0].blocks, top=True)
    theta = {name: Parameter(tensor.detach().clone()) for name, tensor in base.initial.items()}
    ours = {name: theta[name] for name in head.names}
    theirs = {name: theta[name] for name in tail.names}

    @torch.no_grad()
    def shown() -> torch.Tensor:
        found: torch.Tensor = head.forward(theta, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        return found

    @torch.no_grad()
    def loss(hidden: torch.Tensor) -> float:
        out = tail.forward(theta, hidden=hidden, attention_mask=batch.attention_mask, labels=batch.labels)
        return float(out.loss)

    def move(params: dict[str, Parameter], seed: int, far: float) -> None:
        for _, parameter, u in directions(params, seed):
            parameter.data += far * u

    mine = derive(client.secret.hex(), "direction", 0, 0, 0)
    h0 = shown()
    move(ours, mine, mu)
    plus = shown()
    move(ours, mine, -2 * mu)
    minus = shown()
    move(ours, mine, mu)
    for turn in range(2):
        seed = derive(caught[0].seed, "direction", "ann", 0, 0, turn, 0)
        move(theirs, seed, mu)
        above = loss(h0)
        move(theirs, seed, -2 * mu)
        below = loss(h0)
        move(theirs, seed, mu - 3.0 * lr / 2 * (above - below) / (2 * mu))
    move(ours, mine, -lr * (loss(plus) - loss(minus)) / (2 * mu))
    eta = min(1.0, 0.5 * math.sqrt(2))
    for name, tensor in caught[0].state("ann").items():
        start = base.initial[name].detach()
        assert torch.allclose(tensor, start + eta * (theta[name].detach() - start), rtol=0, atol=1e-6), name
        assert not torch.equal(tensor, start)


def test_a_merge_takes_a_share_of_the_mean_change(tmp_path: Path, caught: list[Run]) -> None:
    """Half of the way with global_rate 0.5 and tau 1, all of it with tau 4; who took part has the same."""
    for out, tau, rate in (("all", 1, 1.0), ("half", 1, 0.5), ("enough", 4, 0.5)):
        run(tmp_path / out, exchange={"name": MU, "tau": tau, "global_rate": rate}, rounds=1)
    full, half, enough = caught
    assert [one.exchange.merged_share for one in caught] == [1.0, 0.5, 1.0]
    for name, tensor in full.state("ann").items():
        start = full.parts.base.initial[name].detach()
        assert torch.allclose(half.state("ann")[name], (start + tensor) / 2, rtol=0, atol=1e-7)
    assert equal(half.state("ann"), half.state("bob"))
    assert not equal(full.state("ann"), enough.state("ann"))


@pytest.mark.parametrize("tau", ["auto", pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_and_the_same_run_is_the_same(tau: int | str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "exchange": {"name": MU, "tau": tau, "global_rate": 0.4}, "rounds": 5, "checkpoint_every": 1, "batch_size": 2,
        "framework": {"name": "sfl-v1", "participation": 0.7}, "profiles": PROFILES, "data": {"shuffle": True},
        "optimizer": {"name": "sgd", "lr": 1e-3, "momentum": 0.9, "schedule": "linear"},
    }  # fmt: skip
    for out in ("whole", "part"):
        run(tmp_path / out, **changes)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    part = tmp_path / "part"
    resumed(part)
    assert losses(part) == losses(tmp_path / "whole")
    assert [line["virtual_time"] for line in lines(part)] == [
        line["virtual_time"] for line in lines(tmp_path / "whole")
    ]
    assert equal(adapter(part), adapter(tmp_path / "whole"))


def test_tau_follows_the_slowest_client(tmp_path: Path, caught: list[Run]) -> None:
    """One update while nothing is known; then as many as fit into the slowest client's step, within 1 and 8."""
    run(tmp_path / "fast", exchange={"name": MU, "tau": "auto"}, profiles=PROFILES, rounds=2)
    exchange: Any = caught[0].exchange
    assert exchange._tau == 8
    assert set(exchange._took) == set(NAMES)
    exchange._took = {"ann": (9.0, 1.0), "bob": (2.0, 2.0)}
    assert exchange._measured() == 3
    exchange._took = {"ann": (1.0, 9.0)}
    assert exchange._measured() == 1
    exchange._took = {}
    assert exchange._measured() == 1


def test_a_lost_client_leaves_nothing_behind(tmp_path: Path, caught: list[Run]) -> None:
    """Lost before or after the server has updated its copy: the others go on, and the next rounds are whole."""
    for seed in (0, 1):
        run(tmp_path / str(seed), seed=seed, goings={"bob": {"fails": [1]}}, exchange={"name": MU, "tau": 2}, rounds=3)
        made = caught[-1]
        assert made.counters.lost == {"bob": 1}
        assert made.counters.steps == {"ann": 3, "bob": 2, "cid": 3}
        assert all(slot.idle for slot in made.parts.server.slots.values())
        assert equal(made.state("ann"), made.state("bob"))
        assert {slot.version for slot in made.parts.server.slots.values()} == {3, 2}
        assert not any(client._open for client in made.parts.clients.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "bert", "data": {"format": "classification"}},
        pytest.param({"peft": "full"}, marks=pytest.mark.slow),
        pytest.param({"data": {"packing": True}}, marks=pytest.mark.slow),
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": {"name": "adamw", "lr": 1e-3}}, marks=pytest.mark.slow),
    ],
)
def test_other_tasks_weights_and_numbers(changes: dict[str, Any], tmp_path: Path, caught: list[Run]) -> None:
    """Every part moves, and stays finite."""
    run(tmp_path / "out", **{**changes, "model": model(changes.get("model", "llama"))})
    before, after = caught[0].parts.base.initial, caught[0].state()
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path / "out"))
    assert len(losses(tmp_path / "out")) == 6
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_the_dry_run_foretells_bytes(tmp_path: Path, caught: list[Run]) -> None:
    """By step name, those of a step without padding."""
    rows = {"ann": [{"text": " ".join(f"w{3 + i}" for i in range(12))}] * 3}
    out = tmp_path / "out"
    run(out, rows, exchange={"name": MU, "perturbations": 2}, rounds=1, data={"max_length": 8, "packing": False})
    steps = lines(out)[0]
    told = plan(caught[0].config).summary["bytes"]
    assert sum(told.values()) == steps["bytes_up"] + steps["bytes_down"]


def test_what_does_not_fit_is_refused() -> None:
    """In words, before a model is read, and all of it at once."""
    given: dict[str, Any] = {
        "model": "m", "data": {"train": "x"}, "clients": 2, "framework": "sfl-v1", "exchange": MU, "partition": TWO,
    }  # fmt: skip
    load_config(given)
    for changes, said in [
        ({"partition": U}, r"Take partition: two-part-split"),
        ({"framework": "sfl-v2"}, r"in 'sfl-v2' clients do not train at once .* Take framework: sfl-v1"),
        ({"framework": "psl"}, r"in 'psl' clients"),
        ({"framework": "async-sfl", "aggregator": "dt-asfl"}, r"in 'async-sfl' clients"),
        ({"mixing": "minibatch-sfl"}, r"with mixing 'minibatch-sfl' clients"),
        ({"aggregator": "mhsl"}, r"aggregator 'mhsl' merges none"),
        ({"gradient_accumulation": 2}, r"raise batch_size instead"),
        ({"max_grad_norm": 1.0}, r"Leave out max_grad_norm"),
        ({"planner": {"name": "splitft-adaptive-cut"}, "profile": "laptop+dsl"}, r"no backward passes, which planner"),
        ({"exchange": {"name": MU, "tau": "auto"}}, r"they need profiles"),
        ({"exchange": {"name": MU, "tau": 9}}, r"tau is 9; it must be 1 to 8, or auto"),
        ({"exchange": {"name": MU, "perturbations": 0}}, r"perturbations is 0"),
        ({"exchange": {"name": MU, "mu": 0.0}}, r"mu is 0.0; it must be a finite number above 0"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_config({**given, **changes})
    load_config({**given, "exchange": {"name": MU, "tau": "auto"}, "profile": "laptop+dsl"})


def chain(count: int, *, seed: int, factor: int, noise: float) -> list[dict[str, str]]:
    """Texts of 14 words, of which each follows from the one before by a rule, with some at random."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        words = [draw.randrange(94)]
        for _ in range(13):
            words.append((words[-1] * factor + 7) % 94 if draw.random() > noise else draw.randrange(94))
        found.append({"text": " ".join(f"w{3 + word}" for word in words)})
    return found


def pretrained(home: Path) -> Path:
    """The tiny Llama after 150 steps on one rule."""
    rows = chain(600, seed=0, factor=1, noise=0.2)
    train(
        model(seed=1), home, {"all": rows}, partition=TWO, peft="full", optimizer={"name": "adamw", "lr": 5e-3},
        batch_size=16, steps=150,
    )  # fmt: skip
    return home / "model"


def tuned(folder: Path, home: Path, *, tau: int, lr: float, seed: int, rounds: int) -> tuple[float, float]:
    """Held-out loss before and after tuning on another rule: two clients, 1344 trained numbers."""
    home.mkdir(parents=True)
    files = {
        name: str(write_rows(home / f"{name}.jsonl", chain(count, seed=of, factor=3, noise=0.1)))
        for name, count, of in (("train", 400, 5), ("eval", 64, 6))
    }
    config = {
        "model": str(folder), "clients": 2, "seed": seed, "rounds": rounds, "checkpoint_every": 1000, "batch_size": 8,
        "data": {**files, "format": "text", "max_length": 64}, "partition": TWO, "framework": "sfl-v1",
        "exchange": {"name": MU, "tau": tau}, "optimizer": {"name": "sgd", "lr": lr},
        "peft": {"name": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
    }  # fmt: skip
    found = cutlayer.train(config, out=home / "out").summary["eval"]
    return found["before"]["loss"], found["after"]["loss"]


def test_a_pretrained_model_learns(tmp_path: Path) -> None:
    """(d), the quick part: held-out loss falls from forward passes alone."""
    before, after = tuned(pretrained(tmp_path / "pre"), tmp_path / "tuned", tau=4, lr=4e-2, seed=0, rounds=25)
    assert after < before - 0.1


@pytest.mark.slow
def test_more_updates_of_the_server_tolerate_a_higher_rate(tmp_path: Path) -> None:
    """(d) After 100 rounds, each at its best of four rates, four updates leave less loss than one; means of 3 seeds."""
    folder, best = pretrained(tmp_path / "pre"), {}
    for tau in (1, 4):
        found = []
        for lr in (1e-2, 2e-2, 4e-2, 8e-2):
            home = tmp_path / f"{tau}-{lr}"
            runs = [tuned(folder, home / str(s), tau=tau, lr=lr, seed=s, rounds=100) for s in range(3)]
            found.append(sum(after for _, after in runs) / len(runs))
        best[tau] = min(found)
    assert best[4] < best[1]
