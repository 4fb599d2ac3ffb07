"""The row's check: nobody waits, newer uploads weigh more, and without delays a buffer of all is FedAvg."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cutlayer.contracts import Upload
from cutlayer.errors import CutlayerError, MethodError
from cutlayer.parties.federated import FederatedServer
from cutlayer.registry import create
from spine import MOSTLY_U, adapter, equal, lines, model, often, train
from tiny import text_rows
from unequal import run, uploads

FOUR = {name: text_rows(3, seed=i) for i, name in enumerate(("ann", "bob", "cid", "dan"))}


def test_two_clients_at_speeds_1_and_5(tmp_path: Path) -> None:
    """The fast one is never idle and merged five times as often; weights are a0 s(d) of the logged versions."""
    run(tmp_path / "out", {"slow": 1, "fast": 5}, framework={"uploads": 4})
    found = uploads(tmp_path / "out")
    count = Counter(one["client"] for one in found)
    assert count["slow"] == 4
    assert count["fast"] in (20, 21)  # it ends what it has begun when the slow one is ready
    assert all(one["waited"] == 0.0 for one in found)
    steps = [line for line in lines(tmp_path / "out") if line["client"] == "fast"]
    busy = sum(sum(line["virtual_seconds"].values()) for line in steps)
    assert busy == pytest.approx(steps[-1]["virtual_time"], rel=1e-3)  # the rest are its uploads
    for number, one in enumerate(found):
        assert one["version"] == number + 1
        assert one["delay"] == number - one["base"]
        assert one["share"] == 0.5 * (1 + one["delay"]) ** -0.5
    delays = {c: [one["delay"] for one in found if one["client"] == c] for c in count}
    assert all(4 <= delay <= 5 for delay in delays["slow"])
    assert max(delays["fast"]) == 1
    assert max(o["share"] for o in found if o["client"] == "slow") < min(
        o["share"] for o in found if o["client"] == "fast"
    )


@pytest.mark.parametrize("penalty", ["power", "exponential"])
def test_mixing_by_hand(penalty: str) -> None:
    """(1 - a) theta + a theta_i, upload after upload."""
    rate = 0.5
    server = FederatedServer(create("aggregator", "dt-asfl", {"a0": 0.8, "penalty": penalty, "rate": rate}), {})
    server.begin({"t": torch.tensor([1.0, 2.0])}, {})
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for delay, values in ((0, [3.0, 0.0]), (5, [-1.0, 4.0]), (2, [0.5, 0.5])):
        a = 0.8 * ((1 + delay) ** -rate if penalty == "power" else torch.tensor(-rate * delay).exp().item())
        parts = server.absorb([Upload("ann", delay, 0.3)], {"ann": {"t": torch.tensor(values)}})
        theta = (1 - a) * theta + a * torch.tensor(values)
        assert parts == pytest.approx([a])
        assert torch.allclose(server.before["t"], theta.float(), atol=1e-6)
        theta = server.before["t"].double()


@MOSTLY_U
def test_a_buffer_of_all_without_delay_is_fedavg(partition: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor equal, with clients of unequal data: sfl-v1 with FedAvg is the synchronous twin."""
    rows = {name: text_rows(size, seed=i) for i, (name, size) in enumerate({"ann": 3, "bob": 6, "cid": 9}.items())}
    both: dict[str, Any] = {"partition": partition, "rounds": 3}
    every = {"name": "dt-asfl", "buffer": 3, "a0": 1.0}
    train(model(), tmp_path / "a", rows, framework={"name": "async-sfl", "local_steps": 2}, aggregator=every, **both)
    twin = {"name": "sfl-v1", "local_steps": 2, "moments": "keep"}
    train(model(), tmp_path / "b", rows, framework=twin, **both)
    assert equal(adapter(tmp_path / "a"), adapter(tmp_path / "b"))
    assert {one["delay"] for one in uploads(tmp_path / "a")} == {0}
    assert not equal(adapter(tmp_path / "a"), adapter(tmp_path / "a", "adapter_initial"))


def test_a_buffer_weighs_by_data_and_delay() -> None:
    made = create("aggregator", "dt-asfl", {"buffer": 2, "a0": 0.6, "rate": 1.0})
    found = made.weigh([Upload("ann", 0, 0.5), Upload("bob", 3, 0.2)])
    assert found == pytest.approx([0.6 * 0.5 / 0.55, 0.6 * 0.05 / 0.55])
    assert (made.window({}).uploads, made.window({}).most) == (2, 2)


def test_a_buffer_takes_so_many_at_a_time(tmp_path: Path) -> None:
    """Of speeds 1, 2 and 4 the two that come first share a version, and a client waits for its buffer only."""
    run(tmp_path / "out", {"a": 1, "b": 2, "c": 4}, aggregator={"name": "dt-asfl", "buffer": 2}, rounds=2)
    sizes = Counter(one["version"] for one in uploads(tmp_path / "out"))
    assert set(sizes.values()) <= {1, 2}
    assert sum(size == 1 for size in sizes.values()) <= 2  # the last of a period, when nobody else will come


@pytest.mark.parametrize("p", often([0.0, 0.5], 0.5))
def test_skewed_data_still_teach(p: float, tmp_path: Path) -> None:
    """Both exponents train; docs/log.md has what they come to on longer runs."""
    rows = {"slow": text_rows(6, seed=1), "fast": text_rows(6, seed=2)}
    options = {"aggregator": {"name": "dt-asfl", "rate": p}, "rows": rows, "rounds": 3}
    run(tmp_path / "out", {"slow": 1, "fast": 5}, **options)
    first, last = ([o["loss"] for o in lines(tmp_path / "out") if o["client"] == c] for c in ("fast", "slow"))
    assert first[-1] < first[0]
    assert last[-1] < last[0]


@pytest.mark.parametrize(
    ("options", "said"), [({"a0": 0.0}, "a0 is 0.0"), ({"buffer": 0}, "buffer is 0"), ({"rate": -1.0}, "rate is -1.0")]
)
def test_options_out_of_bounds(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        create("aggregator", "dt-asfl", options)


def test_a_framework_that_waits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CutlayerError, match=r"framework 'sfl-v1' waits for all.* Take framework: async-sfl"):
        train(model(), tmp_path / "out", FOUR, framework="sfl-v1", aggregator="dt-asfl")
