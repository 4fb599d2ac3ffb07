"""Rounds that another system drives (as Flower does): whom the server lets in, and that each client is lost alone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apart import LONG, ROWS, Apart
from cutlayer.apart import served
from cutlayer.errors import AllLeft, PolicyRefused, Refused
from cutlayer.federation import Federation
from cutlayer.frames import limits_of
from cutlayer.issuing import authority
from cutlayer.keys import client_keys, server_keys
from cutlayer.links.net.handing import LIMITS
from cutlayer.models.loading import load_config
from cutlayer.one_round import take_part
from cutlayer.parties.client import ClientParty
from cutlayer.report.progress import reporter
from cutlayer.schedule import Told
from cutlayer.seat import Seat
from cutlayer.wire import Header, Meter
from spine import TWO, often
from test_joining import Noted

Answer = tuple[Header, list[Tensor]]
Spoil = Callable[[Header, Header, list[Tensor]], Answer]


@dataclass
class Rounds:
    """A run with a trunk, and what its clients said and gave."""

    run: Apart
    trunk: Federation
    noted: Noted
    port: int
    places: dict[str, dict[str, str]]
    errors: dict[str, list[str]] = field(default_factory=dict)
    measured: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def make(self, merged: Mapping[str, Tensor], *, training: bool = True) -> dict[str, Tensor]:
        """One round of all; the mean of the parts that fit."""
        number, done = self.trunk.open(len(self.places), training=training)
        parts = []
        with ThreadPoolExecutor() as pool:
            coming = {
                name: pool.submit(
                    take_part, f"localhost:{self.port}", number, merged, places, reporter(False), training=training
                )
                for name, places in self.places.items()
            }
            for name, future in coming.items():
                if error := future.exception(LONG):
                    self.errors.setdefault(name, []).append(str(error))
                    self.trunk.lacks_one()
                else:
                    part, told = future.result()
                    parts.append(part)
                    self.measured.setdefault(name, []).append(told)
        self.trunk.over()
        done.result(LONG)
        assert all(self.trunk.unfit(part) is None for part in parts if training)
        return {name: torch.stack([part[name] for part in parts]).mean(0) for name in merged} if training else {}


@contextmanager
def rounds(run: Apart, keys: Path | None = None, **more: dict[str, str]) -> Iterator[Rounds]:
    """A trunk that listens, and where its clients have what is theirs."""
    noted, config = Noted(), served(run.file)
    places = {
        name: {
            "data": run.files[name], "eval": run.valid, "out": str(run.root / name), "device": "cpu",
            "model": str(run.tree["model"]), **({"keys": str(keys / name)} if keys else {"name": name}),
            **more.get(name, {}),
        }
        for name in ROWS
    }  # fmt: skip
    own = server_keys(keys / "server") if keys else None
    (run.root / "server").mkdir()
    with Meter() as meter, Federation(config, run.root / "server", own, meter, LONG, noted) as trunk:
        yield Rounds(run, trunk, noted, trunk.listen("localhost:0"), places)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Those of a server and two clients."""
    with authority(tmp_path / "keys", make=True) as ca:
        ca.add(hosts=["localhost"], clients=list(ROWS), days=5)
    return tmp_path / "keys"


def spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Spoil, verb: str = "head_forward") -> None:
    """Let ann's first answer to ``verb`` be another."""
    answered, once = Seat._answered, threading.Lock()

    def wrong(self: Seat, party: ClientParty, header: Header, tensors: Sequence[Tensor]) -> Answer:
        reply, shown = answered(self, party, header, tensors)
        if self.name == "ann" and header.verb == verb and once.acquire(blocking=False):
            return spoil(header, reply, list(shown))
        return reply, shown

    monkeypatch.setattr(Seat, "_answered", wrong)


def refusing(asked: Header, reply: Header, shown: list[Tensor]) -> Answer:
    raise PolicyRefused("most.steps", "it has shown enough.")


SPOILS: dict[str, tuple[Spoil, str]] = {
    "not finite": (
        lambda _, reply, shown: (reply, [t * float("nan") if t.is_floating_point() else t for t in shown]),
        "with 'hidden' with values that are not finite",
    ),
    "too large": (lambda _, reply, shown: (reply, [shown[0].new_zeros(1, 64, 2**16), *shown[1:]]), "are accepted"),
    "another's": (lambda _, reply, shown: (reply.but(step=7), shown), "with the step '7'"),
    "beyond bounds": (lambda _, reply, shown: (reply, [shown[0] * 1e38]), "cannot be computed with"),
    "refused": (refusing, r"PolicyRefused (its words stay with the client)"),
}


