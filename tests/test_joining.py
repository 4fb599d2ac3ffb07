"""A client's seat, without a network: what it answers, what it refuses, and what the server reads of a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apart import Apart
from cutlayer.apart import offer, served, taken
from cutlayer.errors import CutlayerError
from cutlayer.joining import Seat
from cutlayer.policy import load_policy
from cutlayer.wire import Header


class Noted:
    """What the owner of the data was told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def start(self, total_steps: int) -> None: ...
    def update(self, record: Any) -> None: ...
    def stop(self) -> None: ...
    def note(self, text: str) -> None:
        self.words.append(text)


def seat(folder: Path, policy: dict[str, Any] | None = None) -> tuple[Seat, Noted]:
    run, noted = Apart(folder), Noted()
    config = taken(offer(served(run.file)), model=str(run.tree["model"]), device="cpu")
    (folder / "ann").mkdir()
    return Seat(config, "ann", run.files["ann"], None, folder / "ann", load_policy(policy or {}), noted), noted


def ask(verb: str, turn: int, **values: Any) -> Header:
    return Header("partition", verb=verb, sender="server", receiver="ann", client="ann", turn=turn, values=values)


def test_nothing_is_answered_before_the_client_knows_where_the_run_is(tmp_path: Path) -> None:
    own, _ = seat(tmp_path, {"may_leave": {"error_texts": True}})
    for turn, verb in enumerate(("get_state", "keep", "finish", "abort"), start=1):
        with pytest.raises(CutlayerError, match=f"'{verb}' came before 'begin'"):
            own.handle(ask(verb, turn, round=1), [])
    own.handle(ask("begin", 5, round=0, updates=3), [])
    assert own.handle(ask("keep", 6, round=1), [])[0].kind == "ack"


@pytest.mark.parametrize("may", [False, True])
def test_the_words_of_a_refusal_stay_unless_they_may_leave(may: bool, tmp_path: Path) -> None:
    own, noted = seat(tmp_path, {"may_leave": {"error_texts": may}})
    own.handle(ask("begin", 1, round=0, updates=3), [])
    with pytest.raises(CutlayerError) as caught:
        own.handle(ask("show_me_all", 2), [])
    assert ("nothing that a client may be asked for" in str(caught.value)) == may
    assert str(caught.value).startswith("PolicyRefused")
    assert "'show_me_all' is nothing that a client may be asked for" in noted.words[-1]
