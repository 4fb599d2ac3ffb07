"""The server's own queue, and nothing around it."""

from cutlayer.registry import create


def test_a_stop_is_left_as_it_is() -> None:
    stop = object()
    assert create("scheduler", "fifo").wrap(stop, "ann") is stop