@pytest.mark.parametrize("case", often(SPOILS, "not finite", "too large"))
def test_a_client_that_misbehaves_is_lost_alone(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round goes on without it; in the next it begins again as it was, and nothing of the wrong stays."""
    spoil, said = SPOILS[case]
    spoilt(monkeypatch, spoil, "tail_step" if case == "beyond bounds" else "head_forward")
    with rounds(Apart(tmp_path, framework="sfl-v2", rounds=2)) as made:
        merged = made.make(made.trunk.initial())
        (error,) = made.errors.pop("ann")
        assert error in {f"{kind} (its words stay with the client)" for kind in ("Refused", "NetworkError")}
        assert not made.errors, "bob is not lost"
        assert any(said in note and note.endswith("The others go on.") for note in made.noted.words), made.noted.words
        assert made.trunk.run.counters.steps == {"ann": 0, "bob": 1}
        merged = made.make(merged)
        result = made.trunk.finished(merged)
    assert not made.errors
    assert result.summary["steps"] == {"ann": 1, "bob": 2}
    assert result.summary["lost"] == {"ann": 1, "bob": 0}


def test_nobody_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The round ends with why, where all are lost."""
    monkeypatch.setattr(Seat, "_answered", lambda self, party, header, tensors: refusing(header, header, []))
    with rounds(Apart(tmp_path, framework="sfl-v2", rounds=1)) as made, pytest.raises(AllLeft, match="'ann' refused"):
        made.make(made.trunk.initial())


def test_who_is_revoked_in_a_round_is_lost_in_it(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("cutlayer.federation.RECHECK", 0.05)
    reasons: Mapping[str, int] = {}

    def revoked(asked: Header, reply: Header, shown: list[Tensor]) -> Answer:
        with authority(keys) as ca:
            ca.revoke("ann")
        until = time.monotonic() + 60
        while not reasons.get("revoked") and time.monotonic() < until:
            time.sleep(0.02)
        return reply, shown

    spoilt(monkeypatch, revoked)
    with rounds(Apart(tmp_path / "run", framework="sfl-v2", rounds=1), keys) as made:
        assert made.trunk._listener is not None
        reasons = made.trunk._listener.reasons
        made.make(made.trunk.initial())
        assert made.trunk.run.counters.steps == {"ann": 0, "bob": 1}
    assert len(made.errors["ann"]) == 1


def test_evaluation_without_data_loses_that_client(tmp_path: Path) -> None:
    with rounds(Apart(tmp_path, framework="sfl-v2", rounds=1)) as made:
        del made.places["ann"]["eval"]
        merged = made.make(made.trunk.initial())
        made.make(merged, training=False)
    assert made.errors == {"ann": ["NetworkError (its words stay with the client)"]}
    assert 0 < made.measured["bob"][1]["eval_loss"] < 10
    assert any("'ann' has nothing to evaluate on" in note for note in made.noted.words)


def test_frames_are_no_larger_than_the_run_needs(tmp_path: Path) -> None:
    with rounds(Apart(tmp_path, framework="sfl-v2", rounds=1, partition=TWO)) as made:
        assert made.trunk._listener is not None
        own = limits_of(made.trunk.config, load_config(made.trunk.config.model))
        assert made.trunk._listener.limits({"client": "ann"}) == own
        assert made.trunk._listener.limits({"client": "ann", "wants": "run"}) == LIMITS


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda name, tensor: {f"{name}x": tensor}, "has not the tensors"),
        (lambda name, tensor: {name: tensor[..., :1]}, "not ["),
        (lambda name, tensor: {name: tensor.double()}, "torch.float64, not"),
        (lambda name, tensor: {name: tensor / 0}, "not finite"),
    ],
    ids=["names", "shape", "type", "finite"],
)
def test_a_part_that_cannot_be_merged_is_known(spoil: Any, said: str, parts: Federation) -> None:
    part = parts.initial()
    assert parts.unfit(part) is None
    name = next(name for name, tensor in part.items() if tensor.abs().sum() > 0)
    part |= spoil(name, part.pop(name))
    assert said in (parts.unfit(part) or "")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A trunk without keys, for what changes nothing of it."""
    with rounds(Apart(tmp_path_factory.mktemp("parts"), framework="sfl-v2", rounds=1)) as made:
        yield made.trunk


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Federation, dict[str, Any], str]]:
    """A trunk with keys in its second round, a hello of ann's that it takes, and her token."""
    root = tmp_path_factory.mktemp("guarded")
    with authority(root / "keys", make=True) as ca:
        ca.add(hosts=["localhost"], clients=[*ROWS, "eve"], days=5)
    with rounds(Apart(root / "run", framework="sfl-v2", rounds=3), root / "keys") as made:
        trunk = made.trunk
        trunk.number, trunk.last["ann"] = 2, 1
        data = asdict(Told(examples=7, label_tokens=70, steps_per_epoch=3, evaluation_batches=1))
        hello = {"client": "ann", "model": trunk.files, "round": 2, "rounds": [1], "data": data}
        yield trunk, hello, client_keys(root / "keys" / "ann").token


