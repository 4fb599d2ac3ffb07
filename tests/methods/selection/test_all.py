"""Everybody, always."""

from cutlayer.registry import create


def test_every_client_in_every_round_in_the_run_s_order() -> None:
    for number in range(3):
        assert list(create("selection", "all").pick(number, ["c", "a", "b"])) == ["c", "a", "b"]
