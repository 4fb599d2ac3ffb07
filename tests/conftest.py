"""Being here puts this folder on the path, for ``from shared import shared``; ``tests/data`` for ``hub_server``."""

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "data"))

import pytest
import torch

from crash import Forge

# The models of the tests are tiny: a second thread only waits for the first, and both for whatever else runs.
torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    """The process that has imported everything; it forks for each command that a test runs."""
    made = Forge(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()