def admitted(guarded: tuple[Federation, dict[str, Any], str], **changes: Any) -> dict[str, Any]:
    trunk, hello, token = guarded
    peer = changes.pop("peer", "ann")
    shown = changes.pop("token", token)
    hello = json.loads(json.dumps({**hello, **changes}))  # as it comes over the wire
    return trunk._soon(trunk._admit(peer, shown, hello)).result(LONG)


def test_who_belongs_comes_in(guarded: tuple[Federation, dict[str, Any], str]) -> None:
    assert admitted(guarded) == {"client": "ann"}
    assert admitted(guarded) == {"client": "ann"}, "and comes back"
    assert set(admitted(guarded, wants="run", model=None, round=None, rounds=None)) == {"run"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": "x" * 43}, "do not belong to this client"),
        ({"peer": "bob"}, "do not belong to this client"),
        ({"client": "bob"}, "do not belong to this client"),
        ({"client": "eve", "peer": "eve", "token": "eve's"}, "has no client 'eve'"),
        ({"wants": "model"}, "does not hand its model"),
        ({"model": {"model.safetensors": "0" * 64}}, "other checksums"),
        ({"model": None}, "other checksums"),
        ({"round": 1}, "but this is round 2"),
        ({"round": 3}, "but this is round 2"),
        ({"round": None}, "but this is round 2"),
        ({"rounds": []}, "has no checkpoint of round 1"),
        ({"rounds": ["1"]}, "rounds that cannot be"),
        ({"data": None}, "does not say what the data are"),
        ({"data": {"examples": 8}}, "does not say what the data are"),
    ],
    ids=str,
)
def test_who_does_not_is_refused(
    changes: dict[str, Any], said: str, guarded: tuple[Federation, dict[str, Any], str]
) -> None:  # fmt: skip
    trunk = guarded[0]
    if changes.get("token") == "eve's":
        assert trunk.keys is not None
        changes = {**changes, "token": client_keys(trunk.keys.folder.parent / "eve").token}
    with pytest.raises(Refused, match=said):
        admitted(guarded, **changes)


def test_data_stay_of_one_size(guarded: tuple[Federation, dict[str, Any], str]) -> None:
    """What is judged, planned and weighed by them was told once."""
    assert admitted(guarded) == {"client": "ann"}
    with pytest.raises(Refused, match="of another size"):
        admitted(guarded, data={**guarded[1]["data"], "examples": 8})


def test_who_was_revoked_is_not_listened_to(tmp_path: Path, keys: Path) -> None:
    """Before its hello is read, and by its token, too."""
    with rounds(Apart(tmp_path / "run", framework="sfl-v2", rounds=1), keys) as made:
        with authority(keys) as ca:
            ca.revoke("ann")
        merged = made.make(made.trunk.initial())
        assert made.errors == {"ann": ["Refused (its words stay with the client)"]}
        assert made.trunk._listener is not None
        assert made.trunk._listener.reasons.keys() == {"revoked"}  # it asks again where gRPC lost the words
        assert made.trunk.unfit(merged) is None
        token = client_keys(keys / "ann").token
        with pytest.raises(Refused, match="or were revoked"):
            made.trunk._soon(made.trunk._admit("ann", token, {"client": "ann", "wants": "run"})).result(LONG)
